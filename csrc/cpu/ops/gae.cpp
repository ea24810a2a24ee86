// gae, k_step_advantages and shaped_gae on CPU: KL-shaped rewards, advantages, returns and whitening, sequence by sequence.
//
// Shapes   N tokens in B sequences: packed ([N] with cu_seqlens [B + 1]) or [B, T].
// Bytes    gae 8 read and 8 written a token, shaped_gae 12 and 12, plus the mask, each once; whitening goes over the advantages again.
// Numerics The live (unmasked) tokens of a sequence are brought together, so the recurrence passes over gaps by construction and masked values
//          are never read into arithmetic. A_t = delta_t + c A_{t+1} is unrolled to A_t = (sum over the rest of t's vector) + c^k A_{t+k}: the
//          same recurrence, a vector of lanes at a time, in float32, with a fraction of the chain of roundings. Sums over tokens and the
//          moments are in double. A sequence is one thread's work and moments are merged in the order of sequences: results do not depend on
//          the thread count.
#include "kl.h"
#include "moments.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstring>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

const float* data_or_null(const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }
Tensor contiguous(const OptionalTensor& t) { return t ? t->contiguous() : Tensor(); }

// Where each sequence lies.
struct Sequences {
  int64_t B, T = 0;
  Tensor cu;
  const int32_t* starts = nullptr;

  Sequences(const Tensor& like, const OptionalTensor& cu_seqlens) : B(cu_seqlens ? cu_seqlens->numel() - 1 : like.size(0)) {
    if (!cu_seqlens) {
      T = like.size(1);
      return;
    }
    cu = cu_seqlens->contiguous();
    starts = cu.const_data_ptr<int32_t>();
    bool ascending = starts[0] == 0 && starts[B] == like.numel();
    for (int64_t b = 0; b < B; ++b) ascending &= starts[b] <= starts[b + 1];
    TORCH_CHECK_VALUE(ascending, "gae: expected cu_seqlens to ascend from 0 to the number of tokens, ", like.numel(), ", got ", starts[0], " to ", starts[B],
                      "; give the cumulative lengths of the sequences");
  }
  int64_t begin(int64_t b) const { return starts ? starts[b] : b * T; }
  int64_t length(int64_t b) const { return starts ? starts[b + 1] - starts[b] : T; }
  // Sequences a task should have at least: about 16384 tokens.
  int64_t grain(int64_t N) const { return std::max<int64_t>(1, 16384 * B / std::max<int64_t>(1, N)); }
};

// The live tokens of one sequence, and scratch for those that do not lie side by side.
class Live {
 public:
  int64_t n = 0;  // how many
  int64_t last() const { return gaps_ ? at_[n - 1] : first_ + n - 1; }

  void find(const uint8_t* mask, int64_t length) {
    length_ = length;
    first_ = 0;
    n = length;
    gaps_ = false;
    if (!mask) return;
    int64_t end = length;
    while (first_ + 8 <= length && all_masked(mask + first_)) first_ += 8;
    while (first_ < length && !mask[first_]) ++first_;
    while (end - 8 >= first_ && all_masked(mask + end - 8)) end -= 8;
    while (end > first_ && !mask[end - 1]) --end;
    n = end - first_;
    gaps_ = n > 0 && std::memchr(mask + first_, 0, n) != nullptr;
    if (!gaps_) return;
    n = 0;
    for (int64_t t = first_; t < end; ++t) n += mask[t] != 0;
    at_.resize(end - first_);
    for (int64_t t = first_, i = 0; t < end; ++t) {
      at_[i] = static_cast<int32_t>(t);
      i += mask[t] != 0;
    }
  }
  // The live elements of x side by side, in x itself where they lie so.
  const float* gather(const float* x, std::vector<float>& scratch) const {
    if (!gaps_) return x + first_;
    scratch.resize(n);
    for (int64_t i = 0; i < n; ++i) scratch[i] = x[at_[i]];
    return scratch.data();
  }
  // Where to write n live elements of `out`, and (after writing) their way to their slots. The other slots become 0.
  float* stage(float* out, std::vector<float>& scratch) const {
    if (!gaps_) return out + first_;
    scratch.resize(n);
    return scratch.data();
  }
  void scatter(const float* staged, float* out) const {
    if (length_ == 0) return;  // an empty result may have no memory at all
    if (!gaps_) {
      std::memset(out, 0, first_ * sizeof(float));
      std::memset(out + first_ + n, 0, (length_ - first_ - n) * sizeof(float));
      return;
    }
    std::memset(out, 0, length_ * sizeof(float));
    for (int64_t i = 0; i < n; ++i) out[at_[i]] = staged[i];
  }

