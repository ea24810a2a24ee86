// rms_norm on CPU: y = weight * round(x * rstd), or (offset + weight) * (x * rstd); optionally of x + residual; and its gradients.
//
// Shapes   rows of H values behind one or two dimensions (tokens, or tokens and heads); rstd [rows] is what the backward keeps.
// Bytes    forward 2 rows H s (4 with a residual), backward 3 (4); in both, a row is read a second time from the cache.
// Numerics float32 between loads and stores. The weight's gradient is summed in float32 over CHUNK rows, then over chunks: its order depends on the
//          number of rows alone.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <tuple>
#include <vector>

#include "autograd.h"
#include "lanes.h"
#include "memory.h"

namespace {

using namespace fusedrl;  // autograd.h

constexpr int64_t SUMS = 4;  // in flight: they hide the latency of an FMA, and shorter sums err less

// sum of term(i, count) over the vectors of a row
template <typename Term>
inline float sum_row(int64_t H, const Term& term) {
  Vec sums[SUMS];
  for (Vec& sum : sums) sum = Vec(0.0f);
  int64_t i = 0;
  for (; i + SUMS * L <= H; i += SUMS * L)
    for (int64_t u = 0; u < SUMS; ++u) term(i + u * L, std::integral_constant<int64_t, L>(), sums[u]);
  for (int64_t u = 0; i < H; i += L, ++u) {
    if (i + L <= H) term(i, std::integral_constant<int64_t, L>(), sums[u]);
    else term(i, H - i, sums[u]);
  }
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// y, x + residual (or nothing), rstd
std::tuple<Tensor, Tensor, Tensor> rms_norm_forward(const Tensor& x, const Tensor& weight, const MaybeTensor& residual, double eps, double offset) {
  const int64_t H = x.size(-1);
  Tensor y = empty_in_huge_pages(x.sizes(), x.options()), sum = empty_in_huge_pages(residual ? x.sizes() : at::IntArrayRef({0}), x.options());
  const Tensor weight_H = weight.contiguous();
  Tensor rstd = at::empty({H ? x.numel() / H : 0}, x.options().dtype(at::kFloat));
  float* rstd_out = rstd.mutable_data_ptr<float>();
  dispatch("rms_norm", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<const T> from(x), added(residual ? *residual : x);
    const Rows<T> to(y), sums(residual ? sum : y);
    const bool adds = residual.has_value();
    const Vec shift(static_cast<float>(offset));
    const T* w = weight_H.const_data_ptr<T>();
    at::parallel_for(0, rstd.numel(), rows_a_task(H), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const T* row = from[n];
        if (adds) {
          const T* other = added[n];
          T* both = sums[n];
          store_rows<T, 1>(H, {both}, [&](int64_t i, auto count) { return std::array<Vec, 1>{load(row + i, count) + load(other + i, count)}; });
          row = both;
        }
        const float squares = sum_row(H, [&](int64_t i, auto count, Vec& sum) {
          const Vec value = load(row + i, count);
          sum = at::vec::fmadd(value, value, sum);
        });
        rstd_out[n] = 1.0f / std::sqrt(squares / static_cast<float>(H) + static_cast<float>(eps));
        const Vec scale(rstd_out[n]);
        T* out = to[n];
        if (offset == 0)
          store_rows<T, 1>(H, {out}, [&](int64_t i, auto count) { return std::array<Vec, 1>{round_to<T>(load(row + i, count) * scale) * load(w + i, count)}; });
        else
          store_rows<T, 1>(H, {out}, [&](int64_t i, auto count) { return std::array<Vec, 1>{load(row + i, count) * scale * (load(w + i, count) + shift)}; });
      }
    });
  });
  return {y, sum, rstd};
}

