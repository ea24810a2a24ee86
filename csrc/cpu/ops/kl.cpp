// token_kl on CPU: one estimate of KL(pi || ref) a token, in one pass. kl_loss: their weighted sum, and the slope of another estimator.
//
// Shapes   N tokens, any shape, or in sequences. Bytes: 8 read and 4 written a token; kl_loss 12 and 4.
// Numerics within 1e-6 relative of float64 from the same inputs, also in the exponential (see kl.h). Sums are in double, over blocks of a fixed
//          size or sequences, merged in order: the same for any thread count. What the weight 0 hides never enters arithmetic.
#include "autograd.h"
#include "kl.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <vector>

namespace {

using namespace fusedrl;  // autograd.h

using at::Tensor;

Tensor token_kl_cpu(const Tensor& logp, const Tensor& ref_logp, int64_t estimator) {
  const Tensor logp_N = logp.contiguous(), ref_N = ref_logp.contiguous();
  Tensor kl_N = at::empty(logp_N.sizes(), logp_N.options());
  const float* l = logp_N.const_data_ptr<float>();
  const float* r = ref_N.const_data_ptr<float>();
  float* out = kl_N.mutable_data_ptr<float>();
  at::parallel_for(0, kl_N.numel(), 32768, [&](int64_t begin, int64_t end) {
    token_kl(l + begin, r + begin, out + begin, end - begin, static_cast<KlEstimator>(estimator));
  });
  return kl_N;
}

// One log ratio: the value of an estimator, and the slope of one.
double value_of(KlEstimator estimator, double k1) {
  switch (estimator) {
    case KlEstimator::k1: return k1;
    case KlEstimator::k2: return 0.5 * k1 * k1;
    case KlEstimator::abs: return std::abs(k1);
    case KlEstimator::k3: break;
  }
  return std::max(0.0, std::expm1(std::clamp<double>(-k1, -kMaxLogRatio, kMaxLogRatio)) + k1);
}

double slope_of(KlEstimator estimator, double k1) {
  switch (estimator) {
    case KlEstimator::k1: return 1.0;
    case KlEstimator::k2: return k1;
    case KlEstimator::abs: return k1 > 0.0 ? 1.0 : k1 < 0.0 ? -1.0 : k1;
    case KlEstimator::k3: break;
  }
  return std::abs(k1) > kMaxLogRatio ? 0.0 : -std::expm1(-k1);
}

Vec slope_of(KlEstimator estimator, const Vec& k1) {
  const Vec zero(0.0f), one(1.0f), bound(kMaxLogRatio);
  switch (estimator) {
    case KlEstimator::k1: return one;
    case KlEstimator::k2: return k1;
    case KlEstimator::abs: return Vec::blendv(Vec::blendv(k1, one, k1 > zero), one.neg(), k1 < zero);
    case KlEstimator::k3: break;
  }
  return Vec::blendv(expm1_bounded(at::vec::clamp(k1.neg(), bound.neg(), bound)).neg(), zero, k1.abs() > bound);
}

// The loss, and d loss / d logp for a unit upstream gradient. cu_seqlens: the sequence level.
std::tuple<Tensor, Tensor> kl_loss_forward(const Tensor& logp, const Tensor& ref_logp, const Tensor& weights, int64_t estimator, int64_t gradient,
                                           const std::optional<Tensor>& cu_seqlens) {
  constexpr int64_t kBlock = 2048;
  const Tensor logp_N = logp.contiguous(), ref_N = ref_logp.contiguous(), weights_N = weights.contiguous(), cu = cu_seqlens ? cu_seqlens->contiguous() : Tensor();
  Tensor loss = at::empty({}, logp_N.options()), slope_N = at::empty(logp_N.sizes(), logp_N.options());
  const int64_t N = logp_N.numel();
  const auto value = static_cast<KlEstimator>(estimator), slope = static_cast<KlEstimator>(gradient);
  const float* l = logp_N.const_data_ptr<float>();
  const float* r = ref_N.const_data_ptr<float>();
  const float* w = weights_N.const_data_ptr<float>();
  float* out = slope_N.mutable_data_ptr<float>();
  std::vector<double> parts;
  if (cu_seqlens) {
    const int64_t B = cu.numel() - 1;
    const int32_t* starts = cu.const_data_ptr<int32_t>();
    bool ascending = starts[0] == 0 && starts[B] == N;
    for (int64_t b = 0; b < B; ++b) ascending &= starts[b] <= starts[b + 1];
    TORCH_CHECK_VALUE(ascending, "kl_loss: expected cu_seqlens to ascend from 0 to the number of tokens, ", N, ", got ", starts[0], " to ", starts[B],
                      "; give the cumulative lengths of the sequences");
    parts.resize(B);
    at::parallel_for(0, B, std::max<int64_t>(1, 16384 * B / std::max<int64_t>(1, N)), [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        double k1 = 0.0, weight = 0.0;
        int64_t count = 0;
        for (int64_t t = starts[b]; t < starts[b + 1]; ++t) {
          if (w[t] == 0.0f) continue;
          k1 += static_cast<double>(l[t]) - r[t];
          weight += w[t];
          ++count;
        }
        weight /= static_cast<double>(std::max<int64_t>(1, count));
        parts[b] = count ? weight * value_of(value, k1) : 0.0;
        const float of_token = count ? static_cast<float>(weight * slope_of(slope, k1)) : 0.0f;
        for (int64_t t = starts[b]; t < starts[b + 1]; ++t) out[t] = w[t] == 0.0f ? 0.0f : of_token;
      }
    });
  } else {
    parts.resize((N + kBlock - 1) / kBlock);
    at::parallel_for(0, parts.size(), 16, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        const int64_t end = std::min(N, (b + 1) * kBlock);
        double sum = 0.0;
        for (int64_t i = b * kBlock; i < end; i += Vec::size()) {
          const int64_t count = std::min<int64_t>(Vec::size(), end - i);
          const Vec weight = Vec::loadu(w + i, count), zero(0.0f), hidden = weight == zero;
          const Vec logps = Vec::blendv(Vec::loadu(l + i, count), zero, hidden), refs = Vec::blendv(Vec::loadu(r + i, count), zero, hidden);
          float terms[Vec::size()];
          (weight * token_kl(logps, refs, value)).store(terms);
          (weight * slope_of(slope, logps - refs)).store(out + i, count);
          for (int64_t j = 0; j < count; ++j) sum += terms[j];
        }
        parts[b] = sum;
      }
    });
  }
  double total = 0.0;
  for (double part : parts) total += part;
  *loss.mutable_data_ptr<float>() = static_cast<float>(total);
  return {loss, slope_N};
}

