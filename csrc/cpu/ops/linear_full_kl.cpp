// linear_full_kl on CPU: full_kl of two heads' logits, a chunk of rows at a time; more than 64 MiB of logits never exist.
//
// Shapes   hidden [N, H], weight [V, H], and the reference's with an H of their own; a chunk of R rows has 2 R V float32 logits in the workspace, of
//          which backward overwrites the first half with their gradient. stats [N, 5] are those of KlRow (full_kl_rows.h).
// Kept     where a backward will follow and all logits fit (keeps_logits), they stay, and it has no product to do again.
// Flops    forward 2 N V (H + H_ref); backward the same again unless they are kept, and 4 N V H for the gradients; N counts the rows that matter: masked rows, and in
//          the backward rows without a gradient, are compacted away before any product.
// Numerics float32 products and logits whatever the dtype of the weights (lower ones are widened in tiles); the weight's gradient gathers in float32.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "autograd.h"
#include "full_kl_rows.h"
#include "linear_head.h"

namespace {

using namespace fusedrl;  // autograd.h

// function(row numbers, rows, hidden [R, H], ref_hidden [R, H_ref], logits [R, V], ref logits [R, V]) for each chunk of `rows`; the logits stay in
// `kept` [2, at least as many rows, V], if that is defined.
template <typename Function>
void each_chunk(std::vector<int64_t>& rows, const Tensor& hidden, const Head& head, const Tensor& ref_hidden, const Head& ref_head, int64_t workspace_bytes,
                const Tensor& kept, const Function& function) {
  const int64_t count = static_cast<int64_t>(rows.size()), step = workspace_rows(workspace_bytes, hidden.size(0), 2 * head.V(), count);
  const Tensor logits = kept.defined() ? kept : at::empty({2, step, head.V()}, hidden.options().dtype(at::kFloat));
  for (int64_t begin = 0; begin < count; begin += step) {
    const int64_t R = std::min(step, count - begin);
    const Tensor index = at::from_blob(rows.data() + begin, {R}, at::kLong);
    const auto some = [&](const Tensor& of) { return (count == of.size(0) ? of.narrow(0, begin, R) : of.index_select(0, index)).to(at::kFloat); };
    const int64_t from = kept.defined() ? begin : 0;
    const Tensor hidden_RH = some(hidden), z_RV = logits[0].narrow(0, from, R), ref_RV = logits[1].narrow(0, from, R);
    head.logits(z_RV, hidden_RH);
    ref_head.logits(ref_RV, some(ref_hidden));
    function(index, R, hidden_RH, z_RV, ref_RV);
  }
}

Head make_head(const Tensor& weight, const MaybeTensor& bias) { return {weight, bias ? bias->to(at::kFloat) : Tensor(), 0.0}; }

// (kl, stats, logits): the last [2, N, V] where keep says so and they fit, else [2, 0, V]; the rows that matter come first, then zeros.
std::tuple<Tensor, Tensor, Tensor> linear_full_kl_forward(const Tensor& hidden, const Tensor& weight, const Tensor& ref_hidden, const Tensor& ref_weight,
                                                          const MaybeTensor& bias, const MaybeTensor& ref_bias, const MaybeTensor& mask, double temperature,
                                                          int64_t direction, int64_t workspace_bytes, bool keep) {
  at::AutoDispatchBelowADInplaceOrView below;
  const int64_t N = hidden.size(0), V = weight.size(0);
  const Tensor mask_N = mask ? mask->contiguous() : Tensor();
  const bool* live = mask_N.defined() ? mask_N.const_data_ptr<bool>() : nullptr;
  Tensor kl_N = at::zeros({N}, hidden.options().dtype(at::kFloat)), stats_N5 = at::zeros({N, 5}, kl_N.options());
  float* kl = kl_N.mutable_data_ptr<float>();
  auto* stats = reinterpret_cast<KlRow*>(stats_N5.mutable_data_ptr<float>());
  std::vector<int64_t> rows;
  for (int64_t n = 0; n < N; ++n) if (!live || live[n]) rows.push_back(n);
  keep = keep && keeps_logits(workspace_bytes, 8 * N * V);
  Tensor kept_2NV = at::empty({2, keep ? N : 0, V}, kl_N.options());
  if (keep) kept_2NV.narrow(1, rows.size(), N - rows.size()).zero_();
  each_chunk(rows, hidden, make_head(weight, bias), ref_hidden, make_head(ref_weight, ref_bias), workspace_bytes, keep ? kept_2NV : Tensor(),
             [&](const Tensor& index, int64_t R, const Tensor&, const Tensor& z_RV, const Tensor& ref_RV) {
    const int64_t* row = index.const_data_ptr<int64_t>();
    const float *z = z_RV.const_data_ptr<float>(), *ref = ref_RV.const_data_ptr<float>();
    at::parallel_for(0, R, grain(V), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) kl[row[i]] = row_kl(z + i * V, ref + i * V, V, temperature, static_cast<Direction>(direction), stats[row[i]]);
    });
  });
  return {kl_N, stats_N5, kept_2NV};
}

