// linear_logprob on CPU: hidden states -> log-probabilities through the head, a chunk of rows at a time; more than 64 MiB of logits never exist.
//
// Shapes   hidden [N, H], weight [V, H]; a chunk of R rows has R V float32 logits in the workspace, which backward overwrites with their gradient.
// Kept     where a backward will follow and all logits fit (keeps_logits), they stay, and it has no product to do again.
// Flops    forward 2 N H V; backward 6 N H V (it computes the chunk's logits again, then two products), 4 N H V with kept logits; N counts the rows that matter:
//          ignored rows, and in the backward rows without an upstream gradient, are compacted away before any product.
// Numerics float32 products and logits whatever the dtype of the weight (lower ones are widened in tiles); the weight's gradient gathers in float32.
//          Forward makes the same products whether or not a gradient will follow, so scoring and training agree in every bit.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "autograd.h"
#include "linear_head.h"

namespace {

using namespace fusedrl;  // autograd.h

// The rows of one call that matter, cut into chunks that fit the workspace.
class Chunks {
 public:
  // whole: one chunk has all rows.
  Chunks(const Tensor& hidden, std::vector<int64_t> rows, int64_t V, int64_t workspace_bytes, bool whole = false)
      : hidden_(hidden), rows_(std::move(rows)), all_(static_cast<int64_t>(rows_.size()) == hidden.size(0)) {
    step_ = whole ? std::max<int64_t>(1, rows_.size()) : workspace_rows(workspace_bytes, hidden.size(0), V, rows_.size());
  }

  // function(first, R, hidden [R, H] float32, z [R, V]) for each chunk, where z is its part of `kept` [rows, V], or else one workspace for all.
  template <typename Function>
  void each(int64_t V, const Tensor& kept, const Function& function) const {
    const int64_t count = rows_.size();
    const Tensor workspace = kept.defined() ? Tensor() : at::empty({step_, V}, hidden_.options().dtype(at::kFloat));
    for (int64_t begin = 0; begin < count; begin += step_) {
      const int64_t R = std::min(step_, count - begin);
      Tensor hidden_RH = all_ ? hidden_.narrow(0, begin, R) : hidden_.index_select(0, index(begin, R));
      function(begin, R, hidden_RH.to(at::kFloat), kept.defined() ? kept.narrow(0, begin, R) : workspace.narrow(0, 0, R));
    }
  }
  int64_t row(int64_t i) const { return rows_[i]; }
  // Copies a chunk's rows to their places in [N, ...].
  void put(Tensor& target, int64_t begin, const Tensor& chunk) const {
    if (all_) target.narrow(0, begin, chunk.size(0)).copy_(chunk);
    else target.index_copy_(0, index(begin, chunk.size(0)), chunk.to(target.scalar_type()));
  }
  bool all() const { return all_; }

 private:
  Tensor index(int64_t begin, int64_t R) const { return at::from_blob(const_cast<int64_t*>(rows_.data()) + begin, {R}, at::kLong); }

