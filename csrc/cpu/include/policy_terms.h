// The policy term of the loss, its derivative and every statistic, over tokens that lie next to each other. Shared by policy_value_loss and
// linear_policy_loss.
//
//   l_t = correction_t * term_t(kind) + kl_coef * kl_t - entropy_coef * entropy_t      d = logp - old_logp      ratio = e^d
//
// The terms of the kinds and of the KL are those of csrc/shared/objectives.h.
//
// Numerics a token's terms in float32; 16 vectors of them are added in float32, the rest in double.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string_view>
#include <type_traits>

#include "objectives.h"

namespace {

using objectives::Coefficients;
using objectives::Kind;
using objectives::Kl;

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kTile = 16 * Vec::size();
constexpr float kUnbounded = std::numeric_limits<float>::infinity();
constexpr float kClamp = 20.0f;
constexpr int64_t kPolicyStats = 16;  // the fields of PolicyStats (kernels/objective.py)

inline Kind kind_of(std::string_view name) {
#define FUSEDRL_IS(one) if (name == #one) return Kind::one;
  FUSEDRL_KINDS(FUSEDRL_IS)
#undef FUSEDRL_IS
  TORCH_CHECK_VALUE(false, "policy loss: no kind is called ", name);
}

inline Kl kl_of(std::string_view name) {
#define FUSEDRL_IS(one) if (name == #one) return Kl::one;
  FUSEDRL_KL_ESTIMATORS(FUSEDRL_IS)
#undef FUSEDRL_IS
  TORCH_CHECK_VALUE(false, "policy loss: no estimator of the KL is called ", name);
}

// Every number in another type.
template <class To, class From>
Coefficients<To> converted(const Coefficients<From>& from) {
  Coefficients<To> to;
#define FUSEDRL_CONVERT(name) to.name = To(from.name);
  FUSEDRL_COEFFICIENTS(FUSEDRL_CONVERT)
#undef FUSEDRL_CONVERT
  return to;
}

// Which objective, as an op is told: its coefficients are in the order of FUSEDRL_COEFFICIENTS.
struct ObjectiveNames {
  std::string_view kind, kl_estimator, kl_gradient;
  at::ArrayRef<double> coefficients;
};
#define FUSEDRL_OBJECTIVE_SCHEMA "str kind, str kl_estimator, str kl_gradient, float[] coefficients"
#define FUSEDRL_OBJECTIVE_PARAMETERS \
  std::string_view kind, std::string_view kl_estimator, std::string_view kl_gradient, at::ArrayRef<double> coefficients

struct Objective {
  Kind kind;
  Kl kl_estimator, kl_gradient;
  Coefficients<double> coefficients;

  explicit Objective(const ObjectiveNames& names)
      : kind(kind_of(names.kind)), kl_estimator(kl_of(names.kl_estimator)), kl_gradient(kl_of(names.kl_gradient)) {
    constexpr size_t kCount = sizeof(coefficients) / sizeof(double);
    TORCH_CHECK_VALUE(names.coefficients.size() == kCount, "policy loss: expected ", kCount, " coefficients, got ", names.coefficients.size());
    const double* next = names.coefficients.data();
#define FUSEDRL_TAKE(name) coefficients.name = *next++;
    FUSEDRL_COEFFICIENTS(FUSEDRL_TAKE)
#undef FUSEDRL_TAKE
  }
};

struct PolicyArguments {
  // [N]; null: absent, and not read where the weight is 0. sequence_log_ratio: log s of the token's sequence. kl_sum: its sum of logp - ref_logp.
  const float *logp, *old_logp, *advantages, *weights, *entropy, *ref_logp, *correction, *sequence_log_ratio, *kl_sum;
  float* logp_grad;
  const Objective& objective;
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
inline void exponential_and_excess(const Vec& clamped, const Vec& d, Vec& ratio, Vec& excess) {
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

// The numbers of objectives.h: as many tokens as a vector has lanes.
struct Lanes {
  using Number = Vec;
  using Mask = Vec;
  static Vec choose(const Vec& mask, const Vec& a, const Vec& b) { return Vec::blendv(b, a, mask); }
  static Vec magnitude(const Vec& x) { return x.abs(); }
  static Vec exponential(const Vec& x) { return x.exp(); }
  static Vec clamped(const Vec& d) { return at::vec::clamp(d, Vec(-kClamp), Vec(kClamp)); }
  static Vec expand(const Vec& d, Vec& excess) {
    Vec ratio;
    exponential_and_excess(clamped(d), d, ratio, excess);
    return ratio;
  }
};

// kExtras: ref_logp or correction is there.
template <Kind kKind, bool kExtras>
void policy_block(const PolicyArguments& a, int64_t begin, int64_t end, PolicyPartial& partial) {
  const Vec zero(0.0f), one(1.0f), infinity(kUnbounded);
  const Coefficients<float> narrow = converted<float>(a.objective.coefficients);
  const Coefficients<Vec> c = converted<Vec>(narrow);
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
      Vec excess, log_s = zero;
      const Vec ratio = Lanes::expand(d, excess);
      if constexpr (objectives::by_sequence(kKind)) log_s = load(a.sequence_log_ratio + t, count) & live;
      const auto [bounded, slope, rest, rest_slope, high, low, too_far] =
          objectives::policy_term<kKind, Lanes>(c, {advantage, logp, d, ratio, excess, log_s, live, beyond});
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
          const Vec kl = objectives::kl_value<Lanes>(a.objective.kl_estimator, k, kl_sum);
          if (narrow.kl_coef != 0.0f) {
            term = at::vec::fmadd(c.kl_coef, kl, term);
            grad = at::vec::fmadd(c.kl_coef, objectives::kl_slope<Lanes>(a.objective.kl_gradient, k, kl_sum), grad);
          }
          sum[REF_KL] = sum[REF_KL] + kl;
        }
      }
      if (a.entropy) {
        const Vec entropy = load(a.entropy + t, count) & live;
        term = term - c.entropy_coef * entropy;
        sum[ENTROPY] = sum[ENTROPY] + entropy;
      }
      (weight * grad & live).store(a.logp_grad + t, static_cast<int>(count));

      const Vec live_ratio = ratio & live;
      sum[LOSS] = sum[LOSS] + weight * term;
      sum[LOW] = sum[LOW] + (one & low);
      sum[DUAL] = sum[DUAL] + (one & too_far);
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
  switch (a.objective.kind) {
#define FUSEDRL_RUN(name) case Kind::name: return run(std::integral_constant<Kind, Kind::name>{});
    FUSEDRL_KINDS(FUSEDRL_RUN)
#undef FUSEDRL_RUN
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
