// rope on CPU: rotate-half position embedding of queries and keys in one pass over the tokens; the gradient is the inverse rotation.
//
// Shapes   q [N, Hq, D], k [N, Hkv, D] with free strides of tokens and heads; cos, sin [N, D / 2] float32.
// Bytes    2 N (Hq + Hkv) D s.
// Numerics float32 between loads and stores, rounded once.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "autograd.h"
#include "lanes.h"
#include "memory.h"

namespace {

using namespace fusedrl;  // autograd.h

// One token's heads: pairs (x[i], x[i + half]) turned by (cos[i], sign sin[i]).
template <typename T>
void rotate(const T* from, int64_t heads, int64_t stride, const float* cos, const float* sin, float sign, int64_t half, T* to) {
  each_vector(half, [&](int64_t i, auto count) {
    const Vec c = load(cos + i, count), s = load(sin + i, count) * Vec(sign);
    for (int64_t h = 0; h < heads; ++h) {
      const T* x = from + h * stride + i;
      T* y = to + h * 2 * half + i;
      const Vec first = load(x, count), second = load(x + half, count);
      store(first * c - second * s, y, count);
      store(second * c + first * s, y + half, count);
    }
  });
}

std::tuple<Tensor, Tensor> rope_forward(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool inverse) {
  const int64_t N = q.size(0), Hq = q.size(1), Hkv = k.size(1), D = q.size(2);
  Tensor q_out = empty_in_huge_pages(q.sizes(), q.options()), k_out = empty_in_huge_pages(k.sizes(), k.options());
  const Tensor cos_ND = cos.to(at::kFloat).contiguous(), sin_ND = sin.to(at::kFloat).contiguous();
  const float *c = cos_ND.const_data_ptr<float>(), *s = sin_ND.const_data_ptr<float>();
  dispatch("rope", q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T *q_in = q.const_data_ptr<T>(), *k_in = k.const_data_ptr<T>();
    T *q_to = q_out.mutable_data_ptr<T>(), *k_to = k_out.mutable_data_ptr<T>();
    const float sign = inverse ? -1.0f : 1.0f;
    at::parallel_for(0, N, rows_a_task((Hq + Hkv) * D), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        rotate(q_in + n * q.stride(0), Hq, q.stride(1), c + n * (D / 2), s + n * (D / 2), sign, D / 2, q_to + n * Hq * D);
        rotate(k_in + n * k.stride(0), Hkv, k.stride(1), c + n * (D / 2), s + n * (D / 2), sign, D / 2, k_to + n * Hkv * D);
      }
    });
  });
  return {q_out, k_out};
}

std::tuple<Tensor, Tensor> call(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool inverse) {
  static auto op = find_op<decltype(rope_forward)>("fusedrl::rope_forward");
  return op.call(q, k, cos, sin, inverse);
}

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin) {
  const auto forward = [&](Saved& saved) -> Tensors {
    saved.tensors = {cos, sin};
    auto [q_out, k_out] = call(q, k, cos, sin, false);
    return {q_out, k_out};
  };
  const auto backward = [](const Tensors& grads, const Saved& saved) -> Tensors {
    auto [dq, dk] = call(grads[0].contiguous(), grads[1].contiguous(), saved.tensors[0], saved.tensors[1], true);
    return {dq, dk};
  };
  const auto out = with_gradient("rope", {q, k}, forward, backward);
  return {out[0], out[1]};
}

TORCH_LIBRARY_FRAGMENT(fusedrl, m) {
  m.def("rope_forward(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)");
  m.def("rope(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fusedrl, CPU, m) { m.impl("rope_forward", &rope_forward); }
TORCH_LIBRARY_IMPL(fusedrl, CompositeImplicitAutograd, m) { m.impl("rope", &rope); }

}  // namespace
