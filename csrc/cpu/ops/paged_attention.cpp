// paged_attention on CPU: one query token a row over the row's blocks of the KV cache. The arithmetic is that of decode_step (paged.h).
//
// Shapes   B rows, Hq query heads, Hkv key/value heads, D head dim, M blocks a row of the table, S positions a block.
// Work     one task is a row and a key/value head.
// Checked  beforehand, every length and every table entry that a row needs.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "paged.h"

namespace {

using at::Tensor;

template <typename T>
void run(const Tensor& q_BHD, const Tensor& k_cache, const Tensor& v_cache, const Tensor& table_BM, const Tensor& lens_B, int64_t window, double softcap,
         double scale, Tensor& out_BHD) {
  const Cache cache{k_cache.size(1), k_cache.size(2), k_cache.size(3)};
  const int64_t B = q_BHD.size(0), M = table_BM.size(1), blocks = k_cache.size(0), group = q_BHD.size(1) / cache.heads, size = group * cache.D;
  const int32_t* table = table_BM.const_data_ptr<int32_t>();
  const int64_t* lens = lens_B.const_data_ptr<int64_t>();
  const auto first_of = [&](int64_t b) { return window ? std::max<int64_t>(0, lens[b] - window) : 0; };
  int64_t longest = 0;
  for (int64_t b = 0; b < B; ++b) {
    TORCH_CHECK_INDEX(lens[b] >= 0 && lens[b] <= M * cache.S, "paged_attention: context_lens[", b, "] = ", lens[b], " is not within the ", M,
                      " blocks of ", cache.S, " in a row of the block table");
    longest = std::max(longest, lens[b]);
    for (int64_t m = first_of(b) / cache.S; m * cache.S < lens[b]; ++m)
      TORCH_CHECK_INDEX(table[b * M + m] >= 0 && table[b * M + m] < blocks, "paged_attention: block_table[", b, ", ", m, "] = ", table[b * M + m],
                        " is not one of the ", blocks, " blocks of the cache, and a context of ", lens[b], " needs it");
  }
  const T *q = q_BHD.const_data_ptr<T>(), *k = k_cache.const_data_ptr<T>(), *v = v_cache.const_data_ptr<T>();
  T* out = out_BHD.mutable_data_ptr<T>();
  const int64_t ld = cache.scores(std::max<int64_t>(longest, 1) - 1), grain = std::max<int64_t>(1, TASK_FLOPS / (4 * size * ld + 1));
  at::parallel_for(0, B * cache.heads, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(4 * (ld + cache.D)), query(size), result(size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / cache.heads;
      if (lens[b] == 0) {
        std::fill(out + task * size, out + (task + 1) * size, T(0.0f));
        continue;
      }
      for (int64_t i = 0; i < size; ++i) query[i] = to_float(q[task * size + i]);
      const Span span{table + b * M, first_of(b), lens[b] - 1, static_cast<float>(softcap)};
      attend_group(k, v, cache, task % cache.heads, span, group, {query.data(), 1, static_cast<float>(scale)}, scores.data(), ld, result.data());
      for (int64_t i = 0; i < size; ++i) out[task * size + i] = static_cast<T>(result[i]);
    }
  });
}

Tensor paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table, const Tensor& context_lens, int64_t window,
                       double softcap, double scale) {
  TORCH_CHECK_VALUE(k_cache.is_contiguous() && v_cache.is_contiguous(), "paged_attention: expected contiguous caches; use allocate_cache");
  const auto call = q.scalar_type() == at::kBFloat16 ? &run<at::BFloat16> : q.scalar_type() == at::kHalf ? &run<at::Half> : &run<float>;
  Tensor out = at::empty(q.sizes(), q.options());
  call(q.contiguous(), k_cache, v_cache, block_table.contiguous(), context_lens.to(at::kLong).contiguous(), window, softcap, scale, out);
  return out;
}

TORCH_LIBRARY_FRAGMENT(fusedrl, m) {
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor context_lens, int window, float softcap, float scale) "
      "-> Tensor");
}
TORCH_LIBRARY_IMPL(fusedrl, CPU, m) { m.impl("paged_attention", &paged_attention); }

}  // namespace
