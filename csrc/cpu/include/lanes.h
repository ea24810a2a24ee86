// float32, bfloat16 or float16 in memory, float32 vectors in registers: load, store and round, with a count for the end of a row.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>

namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t L = Vec::size();

// The first `count` values; the other lanes are 0.
template <typename T>
inline Vec load(const T* p, int64_t count = L) {
  if constexpr (std::is_same_v<T, float>) {
    return Vec::loadu(p, count);
  } else {
    if (count < L) return std::get<0>(at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(p, count)));
    Vec value;
    at::vec::load_to_float<T>(p, value);
    return value;
  }
}

template <typename T>
inline void store(const Vec& value, T* p, int64_t count = L) {
  if constexpr (std::is_same_v<T, float>) value.store(p, count);
  else at::vec::convert_from_float<T>(value, value).store(p, count);
}

// outs[k][i] = values(i, count)[k] for n values. Rounding to two bytes makes two vectors at a time, for the price of one.
template <typename T, size_t K, typename Values>
inline void store_rows(int64_t n, const std::array<T*, K>& outs, const Values& values) {
  int64_t i = 0;
  if constexpr (!std::is_same_v<T, float>) {
    const std::integral_constant<int64_t, L> whole;
    for (; i + 2 * L <= n; i += 2 * L) {
      const std::array<Vec, K> low = values(i, whole), high = values(i + L, whole);
      for (size_t k = 0; k < K; ++k) at::vec::convert_from_float<T>(low[k], high[k]).store(outs[k] + i);
    }
  }
  for (; i < n; i += L) {
    const int64_t count = std::min(L, n - i);
    const std::array<Vec, K> of = count == L ? values(i, std::integral_constant<int64_t, L>()) : values(i, count);
    for (size_t k = 0; k < K; ++k) store(of[k], outs[k] + i, count);
  }
}

// As `store` and `load` would leave it.
template <typename T>
inline Vec round_to(const Vec& value) {
  if constexpr (std::is_same_v<T, float>) return value;
  else if constexpr (std::is_same_v<T, at::BFloat16>) {  // to nearest, ties to even, in place
    using Bits = at::vec::Vectorized<int32_t>;
    const Bits bits = at::vec::cast<int32_t>(value), up = bits + Bits(0x7fff) + ((bits >> Bits(16)) & Bits(1));
    return Vec::blendv(value, at::vec::cast<float>(up & Bits(-65536)), value == value);
  } else return std::get<0>(at::vec::convert_to_float<T>(at::vec::convert_from_float<T>(value, value)));
}

inline float sum_lanes(const Vec& value) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, value);
}

// body(i, count) for every vector of n values: whole ones first, then what is left.
template <typename Body>
inline void each_vector(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + L <= n; i += L) body(i, std::integral_constant<int64_t, L>());
  if (i < n) body(i, n - i);
}

// How many rows of n values make a task worth handing to another thread.
inline int64_t rows_a_task(int64_t n) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, n)); }

// Rows of n values behind one or two dimensions whose strides are free; the last dimension is contiguous.
template <typename T>
struct Rows {
  T* data;
  int64_t count, inner, outer_stride, inner_stride;

  explicit Rows(const Tensor& t) : data(t.numel() ? static_cast<T*>(const_cast<void*>(t.const_data_ptr())) : nullptr) {
    const bool heads = t.dim() == 3;
    inner = heads ? std::max<int64_t>(1, t.size(1)) : 1;
    count = t.size(0) * (heads ? t.size(1) : 1);
    outer_stride = t.stride(0), inner_stride = heads ? t.stride(1) : 0;
  }
  T* operator[](int64_t n) const { return data + (inner == 1 ? n * outer_stride : n / inner * outer_stride + n % inner * inner_stride); }
};

template <typename Function>
void dispatch(const char* op, at::ScalarType type, const Function& function) {
  switch (type) {
    case at::kFloat: return function(float{});
    case at::kBFloat16: return function(at::BFloat16{});
    case at::kHalf: return function(at::Half{});
    default: TORCH_CHECK_TYPE(false, op, ": expected float32, bfloat16 or float16, got ", type);
  }
}

inline MaybeTensor defined(const Tensor& tensor) { return tensor.defined() ? MaybeTensor(tensor) : std::nullopt; }

}  // namespace
