// An op with a gradient. One torch::autograd::Function serves all of them (ops/autograd.cpp): its templates cost every file that has one of its own four
// seconds of compilation.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>

#include <functional>
#include <optional>
#include <vector>

namespace fusedrl {

using Tensors = std::vector<at::Tensor>;

// What an op's forward leaves for its backward.
struct Saved {
  Tensors tensors;                 // inputs and outputs, undefined ones too; whether one was written to since is checked
  std::vector<c10::IValue> values;
  Tensors non_differentiable;      // outputs
  bool zeros_for_missing = true;   // in the backward, for gradients of outputs that nothing was computed from; else they are undefined
  std::vector<bool> needed;        // in the backward: which inputs want a gradient
  bool recorded = false;           // in the forward: a backward may follow
};

using Inputs = std::vector<std::optional<at::Tensor>>;
using Forward = std::function<Tensors(Saved&)>;
using Backward = Tensors (*)(const Tensors& grads, const Saved& saved);

// The outputs of `forward`, run below autograd. `backward` returns a gradient for each of `inputs`, undefined where there is none; it is computed by hand and
// carries no graph, so that a double backward is refused: its result would pass for a constant.
Tensors with_gradient(const char* op, const Inputs& inputs, const Forward& forward, Backward backward);

// The op of that name, with the signature of the function that computes it on a CPU.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace fusedrl
