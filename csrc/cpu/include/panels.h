// Activations of a decoder in panels of up to 64 tokens, [feature][token], and the operations on them.
//
// Tokens are the vector lanes: a norm needs no sum across lanes, RoPE and SwiGLU are plain vector code, and the weights, [out][in] as they are
// trained, are read in order without packing or copies. Everything is float32; a sum has one order, whatever the panel's width or the threads.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t VL = Vec::size();
constexpr int64_t PANEL = 64;      // tokens: four AVX-512 vectors, so that a 4 x 4 tile of sums stays in registers
constexpr int64_t ROW_BLOCK = 32;  // weight rows of one task
constexpr int64_t K_BLOCK = 256;   // inputs of one partial sum: 64 KB of a panel, and shorter sums err less
constexpr int64_t TASK_FLOPS = 1 << 20;  // below this a hand-over to another thread costs more than it saves

// ---- panels ------------------------------------------------------------------------------------------------------------
struct Panels {
  int64_t tokens, count;
  explicit Panels(int64_t n) : tokens(n), count((n + PANEL - 1) / PANEL) {}
  int64_t width(int64_t p) const { return p + 1 < count ? PANEL : (tokens - p * PANEL + VL - 1) / VL * VL; }
  int64_t used(int64_t p) const { return std::min(PANEL, tokens - p * PANEL); }
  int64_t lanes() const { return count ? (count - 1) * PANEL + width(count - 1) : 0; }
};

inline float to_float(float x) { return x; }
inline float to_float(c10::BFloat16 x) { return static_cast<float>(x); }

// ---- y (+)= W x + b ------------------------------------------------------------------------------------------------------
// The compiler's own vectors, of the width of Vec: `a * b + c` becomes one FMA where there is one, and stays in registers where Vec is an array.
typedef float Lanes __attribute__((vector_size(sizeof(float) * VL), aligned(4), may_alias));

template <int R, int C, typename T>
inline void tile(const T* w, int64_t ld, const T* bias, const float* x, int64_t width, int64_t K, float* y, bool add) {
  Lanes sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sum[r][c] = Lanes{} + (bias ? to_float(bias[r]) : 0.0f);
  for (int64_t k = 0; k < K; ++k) {
    Lanes column[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) column[c] = *reinterpret_cast<const Lanes*>(x + k * width + c * VL);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float weight = to_float(w[r * ld + k]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[r][c] += weight * column[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      Lanes* to = reinterpret_cast<Lanes*>(y + r * width + c * VL);
      *to = add ? *to + sum[r][c] : sum[r][c];
    }
}

template <int C, typename T>
inline void strip(const T* w, int64_t ld, const T* bias, int64_t rows, const float* x, int64_t width, int64_t K, float* y, bool add) {
  constexpr int R = C >= 4 ? 4 : 8;  // at least eight sums in flight hide the latency of an FMA
  int64_t r = 0;
  for (; r + R <= rows; r += R) tile<R, C>(w + r * ld, ld, bias ? bias + r : nullptr, x, width, K, y + r * width, add);
  for (; r < rows; ++r) tile<1, C>(w + r * ld, ld, bias ? bias + r : nullptr, x, width, K, y + r * width, add);
}

// w [O, K], x panels of K rows, y panels of O rows.
template <typename T>
void linear(const T* w, const T* bias, int64_t O, int64_t K, const Panels& panels, const float* x, float* y, bool add) {
  const int64_t blocks = (O + ROW_BLOCK - 1) / ROW_BLOCK;
  const int64_t grain = std::max<int64_t>(1, TASK_FLOPS / (2 * ROW_BLOCK * K * std::min(PANEL, panels.lanes()) + 1));
  at::parallel_for(0, blocks * panels.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p = task % panels.count, row = task / panels.count * ROW_BLOCK, rows = std::min(ROW_BLOCK, O - row), width = panels.width(p);
      const float* from = x + p * PANEL * K;
      float* to = y + p * PANEL * O + row * width;
      for (int64_t k = 0; k < K; k += K_BLOCK) {
        const T* weights = w + row * K + k;
        const T* start = bias && k == 0 ? bias + row : nullptr;
        const int64_t length = std::min(K_BLOCK, K - k);
        const bool onto = add || k > 0;
        int64_t c = 0;
        for (; c + 4 * VL <= width; c += 4 * VL) strip<4>(weights, K, start, rows, from + k * width + c, width, length, to + c, onto);
        for (; c + 2 * VL <= width; c += 2 * VL) strip<2>(weights, K, start, rows, from + k * width + c, width, length, to + c, onto);
        for (; c < width; c += VL) strip<1>(weights, K, start, rows, from + k * width + c, width, length, to + c, onto);
      }
    }
  });
}