// Gradients of hidden, weight and bias; those not needed are empty. Kept logits are only read: a second backward finds them as they were.
std::tuple<Tensor, Tensor, Tensor> linear_full_kl_backward(const Tensor& kl_grad, const Tensor& hidden, const Tensor& weight, const Tensor& ref_hidden,
                                                           const Tensor& ref_weight, const MaybeTensor& bias, const MaybeTensor& ref_bias, const Tensor& stats_N5,
                                                           const Tensor& kept_2NV, const MaybeTensor& mask, double temperature, int64_t direction,
                                                           int64_t workspace_bytes, bool for_hidden, bool for_weight, bool for_bias) {
  at::AutoDispatchBelowADInplaceOrView below;
  const int64_t N = hidden.size(0), V = weight.size(0);
  const Tensor grad_N = kl_grad.contiguous();
  const float* g = grad_N.const_data_ptr<float>();
  const Tensor mask_N = mask ? mask->contiguous() : Tensor();
  const bool* live = mask_N.defined() ? mask_N.const_data_ptr<bool>() : nullptr;
  const auto* stats = reinterpret_cast<const KlRow*>(stats_N5.const_data_ptr<float>());
  const auto wide = hidden.options().dtype(at::kFloat);
  const Head head = make_head(weight, bias);
  Tensor hidden_grad = for_hidden ? at::zeros(hidden.sizes(), hidden.options()) : at::empty({0}, hidden.options());
  Tensor weight_grad, bias_grad = at::zeros({for_bias ? V : 0}, wide);
  std::vector<int64_t> rows;
  std::vector<int64_t> at_kept;  // where the logits of these rows are
  int64_t place = 0;
  for (int64_t n = 0; n < N; ++n) {
    if (live && !live[n]) continue;
    if (g[n] != 0.0f && stats[n].sum != 0.0f && stats[n].centre != kInfinity) {
      rows.push_back(n);
      at_kept.push_back(place);
    }
    ++place;
  }
  // of R rows, from the logits of row i at z + at[i] V, which `out` may be
  const auto gradients = [&](const Tensor& index, int64_t R, const Tensor& hidden_RH, const float* z, const float* ref, const int64_t* at, const Tensor& out) {
    const int64_t* row = index.const_data_ptr<int64_t>();
    float* into = out.mutable_data_ptr<float>();
    at::parallel_for(0, R, grain(V), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t from = (at ? at[i] : i) * V;
        row_kl_gradient(z + from, ref + from, into + i * V, V, temperature, static_cast<Direction>(direction), stats[row[i]], g[row[i]]);
      }
    });
    if (for_hidden) hidden_grad.index_copy_(0, index, head.hidden_grad(out).to(hidden.scalar_type()));
    if (for_weight) Head::add_weight_grad(weight_grad, out, hidden_RH);
    if (for_bias) bias_grad.add_(out.sum(0));
  };
  if (kept_2NV.size(1) > 0) {
    const int64_t count = rows.size();
    const float* z = kept_2NV.const_data_ptr<float>();
    const Tensor index = at::from_blob(rows.data(), {count}, at::kLong), out_RV = at::empty({count, V}, wide);
    gradients(index, count, (count == N ? hidden : hidden.index_select(0, index)).to(at::kFloat), z, z + N * V, at_kept.data(), out_RV);
  } else {
    each_chunk(rows, hidden, head, ref_hidden, make_head(ref_weight, ref_bias), workspace_bytes, Tensor(),
               [&](const Tensor& index, int64_t R, const Tensor& hidden_RH, const Tensor& z_RV, const Tensor& ref_RV) {
      gradients(index, R, hidden_RH, z_RV.const_data_ptr<float>(), ref_RV.const_data_ptr<float>(), nullptr, z_RV);
    });
  }
  if (!weight_grad.defined()) weight_grad = for_weight ? at::zeros(weight.sizes(), wide) : at::empty({0}, wide);
  return {hidden_grad, weight_grad.to(weight.scalar_type()), for_bias ? bias_grad.to(bias->scalar_type()) : bias_grad};
}

