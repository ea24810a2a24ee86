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

inline Moments moments(const float* x, int64_t n) {
  if (n == 0) return {};
  const double mean = sum(n, [=](int64_t i) { return static_cast<double>(x[i]); }) / static_cast<double>(n);
  return {static_cast<double>(n), mean, sum(n, [=](int64_t i) { const double d = x[i] - mean; return d * d; })};
}

// Of x[i] with mask[i]. `scratch` [n] holds what is summed, 0 where masked: a select in float32 vectorises, a masked sum in double does not.
inline Moments moments(const float* x, const uint8_t* mask, float* scratch, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += mask[i] != 0;
  if (count == 0) return {};
  for (int64_t i = 0; i < n; ++i) scratch[i] = mask[i] ? x[i] : 0.0f;
  const double mean = sum(n, [=](int64_t i) { return static_cast<double>(scratch[i]); }) / static_cast<double>(count);
  const float high = static_cast<float>(mean), low = static_cast<float>(mean - high);
  for (int64_t i = 0; i < n; ++i) {
    const float d = (x[i] - high) - low;
    scratch[i] = mask[i] ? d : 0.0f;
  }
  return {static_cast<double>(count), mean, sum(n, [=](int64_t i) { const double d = scratch[i]; return d * d; })};
}

// out[i] = (x[i] - mean) / sqrt(variance + eps) + add where mask[i] (or mask is null), else 0; out may be x.
inline void whiten(const float* x, const uint8_t* mask, float* out, int64_t n, const Moments& of, bool unbiased, double eps, double add) {
  const float rstd = static_cast<float>(1.0 / std::sqrt(of.variance(unbiased) + eps)), shift = static_cast<float>(add);
  const float high = static_cast<float>(of.mean), low = static_cast<float>(of.mean - high);  // the difference to a large mean stays exact
  if (mask) {
#pragma omp simd  // element by element, so that out == x is no obstacle
    for (int64_t i = 0; i < n; ++i) {
      const float whitened = ((x[i] - high) - low) * rstd + shift;
      out[i] = mask[i] ? whitened : 0.0f;
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = ((x[i] - high) - low) * rstd + shift;
  }
}

}  // namespace
