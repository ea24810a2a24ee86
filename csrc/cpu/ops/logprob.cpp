// logprob on CPU: logits -> log-probability of one token a row, and the entropy, without a log-softmax in memory.
//
// Shapes   rows of V logits behind any leading dimensions whose strides are free; stats [rows, 3] are max, S and W/S (logprob_rows.h).
// Bytes    forward reads rows V s; backward reads and writes rows V s. A large fresh gradient is asked for in huge pages (page faults
//          cost more than the arithmetic) and written past the caches. Of a row that lists what truncation kept, the forward reads those columns only.
// Threads  rows are divided; a row is always computed by one thread in one order.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "autograd.h"
#include "logprob_rows.h"
#include "memory.h"

namespace {

using namespace fusedrl;  // autograd.h

// Where the rows of a tensor [..., V] lie: at most two leading dimensions with strides of their own; more are copied together.
struct Rows {
  Tensor tensor;
  int64_t count = 1, columns = 0, inner = 1, outer_stride = 0, inner_stride = 0;

  explicit Rows(const Tensor& source) : tensor(source), columns(source.size(-1)) {
    if (!fit()) {
      tensor = source.contiguous();
      fit();
    }
  }
  int64_t offset(int64_t n) const { return n / inner * outer_stride + n % inner * inner_stride; }

 private:
  bool fit() {
    count = inner = 1;
    inner_stride = outer_stride = 0;
    bool split = false;  // whether the outer of the two is in use
    int64_t outer = 1;
    for (int64_t i = tensor.dim() - 2; i >= 0; --i) {
      const int64_t size = tensor.size(i), stride = tensor.stride(i);
      count *= size;
      if (size == 1) continue;
      if (inner == 1) {
        inner = size, inner_stride = stride;
      } else if (!split && stride == inner * inner_stride) {
        inner *= size;
      } else if (!split) {
        split = true, outer = size, outer_stride = stride;
      } else if (stride == outer * outer_stride) {
        outer *= size;
      } else {
        return false;
      }
    }
    inner = std::max<int64_t>(inner, 1);
    return true;
  }
};

// The columns that truncation kept of every row (kernels/kept.py); none: nothing was truncated.
class KeptColumns {
 public:
  KeptColumns(const MaybeTensor& ids_K, const MaybeTensor& offsets, int64_t N, int64_t V) {
    if (!ids_K || !offsets) return;
    ids_K_ = ids_K->contiguous(), offsets_ = offsets->contiguous();
    ids_ = ids_K_.const_data_ptr<int32_t>(), at_ = offsets_.const_data_ptr<int64_t>();
    const int64_t K = ids_K_.numel();
    TORCH_CHECK_VALUE(offsets_.numel() == N + 1, "logprob: expected ", N + 1, " kept.offsets, one more than rows, got ", offsets_.numel());
    TORCH_CHECK_VALUE(at_[0] == 0 && std::is_sorted(at_, at_ + N + 1) && at_[N] <= K, "logprob: expected kept.offsets that ascend from 0 to at most ", K,
                      ", the number of kept ids, got ", at_[0], " to ", at_[N]);
    for (int64_t n = 0; n < N; ++n) {
      int64_t before = -1;
      for (int64_t k = at_[n]; k < at_[n + 1]; before = ids_[k++]) {
        TORCH_CHECK_INDEX(ids_[k] > before && ids_[k] < V, "logprob: expected kept ids that ascend in [0, ", V, "), got ", ids_[k], " after ", before, " in row ", n);
      }
    }
  }
  int64_t count(int64_t n) const { return at_ ? at_[n + 1] - at_[n] : 0; }  // 0: the whole row
  const int32_t* columns(int64_t n) const { return ids_ + at_[n]; }
  // Where the label stands among the kept columns of row n; their count when it is not one of them.
  int64_t find(int64_t n, int64_t label) const {
    const int32_t* end = columns(n) + count(n);
    const int32_t* place = std::lower_bound(columns(n), end, label);
    return (place != end && *place == label ? place : end) - columns(n);
  }