 private:
  static bool all_masked(const uint8_t* eight) {
    uint64_t bytes;
    std::memcpy(&bytes, eight, sizeof bytes);
    return bytes == 0;
  }
  int64_t length_ = 0, first_ = 0;
  bool gaps_ = false;
  std::vector<int32_t> at_;
};

typedef float Lanes __attribute__((vector_size(sizeof(float) * Vec::size()), aligned(4), may_alias));
typedef double WideLanes __attribute__((vector_size(sizeof(double) * Vec::size())));
constexpr int64_t VL = Vec::size();
constexpr int64_t kAhead = 16 * VL;  // of the prefetches. Everything is walked downwards, so that they run into the sequence that comes next

// The first `count` values; the other lanes are 0.
inline Lanes load(const float* p, int64_t count = VL) {
  Lanes x = {};
  std::memcpy(&x, p, count == VL ? sizeof x : count * sizeof(float));
  return x;
}
inline void store(const Lanes& x, float* p, int64_t count = VL) { std::memcpy(p, &x, count == VL ? sizeof x : count * sizeof(float)); }

// Lane l of x moved to lane l - D; zeros come in.
template <int D, int... L>
inline Lanes shifted(Lanes x, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(x, Lanes{}, (L + D)...);
}

// Suffix sums of VL deltas by doubling, each one discounted, and the running advantage behind them.
struct Scan {
  float power[VL];  // c^1, c^2, ..., c^VL
  Lanes to_carry;   // c^(VL - l)

  explicit Scan(double c) {
    double product = 1.0;
    for (int64_t l = 0; l < VL; ++l) power[l] = static_cast<float>(product *= c);
    for (int64_t l = 0; l < VL; ++l) to_carry[l] = power[VL - 1 - l];
  }
  inline Lanes operator()(Lanes x, float carry) const {
    constexpr auto lanes = std::make_integer_sequence<int, VL>();
    x += power[0] * shifted<1>(x, lanes);
    x += power[1] * shifted<2>(x, lanes);
    x += power[3] * shifted<4>(x, lanes);
    if constexpr (VL > 8) x += power[7] * shifted<8>(x, lanes);
    return x + to_carry * carry;
  }
};

// Advantages and returns of n live tokens in one pass from the end. reward(i, count): the rewards from i on, zeros behind `count` of them.
template <typename Reward>
void advantages_of(const Reward& reward, const float* v, float last_value, int64_t n, float gamma, const Scan& scan, float* advantages, float* returns) {
  if (n == 0) return;
  int64_t i = (n - 1) / VL * VL;
  float carry;
  {
    const int64_t count = n - i;  // the last tokens, 1 to VL of them
    float value[VL + 1] = {};
    std::memcpy(value, v + i, count * sizeof(float));
    value[count] = last_value;
    Lanes delta = reward(i, count) + (gamma * load(value + 1) - load(value));
    for (int64_t l = count; l < VL; ++l) delta[l] = 0.0f;
    const Lanes x = scan(delta, 0.0f);
    store(x, advantages + i, count);
    store(x + load(value), returns + i, count);
    carry = x[0];
  }
  for (i -= VL; i >= 0; i -= VL) {
    __builtin_prefetch(v + i - kAhead);
    __builtin_prefetch(advantages + i - kAhead, 1);
    __builtin_prefetch(returns + i - kAhead, 1);
    const Lanes value = load(v + i), x = scan(reward(i, VL) + (gamma * load(v + i + 1) - value), carry);
    store(x, advantages + i);
    store(x + value, returns + i);
    carry = x[0];
  }
}

// The same, looking k tokens ahead: windows of `width` deltas by doubling, of which those that k is made of are added up.
void k_step_advantages_of(const float* r, const float* v, float last_value, int64_t n, int64_t k, double gamma, float* advantages, float* returns) {
  const float g = static_cast<float>(gamma);
  k = std::min(k, n);
  std::vector<float> window(n);
  for (int64_t i = 0; i < n; ++i) {
    window[i] = r[i] + (g * (i + 1 == n ? last_value : v[i + 1]) - v[i]);
    advantages[i] = 0.0f;
  }
  for (int64_t width = 1, done = 0; width <= k; width *= 2) {
    if (k & width) {
      const float weight = static_cast<float>(std::pow(gamma, done));
      for (int64_t i = 0; i + done < n; ++i) advantages[i] += weight * window[i + done];
      done += width;
    }
    const float weight = static_cast<float>(std::pow(gamma, width));
    for (int64_t i = 0; i + width < n; ++i) window[i] += weight * window[i + width];  // ascending i reads what is not yet updated
  }
  for (int64_t i = 0; i < n; ++i) returns[i] = advantages[i] + v[i];
}

