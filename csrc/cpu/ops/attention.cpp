// varlen_attention on CPU: packed attention within sequences, forward and backward, without padding and without a T x T matrix.
//
// Shapes    N tokens, Hq query heads, Hkv key/value heads, D head dim; T the tokens of one sequence.
// Work      one task is one (sequence, key/value head): its keys and values are copied once into float32 rows, and a block of as many queries as a
//           vector has lanes walks them. Scores have queries in the lanes: q.k is D multiply-adds with a broadcast of k, and so is p.v.
// Bytes     q, k, v, o once each (and their gradients); the rest stays in the cache.
// Numerics  float32 throughout; softmax by its own maximum over the block's scores (two passes, nothing rescaled). Every sum has a fixed order that depends
//           on the sequence alone: neither companions nor threads change a bit.
// Source    the backward is that of Dao et al. (2022), FlashAttention, appendix B.
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "autograd.h"

namespace {

using namespace fusedrl;  // autograd.h

using at::Tensor;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t L = Vec::size();  // queries in a block
constexpr int64_t K = 4;            // keys whose scores are formed together, so that a query vector is loaded once for them
constexpr float INF = std::numeric_limits<float>::infinity();

struct Shape {
  int64_t B, Hq, Hkv, D, Dp;  // Dp: D rounded up to whole vectors
  bool causal;
  int64_t window;  // 0: none
  float scale, softcap;  // 0: none
};

// The keys that some query of the block [first, last] may see, and the lanes that may see key j.
struct Block {
  int64_t first, rows, T, window;
  bool causal;
  int64_t begin() const { return window ? std::max<int64_t>(0, first - window + 1) : 0; }
  int64_t end() const {
    const int64_t last = first + rows - 1;
    return causal ? last + 1 : window ? std::min(T, last + window) : T;
  }
  int64_t lane_begin(int64_t j) const { return std::max<int64_t>(0, causal ? j - first : window ? j - window + 1 - first : 0); }
  int64_t lane_end(int64_t j) const { return window ? std::min(L, j + window - first) : L; }
};

// x[token, head, :] of one head as float32 rows [T][Dp], zero behind D.
template <typename scalar>
void load_rows(const scalar* x, int64_t stride, int64_t T, const Shape& s, float* rows) {
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t d = 0; d < s.D; ++d) rows[t * s.Dp + d] = static_cast<float>(x[t * stride + d]);
    for (int64_t d = s.D; d < s.Dp; ++d) rows[t * s.Dp + d] = 0.0f;
  }
}

// rows [n][Dp] -> columns [D][L], zero behind n.
void transpose(const float* rows, int64_t n, const Shape& s, float factor, float* columns) {
  for (int64_t d = 0; d < s.D; ++d)
    for (int64_t i = 0; i < L; ++i) columns[d * L + i] = i < n ? rows[i * s.Dp + d] * factor : 0.0f;
}

// out[k][lane] = sum_d columns[d][lane] * rows[k][d] for n <= K rows.
template <int64_t n>
inline void scores(const float* columns, const float* rows, const Shape& s, Vec* out) {
  for (int64_t k = 0; k < n; ++k) out[k] = Vec(0.0f);
  for (int64_t d = 0; d < s.D; ++d) {
    const Vec column = Vec::loadu(columns + d * L);
    for (int64_t k = 0; k < n; ++k) out[k] = at::vec::fmadd(column, Vec(rows[k * s.Dp + d]), out[k]);
  }
}

// softcap tanh(z / softcap), and what it multiplies a gradient by, from its result.
inline Vec cap(const Vec& z, const Shape& s) { return s.softcap > 0 ? (z * Vec(1.0f / s.softcap)).tanh() * Vec(s.softcap) : z; }
inline Vec cap_slope(const Vec& capped, const Shape& s) {
  const Vec t = capped * Vec(1.0f / s.softcap);
  return Vec(1.0f) - t * t;
}

// columns[d][lane] += sum_k weights[k][lane] * rows[k][d].
template <int64_t n>
inline void accumulate(const Vec* weights, const float* rows, const Shape& s, float* columns) {
  for (int64_t d = 0; d < s.D; ++d) {
    Vec column = Vec::loadu(columns + d * L);
    for (int64_t k = 0; k < n; ++k) column = at::vec::fmadd(weights[k], Vec(rows[k * s.Dp + d]), column);
    column.store(columns + d * L);
  }
}