 private:
  Tensor ids_K_, offsets_;
  const int32_t* ids_ = nullptr;
  const int64_t* at_ = nullptr;
};

// The kept logits of a row, and -inf behind them: there stands a label that was not kept.
template <typename scalar_t>
void gather(const scalar_t* row, const int32_t* columns, int64_t count, std::vector<float>& into) {
  into.resize(count + 1);
  for (int64_t k = 0; k < count; ++k) into[k] = static_cast<float>(row[columns[k]]);
  into[count] = -kInfinity;
}

template <typename Function>
void dispatch(at::ScalarType type, const Function& function) {
  switch (type) {
    case at::kFloat: return function(float{});
    case at::kBFloat16: return function(at::BFloat16{});
    case at::kHalf: return function(at::Half{});
    default: TORCH_CHECK_TYPE(false, "logprob: expected logits of dtype float32, bfloat16 or float16, got ", type);
  }
}

std::tuple<Tensor, Tensor, Tensor> logprob_forward(const Tensor& logits, const Tensor& token_ids, double temperature, const MaybeTensor& temperatures, bool entropy,
                                                   int64_t ignore_index, const MaybeTensor& kept_ids, const MaybeTensor& kept_offsets) {
  const Rows rows(logits);
  const int64_t N = rows.count, V = rows.columns;
  const Tensor ids_N = token_ids.to(at::kLong).contiguous();
  const int64_t* ids = ids_N.const_data_ptr<int64_t>();
  check_ids("logprob", ids, N, V, ignore_index);
  const Temperatures t("logprob", temperature, temperatures);
  const KeptColumns kept(kept_ids, kept_offsets, N, V);
  const auto options = logits.options().dtype(at::kFloat);
  Tensor logp = at::empty(token_ids.sizes(), options), entropies = entropy ? at::empty(token_ids.sizes(), options) : at::empty({0}, options);
  Tensor stats_N3 = at::empty({N, 3}, options);
  float* logp_out = logp.mutable_data_ptr<float>();
  float* entropy_out = entropy ? entropies.mutable_data_ptr<float>() : nullptr;
  auto* stats = reinterpret_cast<RowStats*>(stats_N3.mutable_data_ptr<float>());
  dispatch(logits.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const scalar_t* z = rows.tensor.const_data_ptr<scalar_t>();
    at::parallel_for(0, N, grain(V), [&](int64_t begin, int64_t end) {
      std::vector<float> gathered;
      for (int64_t n = begin; n < end; ++n) {
        const scalar_t* row = z + rows.offset(n);
        const auto score = [&](const auto* values, int64_t count, int64_t label) {
          stats[n] = entropy_out ? row_stats<true>(values, count, t[n]) : row_stats<false>(values, count, t[n]);
          logp_out[n] = row_logp(stats[n], static_cast<float>(values[label]), t[n]);
        };
        if (ids[n] == ignore_index) {
          stats[n] = {0.0f, 0.0f, 0.0f}, logp_out[n] = 0.0f;
        } else if (const int64_t count = kept.count(n)) {
          gather(row, kept.columns(n), count, gathered);
          score(gathered.data(), count, kept.find(n, ids[n]));
        } else {
          score(row, V, ids[n]);
        }
        if (entropy_out) entropy_out[n] = row_entropy(stats[n]);
      }
    });
  });
  return {logp, entropies, stats_N3};
}

