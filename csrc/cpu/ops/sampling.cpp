// sample on CPU: one token a row, drawn by inverse CDF with Philox random numbers, and its log-probabilities.
//
// Bytes    V s a row, read once; the exponentials of a row stay in cache between the sum and the draw.
// Numerics float32 terms; within a block of fixed size each lane adds its own in float32, lanes and blocks are added in double. A row depends on nothing but itself, whatever the number of threads.
// Cost     rows that ask for no truncation need no order; for the others a few linear passes, and an order of the tokens next to the boundary.
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "maximum.h"
#include "panels.h"

namespace {

using at::Tensor;
constexpr int64_t BLOCK = 128;       // the draw walks sums of blocks, then one block
constexpr float SMALLEST = -87.0f;   // exp of less is not a normal float32: it counts as 0
constexpr float BUCKETS_A_NAT = 16.0f;
constexpr int64_t BUCKETS = 87 * 16 + 1;  // of -x in 0 to 87
constexpr uint16_t NO_BUCKET = 0xFFFF;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

// ---- random numbers --------------------------------------------------------------------------------------------------------
// Philox 4x32-10 (Salmon et al., 2011).
void philox4x32(uint32_t counter[4], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t first = uint64_t{0xD2511F53u} * counter[0], second = uint64_t{0xCD9E8D57u} * counter[2];
    const uint32_t c1 = counter[1], c3 = counter[3];
    counter[0] = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    counter[1] = static_cast<uint32_t>(second);
    counter[2] = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    counter[3] = static_cast<uint32_t>(first);
  }
}

// 53 random bits in [0, 1) for key (seed, request id, sample index, position).
double uniform(const int64_t* key) {
  const auto low = [](int64_t x) { return static_cast<uint32_t>(x); };
  const auto high = [](int64_t x) { return static_cast<uint32_t>(static_cast<uint64_t>(x) >> 32); };
  uint32_t counter[4] = {low(key[1]), high(key[1]), low(key[2]), low(key[3])};
  philox4x32(counter, low(key[0]), high(key[0]));
  return static_cast<double>((uint64_t{counter[0] >> 5} << 26) + (counter[1] >> 6)) * 0x1p-53;
}

// ---- one row ---------------------------------------------------------------------------------------------------------------
struct Parameters {
  float temperature, log_min_p;  // -inf: no min-p
  double top_p;                  // >= 1: none
  int64_t top_k;                 // 0: none
};

struct Drawn {
  int64_t token, kept;
  double logp, logp_processed, entropy;
};

struct Sums {
  double weights = 0.0, weighted = 0.0;  // of exp(x) and of x exp(x)
};

inline Vec load(const float* p, int64_t count) { return count >= VL ? Vec::loadu(p) : Vec::loadu(p, count); }

// The lanes of a vector, in double and in one order.
double sum_of(const Lanes& x) {
  float lanes[VL];
  as<Vec>(x).store(lanes);
  double sums[4] = {};  // short chains of additions
  for (int64_t l = 0; l < VL; l += 4)
    for (int64_t u = 0; u < 4; ++u) sums[u] += lanes[l + u];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

double sum(const float* w, int64_t count) {
  Lanes total = {};
  for (int64_t i = 0; i < count; i += VL) total += as<Lanes>(load(w + i, std::min(VL, count - i)));
  return sum_of(total);
}

// Where `value` stands first; it does.
int64_t find(const float* z, int64_t V, float value) {
  int64_t start = 0;
  for (; start + 64 <= V; start += 64) {
    int any = 0;
    for (int64_t i = 0; i < 64; ++i) any |= z[start + i] == value;
    if (any) break;
  }
  while (z[start] != value) ++start;
  return start;
}

// w = exp((z - max) / T), 0 where that is not a normal number; `blocks` receives its sums.
Sums exponentials(const float* z, int64_t V, float max, float temperature, float* w, double* blocks) {
  Sums sums;
  const Vec top(max), T(temperature);
  for (int64_t start = 0; start < V; start += BLOCK) {
    const int64_t end = std::min(V, start + BLOCK);
    Lanes total = {}, weighted = {};
    for (int64_t i = start; i < end; i += VL) {
      const int64_t count = std::min(VL, end - i);
      Vec below = load(z + i, count) - top;
      if (temperature != 1.0f) below = below / T;
      const Lanes x = as<Lanes>(count == VL ? below : Vec::set(Vec(-INFINITE), below, count)), weight = exp_of_negative(x);
      total += weight;
      weighted += x < SMALLEST ? Lanes{} : weight * x;
      as<Vec>(weight).store(w + i, static_cast<int>(count));
    }
    sums.weights += blocks[start / BLOCK] = sum_of(total);
    sums.weighted += sum_of(weighted);
  }
  return sums;
}

// A float and an id as one integer whose descending order is: larger logit first, then lower id.
inline uint64_t rank_key(float z, int64_t id) {
  uint32_t bits;
  z += 0.0f;  // -0 and 0 are equal
  std::memcpy(&bits, &z, sizeof bits);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t{bits} << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(id));
}