Tensor linear_full_kl(const Tensor& hidden, const Tensor& weight, const Tensor& ref_hidden, const Tensor& ref_weight, const MaybeTensor& bias, const MaybeTensor& ref_bias,
                      const MaybeTensor& mask, double temperature, int64_t direction, int64_t workspace_bytes) {
  const auto forward = [&](Saved& saved) -> Tensors {
    static auto op = find_op<decltype(linear_full_kl_forward)>("fusedrl::linear_full_kl_forward");
    auto [kl_N, stats_N5, kept_2NV] = op.call(hidden, weight, ref_hidden, ref_weight, bias, ref_bias, mask, temperature, direction, workspace_bytes, saved.recorded);
    saved.tensors = {hidden, weight, ref_hidden, ref_weight, bias.value_or(Tensor()), ref_bias.value_or(Tensor()), stats_N5, kept_2NV, mask.value_or(Tensor())};
    saved.values = {temperature, direction, workspace_bytes};
    return {kl_N};
  };
  const auto backward = [](const Tensors& grads, const Saved& saved) -> Tensors {
    static auto op = find_op<decltype(linear_full_kl_backward)>("fusedrl::linear_full_kl_backward");
    const auto& [t, x] = std::tie(saved.tensors, saved.values);
    const bool for_hidden = saved.needed[0], for_weight = saved.needed[1], for_bias = saved.needed[2];
    auto [hidden_grad, weight_grad, bias_grad] = op.call(grads[0], t[0], t[1], t[2], t[3], defined(t[4]), defined(t[5]), t[6], t[7], defined(t[8]), x[0].toDouble(), x[1].toInt(),
                                                         x[2].toInt(), for_hidden, for_weight, for_bias);
    return {for_hidden ? hidden_grad : Tensor(), for_weight ? weight_grad : Tensor(), for_bias ? bias_grad : Tensor()};
  };
  return with_gradient("linear_full_kl", {hidden, weight, bias}, forward, backward)[0];
}

#define FUSEDRL_HEADS "Tensor hidden, Tensor weight, Tensor ref_hidden, Tensor ref_weight, Tensor? bias, Tensor? ref_bias, "

TORCH_LIBRARY_FRAGMENT(fusedrl, m) {
  m.def("linear_full_kl_forward(" FUSEDRL_HEADS "Tensor? mask, float temperature, int direction, int workspace_bytes, bool keep) -> (Tensor, Tensor, Tensor)");
  m.def("linear_full_kl_backward(Tensor kl_grad, " FUSEDRL_HEADS "Tensor stats, Tensor kept, Tensor? mask, float temperature, int direction, int workspace_bytes, bool for_hidden, "
        "bool for_weight, bool for_bias) -> (Tensor, Tensor, Tensor)");
  m.def("linear_full_kl(" FUSEDRL_HEADS "Tensor? mask, float temperature, int direction, int workspace_bytes) -> Tensor");
}
TORCH_LIBRARY_IMPL(fusedrl, CPU, m) {
  m.impl("linear_full_kl_forward", &linear_full_kl_forward);
  m.impl("linear_full_kl_backward", &linear_full_kl_backward);
}
TORCH_LIBRARY_IMPL(fusedrl, CompositeImplicitAutograd, m) { m.impl("linear_full_kl", &linear_full_kl); }

}  // namespace
