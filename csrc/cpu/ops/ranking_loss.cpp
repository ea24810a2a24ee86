// Ranking losses on CPU, value and derivative in one pass: pairwise, -mean log sigmoid(chosen - rejected - margin), and K-wise over groups.
//
// Shapes   B pairs, or M scores in groups. Bytes: 8 to 12 read and 4 written a pair.
// Numerics float32 terms (double in groups), a vector of pairs at a time, summed in double in index order by one thread (a batch of sequences, never of tokens).
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "autograd.h"

namespace {

using namespace fusedrl;  // autograd.h

using at::Tensor;
using Vec = at::vec::Vectorized<float>;
using Wide = at::vec::Vectorized<double>;

// Loss and d loss / d chosen (= -d loss / d rejected) for a unit upstream gradient.
std::tuple<Tensor, Tensor> forward(const Tensor& chosen, const Tensor& rejected, const std::optional<Tensor>& margin) {
  const Tensor chosen_B = chosen.contiguous(), rejected_B = rejected.contiguous();
  const Tensor margin_B = margin ? margin->contiguous() : Tensor();
  Tensor loss = at::empty({}, chosen_B.options()), slope_B = at::empty_like(chosen_B);
  const int64_t B = chosen_B.numel();
  const float* c = chosen_B.const_data_ptr<float>();
  const float* r = rejected_B.const_data_ptr<float>();
  const float* m = margin_B.defined() ? margin_B.const_data_ptr<float>() : nullptr;
  float* slope = slope_B.mutable_data_ptr<float>();
  const Vec zero(0.0f), one(1.0f), share(1.0f / static_cast<float>(std::max<int64_t>(1, B)));
  double sum = 0.0;
  for (int64_t b = 0; b < B; b += Vec::size()) {
    const int64_t count = std::min<int64_t>(Vec::size(), B - b);
    Vec d = Vec::loadu(c + b, count) - Vec::loadu(r + b, count);
    if (m) d = d - Vec::loadu(m + b, count);
    const Vec e = d.abs().neg().exp();
    float terms[Vec::size()];
    (e.log1p() + at::vec::maximum(d.neg(), zero)).store(terms);
    (Vec::blendv(e, one, d < zero).neg() / (one + e) * share).store(slope + b, count);  // -sigmoid(-d) / B
    for (int64_t i = 0; i < count; ++i) sum += terms[i];
  }
  *loss.mutable_data_ptr<float>() = B ? static_cast<float>(sum / static_cast<double>(B)) : 0.0f;
  return {loss, slope_B};
}

Tensor pairwise_ranking_loss(const Tensor& chosen, const Tensor& rejected, const std::optional<Tensor>& margin) {
  const auto compute = [&](Saved& saved) -> Tensors {
    static auto op = find_op<decltype(forward)>("fusedrl::pairwise_ranking_loss_forward");
    auto [loss, slope_B] = op.call(chosen, rejected, margin);
    saved.tensors = {slope_B};
    return {loss};
  };
  const auto backward = [](const Tensors& grads, const Saved& saved) -> Tensors {
    const Tensor chosen_grad = saved.tensors[0].mul(grads[0]), opposite = chosen_grad.neg();
    return {chosen_grad, opposite, opposite};
  };
  return with_gradient("pairwise_ranking_loss", {chosen, rejected, margin}, compute, backward)[0];
}

// Loss and d loss / d scores for a unit upstream gradient.
std::tuple<Tensor, Tensor> kwise_forward(const Tensor& scores, const Tensor& ranks, const Tensor& cu_groups) {
  const Tensor scores_M = scores.contiguous(), ranks_M = ranks.to(at::kLong).contiguous(), cu = cu_groups.contiguous();
  Tensor loss = at::empty({}, scores_M.options()), slope_M = at::empty_like(scores_M);
  const int64_t M = scores_M.numel(), B = cu.numel() - 1;
  const int32_t* starts = cu.const_data_ptr<int32_t>();
  bool ascending = starts[0] == 0 && starts[B] == M;
  for (int64_t b = 0; b < B; ++b) ascending &= starts[b] <= starts[b + 1];
  TORCH_CHECK_VALUE(ascending, "kwise_ranking_loss: expected cu_groups to ascend from 0 to the number of scores, ", M, ", got ", starts[0], " to ", starts[B],
                    "; give the cumulative sizes of the groups");
  const float* score = scores_M.const_data_ptr<float>();
  const int64_t* rank = ranks_M.const_data_ptr<int64_t>();
  std::vector<double> slope(M, 0.0), differences;
  std::vector<std::pair<int64_t, int64_t>> pairs;  // of a group: the better and the worse one
  double sum = 0.0;
  int64_t prompts = 0;  // that have a pair
  for (int64_t b = 0; b < B; ++b) {
    pairs.clear();
    differences.clear();
    for (int64_t w = starts[b]; w < starts[b + 1]; ++w) {
      for (int64_t l = starts[b]; l < starts[b + 1]; ++l) {
        if (rank[w] >= rank[l]) continue;
        pairs.emplace_back(w, l);
        differences.push_back(static_cast<double>(score[w]) - score[l]);
      }
    }
    if (pairs.empty()) continue;
    double of_group = 0.0;
    for (size_t i = 0; i < pairs.size(); i += Wide::size()) {
      const int64_t count = std::min<int64_t>(Wide::size(), pairs.size() - i);
      const Wide d = Wide::loadu(differences.data() + i, count), zero(0.0), one(1.0), e = d.abs().neg().exp();
      double terms[Wide::size()], sigmoids[Wide::size()];
      (e.log1p() + at::vec::maximum(d.neg(), zero)).store(terms);
      (Wide::blendv(e, one, d < zero) / (one + e)).store(sigmoids);  // sigmoid(-d)
      for (int64_t j = 0; j < count; ++j) {
        of_group += terms[j];
        slope[pairs[i + j].first] -= sigmoids[j];
        slope[pairs[i + j].second] += sigmoids[j];
      }
    }
    ++prompts;
    const double each = 1.0 / static_cast<double>(pairs.size());
    sum += of_group * each;
    for (int64_t i = starts[b]; i < starts[b + 1]; ++i) slope[i] *= each;
  }
  const double count = static_cast<double>(std::max<int64_t>(1, prompts));
  float* out = slope_M.mutable_data_ptr<float>();
  for (int64_t i = 0; i < M; ++i) out[i] = static_cast<float>(slope[i] / count);
  *loss.mutable_data_ptr<float>() = static_cast<float>(sum / count);
  return {loss, slope_M};
}

Tensor kwise_ranking_loss(const Tensor& scores, const Tensor& ranks, const Tensor& cu_groups) {
  const auto compute = [&](Saved& saved) -> Tensors {
    static auto op = find_op<decltype(kwise_forward)>("fusedrl::kwise_ranking_loss_forward");
    auto [loss, slope_M] = op.call(scores, ranks, cu_groups);
    saved.tensors = {slope_M};
    return {loss};
  };
  const auto backward = [](const Tensors& grads, const Saved& saved) -> Tensors { return {saved.tensors[0].mul(grads[0])}; };
  return with_gradient("kwise_ranking_loss", {scores}, compute, backward)[0];
}

TORCH_LIBRARY_FRAGMENT(fusedrl, m) {
  m.def("kwise_ranking_loss_forward(Tensor scores, Tensor ranks, Tensor cu_groups) -> (Tensor, Tensor)");
  m.def("kwise_ranking_loss(Tensor scores, Tensor ranks, Tensor cu_groups) -> Tensor");
  m.def("pairwise_ranking_loss_forward(Tensor chosen, Tensor rejected, Tensor? margin) -> (Tensor, Tensor)");
  m.def("pairwise_ranking_loss(Tensor chosen, Tensor rejected, Tensor? margin) -> Tensor");
}
TORCH_LIBRARY_IMPL(fusedrl, CPU, m) {
  m.impl("pairwise_ranking_loss_forward", &forward);
  m.impl("kwise_ranking_loss_forward", &kwise_forward);
}
TORCH_LIBRARY_IMPL(fusedrl, CompositeImplicitAutograd, m) {
  m.impl("pairwise_ranking_loss", &pairwise_ranking_loss);
  m.impl("kwise_ranking_loss", &kwise_ranking_loss);
}

}  // namespace