class Sampler {
 public:
  explicit Sampler(int64_t V) : V_(V), weights_(V), candidates_(V), blocks_((V + BLOCK - 1) / BLOCK), bucket_(V) {}

  // token -1: the row holds NaN or +inf, or nothing may be drawn. `list`, where given, receives the kept ids if some token of probability is not kept.
  Drawn draw(const float* z, const bool* suppress, const Parameters& row, bool greedy, const int64_t* key, std::vector<int32_t>* list) {
    float max = maximum_of(z, V_);
    if (!(std::abs(max) < INFINITE)) return {-1, 0, 0, 0, 0};
    Sums sums = exponentials(z, V_, max, row.temperature, weights_.data(), blocks_.data());
    const double all = sums.weights, log_all = std::log(all);
    const double entropy = log_all - sums.weighted / sums.weights;
    const float max_all = max;
    const float* candidates = z;
    if (suppress) {
      for (int64_t v = 0; v < V_; ++v) candidates_[v] = suppress[v] ? -INFINITE : z[v];
      candidates = candidates_.data();
      max = maximum_of(candidates, V_);
      if (max == -INFINITE) return {-1, 0, 0, 0, 0};
      sums = exponentials(candidates, V_, max, row.temperature, weights_.data(), blocks_.data());
    }
    const auto scaled = [&](int64_t v, float top) { return (z[v] - top) / row.temperature; };
    double total = sums.weights;
    if (!greedy && truncate(candidates, row, [&](int64_t v) { return scaled(v, max); })) {
      total = 0.0;
      for (int64_t start = 0; start < V_; start += BLOCK) total += blocks_[start / BLOCK] = sum(&weights_[start], std::min(BLOCK, V_ - start));
    }
    int32_t kept = 0;
    for (const float w : weights_) kept += w > 0.0f;
    if (list) {
      int64_t dropped = 0;
      for (int64_t v = 0; v < V_; ++v) dropped += !(weights_[v] > 0.0f) && scaled(v, max_all) >= SMALLEST;
      if (dropped) list->reserve(kept);
      for (int64_t v = 0; dropped && v < V_; ++v)
        if (weights_[v] > 0.0f) list->push_back(static_cast<int32_t>(v));
    }
    const int64_t token = greedy ? find(candidates, V_, max) : walk(uniform(key) * total);
    return {token, kept, scaled(token, max_all) - log_all, scaled(token, max) - (total == all ? log_all : std::log(total)), entropy};
  }

 private:
  // Sets the weights that top-k, top-p and min-p drop to 0; false when nothing was asked. x(v) is the scaled logit of a token, at most 0.
  template <typename X>
  bool truncate(const float* z, const Parameters& row, const X& x) {
    const bool by_k = row.top_k > 0 && row.top_k < V_, by_p = row.top_p < 1.0, by_share = row.log_min_p > -INFINITE;
    if (by_k || by_p) {
      // A ranking without sorting all: buckets of x are ranked among themselves, so only the bucket that a boundary falls into is put in order.
      counts_.assign(BUCKETS, 0);
      masses_.assign(BUCKETS, 0.0);
      for (int64_t v = 0; v < V_; ++v) {
        bucket_[v] = weights_[v] > 0.0f ? static_cast<uint16_t>(x(v) * -BUCKETS_A_NAT) : NO_BUCKET;
        if (bucket_[v] == NO_BUCKET) continue;
        ++counts_[bucket_[v]];
        masses_[bucket_[v]] += weights_[v];
      }
      int64_t last = BUCKETS - 1;  // the last bucket that keeps something, and the lowest rank that it keeps
      uint64_t lowest = 0;
      if (by_k) {
        int64_t left = row.top_k, b = 0;
        while (b < BUCKETS && counts_[b] < left) left -= counts_[b++];
        if (b < BUCKETS) {
          collect(z, b, 0);
          std::nth_element(keys_.begin(), keys_.begin() + (left - 1), keys_.end(), std::greater<>());
          last = b;
          lowest = keys_[left - 1];
          masses_[b] = 0.0;
          for (int64_t i = 0; i < left; ++i) masses_[b] += weights_[token_of(keys_[i])];
        }
      }
      if (by_p) {
        double total = 0.0, before = 0.0;
        for (int64_t b = 0; b <= last; ++b) total += masses_[b];
        int64_t b = 0;
        while (b < last && before + masses_[b] < row.top_p * total) before += masses_[b++];
        collect(z, b, b == last ? lowest : 0);
        std::sort(keys_.begin(), keys_.end(), std::greater<>());
        last = b;
        for (const uint64_t key : keys_) {
          if (before >= row.top_p * total) break;
          lowest = key;
          before += weights_[token_of(key)];
        }
      }
      for (int64_t v = 0; v < V_; ++v)
        if (bucket_[v] > last || (bucket_[v] == last && rank_key(z[v], v) < lowest)) weights_[v] = 0.0f;
    }
    if (by_share)
      for (int64_t v = 0; v < V_; ++v) weights_[v] = x(v) >= row.log_min_p ? weights_[v] : 0.0f;
    return by_k || by_p || by_share;
  }

