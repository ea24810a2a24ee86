// Count, mean and sum of squared deviations: two passes over a block, Chan's merge between blocks, all in double.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

struct Moments {
  double count = 0.0, mean = 0.0, m2 = 0.0;

  void merge(const Moments& other) {
    if (other.count == 0.0) return;
    const double total = count + other.count, shift = other.mean - mean;
    mean += shift * (other.count / total);
    m2 += other.m2 + shift * shift * (count * other.count / total);
    count = total;
  }
  double variance(bool unbiased) const { return m2 / std::max(1.0, unbiased ? count - 1.0 : count); }
};

constexpr int64_t kLanes = 16;  // accumulators, the same in every build: the order of summation depends on n alone

// sum over i < n of term(i)
template <typename Term>
double sum(int64_t n, Term term) {
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lane[l] += term(i + l);
  for (; i < n; ++i) lane[i % kLanes] += term(i);
  double total = 0.0;
  for (double part : lane) total += part;
  return total;
}

// Of x[i] with mask[i] (every one where mask is null). What the mask hides is never used in arithmetic.
inline Moments moments(const float* x, const uint8_t* mask, int64_t n) {
  Moments result;
  if (mask) {
    result.count = sum(n, [&](int64_t i) { return mask[i] ? 1.0 : 0.0; });
    if (result.count == 0.0) return result;
    result.mean = sum(n, [&](int64_t i) { return mask[i] ? static_cast<double>(x[i]) : 0.0; }) / result.count;
    result.m2 = sum(n, [&](int64_t i) { const double d = x[i] - result.mean; return mask[i] ? d * d : 0.0; });
  } else if (n) {
    result.count = static_cast<double>(n);
    result.mean = sum(n, [&](int64_t i) { return static_cast<double>(x[i]); }) / result.count;
    result.m2 = sum(n, [&](int64_t i) { const double d = x[i] - result.mean; return d * d; });
  }
  return result;
}

// out[i] = (x[i] - mean) / sqrt(variance + eps) + add where mask[i] (or mask is null), else 0; out may be x.
inline void whiten(const float* x, const uint8_t* mask, float* out, int64_t n, const Moments& of, bool unbiased, double eps, double add) {
  const double mean = of.mean, rstd = 1.0 / std::sqrt(of.variance(unbiased) + eps);
  if (mask)
    for (int64_t i = 0; i < n; ++i) out[i] = mask[i] ? static_cast<float>((x[i] - mean) * rstd + add) : 0.0f;
  else
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>((x[i] - mean) * rstd + add);
}

}  // namespace