// compute(rewards, values, last value, n, advantages, returns) for the live tokens of each sequence.
template <typename Compute>
std::tuple<Tensor, Tensor> by_sequence(const Tensor& rewards, const Tensor& values, const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                                       const OptionalTensor& last_values, const Compute& compute) {
  const Tensor rewards_N = rewards.contiguous(), values_N = values.contiguous(), mask_N = contiguous(mask), last_B = contiguous(last_values);
  const Sequences sequences(rewards_N, cu_seqlens);
  Tensor advantages_N = at::empty(rewards_N.sizes(), rewards_N.options()), returns_N = at::empty(rewards_N.sizes(), rewards_N.options());
  const float* r = rewards_N.const_data_ptr<float>();
  const float* v = values_N.const_data_ptr<float>();
  const float* last = data_or_null(last_B);
  const uint8_t* m = mask_N.defined() ? static_cast<const uint8_t*>(mask_N.const_data_ptr()) : nullptr;
  float* advantages = advantages_N.mutable_data_ptr<float>();
  float* returns = returns_N.mutable_data_ptr<float>();
  at::parallel_for(0, sequences.B, sequences.grain(rewards_N.numel()), [&](int64_t first, int64_t end) {
    Live live;
    std::vector<float> r_scratch, v_scratch, a_scratch, ret_scratch;
    for (int64_t b = end - 1; b >= first; --b) {  // downwards, as within a sequence: one direction for the prefetcher
      const int64_t at = sequences.begin(b);
      live.find(m ? m + at : nullptr, sequences.length(b));
      float* a = live.stage(advantages + at, a_scratch);
      float* ret = live.stage(returns + at, ret_scratch);
      compute(live.gather(r + at, r_scratch), live.gather(v + at, v_scratch), last ? last[b] : 0.0f, live.n, a, ret);
      live.scatter(a, advantages + at);
      live.scatter(ret, returns + at);
    }
  });
  return {advantages_N, returns_N};
}

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const OptionalTensor& mask, const OptionalTensor& cu_seqlens, double gamma,
                               double lam, const OptionalTensor& last_values) {
  return by_sequence(rewards, values, mask, cu_seqlens, last_values, [g = static_cast<float>(gamma), scan = Scan(gamma * lam)](const float* r, const float* v, float last, int64_t n, float* a, float* ret) {
    const auto reward = [=](int64_t i, int64_t count) {
      __builtin_prefetch(r + i - kAhead);
      return load(r + i, count);
    };
    advantages_of(reward, v, last, n, g, scan, a, ret);
  });
}

