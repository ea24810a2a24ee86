// What the ops' autograd functions share.
#pragma once

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

// Called in a backward. The gradients are computed by hand and carry no graph: with create_graph they would pass for constants.
inline void refuse_double_backward(const char* op) {
  TORCH_CHECK(!at::GradMode::is_enabled(), op, ": expected one backward pass, got a double backward (create_graph=True), which this op does not have");
}