  static int64_t token_of(uint64_t key) { return static_cast<uint32_t>(~static_cast<uint32_t>(key)); }

  // The ranks of a bucket's tokens, those of at least `lowest`.
  void collect(const float* z, int64_t bucket, uint64_t lowest) {
    keys_.clear();
    for (int64_t v = 0; v < V_; ++v)
      if (bucket_[v] == bucket && rank_key(z[v], v) >= lowest) keys_.push_back(rank_key(z[v], v));
  }

  // The first token in vocabulary order whose running sum exceeds `target`; the last drawable one where rounding leaves none.
  int64_t walk(double target) const {
    double running = 0.0;
    size_t block = 0;
    int64_t last = -1;
    while (block + 1 < blocks_.size() && running + blocks_[block] <= target) running += blocks_[block++];
    for (int64_t v = block * BLOCK; v < std::min<int64_t>(V_, (block + 1) * BLOCK); ++v) {
      if (weights_[v] <= 0.0f) continue;
      last = v;
      running += weights_[v];
      if (running > target) return v;
    }
    if (last >= 0) return last;
    for (int64_t v = V_ - 1;; --v)  // u sum w was rounded up to the sum, and the last blocks hold nothing
      if (weights_[v] > 0.0f) return v;
  }

  int64_t V_;
  std::vector<float> weights_, candidates_;
  std::vector<double> blocks_;
  std::vector<uint64_t> keys_;
  std::vector<uint16_t> bucket_;
  std::vector<int64_t> counts_;
  std::vector<double> masses_;
};

// ---- from tensors ------------------------------------------------------------------------------------------------------------
// Entry b of a [B] or [1] float64 parameter.
struct Column {
  Tensor values;
  double absent;
  double operator[](int64_t b) const { return values.defined() ? values.const_data_ptr<double>()[values.numel() == 1 ? 0 : b] : absent; }
};

Column column(const std::optional<Tensor>& tensor, const char* name, int64_t B, double absent) {
  if (!tensor) return {Tensor(), absent};
  TORCH_CHECK_VALUE(tensor->dim() == 1 && (tensor->numel() == 1 || tensor->numel() == B) && tensor->scalar_type() == at::kDouble,
                    "sample: expected ", name, " as float64 [1] or [", B, "], got ", tensor->scalar_type(), tensor->sizes());
  return {tensor->contiguous(), absent};
}

inline const float* as_floats(const float* row, int64_t, std::vector<float>&) { return row; }
template <typename T>
const float* as_floats(const T* row, int64_t V, std::vector<float>& wide) {
  wide.assign(row, row + V);
  return wide.data();
}