std::tuple<Tensor, Tensor> k_step_advantages(const Tensor& rewards, const Tensor& values, const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                                             int64_t k, double gamma, const OptionalTensor& last_values) {
  return by_sequence(rewards, values, mask, cu_seqlens, last_values, [=](const float* r, const float* v, float last, int64_t n, float* a, float* ret) {
    k_step_advantages_of(r, v, last, n, k, gamma, a, ret);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> shaped_gae(const Tensor& logp, const Tensor& ref_logp, const Tensor& values, const Tensor& scores,
                                                              const Tensor& mask, const OptionalTensor& cu_seqlens, double kl_coef,
                                                              const OptionalTensor& kl_coef_tensor, int64_t kl_estimator, double gamma, double lam,
                                                              const OptionalTensor& token_rewards, std::optional<double> score_clip, bool whitened,
                                                              bool whiten_unbiased) {
  const Tensor logp_N = logp.contiguous(), ref_N = ref_logp.contiguous(), values_N = values.contiguous(), scores_B = scores.contiguous();
  const Tensor mask_N = mask.contiguous(), token_rewards_N = contiguous(token_rewards);
  const Sequences sequences(logp_N, cu_seqlens);
  const int64_t N = logp_N.numel();
  Tensor advantages_N = at::empty(logp_N.sizes(), logp_N.options()), returns_N = at::empty(logp_N.sizes(), logp_N.options());
  Tensor rewards_N = at::empty(logp_N.sizes(), logp_N.options());
  Tensor kl_B = at::empty(scores_B.sizes(), scores_B.options()), score_B = at::empty(scores_B.sizes(), scores_B.options());
  const float* lp = logp_N.const_data_ptr<float>();
  const float* ref = ref_N.const_data_ptr<float>();
  const float* v = values_N.const_data_ptr<float>();
  const float* score_in = scores_B.const_data_ptr<float>();
  const float* extra = data_or_null(token_rewards_N);
  const uint8_t* m = static_cast<const uint8_t*>(mask_N.const_data_ptr());
  float* advantages = advantages_N.mutable_data_ptr<float>();
  float* returns = returns_N.mutable_data_ptr<float>();
  float* rewards = rewards_N.mutable_data_ptr<float>();
  float* kl_sum = kl_B.mutable_data_ptr<float>();
  float* score_out = score_B.mutable_data_ptr<float>();
  const float coef = kl_coef_tensor ? *kl_coef_tensor->const_data_ptr<float>() : static_cast<float>(kl_coef);
  const float bound = score_clip ? static_cast<float>(*score_clip) : std::numeric_limits<float>::infinity();
  const Scan scan(gamma * lam);
  std::vector<Moments> parts(sequences.B);
  at::parallel_for(0, sequences.B, sequences.grain(N), [&](int64_t first, int64_t end) {
    Live live;
    std::vector<float> lp_scratch, ref_scratch, v_scratch, extra_scratch, r_scratch, a_scratch, ret_scratch;
    for (int64_t b = end - 1; b >= first; --b) {
      const int64_t at = sequences.begin(b);
      live.find(m + at, sequences.length(b));
      score_out[b] = std::clamp(score_in[b], -bound, bound);
      const float* l = live.gather(lp + at, lp_scratch);
      const float* l_ref = live.gather(ref + at, ref_scratch);
      const float* given = extra ? live.gather(extra + at, extra_scratch) : nullptr;
      float* r = live.stage(rewards + at, r_scratch);
      float* a = live.stage(advantages + at, a_scratch);
      float* ret = live.stage(returns + at, ret_scratch);
      WideLanes kl_lanes = {};
      const auto reward = [&](int64_t i, int64_t count) {
        __builtin_prefetch(l + i - kAhead);
        __builtin_prefetch(l_ref + i - kAhead);
        __builtin_prefetch(r + i - kAhead, 1);
        float kl[VL];
        token_kl(Vec::loadu(l + i, count), Vec::loadu(l_ref + i, count), static_cast<KlEstimator>(kl_estimator)).store(kl);
        kl_lanes += __builtin_convertvector(load(kl), WideLanes);  // 0 behind the end: the estimate of 0 and 0
        Lanes x = (given ? load(given + i, count) : Lanes{}) - coef * load(kl);
        if (i + count == live.n) x[count - 1] += score_out[b];
        store(x, r + i, count);
        return x;
      };
      advantages_of(reward, live.gather(v + at, v_scratch), 0.0f, live.n, static_cast<float>(gamma), scan, a, ret);
      double kl_total = 0.0;
      for (int64_t lane = 0; lane < VL; ++lane) kl_total += kl_lanes[lane];
      kl_sum[b] = static_cast<float>(kl_total);
      if (whitened) parts[b] = moments(a, live.n);
      live.scatter(r, rewards + at);
      live.scatter(a, advantages + at);
      live.scatter(ret, returns + at);
    }
  });
  if (whitened) {
    Moments all;
    for (const Moments& part : parts) all.merge(part);
    at::parallel_for(0, N, 32768, [&](int64_t begin, int64_t end) {
      whiten(advantages + begin, m + begin, advantages + begin, end - begin, all, whiten_unbiased, 1e-8, 0.0);
    });
  }
  return {advantages_N, returns_N, rewards_N, kl_B, score_B};
}

TORCH_LIBRARY_FRAGMENT(fusedrl, m) {
  m.def("gae(Tensor rewards, Tensor values, Tensor? mask, Tensor? cu_seqlens, float gamma, float lam, Tensor? last_values) -> (Tensor, Tensor)");
  m.def(
      "k_step_advantages(Tensor rewards, Tensor values, Tensor? mask, Tensor? cu_seqlens, int k, float gamma, Tensor? last_values) -> (Tensor, Tensor)");
  m.def(
      "shaped_gae(Tensor logp, Tensor ref_logp, Tensor values, Tensor scores, Tensor mask, Tensor? cu_seqlens, float kl_coef, Tensor? kl_coef_tensor, "
      "int kl_estimator, float gamma, float lam, Tensor? token_rewards, float? score_clip, bool whiten, bool whiten_unbiased) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fusedrl, CPU, m) {
  m.impl("gae", &gae);
  m.impl("k_step_advantages", &k_step_advantages);
  m.impl("shaped_gae", &shaped_gae);
}

}  // namespace
