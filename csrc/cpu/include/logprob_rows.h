// One row of logits at a time: its statistics, and its gradient. Shared by logprob and linear_logprob.
//
//   d_j = (z_j - max z) / T      S = sum e^d      W = sum d e^d      logp = d_y - log S      H = log S - W/S
//   dz_j = (g (1[j=y] - p_j) - h p_j (d_j - W/S)) / T
//
// Shapes   V columns. A block of 1024 columns stays in the first-level cache between the pass for its maximum and the pass for its sums.
// Numerics exp within 1 ulp for d in [-87.3, 0] and exactly 0 below (so is e^-inf, where 0 * -inf is guarded); at most 16 terms are added in
//          float32 before a sum becomes double; what belongs to the label alone is computed in double, where 1 - p_y does not cancel.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#endif

#include "maximum.h"

namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The temperature of every row: one value, or float32 [rows].
class Temperatures {
 public:
  Temperatures(const char* op, double value, const MaybeTensor& per_row) : value_(value) {
    if (!per_row) return;
    per_row_ = per_row->to(at::kFloat).contiguous().view(-1);
    pointer_ = per_row_.const_data_ptr<float>();
    for (int64_t n = 0; n < per_row_.numel(); ++n) TORCH_CHECK_VALUE(pointer_[n] >= std::numeric_limits<float>::min(), op, ": expected temperatures above 0, got ", pointer_[n], " in row ", n);
  }
  double operator[](int64_t n) const { return pointer_ ? pointer_[n] : value_; }

 private:
  double value_;
  Tensor per_row_;
  const float* pointer_ = nullptr;
};

inline int64_t grain(int64_t V) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, V)); }

inline void check_ids(const char* op, const int64_t* ids, int64_t N, int64_t V, int64_t ignore_index) {
  for (int64_t n = 0; n < N; ++n) {
    TORCH_CHECK_INDEX(ids[n] == ignore_index || (ids[n] >= 0 && ids[n] < V), op, ": expected token ids in [0, ", V, ") or ignore_index ", ignore_index, ", got ",
                      ids[n], " in row ", n);
  }
}

inline MaybeTensor defined(const Tensor& tensor) { return tensor.defined() ? MaybeTensor(tensor) : std::nullopt; }

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();
constexpr int64_t kBlock = 1024;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// e^x for x <= 0 (or barely above): 2^n e^r with |r| <= ln2 / 2 and a minimax polynomial of degree 6, relative error 3e-9 before rounding.
// Exactly 0 below the smallest normal number. x is not NaN (rows that hold one never come here).
inline Vec exp_nonpositive(const Vec& x) {
  const Vec log2e(1.44269504f), minus_ln2(-0.693147182f), lowest(-87.33654f), one(1.0f);
#if defined(CPU_CAPABILITY_AVX512)
  const Vec n = (x * log2e).round();
#else
  const Vec magic(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which the low bits of the sum then hold
  const Vec shifted = at::vec::fmadd(x, log2e, magic);
  const Vec n = shifted - magic;
#endif
  const Vec r = at::vec::fmadd(n, minus_ln2, x);
  Vec e = at::vec::fmadd(Vec(0.0013814613f), r, Vec(0.00836871f));
  e = at::vec::fmadd(e, r, Vec(0.04166839f));
  e = at::vec::fmadd(e, r, Vec(0.16666521f));
  e = at::vec::fmadd(e, r, Vec(0.49999994f));
  e = at::vec::fmadd(e, r, one);
  e = at::vec::fmadd(e, r, one);
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, lowest, _CMP_GE_OQ), e, n);
#else
  const auto exponent = at::vec::cast<int32_t>(shifted) << at::vec::Vectorized<int32_t>(23);
  return Vec::blendv(Vec(0.0f), at::vec::cast<float>(at::vec::cast<int32_t>(e) + exponent), x >= lowest);
#endif
}

// The first n <= kLanes values; the other lanes are -inf, which no maximum and no sum sees.
inline Vec load_some(const float* from, int64_t n) {
  return n == kLanes ? Vec::loadu(from) : Vec::set(Vec(-kInfinity), Vec::loadu(from, n), n);
}

