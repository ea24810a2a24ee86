// policy_value_loss on CPU: the clipped surrogate and the value loss, their derivatives and every statistic, in one pass over the tokens.
//
// Shapes   N tokens; each input is [N] float32 and either part (policy, value) may be absent.
// Bytes    policy 16 read (20 with entropy) and 4 written a token; value 8 (12 with a clip) and 4 more; the weights are read once for both.
// Numerics a token's terms in float32; 16 vectors of them are added in float32, the rest in double. Blocks have a fixed size and their sums
//          are combined in order, so nothing depends on the number of threads. Variances are taken about each block's mean and merged (Chan).
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t kBlock = 4096;
constexpr int64_t kTile = 16 * Vec::size();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kClamp = 20.0f;
constexpr int64_t kStats = 20;  // the fields of PolicyStats, then those of ValueStats (kernels/objective.py)

struct Arguments {
  const float *logp, *old_logp, *advantages, *weights, *entropy, *values, *old_values, *returns;  // null: absent
  float *logp_grad, *values_grad;
  bool reinforce;
  float lower, upper, dual, entropy_coef, value_clip, value_coef;
};

enum PolicySum { LOSS, LOW, HIGH, DUAL, K1, K2, K3, RATIO, RATIO_SQUARED, CLAMPED, ENTROPY, TOKENS, POLICY_SUMS };
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

struct Partial {
  double policy[POLICY_SUMS] = {}, value[VALUE_SUMS] = {};
  float ratio_min = kInfinity, ratio_max = -kInfinity;
  Moments returns, residuals;
};

// S sums: float32 lanes for one tile, which then join lanes of doubles.
template <int S>
struct Sums {
  double wide[S][Vec::size()] = {};
  void join(const Vec (&lanes)[S]) {
#pragma GCC unroll 16
    for (int s = 0; s < S; ++s) {
      float narrow[Vec::size()];
      lanes[s].store(narrow);
      for (int i = 0; i < Vec::size(); ++i) wide[s][i] += narrow[i];
    }
  }
  void total(double (&out)[S]) const {
    for (int s = 0; s < S; ++s)
      for (int i = 0; i < Vec::size(); ++i) out[s] += wide[s][i];
  }
};

inline Vec load(const float* from, int64_t count) { return count == Vec::size() ? Vec::loadu(from) : Vec::loadu(from, count); }

// e^d for |d| <= 20, and e^d - 1 - d for the unclamped d. With d = k ln 2 + f, e^f - 1 - f = f^2 q(f) is free of cancellation, which matters
// where d is small, and there k = 0. Within 1 ulp, and exactly 1 and 0 at d = 0.
inline void exponential(const Vec& clamped, const Vec& d, Vec& ratio, Vec& excess) {
  const Vec k = (clamped * Vec(1.44269504f)).round();
  const Vec f = at::vec::fmadd(k, Vec(2.12194440e-4f), at::vec::fmadd(k, Vec(-0.693359375f), clamped));
  Vec q = at::vec::fmadd(f, Vec(1.0f / 5040), Vec(1.0f / 720));
  q = at::vec::fmadd(q, f, Vec(1.0f / 120));
  q = at::vec::fmadd(q, f, Vec(1.0f / 24));
  q = at::vec::fmadd(q, f, Vec(1.0f / 6));
  q = at::vec::fmadd(q, f, Vec(0.5f));
  const Vec small = f * f * q;
  using Int = at::vec::Vectorized<int32_t>;
  const Vec power = at::vec::cast<float, int32_t>((at::vec::convert_to_int_of_same_size<float>(k) + Int(127)) << Int(23));
  ratio = at::vec::fmadd(power, f + small, power);
  const Vec large = ratio - Vec(1.0f) - d;
  excess = Vec::blendv(Vec::blendv(large, Vec(0.0f), large < Vec(0.0f)), small, k == Vec(0.0f));
}

