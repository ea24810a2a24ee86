// masked_whiten on CPU: mean 0 and variance 1 over the unmasked elements.
//
// Shapes   N elements. Bytes: 4 read and 4 written an element, plus two more reads from cache-sized blocks.
// Numerics moments in double, two passes over each block of kBlock elements, blocks merged in order: the same for any thread count.
#include "moments.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

namespace {

using at::Tensor;

constexpr int64_t kBlock = 8192;

Tensor masked_whiten(const Tensor& x, const std::optional<Tensor>& mask, bool shift_mean, bool unbiased, double eps) {
  const Tensor x_N = x.contiguous(), mask_N = mask ? mask->contiguous() : Tensor();
  Tensor out_N = at::empty(x_N.sizes(), x_N.options());
  const int64_t N = x_N.numel(), blocks = (N + kBlock - 1) / kBlock;
  const float* in = x_N.const_data_ptr<float>();
  const uint8_t* live = mask_N.defined() ? static_cast<const uint8_t*>(mask_N.const_data_ptr()) : nullptr;
  float* out = out_N.mutable_data_ptr<float>();
  std::vector<Moments> parts(blocks);
  const auto each_block = [&](auto&& body) {
    at::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) body(b, b * kBlock, std::min(kBlock, N - b * kBlock));
    });
  };
  each_block([&](int64_t b, int64_t at, int64_t n) {
    float scratch[kBlock];
    parts[b] = live ? moments(in + at, live + at, scratch, n) : moments(in + at, n);
  });
  Moments all;
  for (const Moments& part : parts) all.merge(part);
  each_block([&](int64_t, int64_t at, int64_t n) {
    whiten(in + at, live ? live + at : nullptr, out + at, n, all, unbiased, eps, shift_mean ? 0.0 : all.mean);
  });
  return out_N;
}

TORCH_LIBRARY_FRAGMENT(fusedrl, m) { m.def("masked_whiten(Tensor x, Tensor? mask, bool shift_mean, bool unbiased, float eps) -> Tensor"); }
TORCH_LIBRARY_IMPL(fusedrl, CPU, m) { m.impl("masked_whiten", &masked_whiten); }

}  // namespace