// ---- vectors ---------------------------------------------------------------------------------------------------------------
typedef int32_t Ints __attribute__((vector_size(sizeof(Lanes)), may_alias));

template <typename To, typename From>
inline To as(const From& bits) {
  To value;
  static_assert(sizeof value == sizeof bits);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// exp(x) for x <= 0, within 1.01 ulp; 0 below -87, where it is no normal number; NaN stays NaN. Inlined, half the time of Vec::exp.
inline Lanes exp_of_negative(const Lanes& x) {
  constexpr float ROUND = 0x1.8p23f;                       // added and taken off again, it rounds to an integer n, which its low bits hold
  const Lanes shifted = x * 0x1.715476p0f + ROUND, n = shifted - ROUND;
  const Lanes r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // x - n ln 2, exact in its first half
  Lanes p = r * 0x1.6850e4p-10f + 0x1.123bccp-7f;
  p = p * r + 0x1.555b98p-5f;
  p = p * r + 0x1.55548ep-3f;
  p = p * r + 0x1.fffff8p-2f;
  p = (p * r) * r + r + 1.0f;
  return x < -87.0f ? Lanes{} : p * as<Lanes>((as<Ints>(shifted) << 23) + (127 << 23));
}

// ---- what lies between the linear layers, on [rows][width] of one panel ---------------------------------------------------
// Norm of `rows` values of every token, times offset + weight.
template <typename T>
void rms_norm(const float* x, const T* weight, int64_t rows, int64_t width, float eps, float offset, float* y) {
  for (int64_t c = 0; c < width; c += VL) {
    Vec squares(0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      const Vec value = Vec::loadu(x + r * width + c);
      squares = at::vec::fmadd(value, value, squares);
    }
    const Vec scale = Vec(1.0f) / (squares / Vec(static_cast<float>(rows)) + Vec(eps)).sqrt();
    for (int64_t r = 0; r < rows; ++r) (Vec::loadu(x + r * width + c) * scale * Vec(to_float(weight[r]) + offset)).store(y + r * width + c);
  }
}

// LayerNorm of `rows` values of every token.
template <typename T>
void layer_norm(const float* x, const T* weight, const T* bias, int64_t rows, int64_t width, float eps, float* y) {
  const Vec count(static_cast<float>(rows));
  for (int64_t c = 0; c < width; c += VL) {
    Vec mean(0.0f), squares(0.0f);
    for (int64_t r = 0; r < rows; ++r) mean = mean + Vec::loadu(x + r * width + c);
    mean = mean / count;
    for (int64_t r = 0; r < rows; ++r) {
      const Vec value = Vec::loadu(x + r * width + c) - mean;
      squares = at::vec::fmadd(value, value, squares);
    }
    const Vec scale = Vec(1.0f) / (squares / count + Vec(eps)).sqrt();
    for (int64_t r = 0; r < rows; ++r)
      at::vec::fmadd((Vec::loadu(x + r * width + c) - mean) * scale, Vec(to_float(weight[r])), Vec(to_float(bias[r]))).store(y + r * width + c);
  }
}

// Rotate-half RoPE of one head, [D][width]; cos and sin [D / 2][width].
inline void rotate(float* x, const float* cos, const float* sin, int64_t D, int64_t width) {
  const int64_t half = D / 2 * width;
  for (int64_t i = 0; i < half; i += VL) {
    const Vec first = Vec::loadu(x + i), second = Vec::loadu(x + half + i), c = Vec::loadu(cos + i), s = Vec::loadu(sin + i);
    (first * c - second * s).store(x + i);
    (second * c + first * s).store(x + half + i);
  }
}

// cap tanh(x / cap) in place.
inline void cap_scores(float* x, int64_t size, float cap) {
  for (int64_t i = 0; i < size; i += VL) ((Vec::loadu(x + i) * Vec(1.0f / cap)).tanh() * Vec(cap)).store(x + i);
}

enum class Activation { SILU, GELU_TANH, GELU };

inline Vec activate(Vec x, Activation by) {
  if (by == Activation::SILU) return x / (Vec(1.0f) + x.neg().exp());
  if (by == Activation::GELU) return Vec(0.5f) * x * (Vec(1.0f) + (x * Vec(0.7071067811865476f)).erf());
  const Vec inner = Vec(0.7978845608028654f) * (x + Vec(0.044715f) * x * x * x);
  return Vec(0.5f) * x * (Vec(1.0f) + inner.tanh());
}

// The activation of `size` values; gated, times the `size` values behind them.
inline void activate(const float* x, int64_t size, Activation by, bool gated, float* y) {
  for (int64_t i = 0; i < size; i += VL) {
    const Vec value = activate(Vec::loadu(x + i), by);
    (gated ? value * Vec::loadu(x + size + i) : value).store(y + i);
  }
}

}  // namespace