// out[k][d] += sum over the n lanes of weights[k][lane] * rows[lane][d], for the `keys` rows of out.
inline void spread(const float* weights, const float* rows, int64_t n, int64_t keys, const Shape& s, float* out) {
  for (int64_t d = 0; d < s.Dp; d += L) {
    int64_t k = 0;
    for (; k + K <= keys; k += K) {
      Vec sum[K];
      for (int64_t c = 0; c < K; ++c) sum[c] = Vec::loadu(out + (k + c) * s.Dp + d);
      for (int64_t i = 0; i < n; ++i) {
        const Vec row = Vec::loadu(rows + i * s.Dp + d);
        for (int64_t c = 0; c < K; ++c) sum[c] = at::vec::fmadd(Vec(weights[(k + c) * L + i]), row, sum[c]);
      }
      for (int64_t c = 0; c < K; ++c) sum[c].store(out + (k + c) * s.Dp + d);
    }
    for (; k < keys; ++k) {
      Vec sum = Vec::loadu(out + k * s.Dp + d);
      for (int64_t i = 0; i < n; ++i) sum = at::vec::fmadd(Vec(weights[k * L + i]), Vec::loadu(rows + i * s.Dp + d), sum);
      sum.store(out + k * s.Dp + d);
    }
  }
}

// Set the lanes that may not see key j.
inline void blank(const Block& block, int64_t j, float value, float* row) {
  for (int64_t i = 0; i < std::min(L, block.lane_begin(j)); ++i) row[i] = value;
  for (int64_t i = std::max<int64_t>(0, block.lane_end(j)); i < L; ++i) row[i] = value;
}

// Call f.template operator()<n>(j) for the keys of a block, K at a time.
template <typename F>
inline void over_keys(const Block& block, F&& f) {
  int64_t j = block.begin();
  for (; j + K <= block.end(); j += K) f(j, std::integral_constant<int64_t, K>());
  for (; j < block.end(); ++j) f(j, std::integral_constant<int64_t, 1>());
}

Shape shape_of(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens, bool causal, int64_t window, double scale, double softcap) {
  TORCH_CHECK_TYPE(q.scalar_type() != at::kDouble, "varlen_attention: the C++ implementation computes in float32; use the torch one for float64");
  const int64_t D = q.size(2);
  return {cu_seqlens.size(0) - 1, q.size(1), k.size(1), D, (D + L - 1) / L * L, causal, window, static_cast<float>(scale), static_cast<float>(softcap)};
}

void check_sequences(const Tensor& cu_seqlens, int64_t N) {
  const int32_t* ends = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t B = cu_seqlens.size(0) - 1;
  bool rising = ends[0] == 0 && ends[B] == N;
  for (int64_t b = 0; b < B; ++b) rising &= ends[b] <= ends[b + 1];
  TORCH_CHECK_VALUE(rising, "varlen_attention: expected cu_seqlens from 0 to N = ", N, ", not decreasing");
}

// Strides of the token and head dimensions are free; the last dimension is contiguous.
Tensor dense_heads(const Tensor& x) { return x.stride(2) == 1 || x.size(2) == 1 ? x : x.contiguous(); }

