// Attention of one token over its row of the paged KV cache: what decode_step and paged_attention both run.
//
// Layout   one layer's k [blocks][heads][D][S], so that the scores of a block are vector loads over its positions, and v [blocks][heads][S][D].
// Numerics float32. Every sum has one order, which depends on D, S and the token's own span alone: not on companions or threads.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <c10/util/Half.h>

#include <cstring>
#include <limits>
#include <type_traits>

#include "panels.h"

namespace {

inline float to_float(c10::Half x) { return static_cast<float>(x); }

// ---- loads ---------------------------------------------------------------------------------------------------------------
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));

// As many consecutive values as V has, widened to float. Through memcpy: a vector type loses its attributes as a template's argument.
template <typename V>
inline V load(const float* p) {
  V value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
template <typename V, typename Word>
inline V widen(const at::BFloat16*, Word word) {
  word <<= 16;
  V value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}
template <typename V, typename Word>
inline V widen(const at::Half*, Word word) {  // in plain integers: not every target has an instruction for it
  constexpr uint32_t INFINITY_BITS = 0x7c00u << 13;
  Word bits = (word & 0x7fff) << 13;
  const Word special = Word(bits >= INFINITY_BITS) & 0x7f800000u;
  V value;
  std::memcpy(&value, &bits, sizeof value);
  value *= 0x1p112f;  // between the biases of the two exponents: exact, for subnormal numbers too
  std::memcpy(&bits, &value, sizeof value);
  bits |= special | (word & 0x8000) << 16;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <typename V, typename T>
inline V load(const T* p) {
  typedef uint16_t LanesBits __attribute__((vector_size(2 * VL)));
  typedef uint32_t LanesWord __attribute__((vector_size(4 * VL)));
  typedef uint16_t EightBits __attribute__((vector_size(16)));
  typedef uint32_t EightWord __attribute__((vector_size(32)));
  constexpr bool LANES = sizeof(V) == sizeof(Lanes);
  std::conditional_t<LANES, LanesBits, EightBits> bits;
  std::memcpy(&bits, p, sizeof bits);
  return widen<V>(p, __builtin_convertvector(bits, std::conditional_t<LANES, LanesWord, EightWord>));
}
template <typename V, typename T>
inline V load(const T* p, int64_t count) {
  float padded[sizeof(V) / sizeof(float)] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = to_float(p[i]);
  return load<V>(padded);
}

// scores[g][s] = q[g] . k[:, s] of one block; k [D][S], q [G][D]. Writes whole vectors, so up to the next multiple of VL.
template <int G, typename T>
inline void block_scores(const T* k, const float* q, int64_t D, int64_t S, float* scores, int64_t ld) {
  for (int64_t s = 0; s < S; s += VL) {
    Lanes sum[G] = {};
    for (int64_t d = 0; d < D; ++d) {
      const Lanes key = s + VL <= S ? load<Lanes>(k + d * S + s) : load<Lanes>(k + d * S + s, S - s);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sum[g] += q[g * D + d] * key;
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) *reinterpret_cast<Lanes*>(scores + g * ld + s) = sum[g];
  }
}

// out[g] += sum over `count` positions of weights[g][s] v[s]; v [count][D].
template <int G, typename T>
inline void block_values(const T* v, const float* weights, int64_t ld, int64_t count, int64_t D, float* out) {
  constexpr int U = 8 / G;  // eight sums in flight
  for (int64_t d = 0; d + 8 <= D; d += 8) {
    Eight sum[G][U] = {};
    int64_t s = 0;
    for (; s + U <= count; s += U) {
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        const Eight value = load<Eight>(v + (s + u) * D + d);
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) sum[g][u] += weights[g * ld + s + u] * value;
      }
    }
    for (; s < count; ++s) {
      const Eight value = load<Eight>(v + s * D + d);
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) sum[g][0] += weights[g * ld + s] * value;
    }
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 8
      for (int u = 1; u < U; ++u) sum[g][0] += sum[g][u];
      *reinterpret_cast<Eight*>(out + g * D + d) += sum[g][0];
    }
  }
  for (int64_t d = D / 8 * 8; d < D; ++d)
    for (int g = 0; g < G; ++g)
      for (int64_t s = 0; s < count; ++s) out[g * D + d] += weights[g * ld + s] * to_float(v[s * D + d]);
}