  Tensor hidden_;
  std::vector<int64_t> rows_;
  bool all_;
  int64_t step_;
};

// (logp, entropy, stats, logits): the last [N, V] where keep says so and they fit, else [0, V]; the rows that matter come first, then zeros.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_logprob_forward(const Tensor& hidden, const Tensor& weight, const Tensor& token_ids, const MaybeTensor& bias,
                                                                  double temperature, const MaybeTensor& temperatures, double softcap, bool entropy,
                                                                  int64_t ignore_index, int64_t workspace_bytes, bool keep) {
  at::AutoDispatchBelowADInplaceOrView below;
  const int64_t N = hidden.size(0), V = weight.size(0);
  const Tensor ids_N = token_ids.to(at::kLong).contiguous();
  const int64_t* ids = ids_N.const_data_ptr<int64_t>();
  check_ids("linear_logprob", ids, N, V, ignore_index);
  const Temperatures t("linear_logprob", temperature, temperatures);
  const Head head{weight, bias ? bias->to(at::kFloat) : Tensor(), softcap};
  const auto options = hidden.options().dtype(at::kFloat);
  Tensor logp_N = at::zeros({N}, options), entropy_N = at::zeros({entropy ? N : 0}, options), stats_N3 = at::zeros({N, 3}, options);
  float* logp_out = logp_N.mutable_data_ptr<float>();
  float* entropy_out = entropy ? entropy_N.mutable_data_ptr<float>() : nullptr;
  auto* stats = reinterpret_cast<RowStats*>(stats_N3.mutable_data_ptr<float>());
  std::vector<int64_t> rows;
  rows.reserve(N);
  for (int64_t n = 0; n < N; ++n) if (ids[n] != ignore_index) rows.push_back(n);
  keep = keep && keeps_logits(workspace_bytes, 4 * N * V);
  Tensor kept_NV = at::empty({keep ? N : 0, V}, options);
  if (keep) kept_NV.narrow(0, rows.size(), N - rows.size()).zero_();
  const Chunks chunks(hidden, std::move(rows), V, workspace_bytes);
  chunks.each(V, keep ? kept_NV : Tensor(), [&](int64_t begin, int64_t R, const Tensor& hidden_RH, const Tensor& z_RV) {
    head.logits(z_RV, hidden_RH);
    float* z = z_RV.mutable_data_ptr<float>();
    at::parallel_for(0, R, grain(V), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t n = chunks.row(begin + i);
        float* row = z + i * V;
        if (softcap > 0.0) cap_row(row, V, softcap);
        stats[n] = entropy_out ? row_stats<true>(row, V, t[n]) : row_stats<false>(row, V, t[n]);
        logp_out[n] = row_logp(stats[n], row[ids[n]], t[n]);
        if (entropy_out) entropy_out[n] = row_entropy(stats[n]);
      }
    });
  });
  return {logp_N, entropy_N, stats_N3, kept_NV};
}

// Gradients of hidden, weight and bias; those not needed are empty. Kept logits are only read: a second backward finds them as they were.
std::tuple<Tensor, Tensor, Tensor> linear_logprob_backward(const MaybeTensor& logp_grad, const MaybeTensor& entropy_grad, const Tensor& hidden, const Tensor& weight,
                                                           const Tensor& token_ids, const MaybeTensor& bias, const Tensor& stats_N3, const Tensor& kept_NV,
                                                           double temperature, const MaybeTensor& temperatures, double softcap, int64_t ignore_index, int64_t workspace_bytes, bool for_hidden,
                                                           bool for_weight, bool for_bias) {
  at::AutoDispatchBelowADInplaceOrView below;
  const int64_t N = hidden.size(0), V = weight.size(0);
  const Tensor ids_N = token_ids.to(at::kLong).contiguous();
  const int64_t* ids = ids_N.const_data_ptr<int64_t>();
  const Temperatures t("linear_logprob", temperature, temperatures);
  const Head head{weight, bias ? bias->to(at::kFloat) : Tensor(), softcap};
  const Tensor g_N = logp_grad ? logp_grad->contiguous() : Tensor(), h_N = entropy_grad ? entropy_grad->contiguous() : Tensor();
  const float* g = g_N.defined() ? g_N.const_data_ptr<float>() : nullptr;
  const float* h = h_N.defined() ? h_N.const_data_ptr<float>() : nullptr;
  const auto* stats = reinterpret_cast<const RowStats*>(stats_N3.const_data_ptr<float>());
  const auto wide = hidden.options().dtype(at::kFloat);

  const bool kept = kept_NV.size(0) > 0;
  const float* logits = kept ? kept_NV.const_data_ptr<float>() : nullptr;
  std::vector<int64_t> rows, at_kept;  // the rows that matter, and where their logits are
  rows.reserve(N);
  int64_t place = 0;
  for (int64_t n = 0; n < N; ++n) {
    if (ids[n] == ignore_index) continue;
    if ((g && g[n] != 0.0f) || (h && h[n] != 0.0f)) {
      rows.push_back(n);
      if (kept) at_kept.push_back(place);
    }
    ++place;
  }
  const Chunks chunks(hidden, std::move(rows), V, workspace_bytes, kept);
  Tensor hidden_grad = !for_hidden ? at::empty({0}, hidden.options()) : chunks.all() ? at::empty(hidden.sizes(), hidden.options()) : at::zeros(hidden.sizes(), hidden.options());
  Tensor weight_grad, bias_grad = at::zeros({for_bias ? V : 0}, wide);
  chunks.each(V, Tensor(), [&](int64_t begin, int64_t R, const Tensor& hidden_RH, const Tensor& z_RV) {
    if (!kept) head.logits(z_RV, hidden_RH);
    float* z = z_RV.mutable_data_ptr<float>();
    at::parallel_for(0, R, grain(V), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t n = chunks.row(begin + i);
        float* row = z + i * V;
        if (softcap > 0.0 && !kept) cap_row(row, V, softcap);
        row_gradient<false>(kept ? logits + at_kept[begin + i] * V : row, row, V, ids[n], stats[n], g ? g[n] : 0.0, h ? h[n] : 0.0, t[n], softcap);
      }
    });
    if (for_hidden) chunks.put(hidden_grad, begin, head.hidden_grad(z_RV));
    if (for_weight) Head::add_weight_grad(weight_grad, z_RV, hidden_RH);
    if (for_bias) bias_grad.add_(z_RV.sum(0));
  });
  if (!weight_grad.defined()) weight_grad = for_weight ? at::zeros(weight.sizes(), wide) : at::empty({0}, wide);
  return {hidden_grad, weight_grad.to(weight.scalar_type()), for_bias ? bias_grad.to(bias->scalar_type()) : bias_grad};
}

