// linear_policy_loss on CPU: hidden states -> the policy loss and its gradients, through the head, with no logits kept and none computed twice.
//
//   chunk of rows -> logits -> row statistics -> coefficients g = d loss / d logp, h = d loss / d entropy -> logits overwritten by their gradient
//   -> hidden's and weight's gradient
//
// Shapes   hidden [N, H], weight [V, H]; M unmasked rows; a workspace of C rows of V float32 holds logits, then gradients.
// Flops    2 M H V and 4 A H V for the A rows whose g or h is not 0. Of chunks with few of them they are laid aside, up to C / 2 rows more, so that
//          the last two products stay thick.
// Numerics as logprob and policy_value_loss; the weight's gradient gathers in float32. An inactive row would add exact zeros: leaving it out
//          changes only how the products group their rows. Chunks begin where those of linear_logprob do, whichever rows are active: a product's bits
//          depend on how many rows it has, and a row has to score as it did before its advantage was known.
#include <ATen/core/grad_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "autograd.h"
#include "linear_head.h"
#include "policy_terms.h"

namespace {

using namespace fusedrl;  // autograd.h

#define FUSEDRL_LINEAR_POLICY_PARAMETERS                                                                                                             \
  const Tensor &hidden, const Tensor &weight, const MaybeTensor &bias, const Tensor &token_ids, const MaybeTensor &old_logp,                         \
      const Tensor &advantages, const Tensor &weights, const MaybeTensor &ref_logp, const MaybeTensor &correction,                                   \
      const MaybeTensor &sequence_log_ratio, const MaybeTensor &kl_sum, const MaybeTensor &temperatures
#define FUSEDRL_LINEAR_POLICY_NAMES                                                                                                                  \
  hidden, weight, bias, token_ids, old_logp, advantages, weights, ref_logp, correction, sequence_log_ratio, kl_sum, temperatures
#define FUSEDRL_LINEAR_POLICY_SETTINGS FUSEDRL_OBJECTIVE_PARAMETERS, double temperature, double softcap, int64_t workspace_bytes
// What the loss says about the unmasked rows, in their order: inputs gathered once, results as chunks arrive.
struct Rows {
  Tensor index, ids, weights, advantages, old_logp, ref_logp, correction, sequence_log_ratio, kl_sum, logp, entropy, logp_grad;

