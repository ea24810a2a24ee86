// Attention of consecutive tokens of one row over the paged KV cache, a tile of them at a time: a prompt's tokens share the reads of K and V.
//
// Numerics every sum has the order that `attend` has (paged.h), so a token's bits do not tell whether it came alone.
// Work     keys are copied to [D][KEYS] and values to [STRETCH][D], both float32, before they meet all rows of the tile: a row is a query head of a token.
#pragma once

#include <vector>

#include "paged.h"

namespace {

constexpr int KEY_VECTORS = VL < 16 ? 2 : 4, SCORE_ROWS = VL < 16 ? 4 : 6;  // a tile of sums that stays in registers
constexpr int64_t KEYS = KEY_VECTORS * VL;
constexpr int64_t TILE_TOKENS = 16, TILE_BYTES = 1 << 20;  // of scores, which stay in the second cache

// Whether a cache's blocks can be cut so, and how many tokens with at most `ld` scores a row.
inline bool tiles(const Cache& cache) { return cache.S % VL == 0 && cache.D % VL == 0; }
inline int64_t tile_tokens(int64_t group, int64_t ld) {
  return std::max<int64_t>(1, std::min<int64_t>(TILE_TOKENS, TILE_BYTES / (static_cast<int64_t>(sizeof(float)) * group * ld)));
}

// scores[r][i] = q[r] . keys[:, i]; keys [D][KEYS], q [R][D].
template <int R>
inline void tile_scores(const float* keys, const float* q, int64_t D, float* scores, int64_t ld) {
  Lanes sum[R][KEY_VECTORS] = {};
  for (int64_t d = 0; d < D; ++d) {
    Lanes key[KEY_VECTORS];
#pragma GCC unroll 4
    for (int c = 0; c < KEY_VECTORS; ++c) key[c] = load<Lanes>(keys + d * KEYS + c * VL);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < KEY_VECTORS; ++c) sum[r][c] += q[r * D + d] * key[c];
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < KEY_VECTORS; ++c) store(sum[r][c], scores + r * ld + c * VL);
}

// Tokens at `position` and behind it in the row of `blocks`, each of which sees the `window` positions up to its own (0: all).
struct TileTokens {
  const int32_t* blocks;
  int64_t position, count, window;
  float cap;
  int64_t last(int64_t t) const { return position + t; }
  int64_t first(int64_t t) const { return window ? std::max<int64_t>(0, last(t) - window + 1) : 0; }
};

// What a tile needs; one for each thread.
struct TileSpace {
  std::vector<float> keys, values, scores, q, out, sums;
};

// space.q [tokens * group][D], scaled -> space.out, alike. T the cache's dtype.
template <typename T>
void attend_tile(const T* k, const T* v, const Cache& cache, int64_t head, const TileTokens& tokens, int64_t group, TileSpace& space) {
  const int64_t S = cache.S, D = cache.D, rows = tokens.count * group;
  const int64_t start = tokens.first(0) / S, end = tokens.last(tokens.count - 1) / S + 1, count = (end - start) * S, ld = (count + KEYS - 1) / KEYS * KEYS;
  const Pages<T> key_pages{k, tokens.blocks, cache.heads, head, S * D}, value_pages{v, tokens.blocks, cache.heads, head, S * D};
  space.keys.resize(D * KEYS);
  space.scores.resize(std::max<size_t>(space.scores.size(), rows * ld));
  space.out.assign(rows * D, 0.0f);
  space.sums.resize(rows);
  float *keys = space.keys.data(), *scores = space.scores.data(), *out = space.out.data();
  for (int64_t at = 0; at < count; at += KEYS) {
    for (int64_t i = 0; i < KEYS; i += VL) {
      const int64_t p = std::min(at + i, count - VL);  // behind the last vector, that again: nobody reads its scores
      const T* from = key_pages[start + p / S] + p % S;
      for (int64_t d = 0; d < D; ++d) store(load<Lanes>(from + d * S), keys + d * KEYS + i);
    }
    int64_t r = 0;
    for (; r + SCORE_ROWS <= rows; r += SCORE_ROWS) tile_scores<SCORE_ROWS>(keys, space.q.data() + r * D, D, scores + r * ld + at, ld);
    by_threes(rows - r, [&](auto some, int64_t more) {
      tile_scores<decltype(some)::value>(keys, space.q.data() + (r + more) * D, D, scores + (r + more) * ld + at, ld);
    });
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * ld;
    const int64_t first = tokens.first(r / group) - start * S, last = tokens.last(r / group) - start * S;
    if (tokens.cap > 0) cap_scores(row, count, tokens.cap);
    std::fill(row, row + first, -std::numeric_limits<float>::infinity());
    std::fill(row + last + 1, row + count, -std::numeric_limits<float>::infinity());
    Lanes top = Lanes{} - std::numeric_limits<float>::infinity(), sum = {};
    for (int64_t i = 0; i < count; i += VL) top = larger(load<Lanes>(row + i), top);
    const float max = largest(top);
    for (int64_t i = 0; i < count; i += VL) {
      const Lanes weight = exp_of_negative(load<Lanes>(row + i) - max);
      store(weight, row + i);
      sum += weight;
    }
    space.sums[r] = total(sum);
  }
  const int64_t length = stretch_blocks(S) * S, all_from = tokens.first(tokens.count - 1), all_to = tokens.last(0);
  space.values.resize(length * D);
  for (int64_t from = start * S; from < end * S;) {
    const int64_t to = std::min(end * S, (from / length + 1) * length) - 1;
    if (from >= all_from && to <= all_to) {
      for (int64_t p = from; p <= to; ++p) {
        const T* value = value_pages[p / S] + p % S * D;
        for (int64_t d = 0; d < D; d += VL) store(load<Lanes>(value + d), space.values.data() + (p - from) * D + d);
      }
      const float* packed[1] = {space.values.data()};
      by_threes(rows, [&](auto some, int64_t r) {
        constexpr int R = decltype(some)::value;
        stretch_values<R, Lanes>(packed, length, length, D, 0, to - from, scores + r * ld + from - start * S, ld, out + r * D);
      });
    } else {
      for (int64_t t = 0; t < tokens.count; ++t) {
        const int64_t first = std::max(from, tokens.first(t)), last = std::min(to, tokens.last(t)), r = t * group;
        if (first <= last) span_values(value_pages, cache, first, last, group, scores + r * ld, start, ld, out + r * D);
      }
    }
    from = to + 1;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < D; ++d) out[r * D + d] /= space.sums[r];
}

}  // namespace