// The rows' lists one behind the other, in a buffer whose pages behind the last are never touched; and where each begins.
std::tuple<Tensor, Tensor> csr(const std::vector<std::vector<int32_t>>& lists, int64_t capacity) {
  const int64_t B = lists.size();
  Tensor offsets = at::empty({B + 1}, at::kLong);
  int64_t* at = offsets.mutable_data_ptr<int64_t>();
  at[0] = 0;
  for (int64_t b = 0; b < B; ++b) at[b + 1] = at[b] + static_cast<int64_t>(lists[b].size());
  TORCH_CHECK_VALUE(at[B] <= capacity, "sample: expected the kept tokens to fit into kept_capacity ", capacity, ", got ", at[B],
                    "; leave kept_capacity out, or make it larger");
  Tensor ids = at::empty({capacity}, at::kInt);
  for (int64_t b = 0; b < B; ++b) std::copy(lists[b].begin(), lists[b].end(), ids.mutable_data_ptr<int32_t>() + at[b]);
  return {ids, offsets};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sample(
    const Tensor& logits, const Tensor& temperature, const std::optional<Tensor>& top_k, const std::optional<Tensor>& top_p,
    const std::optional<Tensor>& min_p, const Tensor& keys, const std::optional<Tensor>& suppress, std::optional<int64_t> kept_capacity) {
  const int64_t B = logits.size(0), V = logits.size(1);
  TORCH_CHECK_VALUE(V > 0 && V <= std::numeric_limits<int32_t>::max(), "sample: expected a vocabulary of 1 to 2^31 - 1 tokens, got ", V);
  const Tensor rows = logits.stride(1) == 1 || V == 1 ? logits : logits.contiguous(), keys_B4 = keys.contiguous();
  const Tensor suppress_BV = suppress ? suppress->contiguous() : Tensor();
  const Column T = column(temperature, "temperature", B, 1.0), k = column(top_k, "top_k", B, 0.0), p = column(top_p, "top_p", B, 1.0),
               m = column(min_p, "min_p", B, 0.0);
  for (int64_t b = 0; b < B; ++b) {
    TORCH_CHECK_VALUE(T[b] >= 0.0, "sample: expected temperature of 0 or more, got ", T[b], " in row ", b);
    TORCH_CHECK_VALUE(k[b] >= 0.0, "sample: expected top_k of 0 (all) or more, got ", k[b], " in row ", b);
    TORCH_CHECK_VALUE(p[b] > 0.0 && p[b] <= 1.0, "sample: expected top_p in (0, 1], got ", p[b], " in row ", b);
    TORCH_CHECK_VALUE(m[b] >= 0.0 && m[b] <= 1.0, "sample: expected min_p in [0, 1], got ", m[b], " in row ", b);
  }
  Tensor token_ids = at::empty({B}, at::kLong), kept_count = at::empty({B}, at::kLong);
  Tensor logp = at::empty({B}, at::kFloat), logp_processed = at::empty({B}, at::kFloat), entropy = at::empty({B}, at::kFloat);
  int64_t *ids = token_ids.mutable_data_ptr<int64_t>(), *counts = kept_count.mutable_data_ptr<int64_t>();
  float *full = logp.mutable_data_ptr<float>(), *processed = logp_processed.mutable_data_ptr<float>(), *entropies = entropy.mutable_data_ptr<float>();
  const int64_t* key = keys_B4.const_data_ptr<int64_t>();
  const bool* banned = suppress ? suppress_BV.const_data_ptr<bool>() : nullptr;
  std::vector<std::vector<int32_t>> lists(kept_capacity ? B : 0);
  std::atomic<int64_t> bad{B};
  const auto draw_rows = [&](auto zero) {
    using scalar_t = decltype(zero);
    const scalar_t* data = rows.const_data_ptr<scalar_t>();
    at::parallel_for(0, B, std::max<int64_t>(1, (1 << 15) / V), [&](int64_t begin, int64_t end) {
      Sampler sampler(V);
      std::vector<float> wide;
      for (int64_t b = begin; b < end; ++b) {
        const float* z = as_floats(data + b * rows.stride(0), V, wide);
        const float scale = static_cast<float>(T[b]);
        const Parameters parameters{scale == 0.0f ? 1.0f : scale, m[b] > 0.0 ? static_cast<float>(std::log(m[b])) : -INFINITE, p[b],
                                    static_cast<int64_t>(std::min(k[b], static_cast<double>(V)))};
        const Drawn drawn =
            sampler.draw(z, banned ? banned + b * V : nullptr, parameters, scale == 0.0f, key + 4 * b, kept_capacity ? &lists[b] : nullptr);
        ids[b] = drawn.token;
        counts[b] = drawn.kept;
        full[b] = static_cast<float>(drawn.logp);
        processed[b] = static_cast<float>(drawn.logp_processed);
        entropies[b] = static_cast<float>(drawn.entropy);
        for (int64_t seen = bad; drawn.token < 0 && b < seen && !bad.compare_exchange_weak(seen, b);) {
        }
      }
    });
  };
  switch (rows.scalar_type()) {
    case at::kFloat: draw_rows(0.0f); break;
    case at::kBFloat16: draw_rows(at::BFloat16()); break;
    case at::kHalf: draw_rows(at::Half()); break;
    default: TORCH_CHECK_TYPE(false, "sample: expected logits in float32, bfloat16 or float16, got ", rows.scalar_type());
  }
  TORCH_CHECK_VALUE(bad == B, "sample: row ", bad.load(), " of ", B,
                    " holds NaN or +inf, or no token that may be drawn; look at the logits of that row and at `suppress`");
  const auto [kept_ids, kept_offsets] = kept_capacity ? csr(lists, *kept_capacity) : std::make_tuple(at::empty({0}, at::kInt), at::empty({0}, at::kLong));
  return {token_ids, logp, logp_processed, entropy, kept_count, kept_ids, kept_offsets};
}

TORCH_LIBRARY_FRAGMENT(fusedrl, m) {
  m.def("sample(Tensor logits, Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, Tensor keys, Tensor? suppress, "
        "SymInt? kept_capacity) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fusedrl, CPU, m) { m.impl("sample", &sample); }

}  // namespace
