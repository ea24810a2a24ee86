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
#include <type_traits>
#include <utility>

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

// ---- vectors ---------------------------------------------------------------------------------------------------------------
// The compiler's own vectors, of the width of Vec: `a * b + c` becomes one FMA where there is one, and stays in registers where Vec is an array.
typedef float Lanes __attribute__((vector_size(sizeof(float) * VL), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(sizeof(float) * VL), may_alias));
typedef uint16_t Halves __attribute__((vector_size(sizeof(uint16_t) * VL), aligned(2), may_alias));

template <typename To, typename From>
inline To as(const From& bits) {
  To value;
  static_assert(sizeof value == sizeof bits);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline Lanes widened(const float* from) { return *reinterpret_cast<const Lanes*>(from); }
inline Lanes widened(const c10::BFloat16* from) {
  return as<Lanes>(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Ints) << 16);
}

// Lane j is lane Index::at(j) of a and, from VL on, b.
template <typename Index, size_t... j>
inline Lanes pick(const Lanes& a, const Lanes& b, std::index_sequence<j...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Index::at(j)...);
#else
  return __builtin_shuffle(a, b, Ints{Index::at(j)...});
#endif
}
template <typename Index>
inline Lanes pick(const Lanes& a, const Lanes& b) {
  return pick<Index>(a, b, std::make_index_sequence<size_t(VL)>());
}

// Within every four lanes, as one instruction each has it: a0 b0 a1 b1, a2 b2 a3 b3; a0 a1 b0 b1, a2 a3 b2 b3. Of fours: every other one of a, then of b.
struct Low { static constexpr int at(int j) { return j / 4 * 4 + j % 4 / 2 + j % 2 * int(VL); } };
struct High { static constexpr int at(int j) { return Low::at(j) + 2; } };
struct LowPairs { static constexpr int at(int j) { return j / 4 * 4 + j % 2 + j % 4 / 2 * int(VL); } };
struct HighPairs { static constexpr int at(int j) { return LowPairs::at(j) + 2; } };
struct EvenFours { static constexpr int at(int j) { return j / 4 * 8 + j % 4; } };
struct OddFours { static constexpr int at(int j) { return EvenFours::at(j) + 4; } };

// Lane j of vector i becomes lane i of vector j.
inline void transpose(Lanes (&v)[VL]) {
  static_assert(VL == 4 || VL == 8 || VL == 16);
  Lanes t[VL];
#pragma GCC unroll 4
  for (int i = 0; i < VL; i += 4) {  // squares of four by four
    const Lanes a = pick<Low>(v[i], v[i + 1]), b = pick<High>(v[i], v[i + 1]), c = pick<Low>(v[i + 2], v[i + 3]), d = pick<High>(v[i + 2], v[i + 3]);
    t[i] = pick<LowPairs>(a, c), t[i + 1] = pick<HighPairs>(a, c), t[i + 2] = pick<LowPairs>(b, d), t[i + 3] = pick<HighPairs>(b, d);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {  // then the squares among each other
    if constexpr (VL == 4) {
      v[c] = t[c];
    } else if constexpr (VL == 8) {
      v[c] = pick<EvenFours>(t[c], t[c + 4]), v[c + 4] = pick<OddFours>(t[c], t[c + 4]);
    } else {
      const Lanes even = pick<EvenFours>(t[c], t[c + 4]), odd = pick<OddFours>(t[c], t[c + 4]);
      const Lanes even_below = pick<EvenFours>(t[c + 8], t[c + 12]), odd_below = pick<OddFours>(t[c + 8], t[c + 12]);
      v[c] = pick<EvenFours>(even, even_below), v[c + 8] = pick<OddFours>(even, even_below);
      v[c + 4] = pick<EvenFours>(odd, odd_below), v[c + 12] = pick<OddFours>(odd, odd_below);
    }
  }
}

// ---- y (+)= W x + b ------------------------------------------------------------------------------------------------------
// The sum of every output and token begins with the bias and takes the inputs of a block in order, one rounding each, whichever of the two ways below it
// goes. So a token's bits do not tell how many others were there.

// Many tokens: they are the lanes, and a weight is broadcast.
template <int R, int C>
inline void tile(const float* w, int64_t ld, const float* bias, const float* x, int64_t width, int64_t K, float* y, bool add) {
  Lanes sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sum[r][c] = Lanes{} + (bias ? bias[r] : 0.0f);
  if constexpr (R > 1)  // the next rows: so many streams at once are too many for the hardware to see; into the second cache, they come before they are used
    for (int r = 0; r < R; ++r)
      for (int64_t k = 0; k < K; k += 16) __builtin_prefetch(w + (r + R) * ld + k, 0, 2);
  for (int64_t k = 0; k < K; ++k) {
    Lanes column[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) column[c] = *reinterpret_cast<const Lanes*>(x + k * width + c * VL);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[r][c] += w[r * ld + k] * column[c];
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      Lanes* to = reinterpret_cast<Lanes*>(y + r * width + c * VL);
      *to = add ? *to + sum[r][c] : sum[r][c];
    }
}

template <int C>
inline void strip(const float* w, int64_t ld, const float* bias, int64_t rows, const float* x, int64_t width, int64_t K, float* y, bool add) {
  constexpr int R = C >= 4 ? 4 : 8;  // at least eight sums in flight hide the latency of an FMA
  int64_t r = 0;
  for (; r + R <= rows; r += R) tile<R, C>(w + r * ld, ld, bias ? bias + r : nullptr, x, width, K, y + r * width, add);
  for (; r < rows; ++r) tile<1, C>(w + r * ld, ld, bias ? bias + r : nullptr, x, width, K, y + r * width, add);
}

inline void widen(const c10::BFloat16* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) *reinterpret_cast<Lanes*>(to + i) = widened(from + i);
  for (; i < n; ++i) to[i] = to_float(from[i]);
}

