// swiglu on CPU: y = silu(gate) * up from the two halves of one row, and its gradient into the two halves of another.
//
// Shapes   N rows of 2 F values, the gates first; the row stride is free.
// Bytes    forward 3 N F s, backward 5 N F s, one pass each.
// Numerics float32 between loads and stores; both s = sigmoid(gate) and 1 - s from e^-|gate|, so that neither cancels or overflows.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <array>
#include <type_traits>
#include <utility>

#include "autograd.h"
#include "exponential.h"
#include "lanes.h"
#include "memory.h"

namespace {

using namespace fusedrl;  // autograd.h

// exp(x) for x <= 0, down to the smallest number; within 40 units in the last place of float32 where T, to which a result is rounded, has two bytes.
template <typename T>
inline Vec exponential(const Vec& x) {
  if constexpr (std::is_same_v<T, float>) return exp_nonpositive(x);
  const Vec root = (x * Vec(0.5f)).exp_u20();
  return root * root;
}

// sigmoid(x) and 1 - sigmoid(x).
template <typename T>
inline std::pair<Vec, Vec> sigmoid(const Vec& x) {
  const Vec e = exponential<T>(x.abs().neg()), large = Vec(1.0f) / (Vec(1.0f) + e), small = e * large, positive = x >= Vec(0.0f);
  return {Vec::blendv(small, large, positive), Vec::blendv(large, small, positive)};
}

Tensor swiglu_forward(const Tensor& gate_up) {
  const int64_t N = gate_up.size(0), F = gate_up.size(1) / 2;
  Tensor y_NF = empty_in_huge_pages({N, F}, gate_up.options());
  dispatch("swiglu", gate_up.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<const T> from(gate_up);
    const Rows<T> to(y_NF);
    at::parallel_for(0, N, rows_a_task(F), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const T *gates = from[n], *ups = gates + F;
        store_rows<T, 1>(F, {to[n]}, [&](int64_t i, auto count) {
          const Vec gate = load(gates + i, count);
          return std::array<Vec, 1>{gate * sigmoid<T>(gate).first * load(ups + i, count)};
        });
      }
    });
  });
  return y_NF;
}

Tensor swiglu_backward(const Tensor& y_grad, const Tensor& gate_up) {
  const int64_t N = gate_up.size(0), F = gate_up.size(1) / 2;
  const Tensor dy_NF = y_grad.contiguous();
  Tensor grad = empty_in_huge_pages({N, 2 * F}, gate_up.options());
  dispatch("swiglu", gate_up.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<const T> from(gate_up), grads(dy_NF);
    const Rows<T> to(grad);
    at::parallel_for(0, N, rows_a_task(F), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const T *gates = from[n], *ups = gates + F, *dys = grads[n];
        store_rows<T, 2>(F, {to[n], to[n] + F}, [&](int64_t i, auto count) {
          const Vec gate = load(gates + i, count), dy = load(dys + i, count);
          const auto [s, rest] = sigmoid<T>(gate);
          return std::array<Vec, 2>{dy * load(ups + i, count) * s * at::vec::fmadd(gate, rest, Vec(1.0f)), dy * gate * s};
        });
      }
    });
  });
  return grad;
}

Tensor swiglu(const Tensor& gate_up) {
  const auto forward = [&](Saved& saved) -> Tensors {
    static auto op = find_op<decltype(swiglu_forward)>("fusedrl::swiglu_forward");
    saved.tensors = {gate_up};
    return {op.call(gate_up)};
  };
  const auto backward = [](const Tensors& grads, const Saved& saved) -> Tensors {
    static auto op = find_op<decltype(swiglu_backward)>("fusedrl::swiglu_backward");
    return {op.call(grads[0], saved.tensors[0])};
  };
  return with_gradient("swiglu", {gate_up}, forward, backward)[0];
}

TORCH_LIBRARY_FRAGMENT(fusedrl, m) {
  m.def("swiglu_forward(Tensor gate_up) -> Tensor");
  m.def("swiglu_backward(Tensor y_grad, Tensor gate_up) -> Tensor");
  m.def("swiglu(Tensor gate_up) -> Tensor");
}
TORCH_LIBRARY_IMPL(fusedrl, CPU, m) {
  m.impl("swiglu_forward", &swiglu_forward);
  m.impl("swiglu_backward", &swiglu_backward);
}
TORCH_LIBRARY_IMPL(fusedrl, CompositeImplicitAutograd, m) { m.impl("swiglu", &swiglu); }

}  // namespace
