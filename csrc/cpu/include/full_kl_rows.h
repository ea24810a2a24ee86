// One row of logits against one of reference logits: KL over the whole vocabulary, and its gradient. Shared by full_kl and linear_full_kl.
//
//   d_j = (z_j - max z) / T      S = sum e^d      p = e^d / S      the same of the reference: dr, Sr, r      l_j = log p_j - log r_j
//   KL(p || r) = E_p[d - dr] - (log S - log Sr)          JSD = (KL(p || m) + KL(r || m)) / 2,  m = (p + r) / 2
//
// Shapes   V columns, in blocks of kBlock. reverse and forward are one pass: both maxima run along, and the weighted sum is shifted with them.
// Numerics as logprob_rows.h. What lies 1e30 below the row's largest is taken for -inf, as masks of the lowest float32 are meant; it is kept finite (kLowest),
//          so that weight 0 times it is 0. Where p > 0 meets r = 0 the KL is infinite, by flag.
#pragma once

#include "logprob_rows.h"

namespace {

enum class Direction : int64_t { reverse, forward, jsd };  // the order of DIRECTIONS in kernels/full_kl/

constexpr float kLowest = -1e30f;
constexpr float kLn2 = 0.693147181f;

struct KlRow {  // sums are 0 for a row that is all -inf or was not read; all NaN for a pair that holds NaN or +inf
  float max, sum, ref_max, ref_sum;
  float centre;  // what the gradient subtracts: KL(p || r), for jsd KL(p || m); infinite where the KL is
};

inline Vec scaled(const Vec& z, const Vec& max, const Vec& inverse_temperature) {
  return at::vec::clamp_min((z - max) * inverse_temperature, Vec(kLowest));
}

// function(z, ref, n) for each vector of a block, the last one filled up with -inf; z and ref may hold anything but NaN.
template <typename Function>
inline void each_vector(const float* z, const float* ref, int64_t n, const Function& function) {
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t count = std::min(kLanes, n - j);
    function(load_some(z + j, count), load_some(ref + j, count), j, static_cast<int>(count));
  }
}

template <typename scalar_t, typename Function>
inline void each_block(const scalar_t* row, const scalar_t* ref, int64_t V, const Function& function) {
  float buffer[kBlock], ref_buffer[kBlock];
  for (int64_t j = 0; j < V; j += kBlock) {
    const int64_t n = std::min(kBlock, V - j);
    function(as_float(row + j, n, buffer), as_float(ref + j, n, ref_buffer), j, n);
  }
}

struct Cross {  // of KL(own || other)
  float max = -kInfinity, other_max = -kInfinity;
  double sum = 0.0, other_sum = 0.0, weighted = 0.0;  // weighted = sum e^d (d - d_other)
  bool infinite = false, broken = false;              // own > 0 where other = 0; NaN or +inf among them

  double kl() const {
    if (broken) return kNaN;
    if (infinite) return kInfinity;
    return sum == 0.0 ? 0.0 : std::max(0.0, weighted / sum - (std::log(sum) - std::log(other_sum)));
  }
};

template <typename scalar_t>
inline Cross cross(const scalar_t* own, const scalar_t* other, int64_t V, double temperature) {
  Cross at;
  const Vec scale(static_cast<float>(1.0 / temperature)), nothing(kLowest), zero(0.0f), one(1.0f);
  const auto rise = [&](float& max, float block) {  // how much d falls
    const float before = max;
    max = std::max(max, block);
    return before == -kInfinity ? 0.0 : (static_cast<double>(before) - max) / temperature;
  };
  each_block(own, other, V, [&](const float* z, const float* x, int64_t, int64_t n) {
    const float here = maximum_of(z, n), there = maximum_of(x, n);
    at.broken |= std::isnan(here) || std::isnan(there) || here == kInfinity || there == kInfinity;
    if (at.broken) return;
    const double shift = rise(at.max, here), other_shift = rise(at.other_max, there), factor = std::exp(shift);
    at.weighted = factor * (at.weighted + (shift - other_shift) * at.sum);
    at.sum *= factor;
    at.other_sum *= std::exp(other_shift);
    const Vec max(at.max == -kInfinity ? 0.0f : at.max), other_max(at.other_max == -kInfinity ? 0.0f : at.other_max);
    Vec s = zero, so = zero, w = zero, missing = zero;
    each_vector(z, x, n, [&](const Vec& zs, const Vec& xs, int64_t, int) {
      const Vec d = scaled(zs, max, scale), d_other = scaled(xs, other_max, scale), e = exp_nonpositive(d);
      s = s + e;
      so = so + exp_nonpositive(d_other);
      w = at::vec::fmadd(e, d - d_other, w);
      missing = missing + Vec::blendv(zero, one, (d > nothing) & (d_other == nothing));
    });
    at.sum += sum_lanes(s);
    at.other_sum += sum_lanes(so);
    at.weighted += sum_lanes(w);
    at.infinite |= sum_lanes(missing) > 0.0;
  });
  return at;
}

