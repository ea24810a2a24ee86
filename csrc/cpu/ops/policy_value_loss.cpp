// policy_value_loss on CPU: the policy term of every kind and the value loss, their derivatives and every statistic, in one pass over the tokens.
//
// Shapes   N tokens; each input is [N] float32 and either part (policy, value) may be absent.
// Bytes    policy 16 read (4 more for each of entropy, ref_logp, correction, ...) and 4 written a token; value 8 (12 with a clip) and 4 more; the weights are read once for both.
// Numerics a token's terms in float32; 16 vectors of them are added in float32, the rest in double. Blocks have a fixed size and their sums
//          are combined in order, so nothing depends on the number of threads. Variances are taken about each block's mean and merged (Chan).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "autograd.h"
#include "policy_terms.h"

namespace {

using namespace fusedrl;  // autograd.h

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kBlock = 4096;
constexpr int64_t kStats = kPolicyStats + 6;  // then the fields of ValueStats (kernels/objective.py)

struct ValueArguments {
  const float *values, *old_values, *returns, *weights;  // null: absent
  float* values_grad;
  float clip, coef;
};

enum ValueSum { VALUE_LOSS, VALUE_CLIPPED, VALUE, RETURN, RESIDUAL, VALUE_TOKENS, VALUE_SUMS };
enum SpreadSum { RETURN_1, RETURN_2, RESIDUAL_1, RESIDUAL_2, SPREAD_SUMS };

// Count, mean and sum of squared deviations, merged without E[x^2] - E[x]^2.
struct Moments {
  double count = 0, mean = 0, squares = 0;
  void merge(const Moments& other) {
    const double total = count + other.count, difference = other.mean - mean;
    if (other.count == 0) return;
    squares += other.squares + difference * difference * count * other.count / total;
    mean += difference * other.count / total;
    count = total;
  }
};

struct ValuePartial {
  double sums[VALUE_SUMS] = {};
  Moments returns, residuals;
};

void value_block(const ValueArguments& a, int64_t begin, int64_t end, ValuePartial& partial) {
  const Vec zero(0.0f), one(1.0f), half(0.5f), clip(a.clip), coef(a.coef);
  Sums<VALUE_SUMS> sums;
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t tile_end = std::min(end, tile + kTile);
    Vec sum[VALUE_SUMS];
#pragma GCC unroll 16
    for (Vec& s : sum) s = zero;
    for (int64_t t = tile; t < tile_end; t += Vec::size()) {
      const int64_t count = std::min<int64_t>(Vec::size(), tile_end - t);
      const Vec weight = load(a.weights + t, count), live = weight != zero;
      const Vec value = load(a.values + t, count) & live, target = load(a.returns + t, count) & live;
      const Vec error = value - target;
      Vec square = error * error, clipped = zero;
      if (a.old_values) {
        const Vec old = load(a.old_values + t, count) & live;
        const Vec top = old + clip, bottom = old - clip, above = value > top, below = value < bottom;
        const Vec bounded_error = Vec::blendv(Vec::blendv(value, top, above), bottom, below) - target;
        const Vec bounded_square = bounded_error * bounded_error;
        clipped = (above | below) & (bounded_square > square);
        square = Vec::blendv(square, bounded_square, clipped);
      }
      (coef * weight * Vec::blendv(error, zero, clipped) & live).store(a.values_grad + t, static_cast<int>(count));
      sum[VALUE_LOSS] = at::vec::fmadd(weight, half * square, sum[VALUE_LOSS]);
      sum[VALUE_CLIPPED] = sum[VALUE_CLIPPED] + (one & clipped);
      sum[VALUE] = sum[VALUE] + value;
      sum[RETURN] = sum[RETURN] + target;
      sum[RESIDUAL] = sum[RESIDUAL] - error;
      sum[VALUE_TOKENS] = sum[VALUE_TOKENS] + (one & live);
    }
    sums.join(sum);
  }
  sums.total(partial.sums);
  const double n = partial.sums[VALUE_TOKENS];
  if (n == 0) return;
  // The block is still in cache: deviations from its mean, rounded, and from what the rounding left over.
  const Vec return_mean(static_cast<float>(partial.sums[RETURN] / n)), residual_mean(static_cast<float>(partial.sums[RESIDUAL] / n));
  Sums<SPREAD_SUMS> spread;
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t tile_end = std::min(end, tile + kTile);
    Vec sum[SPREAD_SUMS] = {zero, zero, zero, zero};
    for (int64_t t = tile; t < tile_end; t += Vec::size()) {
      const int64_t count = std::min<int64_t>(Vec::size(), tile_end - t);
      const Vec live = load(a.weights + t, count) != zero;
      const Vec target = load(a.returns + t, count);
      const Vec x = (target - return_mean) & live, y = (target - load(a.values + t, count) - residual_mean) & live;
      sum[RETURN_1] = sum[RETURN_1] + x;
      sum[RETURN_2] = at::vec::fmadd(x, x, sum[RETURN_2]);
      sum[RESIDUAL_1] = sum[RESIDUAL_1] + y;
      sum[RESIDUAL_2] = at::vec::fmadd(y, y, sum[RESIDUAL_2]);
    }
    spread.join(sum);
  }
  double total[SPREAD_SUMS] = {};
  spread.total(total);
  partial.returns = {n, static_cast<float>(partial.sums[RETURN] / n) + total[RETURN_1] / n, total[RETURN_2] - total[RETURN_1] * total[RETURN_1] / n};
  partial.residuals = {n, static_cast<float>(partial.sums[RESIDUAL] / n) + total[RESIDUAL_1] / n,
                       total[RESIDUAL_2] - total[RESIDUAL_1] * total[RESIDUAL_1] / n};
}