  Tensor gather(const MaybeTensor& from) const { return from ? from->index_select(0, index) : Tensor(); }
};

const float* data(const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr; }

// Loss, statistics, logp and entropy [N] (0 where the weight is 0), and the loss's gradients for a unit upstream gradient; those not asked for are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_policy_loss_forward(
    FUSEDRL_LINEAR_POLICY_PARAMETERS, FUSEDRL_LINEAR_POLICY_SETTINGS, bool for_hidden, bool for_weight, bool for_bias) {
  at::AutoDispatchBelowADInplaceOrView below;
  const Objective objective({kind, kl_estimator, kl_gradient, coefficients});
  const int64_t N = hidden.size(0), V = weight.size(0);
  const auto wide = hidden.options().dtype(at::kFloat);
  Rows rows;
  rows.index = weights.ne(0).nonzero().view(-1);
  const int64_t M = rows.index.numel();
  rows.ids = token_ids.index_select(0, rows.index).to(at::kLong);
  rows.weights = rows.gather(weights);
  rows.advantages = rows.gather(advantages);
  rows.old_logp = rows.gather(old_logp);
  rows.ref_logp = rows.gather(ref_logp);
  rows.correction = rows.gather(correction);
  rows.sequence_log_ratio = rows.gather(sequence_log_ratio);
  rows.kl_sum = rows.gather(kl_sum);
  for (Tensor* result : {&rows.logp, &rows.entropy, &rows.logp_grad}) *result = at::empty({M}, wide);
  const int64_t* ids = rows.ids.const_data_ptr<int64_t>();
  const int64_t* row_of = rows.index.const_data_ptr<int64_t>();
  for (int64_t m = 0; m < M; ++m) {
    TORCH_CHECK_INDEX(ids[m] >= 0 && ids[m] < V, "linear_policy_loss: expected token ids in [0, ", V, ") where the weight is not 0, got ", ids[m], " in row ", row_of[m]);
  }
  const Temperatures t("linear_policy_loss", temperature, temperatures ? MaybeTensor(temperatures->index_select(0, rows.index)) : std::nullopt);
  const Head head{weight, bias ? bias->to(at::kFloat) : Tensor(), softcap};

  float *logp = rows.logp.mutable_data_ptr<float>(), *entropy = rows.entropy.mutable_data_ptr<float>();
  const float *w = data(rows.weights), *g = data(rows.logp_grad);
  const PolicyArguments policy{logp, old_logp ? data(rows.old_logp) : logp, data(rows.advantages), w, entropy, data(rows.ref_logp),
                               data(rows.correction), data(rows.sequence_log_ratio), data(rows.kl_sum), rows.logp_grad.mutable_data_ptr<float>(),
                               objective};
  const auto h = [&](int64_t m) { return -static_cast<double>(w[m]) * objective.coefficients.entropy_coef; };

  const int64_t C = workspace_rows(workspace_bytes, N, V, M);
  const Tensor workspace_CV = at::empty({M ? C : 0, V}, wide);
  float* const z = workspace_CV.mutable_data_ptr<float>();
  const bool backward = for_hidden || for_weight || for_bias, every_row = M == N;
  Tensor hidden_grad = for_hidden ? at::zeros_like(hidden, at::MemoryFormat::Contiguous) : at::empty({0}, hidden.options());
  Tensor weight_grad = at::empty(for_weight ? weight.sizes() : at::IntArrayRef({0}), wide), bias_grad = at::zeros({for_bias ? V : 0}, wide);
  std::vector<RowStats> stats(C);
  std::vector<std::pair<int64_t, int64_t>> moves;  // (row of the chunk, slot of its gradient)
  std::vector<int64_t> members, aside;             // unmasked row of each gradient: of the chunk, and laid aside
  const int64_t enough = (C + 1) / 2;
  Tensor aside_CV;
  bool first = true;
  const auto add = [&](const Tensor& dz_AV, std::vector<int64_t>& of) {  // the products with gradients that are complete
    const Tensor index_A = rows.index.index_select(0, at::from_blob(of.data(), {dz_AV.size(0)}, at::kLong));
    if (for_hidden) hidden_grad.index_copy_(0, index_A, head.hidden_grad(dz_AV).to(hidden.scalar_type()));
    if (for_weight) {
      const Tensor hidden_AH = hidden.index_select(0, index_A).to(at::kFloat);
      if (first) at::mm_out(weight_grad, dz_AV.t(), hidden_AH); else weight_grad.addmm_(dz_AV.t(), hidden_AH);
    }
    if (for_bias) bias_grad.add_(dz_AV.sum(0));
    first = false;
    of.clear();
  };
  const auto add_aside = [&] { add(aside_CV.narrow(0, 0, aside.size()), aside); };

  for (int64_t begin = 0; begin < M; begin += C) {
    const int64_t R = std::min(C, M - begin);
    const Tensor z_RV = workspace_CV.narrow(0, 0, R);
    const Tensor hidden_RH = every_row ? hidden.narrow(0, begin, R) : hidden.index_select(0, rows.index.narrow(0, begin, R));
    head.logits(z_RV, hidden_RH.to(at::kFloat));
    at::parallel_for(0, R, grain(V), [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t m = begin + i;
        float* row = z + i * V;
        if (softcap > 0.0) cap_row(row, V, softcap);
        stats[i] = row_stats<true>(row, V, t[m]);
        logp[m] = row_logp(stats[i], row[ids[m]], t[m]);
        entropy[m] = row_entropy(stats[i]);
      }
    });
    if (!backward) continue;
    PolicyPartial unused;
    policy_block(policy, begin, begin + R, unused);
    const auto active = [&](int64_t i) { return g[begin + i] != 0.0f || h(begin + i) != 0.0; };
    int64_t A = 0;
    for (int64_t i = 0; i < R; ++i) A += active(i);
    // Active rows among the first A stay; the others go to the slots of inactive ones there. No slot is read and written by two rows.
    members.resize(A);
    moves.clear();
    for (int64_t i = 0, hole = 0; i < R; ++i) {
      if (!active(i)) continue;
      int64_t slot = i;
      if (i >= A) {
        while (active(hole)) ++hole;
        slot = hole++;
      }
      moves.emplace_back(i, slot);
      members[slot] = begin + i;
    }
    at::parallel_for(0, A, grain(V), [&](int64_t from, int64_t to) {
      for (int64_t j = from; j < to; ++j) {
        const auto [i, slot] = moves[j];
        const int64_t m = begin + i;
        row_gradient<false>(z + i * V, z + slot * V, V, ids[m], stats[i], g[m], h(m), t[m], softcap);
      }
    });
    if (A == 0) continue;
    const Tensor dz_AV = workspace_CV.narrow(0, 0, A);
    const int64_t held = aside.size();
    if (A >= enough || (held == 0 && begin + R == M)) {
      add(dz_AV, members);
      continue;
    }
    if (held + A > enough) add_aside();
    if (!aside_CV.defined()) aside_CV = at::empty({enough, V}, wide);
    aside_CV.narrow(0, aside.size(), A).copy_(dz_AV);
    aside.insert(aside.end(), members.begin(), members.end());
  }
  if (!aside.empty()) add_aside();
  if (first && for_weight) weight_grad.zero_();

  PolicyPartial all;
  policy_block(policy, 0, M, all);
  Tensor loss = at::empty({}, wide), out = at::empty({kPolicyStats}, wide);
  *loss.mutable_data_ptr<float>() = static_cast<float>(all.sums[LOSS]);
  policy_stats(all, correction.has_value(), out.mutable_data_ptr<float>());
  const auto of_all = [&](const Tensor& from) { return every_row ? from : at::zeros({N}, wide).index_copy_(0, rows.index, from); };
  return {loss, out, of_all(rows.logp), of_all(rows.entropy), hidden_grad, weight_grad.to(weight.scalar_type()), for_bias ? bias_grad.to(bias->scalar_type()) : bias_grad};
}