// One value per lane -> one value, in a fixed order.
inline double sum_lanes(const Vec& v) {
  float lanes[kLanes];
  v.store(lanes);
  double sums[4] = {};  // four short chains of additions instead of a long one
  for (int64_t i = 0; i < kLanes; i += 4) {
    for (int64_t u = 0; u < 4; ++u) sums[u] += lanes[i + u];
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

struct RowStats {
  float max;   // of the logits; NaN for a row with NaN or +inf, -inf for one that is all -inf
  float sum;   // S; 0 for a row that is all -inf
  float mean;  // W / S, the mean of d under p; 0 unless entropy was asked for
};

template <bool kEntropy>
inline void add_block(const float* z, int64_t n, float max, float inverse_temperature, double& sum, double& weighted) {
  constexpr int64_t kAhead = 2 * kBlock;  // the next blocks come from memory while this one is exponentiated
  const Vec m(max), scale(inverse_temperature), floor(-100.0f);
  Vec s[4] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)}, w[4] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
  const auto add = [&](const Vec& values, int u) {
    const Vec d = (values - m) * scale;
    const Vec e = exp_nonpositive(d);
    s[u] = s[u] + e;
    if constexpr (kEntropy) w[u] = at::vec::fmadd(at::vec::clamp_min(d, floor), e, w[u]);
  };
  int64_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
    for (int u = 0; u < 4; ++u) {
      __builtin_prefetch(z + j + u * kLanes + kAhead);
      add(Vec::loadu(z + j + u * kLanes), u);
    }
  }
  for (int u = 0; j < n; j += kLanes, ++u) add(load_some(z + j, std::min(kLanes, n - j)), u & 3);
  sum += sum_lanes((s[0] + s[1]) + (s[2] + s[3]));
  if constexpr (kEntropy) weighted += sum_lanes((w[0] + w[1]) + (w[2] + w[3]));
}

// Columns [j, j + n) as float32: where they lie, or converted into `buffer`.
template <typename scalar_t>
inline const float* as_float(const scalar_t* z, int64_t n, float* buffer) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    return z;
  } else {
    at::vec::convert(z, buffer, n);
    return buffer;
  }
}

template <bool kEntropy, typename scalar_t>
inline RowStats row_stats(const scalar_t* row, int64_t V, double temperature) {
  const float scale = static_cast<float>(1.0 / temperature);
  float buffer[kBlock];
  float max = -kInfinity;
  double sum = 0.0, weighted = 0.0;
  for (int64_t j = 0; j < V; j += kBlock) {
    const int64_t n = std::min(kBlock, V - j);
    const float* z = as_float(row + j, n, buffer);
    const float here = maximum_of(z, n);
    if (std::isnan(here) || here == kInfinity) return {kNaN, kNaN, kNaN};
    if (here == -kInfinity) continue;
    if (here > max) {
      if (max != -kInfinity) {
        const double shift = (static_cast<double>(max) - here) / temperature, factor = std::exp(shift);
        weighted = factor * (weighted + shift * sum);
        sum *= factor;
      }
      max = here;
    }
    add_block<kEntropy>(z, n, max, scale, sum, weighted);
  }
  return {max, static_cast<float>(sum), sum > 0.0 ? static_cast<float>(weighted / sum) : 0.0f};
}

// logp of a label; -inf for a label on -inf and for a row that is all -inf, NaN for a row that holds NaN or +inf.
inline float row_logp(const RowStats& row, float label_logit, double temperature) {
  if (std::isnan(row.max)) return kNaN;
  if (!(label_logit > -kInfinity)) return -kInfinity;
  return static_cast<float>((static_cast<double>(label_logit) - row.max) / temperature - std::log(static_cast<double>(row.sum)));
}

inline float row_entropy(const RowStats& row) {
  return row.sum == 0.0f ? 0.0f : std::log(row.sum) - row.mean;
}

template <bool kEntropy, bool kCapped>
inline Vec gradient_of(const Vec& z, const Vec& m, const Vec& scale, const Vec& a, const Vec& b, const Vec& inverse_cap) {
  const Vec d = (z - m) * scale;
  Vec out = exp_nonpositive(d);
  if constexpr (kEntropy) {
    out = out * at::vec::fmadd(b, at::vec::clamp_min(d, Vec(-100.0f)), a);
  } else {
    out = out * a;
  }
  if constexpr (kCapped) {
    const Vec tanh = at::vec::maximum(z * inverse_cap, Vec(-1.0f));
    out = out * at::vec::fmadd(Vec(0.0f) - tanh, tanh, Vec(1.0f));
  }
  return out;
}