std::tuple<Tensor, Tensor> linear_logprob(const Tensor& hidden, const Tensor& weight, const Tensor& token_ids, const MaybeTensor& bias, double temperature,
                                          const MaybeTensor& temperatures, double softcap, bool entropy, int64_t ignore_index, int64_t workspace_bytes) {
  const auto forward = [&](Saved& saved) -> Tensors {
    static auto op = find_op<decltype(linear_logprob_forward)>("fusedrl::linear_logprob_forward");
    auto [logp_N, entropy_N, stats_N3, kept_NV] =
        op.call(hidden, weight, token_ids, bias, temperature, temperatures, softcap, entropy, ignore_index, workspace_bytes, saved.recorded);
    saved.tensors = {hidden, weight, token_ids, bias.value_or(Tensor()), stats_N3, temperatures.value_or(Tensor()), kept_NV};
    saved.values = {temperature, softcap, ignore_index, workspace_bytes};
    saved.zeros_for_missing = false;
    if (!entropy) saved.non_differentiable = {entropy_N};
    return {logp_N, entropy_N};
  };
  const auto backward = [](const Tensors& grads, const Saved& saved) -> Tensors {
    static auto op = find_op<decltype(linear_logprob_backward)>("fusedrl::linear_logprob_backward");
    const auto& [t, x] = std::tie(saved.tensors, saved.values);
    const bool for_hidden = saved.needed[0], for_weight = saved.needed[1], for_bias = saved.needed[2];
    auto [hidden_grad, weight_grad, bias_grad] =
        op.call(defined(grads[0]), defined(grads[1]), t[0], t[1], t[2], defined(t[3]), t[4], t[6], x[0].toDouble(), defined(t[5]), x[1].toDouble(), x[2].toInt(),
                x[3].toInt(), for_hidden, for_weight, for_bias);
    return {for_hidden ? hidden_grad : Tensor(), for_weight ? weight_grad : Tensor(), for_bias ? bias_grad : Tensor()};
  };
  const auto out = with_gradient("linear_logprob", {hidden, weight, bias}, forward, backward);
  return {out[0], out[1]};
}

TORCH_LIBRARY_FRAGMENT(fusedrl, m) {
  m.def("linear_logprob_forward(Tensor hidden, Tensor weight, Tensor token_ids, Tensor? bias, float temperature, Tensor? temperatures, float softcap, bool entropy, "
        "int ignore_index, int workspace_bytes, bool keep) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("linear_logprob_backward(Tensor? logp_grad, Tensor? entropy_grad, Tensor hidden, Tensor weight, Tensor token_ids, Tensor? bias, Tensor stats, Tensor kept, float temperature, "
        "Tensor? temperatures, float softcap, int ignore_index, int workspace_bytes, bool for_hidden, bool for_weight, bool for_bias) -> (Tensor, Tensor, Tensor)");
  m.def("linear_logprob(Tensor hidden, Tensor weight, Tensor token_ids, Tensor? bias, float temperature, Tensor? temperatures, float softcap, bool entropy, "
        "int ignore_index, int workspace_bytes) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fusedrl, CPU, m) {
  m.impl("linear_logprob_forward", &linear_logprob_forward);
  m.impl("linear_logprob_backward", &linear_logprob_backward);
}
TORCH_LIBRARY_IMPL(fusedrl, CompositeImplicitAutograd, m) { m.impl("linear_logprob", &linear_logprob); }

}  // namespace
