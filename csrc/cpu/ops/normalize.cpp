// masked_whiten on CPU: mean 0 and variance 1 over the unmasked elements. group_normalize: scores against those of their group.
//
// Shapes   N elements. Bytes: 4 read and 4 written an element, plus two more reads from cache-sized blocks. B scores in groups, one thread.
// Numerics moments in double, two passes over each block of kBlock elements, blocks merged in order: the same for any thread count.
#include "moments.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;

constexpr int64_t kBlock = 8192;

Tensor masked_whiten(const Tensor& x, const std::optional<Tensor>& mask, bool shift_mean, bool unbiased, double eps) {
  const Tensor x_N = x.contiguous(), mask_N = mask ? mask->contiguous() : Tensor();
  Tensor out_N = at::empty(x_N.sizes(), x_N.options());
  const int64_t N = x_N.numel(), blocks = (N + kBlock - 1) / kBlock;
  const float* in = x_N.const_data_ptr<float>();
  const uint8_t* live = mask_N.defined() ? static_cast<const uint8_t*>(mask_N.const_data_ptr()) : nullptr;
  float* out = out_N.mutable_data_ptr<float>();
  std::vector<Moments> parts(blocks);
  const auto each_block = [&](auto&& body) {
    at::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) body(b, b * kBlock, std::min(kBlock, N - b * kBlock));
    });
  };
  each_block([&](int64_t b, int64_t at, int64_t n) {
    float scratch[kBlock];
    parts[b] = live ? moments(in + at, live + at, scratch, n) : moments(in + at, n);
  });
  Moments all;
  for (const Moments& part : parts) all.merge(part);
  each_block([&](int64_t, int64_t at, int64_t n) {
    whiten(in + at, live ? live + at : nullptr, out + at, n, all, unbiased, eps, shift_mean ? 0.0 : all.mean);
  });
  return out_N;
}

enum class GroupMethod : int64_t { grpo, dr_grpo, rloo, batch, none };  // the order of GROUP_METHODS in kernels/normalize/

std::tuple<Tensor, Tensor> group_normalize(const Tensor& scores, const std::optional<Tensor>& group_ids, int64_t group_size, int64_t method, double eps,
                                           bool unbiased) {
  const Tensor scores_B = scores.contiguous(), ids_B = group_ids ? group_ids->to(at::kLong).contiguous() : Tensor();
  Tensor advantages_B = at::empty(scores_B.sizes(), scores_B.options()), flat_B = at::empty(scores_B.sizes(), scores_B.options().dtype(at::kBool));
  const int64_t B = scores_B.numel();
  const float* score = scores_B.const_data_ptr<float>();
  const int64_t* ids = ids_B.defined() ? ids_B.const_data_ptr<int64_t>() : nullptr;
  float* advantages = advantages_B.mutable_data_ptr<float>();
  bool* flat = flat_B.mutable_data_ptr<bool>();
  std::vector<int64_t> order(ids ? B : 0);  // the groups side by side
  std::iota(order.begin(), order.end(), 0);
  if (ids) std::stable_sort(order.begin(), order.end(), [=](int64_t a, int64_t b) { return ids[a] < ids[b]; });
  const auto deviation = [&](const Moments& of) { return std::sqrt(of.variance(unbiased)) + eps; };
  const auto kind = static_cast<GroupMethod>(method);
  const double batch_deviation = kind == GroupMethod::batch ? deviation(moments(score, B)) : 0.0;
  std::vector<float> gathered, results;
  for (int64_t begin = 0, end; begin < B; begin = end) {
    if (ids) for (end = begin + 1; end < B && ids[order[end]] == ids[order[begin]];) ++end;
    else end = begin + group_size;
    const int64_t G = end - begin;
    gathered.resize(ids ? G : 0);
    results.resize(ids ? G : 0);
    for (int64_t i = 0; ids && i < G; ++i) gathered[i] = score[order[begin + i]];
    const float* group = ids ? gathered.data() : score + begin;
    float* out = ids ? results.data() : advantages + begin;
    const bool equal = std::all_of(group, group + G, [&](float s) { return s == group[0]; });
    if (equal && kind != GroupMethod::none) {
      std::fill(out, out + G, 0.0f);
    } else if (kind == GroupMethod::none) {
      std::copy(group, group + G, out);
    } else {
      const Moments of = moments(group, G);
      double scale = 1.0;  // dr_grpo
      if (kind == GroupMethod::grpo) scale = 1.0 / deviation(of);
      if (kind == GroupMethod::batch) scale = 1.0 / batch_deviation;
      if (kind == GroupMethod::rloo) scale = static_cast<double>(G) / static_cast<double>(G - 1);
      for (int64_t i = 0; i < G; ++i) out[i] = static_cast<float>((group[i] - of.mean) * scale);
    }
    for (int64_t i = 0; i < G; ++i) flat[ids ? order[begin + i] : begin + i] = equal;
    for (int64_t i = 0; ids && i < G; ++i) advantages[order[begin + i]] = results[i];
  }
  return {advantages_B, flat_B};
}

TORCH_LIBRARY_FRAGMENT(fusedrl, m) {
  m.def("masked_whiten(Tensor x, Tensor? mask, bool shift_mean, bool unbiased, float eps) -> Tensor");
  m.def("group_normalize(Tensor scores, Tensor? group_ids, int group_size, int method, float eps, bool unbiased) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fusedrl, CPU, m) {
  m.impl("masked_whiten", &masked_whiten);
  m.impl("group_normalize", &group_normalize);
}

}  // namespace