std::tuple<Tensor, Tensor> forward(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& cu_seqlens_, bool causal, int64_t window, double scale,
                                   double softcap) {
  const Tensor q = dense_heads(q_), k = dense_heads(k_), v = dense_heads(v_), cu_seqlens = cu_seqlens_.contiguous();
  check_sequences(cu_seqlens, q.size(0));
  const Shape s = shape_of(q, k, cu_seqlens, causal, window, scale, softcap);
  Tensor o = at::empty(q.sizes(), q.options()), lse = at::empty({s.Hq, q.size(0)}, q.options().dtype(at::kFloat));
  const int32_t* ends = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t N = q.size(0), group = s.Hq / s.Hkv;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, q.scalar_type(), "varlen_attention", [&] {
    const scalar_t *qp = q.const_data_ptr<scalar_t>(), *kp = k.const_data_ptr<scalar_t>(), *vp = v.const_data_ptr<scalar_t>();
    scalar_t* op = o.mutable_data_ptr<scalar_t>();
    float* lp = lse.mutable_data_ptr<float>();
    at::parallel_for(0, s.B * s.Hkv, 1, [&](int64_t task_begin, int64_t task_end) {
      std::vector<float> keys, values, buffer, columns(2 * s.D * L), rows(L * s.Dp);
      for (int64_t task = task_begin; task < task_end; ++task) {
        const int64_t b = task / s.Hkv, g = task % s.Hkv, start = ends[b], T = ends[b + 1] - start;
        if (T == 0) continue;
        keys.resize(std::max<size_t>(keys.size(), T * s.Dp));
        values.resize(keys.size());
        buffer.resize(std::max<size_t>(buffer.size(), T * L));
        load_rows(kp + start * k.stride(0) + g * k.stride(1), k.stride(0), T, s, keys.data());
        load_rows(vp + start * v.stride(0) + g * v.stride(1), v.stride(0), T, s, values.data());
        float *query = columns.data(), *out = query + s.D * L;
        for (int64_t h = g * group; h < (g + 1) * group; ++h) {
          for (int64_t first = 0; first < T; first += L) {
            const Block block{first, std::min(L, T - first), T, s.window, s.causal};
            load_rows(qp + (start + first) * q.stride(0) + h * q.stride(1), q.stride(0), block.rows, s, rows.data());
            transpose(rows.data(), block.rows, s, s.scale, query);
            Vec maximum(-INF);
            over_keys(block, [&](int64_t j, auto n) {
              Vec z[n];
              scores<n>(query, keys.data() + j * s.Dp, s, z);
              for (int64_t c = 0; c < n; ++c) {
                float* row = buffer.data() + (j + c) * L;
                cap(z[c], s).store(row);
                if (block.lane_begin(j + c) > 0 || block.lane_end(j + c) < L) blank(block, j + c, -INF, row);
                maximum = at::vec::maximum(maximum, Vec::loadu(row));
              }
            });
            Vec sum(0.0f);
            std::fill(out, out + s.D * L, 0.0f);
            over_keys(block, [&](int64_t j, auto n) {
              Vec p[n];
              for (int64_t c = 0; c < n; ++c) {
                p[c] = (Vec::loadu(buffer.data() + (j + c) * L) - maximum).exp();
                sum = sum + p[c];
              }
              accumulate<n>(p, values.data() + j * s.Dp, s, out);
            });
            float sums[L], maxima[L];
            sum.store(sums);
            maximum.store(maxima);
            for (int64_t i = 0; i < block.rows; ++i) {
              scalar_t* row = op + ((start + first + i) * s.Hq + h) * s.D;
              for (int64_t d = 0; d < s.D; ++d) row[d] = static_cast<scalar_t>(out[d * L + i] / sums[i]);
              lp[h * N + start + first + i] = maxima[i] + std::log(sums[i]);
            }
          }
        }
      }
    });
  });
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& do_, const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& o_, const Tensor& lse_,
                                            const Tensor& cu_seqlens_, bool causal, int64_t window, double scale, double softcap) {
  const Tensor dout = dense_heads(do_), q = dense_heads(q_), k = dense_heads(k_), v = dense_heads(v_), o = o_.contiguous(), lse = lse_.contiguous();
  const Tensor cu_seqlens = cu_seqlens_.contiguous();
  check_sequences(cu_seqlens, q.size(0));
  const Shape s = shape_of(q, k, cu_seqlens, causal, window, scale, softcap);
  Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options()), dv = at::empty(v.sizes(), v.options());
  const int32_t* ends = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t N = q.size(0), group = s.Hq / s.Hkv;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, q.scalar_type(), "varlen_attention_backward", [&] {
    const scalar_t *qp = q.const_data_ptr<scalar_t>(), *kp = k.const_data_ptr<scalar_t>(), *vp = v.const_data_ptr<scalar_t>();
    const scalar_t *op = o.const_data_ptr<scalar_t>(), *dop = dout.const_data_ptr<scalar_t>();
    scalar_t *dqp = dq.mutable_data_ptr<scalar_t>(), *dkp = dk.mutable_data_ptr<scalar_t>(), *dvp = dv.mutable_data_ptr<scalar_t>();
    const float* lp = lse.const_data_ptr<float>();
    at::parallel_for(0, s.B * s.Hkv, 1, [&](int64_t task_begin, int64_t task_end) {
      std::vector<float> keys, values, dkeys, dvalues, weights, slopes, columns(3 * s.D * L), query_rows(L * s.Dp), dout_rows(L * s.Dp);
      for (int64_t task = task_begin; task < task_end; ++task) {
        const int64_t b = task / s.Hkv, g = task % s.Hkv, start = ends[b], T = ends[b + 1] - start;
        if (T == 0) continue;
        keys.resize(std::max<size_t>(keys.size(), T * s.Dp));
        values.resize(keys.size());
        weights.resize(std::max<size_t>(weights.size(), T * L));
        slopes.resize(weights.size());
        dkeys.assign(T * s.Dp, 0.0f);
        dvalues.assign(T * s.Dp, 0.0f);
        load_rows(kp + start * k.stride(0) + g * k.stride(1), k.stride(0), T, s, keys.data());
        load_rows(vp + start * v.stride(0) + g * v.stride(1), v.stride(0), T, s, values.data());
        float *query = columns.data(), *upstream = query + s.D * L, *dquery = upstream + s.D * L;
        for (int64_t h = g * group; h < (g + 1) * group; ++h) {
          for (int64_t first = 0; first < T; first += L) {
            const Block block{first, std::min(L, T - first), T, s.window, s.causal};
            const int64_t token = start + first;
            load_rows(qp + token * q.stride(0) + h * q.stride(1), q.stride(0), block.rows, s, query_rows.data());
            load_rows(dop + token * dout.stride(0) + h * dout.stride(1), dout.stride(0), block.rows, s, dout_rows.data());
            transpose(query_rows.data(), block.rows, s, s.scale, query);
            transpose(dout_rows.data(), block.rows, s, 1.0f, upstream);
            float logs[L] = {}, inner[L] = {};  // log sum exp; o . do
            for (int64_t i = 0; i < block.rows; ++i) {
              logs[i] = lp[h * N + token + i];
              const scalar_t* row = op + ((token + i) * s.Hq + h) * s.D;
              for (int64_t d = 0; d < s.D; ++d) inner[i] += static_cast<float>(row[d]) * dout_rows[i * s.Dp + d];
            }
            const Vec log_sum = Vec::loadu(logs), delta = Vec::loadu(inner);
            std::fill(dquery, dquery + s.D * L, 0.0f);
            over_keys(block, [&](int64_t j, auto n) {
              Vec z[n], dp[n];
              scores<n>(query, keys.data() + j * s.Dp, s, z);
              scores<n>(upstream, values.data() + j * s.Dp, s, dp);
              for (int64_t c = 0; c < n; ++c) {
                float *p = weights.data() + (j + c) * L, *ds = slopes.data() + (j + c) * L;
                const Vec score = cap(z[c], s), weight = (score - log_sum).exp(), slope = weight * (dp[c] - delta);
                weight.store(p);
                (s.softcap > 0 ? slope * cap_slope(score, s) : slope).store(ds);
                if (block.lane_begin(j + c) > 0 || block.lane_end(j + c) < L) {
                  blank(block, j + c, 0.0f, p);
                  blank(block, j + c, 0.0f, ds);
                }
                dp[c] = Vec::loadu(ds);
              }
              accumulate<n>(dp, keys.data() + j * s.Dp, s, dquery);
            });
            const int64_t from = block.begin(), count = block.end() - from;
            spread(weights.data() + from * L, dout_rows.data(), block.rows, count, s, dvalues.data() + from * s.Dp);
            spread(slopes.data() + from * L, query_rows.data(), block.rows, count, s, dkeys.data() + from * s.Dp);
            for (int64_t i = 0; i < block.rows; ++i)
              for (int64_t d = 0; d < s.D; ++d) dqp[((token + i) * s.Hq + h) * s.D + d] = static_cast<scalar_t>(dquery[d * L + i] * s.scale);
          }
        }
        for (int64_t t = 0; t < T; ++t) {
          for (int64_t d = 0; d < s.D; ++d) {
            const int64_t at = ((start + t) * s.Hkv + g) * s.D + d;
            dkp[at] = static_cast<scalar_t>(dkeys[t * s.Dp + d] * s.scale);
            dvp[at] = static_cast<scalar_t>(dvalues[t * s.Dp + d]);
          }
        }
      }
    });
  });
  return {dq, dk, dv};
}

