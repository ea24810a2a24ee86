// rope_and_cache on CPU: from the output of the qkv projection to the rotated queries and the paged cache, one pass over the tokens.
//
// Shapes   qkv [N, (Hq + 2 Hkv) D] with a free stride of tokens; cos, sin [N, D / 2]; k_cache [blocks, Hkv, D, S], v_cache [blocks, Hkv, S, D].
// Bytes    2 N (Hq + 2 Hkv) D s.
// Numerics float32 between loads and stores, rounded once; values are copied.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "lanes.h"
#include "memory.h"

namespace {

// to = rope(norm(x)) of one head; no norm where `weight` is null.
template <typename T, typename Out>
void turn(const T* x, const float* weight, float eps, const float* cos, const float* sin, int64_t half, Out* to) {
  Vec scale(1.0f);
  if (weight) {
    Vec squares(0.0f);
    each_vector(2 * half, [&](int64_t i, auto count) {
      const Vec value = load(x + i, count);
      squares = at::vec::fmadd(value, value, squares);
    });
    scale = Vec(1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(2 * half) + eps));
  }
  each_vector(half, [&](int64_t i, auto count) {
    Vec first = load(x + i, count), second = load(x + half + i, count);
    if (weight) first = first * scale * load(weight + i, count), second = second * scale * load(weight + half + i, count);
    const Vec c = load(cos + i, count), s = load(sin + i, count);
    store(first * c - second * s, to + i, count);
    store(second * c + first * s, to + half + i, count);
  });
}

MaybeTensor widened(const MaybeTensor& weight) { return weight ? MaybeTensor(weight->to(at::kFloat).contiguous()) : std::nullopt; }

Tensor rope_and_cache(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots,
                      int64_t num_heads, const MaybeTensor& q_norm, const MaybeTensor& k_norm, double eps) {
  const int64_t N = qkv.size(0), Hq = num_heads, blocks = k_cache.size(0), Hkv = k_cache.size(1), D = k_cache.size(2), S = k_cache.size(3);
  const Tensor slots_N = slots.contiguous(), cos_ND = cos.to(at::kFloat).contiguous(), sin_ND = sin.to(at::kFloat).contiguous();
  const int64_t* slot_of = slots_N.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < N; ++n)
    TORCH_CHECK_INDEX(slot_of[n] < blocks * S, "rope_and_cache: expected slots below ", blocks * S, " (", blocks, " blocks of ", S, "), got slots[", n,
                      "] = ", slot_of[n]);
  const MaybeTensor q_norm_D = widened(q_norm), k_norm_D = widened(k_norm);
  const float *cos_in = cos_ND.const_data_ptr<float>(), *sin_in = sin_ND.const_data_ptr<float>();
  const float *q_weight = q_norm_D ? q_norm_D->const_data_ptr<float>() : nullptr, *k_weight = k_norm_D ? k_norm_D->const_data_ptr<float>() : nullptr;
  Tensor q = empty_in_huge_pages({N, Hq, D}, qkv.options());
  dispatch("rope_and_cache", qkv.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* in = qkv.const_data_ptr<T>();
    T *q_out = q.mutable_data_ptr<T>(), *k_out = k_cache.mutable_data_ptr<T>(), *v_out = v_cache.mutable_data_ptr<T>();
    at::parallel_for(0, N, rows_a_task((Hq + 2 * Hkv) * D), [&](int64_t begin, int64_t end) {
      std::vector<T> key(D);
      for (int64_t n = begin; n < end; ++n) {
        const T* head = in + n * qkv.stride(0);
        const float *c = cos_in + n * (D / 2), *s = sin_in + n * (D / 2);
        for (int64_t h = 0; h < Hq; ++h, head += D) turn(head, q_weight, static_cast<float>(eps), c, s, D / 2, q_out + (n * Hq + h) * D);
        if (slot_of[n] < 0) continue;
        const int64_t block = slot_of[n] / S, offset = slot_of[n] % S;
        for (int64_t h = 0; h < Hkv; ++h, head += D) {
          turn(head, k_weight, static_cast<float>(eps), c, s, D / 2, key.data());
          T* column = k_out + (block * Hkv + h) * D * S + offset;
          for (int64_t d = 0; d < D; ++d) column[d * S] = key[d];
        }
        for (int64_t h = 0; h < Hkv; ++h, head += D) std::memcpy(v_out + ((block * Hkv + h) * S + offset) * D, head, D * sizeof(T));
      }
    });
  });
  return q;
}

TORCH_LIBRARY_FRAGMENT(fusedrl, m) {
  m.def(
      "rope_and_cache(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, int num_heads, Tensor? q_norm, "
      "Tensor? k_norm, float eps) -> Tensor");
}
TORCH_LIBRARY_IMPL(fusedrl, CPU, m) { m.impl("rope_and_cache", &rope_and_cache); }

}  // namespace