inline void store_past_cache(const Vec& v, float* to) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm512_stream_ps(to, v);
#elif defined(CPU_CAPABILITY_AVX2)
  _mm256_stream_ps(to, v);
#else
  v.store(to);
#endif
}

inline void finish_stores_past_cache() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

// out_j = e^d_j (a + b d_j), times the softcap's slope; `z` and `out` may be the same. kPastCache is for results larger than the caches.
template <bool kEntropy, bool kCapped, bool kPastCache>
inline void gradient_block(const float* z, float* out, int64_t n, float max, float inverse_temperature, float a, float b, float inverse_cap) {
  constexpr int64_t kAhead = 2 * kBlock;
  const Vec m(max), scale(inverse_temperature), va(a), vb(b), vc(inverse_cap);
  const auto some = [&](int64_t j, int64_t count) {
    gradient_of<kEntropy, kCapped>(load_some(z + j, count), m, scale, va, vb, vc).store(out + j, static_cast<int>(count));
  };
  int64_t j = 0;
  if constexpr (kPastCache) {  // such stores want aligned addresses
    const int64_t off = static_cast<int64_t>((reinterpret_cast<uintptr_t>(out) / sizeof(float)) % kLanes);
    if (off) some(0, j = std::min(n, kLanes - off));
  }
  for (; j + kLanes <= n; j += kLanes) {
    __builtin_prefetch(z + j + kAhead);
    const Vec v = gradient_of<kEntropy, kCapped>(Vec::loadu(z + j), m, scale, va, vb, vc);
    if constexpr (kPastCache) store_past_cache(v, out + j); else v.store(out + j);
  }
  if (j < n) some(j, n - j);
}

// The gradient of one row for upstream gradients g of logp and h of the entropy. `cap` > 0: the logits are softcapped ones, and the
// gradient is that of the logits before the cap. A row that no upstream gradient reaches is zero whatever it holds.
template <bool kPastCache, typename scalar_t>
inline void row_gradient(const scalar_t* row, scalar_t* out, int64_t V, int64_t label, const RowStats& stats, double g, double h, double temperature, double cap) {
  const float label_logit = static_cast<float>(row[label]);
  if (!std::isnan(stats.max) && !(label_logit > -kInfinity)) g = 0.0;  // a label on -inf
  if ((g == 0.0 && h == 0.0) || stats.sum == 0.0f) {
    std::fill(out, out + V, static_cast<scalar_t>(0.0f));
    return;
  }
  if (std::isnan(stats.max)) {
    std::fill(out, out + V, static_cast<scalar_t>(kNaN));
    return;
  }
  const double S = stats.sum, scale = 1.0 / (temperature * S), mean = stats.mean;
  const float a = static_cast<float>((h * mean - g) * scale), b = static_cast<float>(-h * scale);
  const float inverse_temperature = static_cast<float>(1.0 / temperature), inverse_cap = cap > 0.0 ? static_cast<float>(1.0 / cap) : 0.0f;
  const auto blocks = [&](auto entropy, auto capped) {
    float buffer[kBlock];
    for (int64_t j = 0; j < V; j += kBlock) {
      const int64_t n = std::min(kBlock, V - j);
      const float* z = as_float(row + j, n, buffer);
      constexpr bool kDirect = std::is_same_v<scalar_t, float>;
      float* to = buffer;
      if constexpr (kDirect) to = out + j;
      gradient_block<entropy, capped, kPastCache && kDirect>(z, to, n, stats.max, inverse_temperature, a, b, inverse_cap);
      if constexpr (!kDirect) at::vec::convert(static_cast<const float*>(buffer), out + j, n);
    }
  };
  if (cap > 0.0) {
    h != 0.0 ? blocks(std::true_type{}, std::true_type{}) : blocks(std::false_type{}, std::true_type{});
  } else {
    h != 0.0 ? blocks(std::true_type{}, std::false_type{}) : blocks(std::false_type{}, std::false_type{});
  }
  if (label_logit > -kInfinity) {
    const double d = (static_cast<double>(label_logit) - stats.max) / temperature, logp = d - std::log(S);
    const double tanh = cap > 0.0 ? label_logit / cap : 0.0;
    out[label] = static_cast<scalar_t>(static_cast<float>((-g * std::expm1(logp) - h * std::exp(logp) * (d - mean)) / temperature * (1.0 - tanh * tanh)));
  }
}

}  // namespace