void policy_block(const Arguments& a, int64_t begin, int64_t end, Partial& partial) {
  const Vec zero(0.0f), one(1.0f), infinity(kInfinity), lower(a.lower), upper(a.upper), dual(a.dual);
  Sums<POLICY_SUMS> sums;
  Vec smallest(kInfinity), largest(-kInfinity);
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t tile_end = std::min(end, tile + kTile);
    Vec sum[POLICY_SUMS];
#pragma GCC unroll 16
    for (Vec& s : sum) s = zero;
    for (int64_t t = tile; t < tile_end; t += Vec::size()) {
      const int64_t count = std::min<int64_t>(Vec::size(), tile_end - t);
      const Vec weight = load(a.weights + t, count);  // 0 past the end: such lanes are masked
      const Vec live = weight != zero;
      const Vec logp = load(a.logp + t, count) & live, advantage = load(a.advantages + t, count) & live;
      const Vec d = logp - (load(a.old_logp + t, count) & live);
      const Vec beyond = d.abs() > Vec(kClamp);
      Vec ratio, excess;
      exponential(at::vec::clamp(d, Vec(-kClamp), Vec(kClamp)), d, ratio, excess);

      const Vec gains = advantage > zero, loses = advantage < zero;
      const Vec high = gains & (ratio > upper), too_far = loses & (ratio > dual), low = loses & (ratio < lower);
      Vec bounded = Vec::blendv(Vec::blendv(Vec::blendv(ratio, upper, high), lower, low), dual, too_far);
      Vec slope = Vec::blendv(ratio, zero, high | low | too_far | beyond);
      if (a.reinforce) {
        bounded = logp;
        slope = one;
      }
      Vec term = (advantage * bounded).neg();
      if (a.entropy) {
        const Vec entropy = load(a.entropy + t, count) & live;
        term = term - Vec(a.entropy_coef) * entropy;
        sum[ENTROPY] = sum[ENTROPY] + entropy;
      }
      (weight * (advantage * slope).neg() & live).store(a.logp_grad + t, static_cast<int>(count));

      const Vec live_ratio = ratio & live;
      sum[LOSS] = sum[LOSS] + weight * term;
      sum[LOW] = sum[LOW] + (one & low);
      sum[HIGH] = sum[HIGH] + (one & high);
      sum[DUAL] = sum[DUAL] + (one & too_far);
      sum[K1] = sum[K1] - d;
      sum[K2] = at::vec::fmadd(d, d * Vec(0.5f), sum[K2]);
      sum[K3] = sum[K3] + excess;
      sum[RATIO] = sum[RATIO] + live_ratio;
      sum[RATIO_SQUARED] = at::vec::fmadd(live_ratio, live_ratio, sum[RATIO_SQUARED]);
      sum[CLAMPED] = sum[CLAMPED] + (one & beyond);
      sum[TOKENS] = sum[TOKENS] + (one & live);
      smallest = at::vec::minimum(smallest, Vec::blendv(infinity, ratio, live));
      largest = at::vec::maximum(largest, Vec::blendv(infinity.neg(), ratio, live));
    }
    sums.join(sum);
  }
  sums.total(partial.policy);
  float lanes[Vec::size()];
  smallest.store(lanes);
  for (const float x : lanes) partial.ratio_min = std::isnan(x) || x < partial.ratio_min ? x : partial.ratio_min;
  largest.store(lanes);
  for (const float x : lanes) partial.ratio_max = std::isnan(x) || x > partial.ratio_max ? x : partial.ratio_max;
}

void value_block(const Arguments& a, int64_t begin, int64_t end, Partial& partial) {
  const Vec zero(0.0f), one(1.0f), half(0.5f), clip(a.value_clip), coef(a.value_coef);
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
  sums.total(partial.value);
  const double n = partial.value[VALUE_TOKENS];
  if (n == 0) return;
  // The block is still in cache: deviations from its mean, rounded, and from what the rounding left over.
  const Vec return_mean(static_cast<float>(partial.value[RETURN] / n)), residual_mean(static_cast<float>(partial.value[RESIDUAL] / n));
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
  partial.returns = {n, static_cast<float>(partial.value[RETURN] / n) + total[RETURN_1] / n, total[RETURN_2] - total[RETURN_1] * total[RETURN_1] / n};
  partial.residuals = {n, static_cast<float>(partial.value[RESIDUAL] / n) + total[RESIDUAL_1] / n,
                       total[RESIDUAL_2] - total[RESIDUAL_1] * total[RESIDUAL_1] / n};
}

