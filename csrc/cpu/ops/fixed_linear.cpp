// fixed_linear on CPU: y = x W^T + b, softcap tanh(y / softcap) of it if asked, whose sums have one order, that of decode_step's own linear layers (panels.h).
//
// Bytes    the weights once a 64 rows; x and y once.
// Numerics float32 sums over blocks of 256 inputs, then over blocks, in order: a row of y depends on its row of x, the weights and their sizes alone.
#include "panels.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>

namespace {

using at::Tensor;

// `used` rows x [.., K] -> a panel [K][width], zeros behind them.
template <typename T>
void to_panel(const T* x, int64_t used, int64_t K, int64_t width, float* panel) {
  for (int64_t c = 0; c < width; c += VL) {
    int64_t k = 0;
    for (; k + VL <= K; k += VL) {
      Lanes v[VL] = {};
      for (int64_t i = 0; i < std::min(VL, used - c); ++i) v[i] = widened(x + (c + i) * K + k);
      transpose(v);
      for (int64_t i = 0; i < VL; ++i) *reinterpret_cast<Lanes*>(panel + (k + i) * width + c) = v[i];
    }
    for (; k < K; ++k)
      for (int64_t i = c; i < c + VL; ++i) panel[k * width + i] = i < used ? to_float(x[i * K + k]) : 0.0f;
  }
}

// Outputs `begin` to `end` of a panel [O][width] -> `used` rows of out [.., O].
void from_panel(const float* panel, int64_t begin, int64_t end, int64_t used, int64_t O, int64_t width, float* out) {
  for (int64_t c = 0; c < used; c += VL) {
    int64_t o = begin;
    for (; o + VL <= end; o += VL) {
      Lanes v[VL];
      for (int64_t i = 0; i < VL; ++i) v[i] = *reinterpret_cast<const Lanes*>(panel + (o + i) * width + c);
      transpose(v);
      for (int64_t i = 0; i < std::min(VL, used - c); ++i) *reinterpret_cast<Lanes*>(out + (c + i) * O + o) = v[i];
    }
    for (; o < end; ++o)
      for (int64_t i = c; i < std::min(c + VL, used); ++i) out[i * O + o] = panel[o * width + i];
  }
}

template <typename T>
void run(const Tensor& x_NK, const Tensor& weight_OK, const std::optional<Tensor>& bias_O, float softcap, Tensor& out_NO) {
  const int64_t N = x_NK.size(0), K = x_NK.size(1), O = weight_OK.size(0);
  const T* x = x_NK.const_data_ptr<T>();
  const T* w = weight_OK.const_data_ptr<T>();
  const T* bias = bias_O ? bias_O->const_data_ptr<T>() : nullptr;
  float* out = out_NO.mutable_data_ptr<float>();
  Tensor workspace = at::empty({PANEL * (K + O)}, at::kFloat);
  float* from = workspace.mutable_data_ptr<float>();
  float* to = from + PANEL * K;
  for (int64_t first = 0; first < N; first += PANEL) {
    const Panels panel(std::min(PANEL, N - first));
    const int64_t used = panel.used(0), width = panel.width(0);
    to_panel(x + first * K, used, K, width, from);
    linear(w, bias, O, K, panel, from, to, false);
    constexpr int64_t BLOCK = 64;  // of outputs: their lines stay in the cache while 64 rows are written
    at::parallel_for(0, (O + BLOCK - 1) / BLOCK, std::max<int64_t>(1, 32768 / (BLOCK * used)), [&](int64_t begin, int64_t end) {
      for (int64_t o = begin * BLOCK; o < std::min(O, end * BLOCK); o += BLOCK) {
        const int64_t behind = std::min(O, o + BLOCK);
        if (softcap > 0) cap_scores(to + o * width, (behind - o) * width, softcap);
        from_panel(to, o, behind, used, O, width, out + first * O);
      }
    });
  }
}

Tensor fixed_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double softcap) {
  const Tensor x_NK = x.contiguous(), weight_OK = weight.contiguous();
  const std::optional<Tensor> bias_O = bias ? std::optional<Tensor>(bias->contiguous()) : std::nullopt;
  Tensor out_NO = at::empty({x.size(0), weight.size(0)}, x.options().dtype(at::kFloat).requires_grad(false));
  if (x.size(1) == 0) {
    bias ? out_NO.copy_(*bias) : out_NO.zero_();
    return softcap > 0 ? out_NO.div_(softcap).tanh_().mul_(softcap) : out_NO;
  }
  if (out_NO.numel()) (x.scalar_type() == at::kBFloat16 ? &run<at::BFloat16> : &run<float>)(x_NK, weight_OK, bias_O, static_cast<float>(softcap), out_NO);
  return out_NO;
}

TORCH_LIBRARY_FRAGMENT(fusedrl, m) { m.def("fixed_linear(Tensor x, Tensor weight, Tensor? bias, float softcap=0.0) -> Tensor"); }
TORCH_LIBRARY_IMPL(fusedrl, CPU, m) { m.impl("fixed_linear", &fixed_linear); }

}  // namespace