// Row by row into `out`, which has the strides of `out_rows` and may be the logits themselves.
template <bool kPastCache>
void gradient_rows(const Rows& rows, const Rows& out_rows, const MaybeTensor& logp_grad, const MaybeTensor& entropy_grad, const Tensor& token_ids, const Tensor& stats_N3,
                   double temperature, const MaybeTensor& temperatures, int64_t ignore_index, const MaybeTensor& kept_ids, const MaybeTensor& kept_offsets) {
  const int64_t N = rows.count, V = rows.columns;
  const Tensor ids_N = token_ids.to(at::kLong).contiguous();
  const Tensor g_N = logp_grad ? logp_grad->contiguous() : Tensor(), h_N = entropy_grad ? entropy_grad->contiguous() : Tensor();
  const int64_t* ids = ids_N.const_data_ptr<int64_t>();
  const float* g = g_N.defined() ? g_N.const_data_ptr<float>() : nullptr;
  const float* h = h_N.defined() ? h_N.const_data_ptr<float>() : nullptr;
  const auto* stats = reinterpret_cast<const RowStats*>(stats_N3.const_data_ptr<float>());
  const Temperatures t("logprob", temperature, temperatures);
  const KeptColumns kept(kept_ids, kept_offsets, N, V);
  dispatch(rows.tensor.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const scalar_t* z = rows.tensor.const_data_ptr<scalar_t>();
    scalar_t* out = out_rows.tensor.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, N, grain(V), [&](int64_t begin, int64_t end) {
      std::vector<float> gathered;
      for (int64_t n = begin; n < end; ++n) {
        const scalar_t* row = z + rows.offset(n);
        scalar_t* to = out + out_rows.offset(n);
        const double g_n = g ? g[n] : 0.0, h_n = h ? h[n] : 0.0;
        if (ids[n] == ignore_index) {
          std::fill(to, to + V, zero);
        } else if (const int64_t count = kept.count(n)) {
          const int32_t* columns = kept.columns(n);
          gather(row, columns, count, gathered);  // before the zeros: they may be written over the logits
          row_gradient<false>(gathered.data(), gathered.data(), count + 1, kept.find(n, ids[n]), stats[n], g_n, h_n, t[n], 0.0);
          std::fill(to, to + V, zero);
          for (int64_t k = 0; k < count; ++k) to[columns[k]] = static_cast<scalar_t>(gathered[k]);
        } else {
          row_gradient<kPastCache>(row, to, V, ids[n], stats[n], g_n, h_n, t[n], 0.0);
        }
      }
      if constexpr (kPastCache) finish_stores_past_cache();
    });
  });
}

Tensor logprob_backward(const MaybeTensor& logp_grad, const MaybeTensor& entropy_grad, const Tensor& logits, const Tensor& token_ids, const Tensor& stats_N3,
                        double temperature, const MaybeTensor& temperatures, int64_t ignore_index, const MaybeTensor& kept_ids, const MaybeTensor& kept_offsets) {
  Tensor grad = empty_in_huge_pages(logits.sizes(), logits.options());
  const bool large = grad.nbytes() >= kLarge;
  const auto run = large ? gradient_rows<true> : gradient_rows<false>;
  run(Rows(logits), Rows(grad), logp_grad, entropy_grad, token_ids, stats_N3, temperature, temperatures, ignore_index, kept_ids, kept_offsets);
  return grad;
}

// The same, over the logits.
void logprob_backward_(Tensor& logits, const MaybeTensor& logp_grad, const MaybeTensor& entropy_grad, const Tensor& token_ids, const Tensor& stats_N3, double temperature,
                       const MaybeTensor& temperatures, int64_t ignore_index, const MaybeTensor& kept_ids, const MaybeTensor& kept_offsets) {
  const Rows rows(logits);
  gradient_rows<false>(rows, rows, logp_grad, entropy_grad, token_ids, stats_N3, temperature, temperatures, ignore_index, kept_ids, kept_offsets);
}

