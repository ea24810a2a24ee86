// What most files here include of torch: parsed once a build by setup.py, and by every file otherwise. A file still includes what it uses. <ATen/ATen.h> and
// torch's autograd are left out: each doubles the time that these take.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
