// pairwise_ranking_loss on CPU: -mean log sigmoid(chosen - rejected - margin), value and derivative in one pass.
//
// Shapes   B pairs. Bytes: 8 to 12 read and 4 written a pair.
// Numerics float32 terms, summed in double in index order by one thread (B is a batch of sequences, never of tokens).
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

namespace {

using at::Tensor;

// Loss and d loss / d chosen (= -d loss / d rejected) for a unit upstream gradient.
std::tuple<Tensor, Tensor> forward(const Tensor& chosen, const Tensor& rejected, const std::optional<Tensor>& margin) {
  const Tensor chosen_B = chosen.contiguous(), rejected_B = rejected.contiguous();
  const Tensor margin_B = margin ? margin->contiguous() : Tensor();
  Tensor loss = at::empty({}, chosen_B.options()), slope_B = at::empty_like(chosen_B);
  const int64_t B = chosen_B.numel();
  const float* c = chosen_B.const_data_ptr<float>();
  const float* r = rejected_B.const_data_ptr<float>();
  const float* m = margin_B.defined() ? margin_B.const_data_ptr<float>() : nullptr;
  float* slope = slope_B.mutable_data_ptr<float>();
  double sum = 0.0;
  for (int64_t b = 0; b < B; ++b) {
    const float d = c[b] - r[b] - (m ? m[b] : 0.0f);
    const float e = std::exp(-std::abs(d));
    sum += std::log1p(e) + (d < 0 ? -d : 0.0f);
    slope[b] = -(d < 0 ? 1.0f : e) / (1.0f + e) / static_cast<float>(B);  // -sigmoid(-d) / B
  }
  *loss.mutable_data_ptr<float>() = B ? static_cast<float>(sum / static_cast<double>(B)) : 0.0f;
  return {loss, slope_B};
}

struct PairwiseRankingLoss : torch::autograd::Function<PairwiseRankingLoss> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& chosen, const Tensor& rejected, const std::optional<Tensor>& margin) {
    at::AutoDispatchBelowADInplaceOrView below;
    static auto op = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("fusedrl::pairwise_ranking_loss_forward", "")
                         .typed<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const std::optional<Tensor>&)>();
    auto [loss, slope_B] = op.call(chosen, rejected, margin);
    ctx->save_for_backward({slope_B});
    ctx->saved_data["margin"] = margin.has_value();
    return loss;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grads) {
    const Tensor chosen_grad = grads[0] * ctx->get_saved_variables()[0];
    return {chosen_grad, -chosen_grad, ctx->saved_data["margin"].toBool() ? -chosen_grad : Tensor()};
  }
};

Tensor pairwise_ranking_loss(const Tensor& chosen, const Tensor& rejected, const std::optional<Tensor>& margin) {
  return PairwiseRankingLoss::apply(chosen, rejected, margin);
}

TORCH_LIBRARY_FRAGMENT(fusedrl, m) {
  m.def("pairwise_ranking_loss_forward(Tensor chosen, Tensor rejected, Tensor? margin) -> (Tensor, Tensor)");
  m.def("pairwise_ranking_loss(Tensor chosen, Tensor rejected, Tensor? margin) -> Tensor");
}
TORCH_LIBRARY_IMPL(fusedrl, CPU, m) { m.impl("pairwise_ranking_loss_forward", &forward); }
TORCH_LIBRARY_IMPL(fusedrl, CompositeImplicitAutograd, m) { m.impl("pairwise_ranking_loss", &pairwise_ranking_loss); }

}  // namespace