// Whether the upstream gradient is 1, as it is after loss.backward(): the weight's gradient is then handed on as it is, not copied.
bool is_one(const Tensor& scale) {
  const auto keys = scale.key_set();
  const bool traced = keys.has(c10::DispatchKey::Python) || keys.has(c10::DispatchKey::Functionalize) || !scale.device().is_cpu();
  return !traced && *scale.const_data_ptr<float>() == 1.0f;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_policy_loss(FUSEDRL_LINEAR_POLICY_PARAMETERS, FUSEDRL_LINEAR_POLICY_SETTINGS) {
  const auto needed = [](const Tensor& tensor) { return at::GradMode::is_enabled() && tensor.requires_grad(); };
  const bool for_hidden = needed(hidden), for_weight = needed(weight), for_bias = bias && needed(*bias);
  const auto forward = [&](Saved& saved) -> Tensors {
    static auto op = find_op<decltype(linear_policy_loss_forward)>("fusedrl::linear_policy_loss_forward");
    auto [loss, stats, logp, entropy, hidden_grad, weight_grad, bias_grad] =
        op.call(FUSEDRL_LINEAR_POLICY_NAMES, kind, kl_estimator, kl_gradient, coefficients, temperature, softcap, workspace_bytes, for_hidden, for_weight,
                for_bias);
    saved.tensors = {hidden_grad, weight_grad, bias_grad};
    saved.non_differentiable = {stats, logp, entropy};
    return {loss, stats, logp, entropy};
  };
  const auto backward = [](const Tensors& grads, const Saved& saved) -> Tensors {
    Tensors out(3);
    const bool one = is_one(grads[0]);
    for (int i = 0; i < 3; ++i)
      if (saved.needed[i]) out[i] = one ? saved.tensors[i] : saved.tensors[i].mul(grads[0]);
    return out;
  };
  const auto out = with_gradient("linear_policy_loss", {hidden, weight, bias}, forward, backward);
  return {out[0], out[1], out[2], out[3]};
}

#define FUSEDRL_LINEAR_POLICY_SCHEMA                                                                                                                 \
  "Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? old_logp, Tensor advantages, Tensor weights, Tensor? ref_logp, "            \
  "Tensor? correction, Tensor? sequence_log_ratio, Tensor? kl_sum, Tensor? temperatures, " FUSEDRL_OBJECTIVE_SCHEMA ", float temperature, "          \
  "float softcap, int workspace_bytes"

TORCH_LIBRARY_FRAGMENT(fusedrl, m) {
  m.def("linear_policy_loss_forward(" FUSEDRL_LINEAR_POLICY_SCHEMA ", bool for_hidden, bool for_weight, bool for_bias) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("linear_policy_loss(" FUSEDRL_LINEAR_POLICY_SCHEMA ") -> (Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(fusedrl, CPU, m) { m.impl("linear_policy_loss_forward", &linear_policy_loss_forward); }
TORCH_LIBRARY_IMPL(fusedrl, CompositeImplicitAutograd, m) { m.impl("linear_policy_loss", &linear_policy_loss); }

}  // namespace
