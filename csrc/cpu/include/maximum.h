// The largest of many values, which one NaN makes NaN.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace {

// -inf of none. Four chains of plain maxima, with NaN collected aside: `at::vec::maximum`, which NaN passes through, costs three times as much.
inline float maximum_of(const float* z, int64_t n) {
  using Vec = at::vec::Vectorized<float>;
  constexpr int64_t lanes = Vec::size();
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  Vec m[4] = {Vec(lowest), Vec(lowest), Vec(lowest), Vec(lowest)}, nan(0.0f);
  const auto see = [&](const Vec& values, int u) {
    m[u] = at::vec::clamp_min(m[u], values);  // m[u] where values hold NaN
    nan = nan | (values != values);
  };
  int64_t j = 0;
  for (; j + 4 * lanes <= n; j += 4 * lanes)
    for (int u = 0; u < 4; ++u) see(Vec::loadu(z + j + u * lanes), u);
  for (int u = 0; j < n; j += lanes, ++u) see(n - j >= lanes ? Vec::loadu(z + j) : Vec::set(Vec(lowest), Vec::loadu(z + j, n - j), n - j), u & 3);
  float values[lanes], nans[lanes];
  at::vec::clamp_min(at::vec::clamp_min(m[0], m[1]), at::vec::clamp_min(m[2], m[3])).store(values);
  nan.store(nans);
  float max = lowest;
  bool any = false;
  for (int64_t i = 0; i < lanes; ++i) {
    max = std::max(max, values[i]);
    any |= std::isnan(nans[i]);  // every bit is set
  }
  return any ? std::numeric_limits<float>::quiet_NaN() : max;
}

}  // namespace