// Block results in order -> the fields of ValueStats.
void value_stats(const ValuePartial& all, float* stats) {
  const double *v = all.sums, tokens = std::max(1.0, v[VALUE_TOKENS]);
  const double resolution = std::numeric_limits<float>::epsilon() * all.returns.mean;
  const bool varies = all.returns.squares > tokens * resolution * resolution;
  const double out[] = {v[VALUE_LOSS], v[VALUE_CLIPPED] / tokens, varies ? 1.0 - all.residuals.squares / all.returns.squares : 0.0,
                        v[VALUE] / tokens, all.returns.mean, v[VALUE_TOKENS]};
  for (const double x : out) *stats++ = static_cast<float>(x);
}

const float* data(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr<float>() : nullptr; }
OptionalTensor contiguous(const OptionalTensor& tensor) { return tensor ? OptionalTensor(tensor->contiguous()) : std::nullopt; }

#define FUSEDRL_POLICY_VALUE_PARAMETERS                                                                                                              \
  const OptionalTensor &logp, const OptionalTensor &old_logp, const OptionalTensor &advantages, const Tensor &weights,                               \
      const OptionalTensor &entropy, const OptionalTensor &values, const OptionalTensor &old_values, const OptionalTensor &returns,                  \
      const OptionalTensor &ref_logp, const OptionalTensor &correction, const OptionalTensor &sequence_log_ratio, const OptionalTensor &kl_sum
#define FUSEDRL_POLICY_VALUE_NAMES                                                                                                                   \
  logp, old_logp, advantages, weights, entropy, values, old_values, returns, ref_logp, correction, sequence_log_ratio, kl_sum

