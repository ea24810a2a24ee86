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
#include <utility>

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

// ---- vectors -------------------------------------------------------------------------------------------------------------
template <typename V>
inline void store(const V& x, float* to) { std::memcpy(to, &x, sizeof x); }
inline Lanes larger(const Lanes& a, const Lanes& b) { return a > b ? a : b; }  // a NaN may get lost: it comes again as a weight
inline float largest(const Lanes& x) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return as<Vec>(larger(as<Lanes>(a), as<Lanes>(b))); }, as<Vec>(x));
}
inline float total(const Lanes& x) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, as<Vec>(x));
}

struct Cache {
  int64_t heads, D, S;  // one layer: k [blocks, heads, D, S], v [blocks, heads, S, D]
  int64_t pitch() const { return (S + VL - 1) / VL * VL; }                 // scores of a block
  int64_t scores(int64_t last) const { return (last / S + 1) * pitch(); }  // at most, up to position `last`
};

// The positions first to last of one row, and how their scores are made.
struct Span {
  const int32_t* blocks;
  int64_t first, last;
  float cap;  // 0: none
};

// Query heads of one token: value i, times scale, is at[i * stride] * scale.
struct Query {
  const float* at;
  int64_t stride;
  float scale;
};

// Of a span, what lies in one block: slots from to to.
struct Seen {
  int64_t from, to;
  Seen(const Span& span, int64_t block, int64_t S)
      : from(block == span.first / S ? span.first % S : 0), to(block == span.last / S ? span.last % S + 1 : S) {}
};

// x where `at` + its lane lies in first to last, `other` elsewhere.
inline Lanes where_seen(const Lanes& x, int64_t at, int64_t first, int64_t last, float other) {
  typedef uint32_t Counts __attribute__((vector_size(sizeof(Lanes))));
  Counts lane;
  for (int i = 0; i < VL; ++i) lane[i] = i;
  return lane + static_cast<uint32_t>(at - first) <= static_cast<uint32_t>(last - first) ? x : Lanes{} + other;  // before first it wraps
}

// Scores of one block: q[g] . k[:, s], capped, -inf where not seen, to scores[g][s]; `top` [G] holds the largest of each lane so far. k [D][S], q [G][D].
template <int G, typename T>
inline void block_scores(const T* k, const float* q, const Cache& cache, const Span& span, const Seen& seen, float* scores, int64_t ld, Lanes* top) {
  const int64_t S = cache.S, D = cache.D;
  for (int64_t s = 0; s < S; s += VL) {
    Lanes sum[G] = {};
    for (int64_t d = 0; d < D; ++d) {
      const Lanes key = s + VL <= S ? load<Lanes>(k + d * S + s) : load<Lanes>(k + d * S + s, S - s);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sum[g] += q[g * D + d] * key;
    }
    if (span.cap > 0)
      for (int g = 0; g < G; ++g) cap_scores(reinterpret_cast<float*>(&sum[g]), VL, span.cap);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      if (s < seen.from || s + VL > seen.to) sum[g] = where_seen(sum[g], s, seen.from, seen.to - 1, -std::numeric_limits<float>::infinity());
      top[g] = larger(sum[g], top[g]);
      *reinterpret_cast<Lanes*>(scores + g * ld + s) = sum[g];
    }
  }
}

// Products with V are summed over the blocks of a stretch before they are added to the result, slots 4 i + u apart: short sums err less, and four of them hide
// the latency of an FMA. A stretch begins at a multiple of its own length, so a sum's order does not depend on where else it is cut.
constexpr int64_t STRETCH = 128;  // positions, or one block where that is longer
constexpr int APART = 4;
inline int64_t stretch_blocks(int64_t S) { return std::max<int64_t>(1, STRETCH / S); }

// One key/value head of the blocks of a row.
template <typename T>
struct Pages {
  const T* base;
  const int32_t* blocks;
  int64_t heads, head, size;  // size: values of a head in a block
  const T* operator[](int64_t b) const { return base + (blocks[b] * heads + head) * size; }
};

