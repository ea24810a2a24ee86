// The products with the head's weight, a chunk of rows at a time. Shared by linear_logprob and linear_policy_loss.
//
// Shapes   hidden [R, H], weight [V, H], logits and their gradient [R, V] float32. A weight of a lower dtype is widened in tiles.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "logprob_rows.h"

namespace {

constexpr int64_t kMebi = 1 << 20;

struct Head {
  Tensor weight, bias;  // [V, H], [V] or undefined
  double softcap;       // 0: none

  bool widen() const { return weight.scalar_type() != at::kFloat; }
  int64_t V() const { return weight.size(0); }

  // The weight in float32, in tiles of rows of about 4 MiB: function(first row, tile).
  template <typename Function>
  void tiles(const Function& function) const {
    const int64_t step = std::max<int64_t>(1, 4 * kMebi / 4 / std::max<int64_t>(1, weight.size(1)));
    for (int64_t v = 0; v < V(); v += step) function(v, weight.narrow(0, v, std::min(step, V() - v)).to(at::kFloat));
  }

  // Logits [R, V] before the cap.
  void logits(Tensor z_RV, const Tensor& hidden_RH) const {
    if (!widen()) {
      if (bias.defined()) at::addmm_out(z_RV, bias, hidden_RH, weight.t()); else at::mm_out(z_RV, hidden_RH, weight.t());
      return;
    }
    tiles([&](int64_t v, const Tensor& tile) {
      Tensor part = z_RV.narrow(1, v, tile.size(0));
      at::mm_out(part, hidden_RH, tile.t());
    });
    if (bias.defined()) z_RV.add_(bias);
  }

  // Adds a chunk's part to the weight's gradient [V, H] float32, which is undefined before the first.
  static void add_weight_grad(Tensor& grad_VH, const Tensor& dz_RV, const Tensor& hidden_RH) {
    if (grad_VH.defined()) grad_VH.addmm_(dz_RV.t(), hidden_RH); else grad_VH = at::mm(dz_RV.t(), hidden_RH);
  }

  Tensor hidden_grad(const Tensor& dz_RV) const {
    if (!widen()) return at::mm(dz_RV, weight);
    Tensor grad_RH = at::zeros({dz_RV.size(0), weight.size(1)}, dz_RV.options());
    tiles([&](int64_t v, const Tensor& tile) { grad_RH.addmm_(dz_RV.narrow(1, v, tile.size(0)), tile); });
    return grad_RH;
  }
};

inline void cap_row(float* z, int64_t V, double softcap) {
  const Vec cap(static_cast<float>(softcap)), inverse(static_cast<float>(1.0 / softcap));
  for (int64_t j = 0; j < V; j += kLanes) {
    const int64_t n = std::min(kLanes, V - j);
    ((load_some(z + j, n) * inverse).tanh() * cap).store(z + j, static_cast<int>(n));
  }
}

// Rows of a [rows, V] float32 workspace: by default the smaller of 256 MiB and an eighth of the full logits, but never below 4 MiB, where the
// products grow slow; at least one row, and not more than there are.
inline int64_t workspace_rows(int64_t bytes, int64_t N, int64_t V, int64_t rows) {
  if (bytes < 0) bytes = std::max(4 * kMebi, std::min(256 * kMebi, N * V * 4 / 8));
  return std::clamp<int64_t>(bytes / (4 * std::max<int64_t>(1, V)), 1, std::max<int64_t>(1, rows));
}

// Whether the logits of a forward pass that will be followed by a backward pass stay until then, which saves the products that compute them again: where all
// of them, `bytes`, fit the workspace that was asked for, or 64 MiB by default.
inline bool keeps_logits(int64_t workspace_bytes, int64_t bytes) { return bytes <= (workspace_bytes < 0 ? 64 * kMebi : workspace_bytes); }

}  // namespace
