// For backward passes whose gradient was formed in the forward pass: how it depends on the input is not known any more, so a double backward must not
// take it for a constant.
#pragma once
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <string>

namespace {

struct FirstOrder : torch::autograd::Function<FirstOrder> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& gradient, const at::Tensor& scale, const at::Tensor& /*input*/,
                            const std::string& op) {
    ctx->saved_data["op"] = op;
    return gradient * scale;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list&) {
    TORCH_CHECK(false, ctx->saved_data["op"].toStringRef(), ": expected one backward pass, got a double backward; use impl=\"torch\" for second derivatives");
  }
};

// gradient * scale, once. `input`, which the gradient belongs to, leads a double backward here, where it is refused.
inline at::Tensor scaled_once(const char* op, const at::Tensor& gradient, const at::Tensor& scale, const at::Tensor& input) {
  return FirstOrder::apply(gradient, scale, input, std::string(op));
}

}  // namespace