// Block results in order -> the loss and the statistics.
void combine(const Arguments& a, const std::vector<Partial>& partials, float* loss, float* stats) {
  Partial all;
  for (const Partial& p : partials) {
    for (int s = 0; s < POLICY_SUMS; ++s) all.policy[s] += p.policy[s];
    for (int s = 0; s < VALUE_SUMS; ++s) all.value[s] += p.value[s];
    all.ratio_min = std::isnan(p.ratio_min) || p.ratio_min < all.ratio_min ? p.ratio_min : all.ratio_min;
    all.ratio_max = std::isnan(p.ratio_max) || p.ratio_max > all.ratio_max ? p.ratio_max : all.ratio_max;
    all.returns.merge(p.returns);
    all.residuals.merge(p.residuals);
  }
  const double *p = all.policy, *v = all.value;
  const double tokens = std::max(1.0, p[TOKENS]), value_tokens = std::max(1.0, v[VALUE_TOKENS]);
  const bool any = p[TOKENS] > 0;
  const double resolution = std::numeric_limits<float>::epsilon() * all.returns.mean;
  const bool varies = all.returns.squares > value_tokens * resolution * resolution;
  const double out[kStats] = {
      p[LOSS], p[LOW] / tokens, p[HIGH] / tokens, p[DUAL] / tokens, p[K1] / tokens, p[K2] / tokens, p[K3] / tokens,
      any ? p[RATIO] / tokens : 1.0, any ? all.ratio_min : 1.0, any ? all.ratio_max : 1.0,
      any ? p[RATIO] * p[RATIO] / p[RATIO_SQUARED] : 0.0, p[CLAMPED] / tokens, p[ENTROPY] / tokens, p[TOKENS],
      v[VALUE_LOSS], v[VALUE_CLIPPED] / value_tokens, varies ? 1.0 - all.residuals.squares / all.returns.squares : 0.0,
      v[VALUE] / value_tokens, all.returns.mean, v[VALUE_TOKENS]};
  for (int64_t i = 0; i < kStats; ++i) stats[i] = static_cast<float>(out[i]);
  *loss = static_cast<float>(p[LOSS] + a.value_coef * v[VALUE_LOSS]);
}

const float* data(const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr; }
Tensor contiguous(const OptionalTensor& tensor) { return tensor ? tensor->contiguous() : Tensor(); }

// Loss, statistics, and d loss / d logp and d loss / d values for a unit upstream gradient (empty where that part is absent).
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const OptionalTensor& logp, const OptionalTensor& old_logp, const OptionalTensor& advantages, const Tensor& weights,
    const OptionalTensor& entropy, const OptionalTensor& values, const OptionalTensor& old_values, const OptionalTensor& returns,
    bool reinforce, double lower, double upper, double dual, double entropy_coef, double value_clip, double value_coef) {
  const Tensor weights_N = weights.contiguous(), logp_N = contiguous(logp), old_logp_N = contiguous(old_logp), advantages_N = contiguous(advantages);
  const Tensor entropy_N = contiguous(entropy), values_N = contiguous(values), old_values_N = contiguous(old_values), returns_N = contiguous(returns);
  const int64_t N = weights_N.numel(), blocks = (N + kBlock - 1) / kBlock;
  Tensor loss = at::empty({}, weights_N.options()), stats = at::empty({kStats}, weights_N.options());
  Tensor logp_grad_N = at::empty({logp ? N : 0}, weights_N.options()), values_grad_N = at::empty({values ? N : 0}, weights_N.options());
  const Arguments a{data(logp_N), data(old_logp_N), data(advantages_N), data(weights_N), data(entropy_N), data(values_N), data(old_values_N),
                    data(returns_N), logp_grad_N.mutable_data_ptr<float>(), values_grad_N.mutable_data_ptr<float>(), reinforce,
                    static_cast<float>(lower), static_cast<float>(upper), static_cast<float>(dual), static_cast<float>(entropy_coef),
                    static_cast<float>(value_clip), static_cast<float>(value_coef)};
  std::vector<Partial> partials(blocks);
  at::parallel_for(0, blocks, 8, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b * kBlock, end = std::min(N, begin + kBlock);
      if (logp) policy_block(a, begin, end, partials[b]);
      if (values) value_block(a, begin, end, partials[b]);
    }
  });
  combine(a, partials, loss.mutable_data_ptr<float>(), stats.mutable_data_ptr<float>());
  return {loss, stats, logp_grad_N, values_grad_N};
}