Tensor kl_loss(const Tensor& logp, const Tensor& ref_logp, const Tensor& weights, int64_t estimator, int64_t gradient, const std::optional<Tensor>& cu_seqlens) {
  const auto forward = [&](Saved& saved) -> Tensors {
    static auto op = find_op<decltype(kl_loss_forward)>("fusedrl::kl_loss_forward");
    auto [loss, slope_N] = op.call(logp, ref_logp, weights, estimator, gradient, cu_seqlens);
    saved.tensors = {slope_N};
    return {loss};
  };
  const auto backward = [](const Tensors& grads, const Saved& saved) -> Tensors { return {saved.tensors[0].mul(grads[0])}; };
  return with_gradient("kl_loss", {logp}, forward, backward)[0];
}

TORCH_LIBRARY_FRAGMENT(fusedrl, m) {
  m.def("token_kl(Tensor logp, Tensor ref_logp, int estimator) -> Tensor");
  m.def("kl_loss_forward(Tensor logp, Tensor ref_logp, Tensor weights, int estimator, int gradient, Tensor? cu_seqlens) -> (Tensor, Tensor)");
  m.def("kl_loss(Tensor logp, Tensor ref_logp, Tensor weights, int estimator, int gradient, Tensor? cu_seqlens) -> Tensor");
}
TORCH_LIBRARY_IMPL(fusedrl, CPU, m) {
  m.impl("token_kl", &token_kl_cpu);
  m.impl("kl_loss_forward", &kl_loss_forward);
}
TORCH_LIBRARY_IMPL(fusedrl, CompositeImplicitAutograd, m) { m.impl("kl_loss", &kl_loss); }

}  // namespace