// dx and, if asked for, dweight. `x` is what was normalised; `sum_grad` reaches it directly.
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& y_grad, const MaybeTensor& sum_grad, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                                             bool weight_wanted, double offset) {
  const int64_t H = x.size(-1), N = rstd.numel();
  const int64_t chunk = std::max<int64_t>(64, (N + 127) / 128), chunks = (N + chunk - 1) / chunk;
  const Tensor dy = y_grad.contiguous(), dsum = sum_grad ? sum_grad->contiguous() : dy, weight_H = weight.contiguous();
  Tensor dx = empty_in_huge_pages(x.sizes(), x.options()), dweight = at::empty({weight_wanted ? H : 0}, weight.options());
  const Tensor parts_CH = at::zeros({weight_wanted ? chunks : 0, H}, x.options().dtype(at::kFloat));
  const bool adds = sum_grad.has_value();
  const Vec shift(static_cast<float>(offset));
  const float* rstd_in = rstd.const_data_ptr<float>();
  float* parts = weight_wanted ? parts_CH.mutable_data_ptr<float>() : nullptr;
  dispatch("rms_norm", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Rows<const T> from(x);
    const T *w = weight_H.const_data_ptr<T>(), *dy_in = dy.const_data_ptr<T>(), *dsum_in = dsum.const_data_ptr<T>();
    T* out = dx.mutable_data_ptr<T>();
    at::parallel_for(0, chunks, rows_a_task(chunk * H), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        float* part = parts ? parts + c * H : nullptr;
        for (int64_t n = c * chunk; n < std::min(N, (c + 1) * chunk); ++n) {
          const T *row = from[n], *grad = dy_in + n * H;
          const Vec scale(rstd_in[n]);
          const float along = sum_row(H, [&](int64_t i, auto count, Vec& sum) {
            const Vec dyu = load(grad + i, count) * (load(row + i, count) * scale);
            sum = at::vec::fmadd(dyu, load(w + i, count) + shift, sum);
            if (part) (load(part + i, count) + dyu).store(part + i, count);
          });
          const Vec mean(along / static_cast<float>(H));
          store_rows<T, 1>(H, {out + n * H}, [&](int64_t i, auto count) {
            const Vec unit = load(row + i, count) * scale;
            const Vec value = (load(grad + i, count) * (load(w + i, count) + shift) - unit * mean) * scale;
            return std::array<Vec, 1>{adds ? value + load(dsum_in + n * H + i, count) : value};
          });
        }
      }
    });
    if (!weight_wanted) return;
    T* to = dweight.mutable_data_ptr<T>();
    each_vector(H, [&](int64_t i, auto count) {
      Vec total(0.0f);
      for (int64_t c = 0; c < chunks; ++c) total = total + load(parts + c * H + i, count);
      store(total, to + i, count);
    });
  });
  return {dx, dweight};
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, const MaybeTensor& residual, double eps, double offset) {
  const auto forward = [&](Saved& saved) -> Tensors {
    static auto op = find_op<decltype(rms_norm_forward)>("fusedrl::rms_norm_forward");
    auto [y, sum, rstd] = op.call(x, weight, residual, eps, offset);
    saved.tensors = {residual ? sum : x, weight, rstd};
    saved.values = {residual.has_value(), offset, weight.requires_grad()};
    saved.zeros_for_missing = false;
    if (!residual) saved.non_differentiable = {sum};
    return {y, sum};
  };
  const auto backward = [](const Tensors& grads, const Saved& saved) -> Tensors {
    static auto op = find_op<decltype(rms_norm_backward)>("fusedrl::rms_norm_backward");
    const bool residual = saved.values[0].toBool(), weight_wanted = saved.values[2].toBool();
    if (!grads[0].defined()) return {grads[1], Tensor(), residual ? grads[1] : Tensor()};
    auto [dx, dweight] = op.call(grads[0], residual ? defined(grads[1]) : std::nullopt, saved.tensors[0], saved.tensors[1], saved.tensors[2], weight_wanted,
                                 saved.values[1].toDouble());
    return {dx, weight_wanted ? dweight : Tensor(), residual ? dx : Tensor()};
  };
  const auto out = with_gradient("rms_norm", {x, weight, residual}, forward, backward);
  return {out[0], out[1]};
}

TORCH_LIBRARY_FRAGMENT(fusedrl, m) {
  m.def("rms_norm_forward(Tensor x, Tensor weight, Tensor? residual, float eps, float offset) -> (Tensor, Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor y_grad, Tensor? sum_grad, Tensor x, Tensor weight, Tensor rstd, bool weight_wanted, float offset) -> (Tensor, Tensor)");
  m.def("rms_norm(Tensor x, Tensor weight, Tensor? residual, float eps, float offset) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fusedrl, CPU, m) {
  m.impl("rms_norm_forward", &rms_norm_forward);
  m.impl("rms_norm_backward", &rms_norm_backward);
}
TORCH_LIBRARY_IMPL(fusedrl, CompositeImplicitAutograd, m) { m.impl("rms_norm", &rms_norm); }

}  // namespace