// out[r] += sum over the positions first to last, of one stretch, of weights[r][position] v[position], for R rows; weights begin with slot 0 of block
// first / S. D is a multiple of V's values, but for what is left behind the last of them.
template <int R, typename V, typename Values>
inline void stretch_values(const Values& v, int64_t S, int64_t pitch, int64_t D, int64_t first, int64_t last, const float* weights, int64_t ld, float* out) {
  constexpr int64_t WIDTH = sizeof(V) / sizeof(float);
  constexpr int MANY = std::max(1, (VL < 16 ? 12 : 24) / (APART * R));  // vectors of one position, whose sums stay in registers
  const auto columns = [&](auto several, int64_t d) {
    constexpr int C = decltype(several)::value;
    V sum[R][C][APART] = {};
    for (int64_t b = first / S; b <= last / S; ++b) {
      const auto* values = v[b] + d;
      const float* weight = weights + (b - first / S) * pitch;
      const int64_t begin = b == first / S ? first % S : 0, end = b == last / S ? last % S + 1 : S;
      const auto add = [&](int64_t s, auto whole) {
#pragma GCC unroll 4
        for (int u = 0; u < APART; ++u)
          if (decltype(whole)::value || (s + u >= begin && s + u < end))  // what is not seen is stepped over, never multiplied by 0: it may be NaN
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) {
              const V value = load<V>(values + (s + u) * D + c * WIDTH);
#pragma GCC unroll 8
              for (int r = 0; r < R; ++r) sum[r][c][u] += weight[r * ld + s + u] * value;
            }
      };
      int64_t s = begin / APART * APART;
      if (s < begin) add(s, std::false_type()), s += APART;
      for (; s + APART <= end; s += APART) add(s, std::true_type());
      if (s < end) add(s, std::false_type());
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        float* to = out + r * D + d + c * WIDTH;
        store(V(load<V>(to) + ((sum[r][c][0] + sum[r][c][1]) + (sum[r][c][2] + sum[r][c][3]))), to);
      }
  };
  int64_t d = 0;
  for (; d + MANY * WIDTH <= D; d += MANY * WIDTH) columns(std::integral_constant<int, MANY>(), d);
  for (; d + WIDTH <= D; d += WIDTH) columns(std::integral_constant<int, 1>(), d);
  for (; d < D; ++d)
    for (int r = 0; r < R; ++r) {
      float sum = 0.0f;
      for (int64_t i = first; i <= last; ++i) sum += weights[r * ld + (i / S - first / S) * pitch + i % S] * to_float(v[i / S][i % S * D + d]);
      out[r * D + d] += sum;
    }
}

// body(R, r): `rows` rows from r = 0 on, R at a time.
template <typename Body>
inline void by_threes(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + 3 <= rows; r += 3) body(std::integral_constant<int, 3>(), r);
  if (rows - r == 2) body(std::integral_constant<int, 2>(), r);
  else if (rows - r == 1) body(std::integral_constant<int, 1>(), r);
}

// The same for any number of rows, and all stretches of the positions first to last; weights begin with slot 0 of block `start`.
template <typename T>
void span_values(const Pages<T>& v, const Cache& cache, int64_t first, int64_t last, int64_t rows, const float* weights, int64_t start, int64_t ld, float* out) {
  const int64_t S = cache.S, D = cache.D, length = stretch_blocks(S) * S;
  for (int64_t from = first; from <= last;) {
    const int64_t to = std::min(last, (from / length + 1) * length - 1);
    by_threes(rows, [&](auto some, int64_t r) {
      constexpr int R = decltype(some)::value;
      const auto call = D % VL ? &stretch_values<R, Eight, Pages<T>> : &stretch_values<R, Lanes, Pages<T>>;
      call(v, S, cache.pitch(), D, from, to, weights + r * ld + (from / S - start) * cache.pitch(), ld, out + r * D);
    });
    from = to + 1;
  }
}

// weight[2 j] in the lower half of the lanes, weight[2 j + 1] in the upper half.
inline Lanes pair_of(const Lanes& weight, int j) {
  Ints from;
  for (int i = 0; i < VL; ++i) from[i] = 2 * j + 2 * i / VL;
  return __builtin_shuffle(weight, from);
}

// attend, where a block is small: heads half as wide as a vector, so that one holds V of two positions, and as many slots as a vector has lanes.
// Everything between K and the result stays in registers but the scores.
template <int G, typename T>
void attend_small(const T* k, const T* v, int64_t heads, int64_t head, const Span& span, const Query& q, float* scores, int64_t ld, float* out) {
  constexpr int64_t D = VL / 2, S = VL;
  constexpr int U = 8 / G;  // eight sums in flight
  const int64_t start = span.first / S, count = span.last / S + 1 - start, first = span.first - start * S, last = span.last - start * S;
  const int32_t* blocks = span.blocks + start;
  const auto at = [&](int64_t b, int g) { return scores + g * ld + b * S; };
  const auto offset = [&](int64_t b) { return (blocks[b] * heads + head) * (D * S); };
  Lanes query[G][D];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) query[g][d] = Lanes{} + q.at[(g * D + d) * q.stride] * q.scale;
  for (int64_t b = 0; b < count; ++b) {
    const T* keys = k + offset(b);
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) __builtin_prefetch(v + offset(b) + d * S);  // read when all scores are there, too far ahead for the processor to see
    Lanes sum[G] = {};
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) {
      const Lanes key = load<Lanes>(keys + d * S);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sum[g] += query[g][d] * key;
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) store(sum[g], at(b, g));
  }
  if (span.cap > 0)
    for (int g = 0; g < G; ++g) cap_scores(scores + g * ld, count * S, span.cap);
  for (const int64_t b : {int64_t{0}, count - 1})
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) store(where_seen(load<Lanes>(at(b, g)), b * S, first, last, -std::numeric_limits<float>::infinity()), at(b, g));
  Lanes top[G], max[G], weights[G] = {}, sum[G][U] = {};
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) top[g] = load<Lanes>(at(0, g));
  for (int64_t b = 1; b < count; ++b)
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) top[g] = larger(load<Lanes>(at(b, g)), top[g]);
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) max[g] = Lanes{} + largest(top[g]);
  const bool more = head + 1 < heads;  // whoever attends to this head goes on to the next
  const auto add = [&](int64_t b, auto masked) {
    const T* values = v + offset(b);
    if (more) {
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) __builtin_prefetch(k + offset(b) + (D + d) * S);
    }
    Lanes weight[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      weight[g] = exp_of_negative(load<Lanes>(at(b, g)) - max[g]);
      weights[g] += weight[g];
    }
