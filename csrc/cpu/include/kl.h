// Estimators of KL(pi || ref) from the log-probability of one token: k1 = logp - ref, k2 = k1^2 / 2, k3 = expm1(-k1) + k1, |k1|.
#pragma once
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>

#include "exponential.h"

namespace {

using Vec = at::vec::Vectorized<float>;

enum class KlEstimator : int64_t { k1, k2, k3, abs };  // the order of ESTIMATORS in kernels/kl/
constexpr float kMaxLogRatio = 20.0f;                  // inside exponentials

inline Vec token_kl(Vec logp, Vec ref_logp, KlEstimator estimator) {
  const Vec d = logp - ref_logp;
  switch (estimator) {
    case KlEstimator::k1: return d;
    case KlEstimator::k2: return Vec(0.5f) * d * d;
    case KlEstimator::abs: return d.abs();
    case KlEstimator::k3: break;
  }
  const Vec m = expm1_bounded(at::vec::clamp(d.neg(), Vec(-kMaxLogRatio), Vec(kMaxLogRatio)));
  // The difference is rounded by up to half an ulp of 16 = 1e-6, which the exponential would hand on as a relative error: add its first-order effect.
  const Vec t = d - logp, rounding = (logp - (d - t)) - (ref_logp + t);
  const Vec inside = (d > Vec(-kMaxLogRatio)) & (rounding == rounding);  // infinite log-probabilities have no rounding error
  return at::vec::maximum(m + d - Vec::blendv(Vec(0.0f), rounding * m, inside), Vec(0.0f));
}

// out[i] = token_kl(logp[i], ref_logp[i])
inline void token_kl(const float* logp, const float* ref_logp, float* out, int64_t n, KlEstimator estimator) {
  for (int64_t i = 0; i < n; i += Vec::size()) {
    const int64_t count = std::min<int64_t>(Vec::size(), n - i);
    token_kl(Vec::loadu(logp + i, count), Vec::loadu(ref_logp + i, count), estimator).store(out + i, count);
  }
}

}  // namespace