Tensor varlen_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, bool causal, int64_t window, double scale,
                        double softcap) {
  const auto compute = [&](Saved& saved) -> Tensors {
    static auto op = find_op<decltype(forward)>("fusedrl::varlen_attention_forward");
    auto [o, lse] = op.call(q, k, v, cu_seqlens, causal, window, scale, softcap);
    saved.tensors = {q, k, v, o, lse, cu_seqlens};
    saved.values = {causal, window, scale, softcap};
    return {o};
  };
  const auto gradients = [](const Tensors& grads, const Saved& saved) -> Tensors {
    static auto op = find_op<decltype(backward)>("fusedrl::varlen_attention_backward");
    const auto& [t, x] = std::tie(saved.tensors, saved.values);
    auto [dq, dk, dv] = op.call(grads[0], t[0], t[1], t[2], t[3], t[4], t[5], x[0].toBool(), x[1].toInt(), x[2].toDouble(), x[3].toDouble());
    return {dq, dk, dv};
  };
  return with_gradient("varlen_attention", {q, k, v}, compute, gradients)[0];
}

TORCH_LIBRARY_FRAGMENT(fusedrl, m) {
  m.def(
      "varlen_attention_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, bool causal, int window, float scale, float softcap) -> (Tensor, Tensor)");
  m.def(
      "varlen_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor cu_seqlens, bool causal, int window, float scale, "
      "float softcap) -> (Tensor, Tensor, Tensor)");
  m.def("varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, bool causal, int window, float scale, float softcap) -> Tensor");
}
TORCH_LIBRARY_IMPL(fusedrl, CPU, m) {
  m.impl("varlen_attention_forward", &forward);
  m.impl("varlen_attention_backward", &backward);
}
TORCH_LIBRARY_IMPL(fusedrl, CompositeImplicitAutograd, m) { m.impl("varlen_attention", &varlen_attention); }

}  // namespace
