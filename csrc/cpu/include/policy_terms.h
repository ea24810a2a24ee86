// The policy term of the loss, its derivative and every statistic, over tokens that lie next to each other. Shared by policy_value_loss and
// linear_policy_loss.
//
//   l_t = correction_t * term_t(kind) + kl_coef * kl_t - entropy_coef * entropy_t      d = logp - old_logp      ratio = e^d
//
// Numerics a token's terms in float32; 16 vectors of them are added in float32, the rest in double.
#pragma once

#include <ATen/ATen.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kTile = 16 * Vec::size();
constexpr float kUnbounded = std::numeric_limits<float>::infinity();
constexpr float kClamp = 20.0f;
constexpr int64_t kPolicyStats = 16;  // the fields of PolicyStats (kernels/objective.py)

enum class Kind : int64_t { clip, ratio, reinforce, kl_penalty, gspo, cispo, sapo, geometric_mean, dro };  // the order of KINDS in kernels/objective.py
enum class Kl : int64_t { k1, k2, k3, abs, sequence_k2 };                                                   // the order of KL_ESTIMATORS in kernels/policy_loss/

struct PolicyArguments {
  // [N]; null: absent, and not read where the weight is 0. sequence_log_ratio: log s of the token's sequence. kl_sum: its sum of logp - ref_logp.
  const float *logp, *old_logp, *advantages, *weights, *entropy, *ref_logp, *correction, *sequence_log_ratio, *kl_sum;
  float* logp_grad;
  Kind kind;
  float lower, upper, dual, tau_positive, tau_negative, beta;  // what a kind does not use is neutral: infinite bounds, tau 1, beta 0
  float kl_coef;
  Kl kl_estimator, kl_gradient;
  float entropy_coef;
};

enum PolicySum { LOSS, LOW, HIGH, DUAL, K1, K2, K3, RATIO, RATIO_SQUARED, CLAMPED, ENTROPY, TOKENS, REF_KL, CORRECTION, POLICY_SUMS };