// x = exp(x) for x <= 0, within 1.01 ulp; 0 below -87, where it is no normal number; NaN stays NaN. Inlined, half the time of Vec::exp.
inline void exp_of_negative(Lanes& x) {
  typedef int32_t Bits __attribute__((vector_size(sizeof(Lanes))));
  constexpr float ROUND = 0x1.8p23f;                       // added and taken off again, it rounds to an integer n, which its low bits hold
  const Lanes shifted = x * 0x1.715476p0f + ROUND, n = shifted - ROUND;
  const Lanes r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // x - n ln 2, exact in its first half
  Lanes p = r * 0x1.6850e4p-10f + 0x1.123bccp-7f;
  p = p * r + 0x1.555b98p-5f;
  p = p * r + 0x1.55548ep-3f;
  p = p * r + 0x1.fffff8p-2f;
  p = (p * r) * r + r + 1.0f;
  Bits exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent << 23) + (127 << 23);
  Lanes scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  x = x < -87.0f ? Lanes{} : p * scale;
}

// exp(x - max) in place; the sum. Masked scores are -inf and come out as 0.
inline float softmax_weights(float* scores, int64_t size) {
  Vec top = Vec::loadu(scores);
  for (int64_t i = VL; i < size; i += VL) top = at::vec::maximum(top, Vec::loadu(scores + i));
  const float max = at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, top);
  Lanes sum = {};
  for (int64_t i = 0; i < size; i += VL) {
    Lanes weight = *reinterpret_cast<const Lanes*>(scores + i) - max;
    exp_of_negative(weight);
    *reinterpret_cast<Lanes*>(scores + i) = weight;
    sum += weight;
  }
  Vec total;
  std::memcpy(&total, &sum, sizeof total);
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, total);
}

struct Cache {
  int64_t heads, D, S;  // one layer: k [blocks, heads, D, S], v [blocks, heads, S, D]
  int64_t pitch() const { return (S + VL - 1) / VL * VL; }                     // scores of a block
  int64_t scores(int64_t last) const { return (last / S + 1) * pitch(); }  // at most, up to position `last`
};

// The positions first to last of one row, and how their scores are made.
struct Span {
  const int32_t* blocks;
  int64_t first, last;
  float cap;  // 0: none
};

// q [G][D], already scaled, of query heads that share key/value head `head`; out [G][D]. scores holds G rows of `ld`.
template <int G, typename T>
void attend(const T* k, const T* v, const Cache& cache, int64_t head, const Span& span, const float* q, float* scores, int64_t ld, float* out) {
  const int64_t S = cache.S, D = cache.D, pitch = cache.pitch(), start = span.first / S, count = span.last / S - start + 1, size = count * pitch;
  const auto offset = [&](int64_t b) { return (static_cast<int64_t>(span.blocks[start + b]) * cache.heads + head) * S * D; };
  const auto mask = [&](int64_t from, int64_t to) {
    for (int g = 0; g < G; ++g) std::fill(scores + g * ld + from, scores + g * ld + to, -std::numeric_limits<float>::infinity());
  };
  for (int64_t b = 0; b < count; ++b) {
    block_scores<G>(k + offset(b), q, D, S, scores + b * pitch, ld);
    for (int g = 0; g < G && span.cap > 0; ++g) cap_scores(scores + g * ld + b * pitch, pitch, span.cap);
    if (pitch > S) mask(b * pitch + S, (b + 1) * pitch);
  }
  mask(0, span.first % S);
  mask((count - 1) * pitch + span.last % S + 1, size);
  float sums[G];
  for (int g = 0; g < G; ++g) sums[g] = softmax_weights(scores + g * ld, size);
  std::fill(out, out + G * D, 0.0f);
  for (int64_t b = 0; b < count; ++b) {  // unseen slots are stepped over, never multiplied by 0: they may hold NaN
    const int64_t from = b == 0 ? span.first % S : 0, to = b + 1 == count ? span.last % S + 1 : S;
    block_values<G>(v + offset(b) + from * D, scores + b * pitch + from, ld, to - from, D, out);
  }
  for (int g = 0; g < G; ++g)
    for (int64_t d = 0; d < D; ++d) out[g * D + d] /= sums[g];
}

// The same for any number of query heads, four at a time: they share the reads of K and V. scores holds four rows of `ld`.
template <typename T>
void attend_group(const T* k, const T* v, const Cache& cache, int64_t head, const Span& span, int64_t group, const float* q, float* scores, int64_t ld,
                  float* out) {
  for (int64_t g = 0; g < group;) {
    const auto run = [&](auto size) {
      constexpr int G = decltype(size)::value;
      attend<G>(k, v, cache, head, span, q + g * cache.D, scores, ld, out + g * cache.D);
      g += G;
    };
    if (group - g >= 4) run(std::integral_constant<int, 4>());
    else if (group - g >= 2) run(std::integral_constant<int, 2>());
    else run(std::integral_constant<int, 1>());
  }
}

}  // namespace