std::tuple<Tensor, Tensor> logprob_with_gradient(const Tensor& logits, const Tensor& token_ids, double temperature, const MaybeTensor& temperatures, bool entropy,
                                                 int64_t ignore_index, const MaybeTensor& kept_ids, const MaybeTensor& kept_offsets, bool in_place) {
  const auto forward = [&](Saved& saved) -> Tensors {
    static auto op = find_op<decltype(logprob_forward)>("fusedrl::logprob_forward");
    auto [logp, entropies, stats_N3] = op.call(logits, token_ids, temperature, temperatures, entropy, ignore_index, kept_ids, kept_offsets);
    saved.tensors = {logits, token_ids, stats_N3, temperatures.value_or(Tensor()), kept_ids.value_or(Tensor()), kept_offsets.value_or(Tensor())};
    saved.values = {temperature, ignore_index, in_place};
    saved.zeros_for_missing = false;
    if (!entropy) saved.non_differentiable = {entropies};
    return {logp, entropies};
  };
  const auto backward = [](const Tensors& grads, const Saved& saved) -> Tensors {
    const auto& [t, x] = std::tie(saved.tensors, saved.values);
    const double temperature = x[0].toDouble();
    const int64_t ignore_index = x[1].toInt();
    if (x[2].toBool()) {
      static auto op = find_op<decltype(logprob_backward_)>("fusedrl::logprob_backward_");
      Tensor grad = t[0].detach();  // shares the version counter: whoever else saved these logits is told
      op.call(grad, defined(grads[0]), defined(grads[1]), t[1], t[2], temperature, defined(t[3]), ignore_index, defined(t[4]), defined(t[5]));
      grad.unsafeGetTensorImpl()->bump_version();
      return {grad};
    }
    static auto op = find_op<decltype(logprob_backward)>("fusedrl::logprob_backward");
    return {op.call(defined(grads[0]), defined(grads[1]), t[0], t[1], t[2], temperature, defined(t[3]), ignore_index, defined(t[4]), defined(t[5]))};
  };
  const auto out = with_gradient("logprob", {logits}, forward, backward);
  return {out[0], out[1]};
}

std::tuple<Tensor, Tensor> logprob(const Tensor& logits, const Tensor& token_ids, double temperature, const MaybeTensor& temperatures, bool entropy, int64_t ignore_index,
                                   const MaybeTensor& kept_ids, const MaybeTensor& kept_offsets) {
  return logprob_with_gradient(logits, token_ids, temperature, temperatures, entropy, ignore_index, kept_ids, kept_offsets, false);
}

// The backward overwrites the logits; the Python function has checked that it may.
std::tuple<Tensor, Tensor> logprob_in_place(const Tensor& logits, const Tensor& token_ids, double temperature, const MaybeTensor& temperatures, bool entropy,
                                            int64_t ignore_index, const MaybeTensor& kept_ids, const MaybeTensor& kept_offsets) {
  TORCH_CHECK_VALUE(Rows(logits).tensor.is_same(logits), "logprob_: expected at most two leading dimensions with strides of their own, got sizes ", logits.sizes(),
                    " with strides ", logits.strides(), "; use logprob");
  return logprob_with_gradient(logits, token_ids, temperature, temperatures, entropy, ignore_index, kept_ids, kept_offsets, true);
}

TORCH_LIBRARY_FRAGMENT(fusedrl, m) {
  m.def("logprob_forward(Tensor logits, Tensor token_ids, float temperature, Tensor? temperatures, bool entropy, int ignore_index, Tensor? kept_ids=None, "
        "Tensor? kept_offsets=None) -> (Tensor, Tensor, Tensor)");
  m.def("logprob_backward(Tensor? logp_grad, Tensor? entropy_grad, Tensor logits, Tensor token_ids, Tensor stats, float temperature, Tensor? temperatures, "
        "int ignore_index, Tensor? kept_ids=None, Tensor? kept_offsets=None) -> Tensor");
  m.def("logprob_backward_(Tensor(a!) logits, Tensor? logp_grad, Tensor? entropy_grad, Tensor token_ids, Tensor stats, float temperature, Tensor? temperatures, "
        "int ignore_index, Tensor? kept_ids=None, Tensor? kept_offsets=None) -> ()");
  m.def("logprob(Tensor logits, Tensor token_ids, float temperature, Tensor? temperatures, bool entropy, int ignore_index, Tensor? kept_ids=None, "
        "Tensor? kept_offsets=None) -> (Tensor, Tensor)");
  m.def("logprob_in_place(Tensor logits, Tensor token_ids, float temperature, Tensor? temperatures, bool entropy, int ignore_index, Tensor? kept_ids=None, "
        "Tensor? kept_offsets=None) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fusedrl, CPU, m) {
  m.impl("logprob_forward", &logprob_forward);
  m.impl("logprob_backward", &logprob_backward);
  m.impl("logprob_backward_", &logprob_backward_);
}
TORCH_LIBRARY_IMPL(fusedrl, CompositeImplicitAutograd, m) {
  m.impl("logprob", &logprob);
  m.impl("logprob_in_place", &logprob_in_place);
}

}  // namespace