struct PolicyPartial {
  double sums[POLICY_SUMS] = {};
  float ratio_min = kUnbounded, ratio_max = -kUnbounded;
  void add(const PolicyPartial& other) {
    for (int s = 0; s < POLICY_SUMS; ++s) sums[s] += other.sums[s];
    lower(other.ratio_min);
    raise(other.ratio_max);
  }
  void lower(float x) { ratio_min = std::isnan(x) || x < ratio_min ? x : ratio_min; }
  void raise(float x) { ratio_max = std::isnan(x) || x > ratio_max ? x : ratio_max; }
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
  void total(double* out) const {
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

inline Vec clamped(const Vec& d) { return at::vec::clamp(d, Vec(-kClamp), Vec(kClamp)); }

// An estimate of KL(pi || ref) from k = logp - ref_logp, and the derivative by logp of an estimate; k3's is 0 beyond the clamp.
inline Vec kl_value(Kl estimator, const Vec& k, const Vec& sum) {
  switch (estimator) {
    case Kl::k1: return k;
    case Kl::k2: return Vec(0.5f) * k * k;
    case Kl::abs: return k.abs();
    case Kl::sequence_k2: return Vec(0.5f) * k * sum;
    case Kl::k3: break;
  }
  Vec inverse, excess;
  exponential(clamped(k.neg()), k.neg(), inverse, excess);
  return excess;
}

inline Vec kl_slope(Kl estimator, const Vec& k, const Vec& sum) {
  const Vec zero(0.0f), one(1.0f);
  switch (estimator) {
    case Kl::k1: return one;
    case Kl::k2: return k;
    case Kl::abs: return Vec::blendv(Vec::blendv(k, one, k > zero), one.neg(), k < zero);
    case Kl::sequence_k2: return sum;
    case Kl::k3: break;
  }
  Vec inverse, excess;
  exponential(clamped(k.neg()), k.neg(), inverse, excess);
  return Vec::blendv(k - excess, zero, k.abs() > Vec(kClamp));
}

// kExtras: ref_logp or correction is there.
template <Kind kKind, bool kExtras>
void policy_block(const PolicyArguments& a, int64_t begin, int64_t end, PolicyPartial& partial) {
  const Vec zero(0.0f), one(1.0f), infinity(kUnbounded), lower(a.lower), upper(a.upper), dual(a.dual), beta(a.beta);
  constexpr int kSums = kExtras ? POLICY_SUMS : REF_KL;
  Sums<kSums> sums;
  Vec smallest(kUnbounded), largest(-kUnbounded);
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t tile_end = std::min(end, tile + kTile);
    Vec sum[kSums];
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
      exponential(clamped(d), d, ratio, excess);

      // bounded: what -A multiplies. slope: its derivative by logp. rest, rest_slope: what A does not multiply.
      const Vec gains = advantage > zero, loses = advantage < zero;
      Vec high = zero, low = zero, too_far = zero, bounded = ratio, slope = Vec::blendv(ratio, zero, beyond), rest = zero, rest_slope = zero;
      if constexpr (kKind == Kind::clip || kKind == Kind::gspo) {
        Vec r = ratio, cut = beyond;
        if constexpr (kKind == Kind::gspo) {
          const Vec log_s = load(a.sequence_log_ratio + t, count) & live;
          Vec unused;
          exponential(clamped(log_s), log_s, r, unused);
          cut = log_s.abs() > Vec(kClamp);
        }
        high = gains & (r > upper);
        too_far = loses & (r > dual);
        low = loses & (r < lower);
        bounded = Vec::blendv(Vec::blendv(Vec::blendv(r, upper, high), lower, low), dual, too_far);
        slope = Vec::blendv(r, zero, high | low | too_far | cut);
      } else if constexpr (kKind == Kind::geometric_mean) {
        const Vec log_s = load(a.sequence_log_ratio + t, count) & live;
        Vec unused;
        exponential(clamped(log_s), log_s, bounded, unused);
        high = gains & (d > upper);
        low = loses & (d < lower);
        slope = Vec::blendv(bounded, zero, high | low | (log_s.abs() > Vec(kClamp)));
      } else if constexpr (kKind == Kind::reinforce) {
        bounded = logp;
        slope = one;
      } else if constexpr (kKind == Kind::kl_penalty) {
        rest = beta * excess;
        rest_slope = Vec::blendv(beta * (excess + d), zero, beyond);
      } else if constexpr (kKind == Kind::cispo) {
        high = live & (ratio > upper);
        slope = Vec::blendv(ratio, upper, high);
        bounded = slope * logp;
      } else if constexpr (kKind == Kind::sapo) {
        const Vec tau = Vec::blendv(Vec(a.tau_negative), Vec(a.tau_positive), gains);
        const Vec e = at::vec::clamp(tau * (one - ratio), Vec(-80.0f), Vec(80.0f)).exp(), sigmoid = one / (one + e);
        bounded = Vec(4.0f) / tau * sigmoid;
        slope = Vec::blendv(Vec(4.0f) * sigmoid * (e * sigmoid) * ratio, zero, beyond);
      } else if constexpr (kKind == Kind::dro) {
        bounded = logp;
        slope = one;
        rest = Vec(0.5f) * beta * d * d;
        rest_slope = beta * d;
      }
      Vec term = rest - advantage * bounded, grad = rest_slope - advantage * slope;
      if constexpr (kExtras) {
        if (a.correction) {
          const Vec correction = load(a.correction + t, count) & live;
          term = term * correction;
          grad = grad * correction;
          sum[CORRECTION] = sum[CORRECTION] + correction;
        }
        if (a.ref_logp) {
          const Vec k = logp - (load(a.ref_logp + t, count) & live), kl_sum = a.kl_sum ? load(a.kl_sum + t, count) & live : zero;
          const Vec kl = kl_value(a.kl_estimator, k, kl_sum);
          if (a.kl_coef != 0.0f) {
            term = at::vec::fmadd(Vec(a.kl_coef), kl, term);
            grad = at::vec::fmadd(Vec(a.kl_coef), kl_slope(a.kl_gradient, k, kl_sum), grad);
          }
          sum[REF_KL] = sum[REF_KL] + kl;
        }
      }
      if (a.entropy) {
        const Vec entropy = load(a.entropy + t, count) & live;
        term = term - Vec(a.entropy_coef) * entropy;
        sum[ENTROPY] = sum[ENTROPY] + entropy;
      }
      (weight * grad & live).store(a.logp_grad + t, static_cast<int>(count));

      const Vec live_ratio = ratio & live;
      sum[LOSS] = sum[LOSS] + weight * term;
      if constexpr (kKind == Kind::clip || kKind == Kind::gspo || kKind == Kind::geometric_mean) {
        sum[LOW] = sum[LOW] + (one & low);
        sum[DUAL] = sum[DUAL] + (one & too_far);
      }
      sum[HIGH] = sum[HIGH] + (one & high);
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
  sums.total(partial.sums);
  float lanes[Vec::size()];
  smallest.store(lanes);
  for (const float x : lanes) partial.lower(x);
  largest.store(lanes);
  for (const float x : lanes) partial.raise(x);
}

// Tokens [begin, end): writes logp_grad and adds to `partial`.
inline void policy_block(const PolicyArguments& a, int64_t begin, int64_t end, PolicyPartial& partial) {
  const auto run = [&](auto kind) {
    if (a.ref_logp || a.correction) policy_block<decltype(kind)::value, true>(a, begin, end, partial);
    else policy_block<decltype(kind)::value, false>(a, begin, end, partial);
  };
  switch (a.kind) {
    case Kind::clip: return run(std::integral_constant<Kind, Kind::clip>{});
    case Kind::ratio: return run(std::integral_constant<Kind, Kind::ratio>{});
    case Kind::reinforce: return run(std::integral_constant<Kind, Kind::reinforce>{});
    case Kind::kl_penalty: return run(std::integral_constant<Kind, Kind::kl_penalty>{});
    case Kind::gspo: return run(std::integral_constant<Kind, Kind::gspo>{});
    case Kind::cispo: return run(std::integral_constant<Kind, Kind::cispo>{});
    case Kind::sapo: return run(std::integral_constant<Kind, Kind::sapo>{});
    case Kind::geometric_mean: return run(std::integral_constant<Kind, Kind::geometric_mean>{});
    case Kind::dro: return run(std::integral_constant<Kind, Kind::dro>{});
  }
}

// The fields of PolicyStats.
inline void policy_stats(const PolicyPartial& all, bool has_correction, float* stats) {
  const double* p = all.sums;
  const double tokens = std::max(1.0, p[TOKENS]);
  const bool any = p[TOKENS] > 0;
  const double out[kPolicyStats] = {
      p[LOSS], p[LOW] / tokens, p[HIGH] / tokens, p[DUAL] / tokens, p[K1] / tokens, p[K2] / tokens, p[K3] / tokens,
      any ? p[RATIO] / tokens : 1.0, any ? all.ratio_min : 1.0, any ? all.ratio_max : 1.0,
      any ? p[RATIO] * p[RATIO] / p[RATIO_SQUARED] : 0.0, p[CLAMPED] / tokens, p[REF_KL] / tokens, p[ENTROPY] / tokens,
      any && has_correction ? p[CORRECTION] / tokens : 1.0, p[TOKENS]};
  for (int64_t i = 0; i < kPolicyStats; ++i) stats[i] = static_cast<float>(out[i]);
}

}  // namespace
