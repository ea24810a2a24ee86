// full_kl on CPU: the KL of softmax(logits / T) and softmax(ref_logits / T) over the whole vocabulary, row by row.
//
// Shapes   logits and ref_logits [N, V], row strides free; stats [N, 5] are those of KlRow (full_kl_rows.h).
// Bytes    forward reads 2 N V s (jsd twice), backward reads 2 N V s and writes N V s. A row is one thread's work.
#include <ATen/ops/empty.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "autograd.h"
#include "full_kl_rows.h"

namespace {

using namespace fusedrl;  // autograd.h

template <typename Function>
void dispatch(at::ScalarType type, const Function& function) {
  switch (type) {
    case at::kFloat: return function(float{});
    case at::kBFloat16: return function(at::BFloat16{});
    case at::kHalf: return function(at::Half{});
    default: TORCH_CHECK_TYPE(false, "full_kl: expected logits of dtype float32, bfloat16 or float16, got ", type);
  }
}

std::tuple<Tensor, Tensor> full_kl_forward(const Tensor& logits, const Tensor& ref_logits, const MaybeTensor& mask, double temperature, int64_t direction) {
  const int64_t N = logits.size(0), V = logits.size(1), stride = logits.stride(0), ref_stride = ref_logits.stride(0);
  const Tensor mask_N = mask ? mask->contiguous() : Tensor();
  const bool* live = mask_N.defined() ? mask_N.const_data_ptr<bool>() : nullptr;
  Tensor kl_N = at::empty({N}, logits.options().dtype(at::kFloat)), stats_N5 = at::empty({N, 5}, kl_N.options());
  float* kl = kl_N.mutable_data_ptr<float>();
  auto* stats = reinterpret_cast<KlRow*>(stats_N5.mutable_data_ptr<float>());
  dispatch(logits.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const scalar_t *z = logits.const_data_ptr<scalar_t>(), *ref = ref_logits.const_data_ptr<scalar_t>();
    at::parallel_for(0, N, grain(V), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        stats[n] = {};
        kl[n] = live && !live[n] ? 0.0f : row_kl(z + n * stride, ref + n * ref_stride, V, temperature, static_cast<Direction>(direction), stats[n]);
      }
    });
  });
  return {kl_N, stats_N5};
}

Tensor full_kl_backward(const Tensor& kl_grad, const Tensor& logits, const Tensor& ref_logits, const Tensor& stats_N5, double temperature, int64_t direction) {
  const int64_t N = logits.size(0), V = logits.size(1), stride = logits.stride(0), ref_stride = ref_logits.stride(0);
  const Tensor grad_N = kl_grad.contiguous();
  Tensor grad_NV = at::empty({N, V}, logits.options());
  const float* g = grad_N.const_data_ptr<float>();
  const auto* stats = reinterpret_cast<const KlRow*>(stats_N5.const_data_ptr<float>());
  dispatch(logits.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const scalar_t *z = logits.const_data_ptr<scalar_t>(), *ref = ref_logits.const_data_ptr<scalar_t>();
    scalar_t* out = grad_NV.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, N, grain(V), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        row_kl_gradient(z + n * stride, ref + n * ref_stride, out + n * V, V, temperature, static_cast<Direction>(direction), stats[n], g[n]);
    });
  });
  return grad_NV;
}

Tensor full_kl(const Tensor& logits, const Tensor& ref_logits, const MaybeTensor& mask, double temperature, int64_t direction) {
  const auto forward = [&](Saved& saved) -> Tensors {
    static auto op = find_op<decltype(full_kl_forward)>("fusedrl::full_kl_forward");
    auto [kl_N, stats_N5] = op.call(logits, ref_logits, mask, temperature, direction);
    saved.tensors = {logits, ref_logits, stats_N5};
    saved.values = {temperature, direction};
    return {kl_N};
  };
  const auto backward = [](const Tensors& grads, const Saved& saved) -> Tensors {
    static auto op = find_op<decltype(full_kl_backward)>("fusedrl::full_kl_backward");
    return {op.call(grads[0], saved.tensors[0], saved.tensors[1], saved.tensors[2], saved.values[0].toDouble(), saved.values[1].toInt())};
  };
  return with_gradient("full_kl", {logits}, forward, backward)[0];
}

TORCH_LIBRARY_FRAGMENT(fusedrl, m) {
  m.def("full_kl_forward(Tensor logits, Tensor ref_logits, Tensor? mask, float temperature, int direction) -> (Tensor, Tensor)");
  m.def("full_kl_backward(Tensor kl_grad, Tensor logits, Tensor ref_logits, Tensor stats, float temperature, int direction) -> Tensor");
  m.def("full_kl(Tensor logits, Tensor ref_logits, Tensor? mask, float temperature, int direction) -> Tensor");
}
TORCH_LIBRARY_IMPL(fusedrl, CPU, m) {
  m.impl("full_kl_forward", &full_kl_forward);
  m.impl("full_kl_backward", &full_kl_backward);
}
TORCH_LIBRARY_IMPL(fusedrl, CompositeImplicitAutograd, m) { m.impl("full_kl", &full_kl); }

}  // namespace