// Loss, statistics, and d loss / d logp and d loss / d values for a unit upstream gradient (empty where that part is absent).
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(FUSEDRL_POLICY_VALUE_PARAMETERS, FUSEDRL_OBJECTIVE_PARAMETERS) {
  const Objective objective({kind, kl_estimator, kl_gradient, coefficients});
  const Tensor weights_N = weights.contiguous();
  const OptionalTensor logp_N = contiguous(logp), old_logp_N = contiguous(old_logp), advantages_N = contiguous(advantages), entropy_N = contiguous(entropy),
                       values_N = contiguous(values), old_values_N = contiguous(old_values), returns_N = contiguous(returns),
                       ref_logp_N = contiguous(ref_logp), correction_N = contiguous(correction),
                       sequence_log_ratio_N = contiguous(sequence_log_ratio), kl_sum_N = contiguous(kl_sum);
  const int64_t N = weights_N.numel(), blocks = (N + kBlock - 1) / kBlock;
  Tensor loss = at::empty({}, weights_N.options()), stats = at::empty({kStats}, weights_N.options());
  Tensor logp_grad_N = at::empty({logp ? N : 0}, weights_N.options()), values_grad_N = at::empty({values ? N : 0}, weights_N.options());
  const PolicyArguments policy{data(logp_N), data(old_logp_N), data(advantages_N), data(weights_N), data(entropy_N), data(ref_logp_N),
                               data(correction_N), data(sequence_log_ratio_N), data(kl_sum_N), logp_grad_N.mutable_data_ptr<float>(), objective};
  const ValueArguments value{data(values_N), data(old_values_N), data(returns_N), data(weights_N), values_grad_N.mutable_data_ptr<float>(),
                             static_cast<float>(objective.coefficients.value_clip), static_cast<float>(objective.coefficients.value_coef)};
  std::vector<PolicyPartial> policy_partials(logp ? blocks : 0);
  std::vector<ValuePartial> value_partials(values ? blocks : 0);
  at::parallel_for(0, blocks, 8, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b * kBlock, end = std::min(N, begin + kBlock);
      if (logp) policy_block(policy, begin, end, policy_partials[b]);
      if (values) value_block(value, begin, end, value_partials[b]);
    }
  });
  PolicyPartial of_policy;
  for (const PolicyPartial& p : policy_partials) of_policy.add(p);
  ValuePartial of_value;
  for (const ValuePartial& p : value_partials) {
    for (int s = 0; s < VALUE_SUMS; ++s) of_value.sums[s] += p.sums[s];
    of_value.returns.merge(p.returns);
    of_value.residuals.merge(p.residuals);
  }
  float* out = stats.mutable_data_ptr<float>();
  policy_stats(of_policy, correction.has_value(), out);
  value_stats(of_value, out + kPolicyStats);
  *loss.mutable_data_ptr<float>() = static_cast<float>(of_policy.sums[LOSS] + objective.coefficients.value_coef * of_value.sums[VALUE_LOSS]);
  return {loss, stats, logp_grad_N, values_grad_N};
}

std::tuple<Tensor, Tensor> policy_value_loss(FUSEDRL_POLICY_VALUE_PARAMETERS, FUSEDRL_OBJECTIVE_PARAMETERS) {
  const auto compute = [&](Saved& saved) -> Tensors {
    static auto op = find_op<decltype(::forward)>("fusedrl::policy_value_loss_forward");
    auto [loss, stats, logp_grad_N, values_grad_N] = op.call(FUSEDRL_POLICY_VALUE_NAMES, kind, kl_estimator, kl_gradient, coefficients);
    saved.tensors = {logp_grad_N, entropy ? weights : Tensor(), values_grad_N};
    saved.values = {Objective({kind, kl_estimator, kl_gradient, coefficients}).coefficients.entropy_coef};
    saved.non_differentiable = {stats};
    return {loss, stats};
  };
  const auto backward = [](const Tensors& grads, const Saved& saved) -> Tensors {
    Tensors out(3);
    if (saved.needed[0]) out[0] = saved.tensors[0].mul(grads[0]);
    if (saved.needed[1]) out[1] = saved.tensors[1].mul(grads[0].mul(-saved.values[0].toDouble()));
    if (saved.needed[2]) out[2] = saved.tensors[2].mul(grads[0]);
    return out;
  };
  const auto out = with_gradient("policy_value_loss", {logp, entropy, values}, compute, backward);
  return {out[0], out[1]};
}

#define FUSEDRL_POLICY_VALUE_SCHEMA                                                                                                                  \
  "(Tensor? logp, Tensor? old_logp, Tensor? advantages, Tensor weights, Tensor? entropy, Tensor? values, Tensor? old_values, Tensor? returns, "      \
  "Tensor? ref_logp, Tensor? correction, Tensor? sequence_log_ratio, Tensor? kl_sum, " FUSEDRL_OBJECTIVE_SCHEMA ")"

TORCH_LIBRARY_FRAGMENT(fusedrl, m) {
  m.def("policy_value_loss_forward" FUSEDRL_POLICY_VALUE_SCHEMA " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("policy_value_loss" FUSEDRL_POLICY_VALUE_SCHEMA " -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fusedrl, CPU, m) { m.impl("policy_value_loss_forward", &forward); }
TORCH_LIBRARY_IMPL(fusedrl, CompositeImplicitAutograd, m) { m.impl("policy_value_loss", &policy_value_loss); }

}  // namespace
