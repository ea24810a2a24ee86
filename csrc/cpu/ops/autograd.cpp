// The one torch::autograd::Function behind with_gradient (autograd.h).
#include "autograd.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstdint>
#include <utility>

namespace fusedrl {
namespace {

using torch::autograd::AutogradContext;

struct Recorded : torch::autograd::Function<Recorded> {
  static Tensors forward(AutogradContext* ctx, at::TensorList, int64_t given, const char* op, const Forward& forward, Backward backward) {
    at::AutoDispatchBelowADInplaceOrView below;
    Saved saved;
    saved.recorded = true;
    Tensors outputs = forward(saved);
    ctx->save_for_backward(std::move(saved.tensors));
    ctx->mark_non_differentiable(saved.non_differentiable);
    ctx->set_materialize_grads(saved.zeros_for_missing);
    ctx->saved_data["values"] = c10::ivalue::Tuple::create(std::move(saved.values));
    ctx->saved_data["given"] = given;
    ctx->saved_data["op"] = op;
    ctx->saved_data["backward"] = static_cast<int64_t>(reinterpret_cast<intptr_t>(backward));
    return outputs;
  }

  static Tensors backward(AutogradContext* ctx, const Tensors& grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(), ctx->saved_data["op"].toStringRef(),
                ": expected one backward pass, got a double backward (create_graph=True), which this op does not have");
    const uint64_t given = ctx->saved_data["given"].toInt();
    Saved saved;
    saved.tensors = ctx->get_saved_variables();
    saved.values = ctx->saved_data["values"].toTupleRef().elements().vec();
    for (int i = 0, edge = 0; given >> i > 1; ++i) saved.needed.push_back((given >> i & 1) && ctx->needs_input_grad(edge++));
    const auto compute = reinterpret_cast<Backward>(static_cast<intptr_t>(ctx->saved_data["backward"].toInt()));
    const Tensors of_inputs = compute(grads, saved);
    Tensors of_given;  // and of the four arguments behind them
    for (size_t i = 0; i < saved.needed.size(); ++i)
      if (given >> i & 1) of_given.push_back(of_inputs[i]);
    of_given.resize(of_given.size() + 4);
    return of_given;
  }
};

}  // namespace

Tensors with_gradient(const char* op, const Inputs& inputs, const Forward& forward, Backward backward) {
  Tensors there;
  int64_t given = int64_t(1) << inputs.size();  // bit i: input i is there; one more bit marks the end
  bool wanted = false;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!inputs[i] || !inputs[i]->defined()) continue;
    there.push_back(*inputs[i]);
    given |= int64_t(1) << i;
    wanted |= inputs[i]->requires_grad();
  }
  if (!wanted || !at::GradMode::is_enabled()) {
    at::AutoDispatchBelowADInplaceOrView below;
    Saved unused;
    return forward(unused);
  }
  return Recorded::apply(at::TensorList(there), given, op, forward, backward);
}

}  // namespace fusedrl
