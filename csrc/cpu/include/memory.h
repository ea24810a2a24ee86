// A fresh tensor whose memory, when there is much of it, comes in huge pages: faulting it in page by page costs more than the arithmetic of most ops here.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr size_t kLarge = 16 << 20;

inline at::Tensor empty_in_huge_pages(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor tensor = at::empty(sizes, options);
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  if (tensor.nbytes() >= kLarge) {
    const auto at = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
    const uintptr_t begin = (at + kHugePage - 1) / kHugePage * kHugePage, end = (at + tensor.nbytes()) / kHugePage * kHugePage;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: refused, nothing is lost but time
  }
#endif
  return tensor;
}

}  // namespace