// Narrow weights are widened, some rows at a time, before they meet their tokens.
template <typename T>
inline void strips(const T* w, int64_t ld, const T* bias, int64_t rows, const float* x, int64_t width, int64_t K, float* y, bool add) {
  if constexpr (std::is_same_v<T, float>) {
    int64_t c = 0;
    for (; c + 4 * VL <= width; c += 4 * VL) strip<4>(w, ld, bias, rows, x + c, width, K, y + c, add);
    for (; c + 2 * VL <= width; c += 2 * VL) strip<2>(w, ld, bias, rows, x + c, width, K, y + c, add);
    for (; c < width; c += VL) strip<1>(w, ld, bias, rows, x + c, width, K, y + c, add);
  } else {
    constexpr int64_t SOME = 8;
    alignas(64) float wide[SOME * K_BLOCK], starts[SOME];
    for (int64_t r = 0; r < rows; r += SOME) {
      const int64_t n = std::min(SOME, rows - r);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t k = 0; k < K; k += 32) __builtin_prefetch(w + (r + SOME + i) * ld + k, 0, 2);
        widen(w + (r + i) * ld, K, wide + i * K_BLOCK);
      }
      if (bias) widen(bias + r, n, starts);
      strips<float>(wide, K_BLOCK, bias ? starts : nullptr, n, x, width, K, y + r * width, add);
    }
  }
}

// Few tokens: VL outputs are the lanes, a token's input is broadcast, and the weights are read as they lie, VL rows of one vector at a time.
constexpr int64_t FEW = VL < 8 ? VL : 8;

template <int N, typename T>
inline void few_tokens(const T* w, int64_t ld, const T* bias, const float* x, int64_t width, int64_t K, float* y, bool add) {
  constexpr int PER_WORD = sizeof(float) / sizeof(T);
  Lanes sum[N] = {};
  if (bias)
    for (int r = 0; r < VL; ++r)
      for (int n = 0; n < N; ++n) sum[n][r] = to_float(bias[r]);
  const auto take = [&](const Lanes& weights, int64_t k) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[n] += weights * x[k * width + n];
  };
  int64_t k = 0;
  for (; k + VL * PER_WORD <= K; k += VL * PER_WORD) {
    Lanes words[VL];
#pragma GCC unroll 16
    for (int r = 0; r < VL; ++r) {
      std::memcpy(&words[r], w + r * ld + k, sizeof(Lanes));
      __builtin_prefetch(w + (r + VL) * ld + k, 0, 2);  // as in `tile`
    }
    transpose(words);
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) {
      if constexpr (PER_WORD == 1) {
        take(words[i], k + i);
      } else {
        const Ints pair = as<Ints>(words[i]);
        take(as<Lanes>(pair << 16), k + 2 * i);
        take(as<Lanes>(pair & int32_t(0xffff0000)), k + 2 * i + 1);
      }
    }
  }
  for (; k < K; ++k) {
    Lanes weights;
    for (int r = 0; r < VL; ++r) weights[r] = to_float(w[r * ld + k]);
    take(weights, k);
  }
  Lanes out[VL] = {};
  for (int n = 0; n < N; ++n) out[n] = sum[n];
  transpose(out);
  for (int r = 0; r < VL; ++r) {
    Lanes* to = reinterpret_cast<Lanes*>(y + r * width);
    *to = add ? *to + out[r] : out[r];
  }
}

// w [O, K], x panels of K rows, y panels of O rows.
template <typename T>
void linear(const T* w, const T* bias, int64_t O, int64_t K, const Panels& panels, const float* x, float* y, bool add) {
  const int64_t blocks = (O + ROW_BLOCK - 1) / ROW_BLOCK;
  const int64_t grain = std::max<int64_t>(1, TASK_FLOPS / (2 * ROW_BLOCK * K * std::min(PANEL, panels.lanes()) + 1));
  at::parallel_for(0, blocks * panels.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p = task % panels.count, row = task / panels.count * ROW_BLOCK, rows = std::min(ROW_BLOCK, O - row), width = panels.width(p);
      const int64_t used = panels.used(p);
      // the lanes beyond `used` are zeros; one token beside a zero one takes 3/4 of the time of one alone
      const auto few = used > FEW ? nullptr : used > 4 ? &few_tokens<FEW, T> : used > 2 ? &few_tokens<4, T> : &few_tokens<2, T>;
      const float* from = x + p * PANEL * K;
      float* to = y + p * PANEL * O + row * width;
      const auto each_block = [&](int64_t r, auto&& product) {  // of the inputs of outputs from `row + r` on
        for (int64_t k = 0; k < K; k += K_BLOCK)
          product(w + (row + r) * K + k, bias && k == 0 ? bias + row + r : nullptr, from + k * width, std::min(K_BLOCK, K - k), to + r * width, add || k > 0);
      };
      int64_t r = 0;
      for (; few && r + VL <= rows; r += VL)
        each_block(r, [&](const T* weights, const T* start, const float* inputs, int64_t length, float* sums, bool onto) {
          few(weights, K, start, inputs, width, length, sums, onto);
        });
      each_block(r, [&](const T* weights, const T* start, const float* inputs, int64_t length, float* sums, bool onto) {
        strips(weights, K, start, rows - r, inputs, width, length, sums, onto);
      });
    }
  });
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