#pragma GCC unroll 8
    for (int j = 0; j < VL / 2; ++j) {
      Lanes value = load<Lanes>(values + j * VL);
      if constexpr (decltype(masked)::value) value = where_seen(value, b * S * D + j * VL, first * D, last * D + D - 1, 0.0f);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sum[g][j % U] += pair_of(weight[g], j) * value;
    }
  };
  for (int64_t b = 0; b < count; ++b) {  // what is not seen is replaced, never multiplied by 0: it may be NaN
    if (b + 1 == count || (b == 0 && first > 0)) add(b, std::true_type());
    else add(b, std::false_type());
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 8
    for (int u = 1; u < U; ++u) sum[g][0] += sum[g][u];
    typedef float Half __attribute__((vector_size(sizeof(float) * D)));
    Half halves[2];
    std::memcpy(halves, &sum[g][0], sizeof halves);
    const Half result = (halves[0] + halves[1]) / total(weights[g]);
    std::memcpy(out + g * D, &result, sizeof result);
  }
}

// q [G][D], already scaled, of query heads that share key/value head `head`; out [G][D]. scores holds G rows of `ld`.
template <int G, typename T>
void attend(const T* k, const T* v, const Cache& cache, int64_t head, const Span& span, const float* q, float* scores, int64_t ld, float* out) {
  const int64_t S = cache.S, D = cache.D, pitch = cache.pitch(), start = span.first / S, end = span.last / S + 1;
  const auto offset = [&](int64_t b) { return (static_cast<int64_t>(span.blocks[b]) * cache.heads + head) * S * D; };
  Lanes top[G];
  float max[G];
  for (int g = 0; g < G; ++g) top[g] = Lanes{} - std::numeric_limits<float>::infinity();
  for (int64_t b = start; b < end; ++b) block_scores<G>(k + offset(b), q, cache, span, Seen(span, b, S), scores + (b - start) * pitch, ld, top);
  for (int g = 0; g < G; ++g) max[g] = largest(top[g]);
  float sums[G];
  for (int g = 0; g < G; ++g) {
    Lanes sum = {};
    for (int64_t i = 0; i < (end - start) * pitch; i += VL) {
      Lanes* weight = reinterpret_cast<Lanes*>(scores + g * ld + i);
      *weight = exp_of_negative(*weight - max[g]);
      sum += *weight;
    }
    sums[g] = total(sum);
  }
  std::fill(out, out + G * D, 0.0f);
  span_values(Pages<T>{v, span.blocks, cache.heads, head, S * D}, cache, span.first, span.last, G, scores, start, ld, out);
  for (int g = 0; g < G; ++g)
    for (int64_t d = 0; d < D; ++d) out[g * D + d] /= sums[g];
}

// The same for any number of query heads, four at a time: they share the reads of K and V. scores holds four rows of `ld`, and four heads behind them.
template <typename T>
void attend_group(const T* k, const T* v, const Cache& cache, int64_t head, const Span& span, int64_t group, const Query& query, float* scores, int64_t ld,
                  float* out) {
  const int64_t D = cache.D;
  const bool small = 2 * D == VL && cache.S == VL;
  for (int64_t g = 0; g < group;) {
    const auto run = [&](auto size) {
      constexpr int G = decltype(size)::value;
      const Query mine{query.at + g * D * query.stride, query.stride, query.scale};
      if (small) {
        attend_small<G>(k, v, cache.heads, head, span, mine, scores, ld, out + g * D);
      } else {
        for (int64_t i = 0; i < G * D; ++i) scores[4 * ld + i] = mine.at[i * mine.stride] * mine.scale;
        attend<G>(k, v, cache, head, span, scores + 4 * ld, scores, ld, out + g * D);
      }
      g += G;
    };
    if (group - g >= 4) run(std::integral_constant<int, 4>());
    else if (group - g >= 2) run(std::integral_constant<int, 2>());
    else run(std::integral_constant<int, 1>());
  }
}

}  // namespace