// gradient * scale, once: the gradient was formed in the forward pass, and how it depends on the input is not known any more. `input` is there
// to make a double backward arrive here, where it is refused, instead of taking the gradient for a constant.
struct Scaled : torch::autograd::Function<Scaled> {
  static Tensor forward(torch::autograd::AutogradContext*, const Tensor& gradient, const Tensor& scale, const Tensor& /*input*/) {
    return gradient * scale;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*, const torch::autograd::variable_list&) {
    TORCH_CHECK(false, "policy_value_loss: expected one backward pass, got a double backward; use impl=\"torch\" for second derivatives");
  }
};

struct PolicyValueLoss : torch::autograd::Function<PolicyValueLoss> {
  static torch::autograd::variable_list forward(
      torch::autograd::AutogradContext* ctx, const OptionalTensor& logp, const OptionalTensor& old_logp, const OptionalTensor& advantages,
      const Tensor& weights, const OptionalTensor& entropy, const OptionalTensor& values, const OptionalTensor& old_values,
      const OptionalTensor& returns, bool reinforce, double lower, double upper, double dual, double entropy_coef, double value_clip,
      double value_coef) {
    at::AutoDispatchBelowADInplaceOrView below;
    static auto op = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("fusedrl::policy_value_loss_forward", "")
                         .typed<decltype(::forward)>();
    auto [loss, stats, logp_grad_N, values_grad_N] = op.call(logp, old_logp, advantages, weights, entropy, values, old_values, returns, reinforce,
                                                             lower, upper, dual, entropy_coef, value_clip, value_coef);
    ctx->save_for_backward({logp_grad_N, entropy ? weights : Tensor(), values_grad_N, logp.value_or(Tensor()), entropy.value_or(Tensor()),
                            values.value_or(Tensor())});
    ctx->saved_data["entropy_coef"] = entropy_coef;
    // Edges count the tensors that were given: logp, old_logp, advantages, weights, entropy, values, ...
    ctx->saved_data["logp_edge"] = logp ? 0 : -1;
    ctx->saved_data["entropy_edge"] = entropy ? 4 : -1;
    ctx->saved_data["values_edge"] = values ? (logp ? 4 : 1) + (entropy ? 1 : 0) : -1;
    ctx->mark_non_differentiable({stats});
    return {loss, stats};
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    torch::autograd::variable_list out(15);
    const auto needed = [&](const char* edge) {
      const int64_t index = ctx->saved_data[edge].toInt();
      return index >= 0 && ctx->needs_input_grad(index);
    };
    if (needed("logp_edge")) out[0] = Scaled::apply(saved[0], grads[0], saved[3]);
    if (needed("entropy_edge")) out[4] = Scaled::apply(saved[1], grads[0] * -ctx->saved_data["entropy_coef"].toDouble(), saved[4]);
    if (needed("values_edge")) out[5] = Scaled::apply(saved[2], grads[0], saved[5]);
    return out;
  }
};

std::tuple<Tensor, Tensor> policy_value_loss(
    const OptionalTensor& logp, const OptionalTensor& old_logp, const OptionalTensor& advantages, const Tensor& weights,
    const OptionalTensor& entropy, const OptionalTensor& values, const OptionalTensor& old_values, const OptionalTensor& returns,
    bool reinforce, double lower, double upper, double dual, double entropy_coef, double value_clip, double value_coef) {
  const auto out = PolicyValueLoss::apply(logp, old_logp, advantages, weights, entropy, values, old_values, returns, reinforce, lower, upper, dual,
                                          entropy_coef, value_clip, value_coef);
  return {out[0], out[1]};
}

#define FUSEDRL_POLICY_VALUE_ARGUMENTS                                                                                                       \
  "(Tensor? logp, Tensor? old_logp, Tensor? advantages, Tensor weights, Tensor? entropy, Tensor? values, Tensor? old_values, "               \
  "Tensor? returns, bool reinforce, float lower, float upper, float dual, float entropy_coef, float value_clip, float value_coef)"

TORCH_LIBRARY_FRAGMENT(fusedrl, m) {
  m.def("policy_value_loss_forward" FUSEDRL_POLICY_VALUE_ARGUMENTS " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("policy_value_loss" FUSEDRL_POLICY_VALUE_ARGUMENTS " -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fusedrl, CPU, m) { m.impl("policy_value_loss_forward", &forward); }
TORCH_LIBRARY_IMPL(fusedrl, CompositeImplicitAutograd, m) { m.impl("policy_value_loss", &policy_value_loss); }

}  // namespace
