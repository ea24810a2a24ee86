// advance_rows_ on CPU: what was drawn goes into the ring, rows that end are marked, the others move on.
//
// Shapes   R rows, W stop ids a row ([W, R]), rings of K steps. One pass, no task: a row is a few integers.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

void advance_rows(const Tensor& drawn, const Tensor& logp, const Tensor& stops, const Tensor& last_positions, const Tensor& token_ids,
                  const Tensor& positions, const Tensor& finished, const Tensor& ring_tokens, const Tensor& ring_logp, const Tensor& cursor,
                  const MaybeTensor& values, const MaybeTensor& ring_values) {
  TORCH_CHECK_VALUE(drawn.dim() == 1 && stops.dim() == 2 && ring_tokens.dim() == 2, "advance_rows_: expected drawn [R], stops [W, R], ring_tokens [K, R]");
  TORCH_CHECK_VALUE(values.has_value() == ring_values.has_value(), "advance_rows_: expected values and ring_values together, got only ",
                    values ? "values" : "ring_values");
  const int64_t R = drawn.size(0), W = stops.size(0), K = ring_tokens.size(0);
  struct Argument {
    const char* name;
    const Tensor& tensor;
    std::initializer_list<int64_t> sizes;
    at::ScalarType dtype;
  };
  for (const Argument& a : {Argument{"drawn", drawn, {R}, at::kLong}, Argument{"logp", logp, {R}, at::kFloat}, Argument{"stops", stops, {W, R}, at::kLong},
                            Argument{"last_positions", last_positions, {R}, at::kLong}, Argument{"token_ids", token_ids, {R}, at::kLong},
                            Argument{"positions", positions, {2, R}, at::kLong}, Argument{"finished", finished, {R}, at::kBool},
                            Argument{"ring_tokens", ring_tokens, {K, R}, at::kLong}, Argument{"ring_logp", ring_logp, {K, R}, at::kFloat},
                            Argument{"cursor", cursor, {1}, at::kLong}, Argument{"values", values ? *values : logp, {R}, at::kFloat},
                            Argument{"ring_values", ring_values ? *ring_values : ring_logp, {K, R}, at::kFloat}}) {
    TORCH_CHECK_VALUE(a.tensor.sizes() == at::IntArrayRef(a.sizes), "advance_rows_: expected ", a.name, " ", at::IntArrayRef(a.sizes), ", got ", a.tensor.sizes());
    TORCH_CHECK_TYPE(a.tensor.scalar_type() == a.dtype, "advance_rows_: expected ", a.name, " of dtype ", a.dtype, ", got ", a.tensor.scalar_type());
    TORCH_CHECK_VALUE(a.tensor.is_contiguous(), "advance_rows_: expected ", a.name, " contiguous, got strides ", a.tensor.strides());
  }
  int64_t& step = *cursor.mutable_data_ptr<int64_t>();
  TORCH_CHECK_INDEX(step >= 0 && step < K, "advance_rows_: expected the cursor in [0, ", K, "), the steps of the ring, got ", step);
  const int64_t *token = drawn.const_data_ptr<int64_t>(), *stop = stops.const_data_ptr<int64_t>(), *last = last_positions.const_data_ptr<int64_t>();
  int64_t *newest = token_ids.mutable_data_ptr<int64_t>(), *key_at = positions.mutable_data_ptr<int64_t>(), *at = key_at + R;
  bool* ended = finished.mutable_data_ptr<bool>();
  std::copy_n(token, R, ring_tokens.mutable_data_ptr<int64_t>() + step * R);
  std::copy_n(logp.const_data_ptr<float>(), R, ring_logp.mutable_data_ptr<float>() + step * R);
  if (values) std::copy_n(values->const_data_ptr<float>(), R, ring_values->mutable_data_ptr<float>() + step * R);
  ++step;
  for (int64_t r = 0; r < R; ++r) ended[r] = ended[r] || at[r] >= last[r];
  for (int64_t w = 0; w < W; ++w)
    for (int64_t r = 0; r < R; ++r) ended[r] = ended[r] || token[r] == stop[w * R + r];
  for (int64_t r = 0; r < R; ++r) {
    newest[r] = ended[r] ? newest[r] : token[r];
    key_at[r] += !ended[r];
    at[r] += !ended[r];
  }
}

TORCH_LIBRARY_FRAGMENT(fusedrl, m) {
  m.def(
      "advance_rows_(Tensor drawn, Tensor logp, Tensor stops, Tensor last_positions, Tensor(a!) token_ids, Tensor(b!) positions, Tensor(c!) finished, "
      "Tensor(d!) ring_tokens, Tensor(e!) ring_logp, Tensor(f!) cursor, Tensor? values=None, Tensor(g!)? ring_values=None) -> ()");
}
TORCH_LIBRARY_IMPL(fusedrl, CPU, m) { m.impl("advance_rows_", &advance_rows); }

}  // namespace