// log(p / m) and log(r / m) from l = log p - log r.
inline std::pair<Vec, Vec> against_mixture(const Vec& l) {
  const Vec rest = Vec(kLn2) - exp_nonpositive(l.abs().neg()).log1p();
  return {rest - at::vec::clamp_min(l.neg(), Vec(0.0f)), rest - at::vec::clamp_min(l, Vec(0.0f))};
}

inline float log_ratio_of_sums(const KlRow& stats) {
  return static_cast<float>(std::log(static_cast<double>(stats.sum)) - std::log(static_cast<double>(stats.ref_sum)));
}

// The KL of one row, and what its gradient needs.
template <typename scalar_t>
inline float row_kl(const scalar_t* row, const scalar_t* ref, int64_t V, double temperature, Direction direction, KlRow& stats) {
  if (direction != Direction::jsd) {
    const bool reverse = direction == Direction::reverse;
    const Cross at = reverse ? cross(row, ref, V, temperature) : cross(ref, row, V, temperature);
    const float kl = static_cast<float>(at.kl()), sum = static_cast<float>(at.sum), other_sum = static_cast<float>(at.other_sum);
    stats = at.broken ? KlRow{kNaN, kNaN, kNaN, kNaN, kNaN} : reverse ? KlRow{at.max, sum, at.other_max, other_sum, kl} : KlRow{at.other_max, other_sum, at.max, sum, kl};
    return kl;
  }
  const RowStats p = row_stats<false>(row, V, temperature), r = row_stats<false>(ref, V, temperature);
  stats = {p.max, p.sum, r.max, r.sum, 0.0f};
  if (std::isnan(p.max) || std::isnan(r.max)) {
    stats = {kNaN, kNaN, kNaN, kNaN, kNaN};
    return kNaN;
  }
  if (p.sum == 0.0f || r.sum == 0.0f) return p.sum == r.sum ? 0.0f : 0.5f * kLn2;
  const Vec scale(static_cast<float>(1.0 / temperature)), max(p.max), ref_max(r.max), offset(log_ratio_of_sums(stats));
  double of_p = 0.0, of_r = 0.0;
  each_block(row, ref, V, [&](const float* z, const float* x, int64_t, int64_t n) {
    Vec sum_p(0.0f), sum_r(0.0f);
    each_vector(z, x, n, [&](const Vec& zs, const Vec& xs, int64_t, int) {
      const Vec d = scaled(zs, max, scale), dr = scaled(xs, ref_max, scale);
      const auto [log_p, log_r] = against_mixture((d - dr) - offset);
      sum_p = at::vec::fmadd(exp_nonpositive(d), log_p, sum_p);
      sum_r = at::vec::fmadd(exp_nonpositive(dr), log_r, sum_r);
    });
    of_p += sum_lanes(sum_p);
    of_r += sum_lanes(sum_r);
  });
  of_p /= p.sum;
  of_r /= r.sum;
  stats.centre = static_cast<float>(of_p);
  return static_cast<float>(std::clamp(0.5 * (of_p + of_r), 0.0, static_cast<double>(kLn2)));
}

// g times the gradient; `row` and `out` may be the same. Zero where the KL is infinite or a distribution is empty, and where g is 0.
template <typename scalar_t>
inline void row_kl_gradient(const scalar_t* row, const scalar_t* ref, scalar_t* out, int64_t V, double temperature, Direction direction, const KlRow& stats, double g) {
  const bool none = g == 0.0 || stats.sum == 0.0f || stats.ref_sum == 0.0f || stats.centre == kInfinity;
  if (none || std::isnan(stats.max)) {
    std::fill(out, out + V, static_cast<scalar_t>(none ? 0.0f : kNaN));
    return;
  }
  const Vec scale(static_cast<float>(1.0 / temperature)), max(stats.max), ref_max(stats.ref_max);
  const double log_ratio = log_ratio_of_sums(stats), half = direction == Direction::jsd ? 0.5 : 1.0;
  const Vec a(static_cast<float>(half * g / (temperature * stats.sum))), b(static_cast<float>(g / (temperature * stats.ref_sum)));
  const Vec offset(static_cast<float>(log_ratio)), centre(stats.centre), both(static_cast<float>(log_ratio + stats.centre));
  float result[kBlock];
  const auto blocks = [&](auto gradient) {
    each_block(row, ref, V, [&](const float* z, const float* x, int64_t begin, int64_t n) {
      each_vector(z, x, n, [&](const Vec& zs, const Vec& xs, int64_t j, int count) {
        gradient(scaled(zs, max, scale), scaled(xs, ref_max, scale)).store(result + j, count);
      });
      if constexpr (std::is_same_v<scalar_t, float>) {
        std::copy(result, result + n, out + begin);
      } else {
        at::vec::convert(static_cast<const float*>(result), out + begin, n);
      }
    });
  };
  switch (direction) {
    case Direction::reverse: return blocks([&](const Vec& d, const Vec& dr) { return exp_nonpositive(d) * a * ((d - dr) - both); });
    case Direction::forward: return blocks([&](const Vec& d, const Vec& dr) { return exp_nonpositive(d) * a - exp_nonpositive(dr) * b; });
    case Direction::jsd: return blocks([&](const Vec& d, const Vec& dr) { return exp_nonpositive(d) * a * (against_mixture((d - dr) - offset).first - centre); });
  }
}

}  // namespace
