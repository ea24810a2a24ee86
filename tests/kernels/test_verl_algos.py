"""verl's functions by their names, against their definitions written out token by token."""

import math
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch

from fusedrl.kernels import verl_algos as algos

pytestmark = pytest.mark.cpu_only("loops in float64 beside functions of torch alone")
B, T = 5, 7
LENGTHS = (7, 3, 1, 5, 7)
INDEX = np.array(["a", "b", "a", "c", "a"], dtype=object)
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm")
MODES += ("seq-mean-token-mean",)


def rand(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def mask(device):
    """With a hole, as observations make it."""
    found = torch.arange(T)[None] < torch.tensor(LENGTHS)[:, None]
    found[0, 2] = False
    return found.long().to(device)


def hidden(x, mask):
    """What a mask hides is nonsense."""
    return torch.where(mask != 0, x.to(mask.device), math.nan)


def white(x, mask):
    live = x[mask != 0]
    scaled = (x - live.mean()) / (live.var(correction=1) + 1e-8).sqrt()
    return torch.where(mask != 0, scaled, 0)


def close(got, want):
    torch.testing.assert_close(got.double().cpu(), want.double().cpu(), rtol=1e-9, atol=1e-9)


def test_advantages_that_look_ahead(mask):
    rewards, values = rand(0, B, T), rand(1, B, T)
    advantages, returns = torch.zeros(B, T).double(), torch.zeros(B, T).double()
    to_go = torch.zeros(B, T).double()
    for b in range(B):
        ahead = value = total = 0.0
        for t in reversed(range(T)):
            if mask[b, t]:
                delta = rewards[b, t] + 0.9 * value - values[b, t]
                ahead, value = delta + 0.9 * 0.8 * ahead, values[b, t]
                advantages[b, t], returns[b, t] = ahead, ahead + value
                total = rewards[b, t] + 0.9 * total
                to_go[b, t] = total
    m = mask.cpu()
    got = algos.compute_gae_advantage_return(
        hidden(rewards, mask), hidden(values, mask), mask, 0.9, 0.8
    )
    close(got[0], white(advantages, m))
    close(got[1], returns)
    plus = algos.compute_reinforce_plus_plus_outcome_advantage(
        hidden(rewards, mask), mask, config=SimpleNamespace(gamma=0.9)
    )
    close(plus[0], white(to_go, m))
    close(plus[1], to_go)
    base = rand(2, B).to(mask.device)
    remax = algos.compute_remax_outcome_advantage(hidden(rewards, mask), base, mask)
    undiscounted = (rewards * m).flip(1).cumsum(1).flip(1) * m
    close(remax[1], undiscounted)
    close(remax[0], (undiscounted - base.cpu()[:, None]) * m)


def test_advantages_of_groups(mask):
    """a has three scores, b and c one each, which keep theirs."""
    rewards = rand(0, B, T).to(mask.device) * mask
    scores, m = rewards.sum(1).cpu(), mask.cpu()
    a = scores[[0, 2, 4]]
    centred = torch.where(torch.tensor([1, 0, 1, 0, 1]) == 1, scores - a.mean(), scores)
    scaled = torch.where(centred == scores, scores / (1 + 1e-6), centred / (a.std() + 1e-6))
    others = scores.clone()
    for b in (0, 2, 4):
        others[b] = scores[b] - (a.sum() - scores[b]) / 2
    for name, by_std, want in (
        ("compute_grpo_outcome_advantage", True, scaled),
        ("compute_grpo_outcome_advantage", False, centred),
        ("compute_grpo_vectorized_outcome_advantage", True, scaled),
    ):
        got = getattr(algos, name)(rewards, mask, INDEX, norm_adv_by_std_in_grpo=by_std)
        assert got[0] is got[1]
        close(got[0], want[:, None] * m)
    close(algos.compute_rloo_outcome_advantage(rewards, mask, INDEX)[0], others[:, None] * m)
    alone = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    close(
        algos.compute_rloo_vectorized_outcome_advantage(rewards, mask, INDEX)[0],
        (others * alone)[:, None] * m,
    )
    close(
        algos.compute_reinforce_plus_plus_baseline_outcome_advantage(rewards, mask, INDEX)[0],
        white(centred[:, None].expand(B, T), m),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "parts", [{}, {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 9}]
)
def test_aggregations(mode, parts, mask):
    losses = rand(0, B, T)
    total, tokens, size = 0.0, int(mask.sum()), B
    scale = parts.get("dp_size", 1)
    for b in range(B):
        own = losses[b][mask[b].cpu() != 0]
        total = (
            total
            + scale
            * {
                "token-mean": own.sum() / parts.get("batch_num_tokens", tokens),
                "token-sum": own.sum(),
                "seq-mean-token-sum": own.sum() / parts.get("global_batch_size", size),
                "seq-mean-token-sum-norm": own.sum() / parts.get("global_batch_size", size) / T,
                "seq-mean-token-mean": own.sum()
                / (len(own) + 1e-8)
                / parts.get("global_batch_size", size),
            }[mode]
        )
    close(algos.agg_loss(hidden(losses, mask), mask, mode, **parts), total)
    if mode != "token-sum":
        with pytest.raises(ValueError, match="is required when dp_size > 1"):
            algos.agg_loss(losses.to(mask.device), mask, mode, dp_size=2)
    with pytest.raises(ValueError, match="Invalid loss_agg_mode: mean: expected one of token-mean"):
        algos.agg_loss(losses.to(mask.device), mask, "mean")


class Config:
    clip_ratio, clip_ratio_low, clip_ratio_high = 0.2, None, 0.3
    tau_pos, tau_neg = 1.0, 1.05
    global_batch_info = MappingProxyType({})

    def get(self, name, default):
        return {"clip_ratio_c": 1.5}.get(name, default)


def by_hand(name, old, logp, A, live):
    """(loss per token, clipped, beyond the dual clip) of one sequence's unmasked tokens."""
    d = logp - old
    ratio = d.exp()
    none = torch.zeros(len(d), dtype=torch.bool)
    if name == "gspo":
        ratio = d.mean().exp().expand(len(d))
    if name in ("vanilla", "gspo"):
        low, high = -A * ratio, -A * ratio.clamp(0.8, 1.3)
        term, dual = torch.maximum(low, high), none
        if name == "vanilla":
            dual = (A < 0) & (term > -A * 1.5)
            term = torch.where(A < 0, torch.minimum(term, -A * 1.5), term)
        return term, high > low, dual
    if name == "gpg":
        return -A * logp, none, none
    if name == "cispo":
        clipped = ratio.clamp(0.8, 1.3)
        return -clipped.detach() * A * logp, clipped != ratio, none
    tau = torch.where(A > 0, 1.0, 1.05)
    return -A * torch.sigmoid(tau * (ratio - 1)) * 4 / tau, none, none


@pytest.mark.parametrize("name", ["vanilla", "gspo", "gpg", "cispo", "sapo"])
@pytest.mark.parametrize("weighted", [False, True])
def test_policy_losses(name, weighted, mask):
    logp, m = -rand(0, B, T).abs(), mask.cpu() != 0
    old, A = logp + 0.5 * rand(1, B, T), rand(2, B, 1).expand(B, T)
    correction = (0.5 + rand(3, B, 1).abs()).expand(B, T) if weighted else None
    leaf, terms, clipped, dual = logp.clone().requires_grad_(), [], 0, 0
    for b in range(B):
        term, cut, beyond = by_hand(name, old[b][m[b]], leaf[b][m[b]], A[b][m[b]], m[b])
        terms.append((term if correction is None else term * correction[b][m[b]]).mean() / B)
        clipped, dual = clipped + int(cut.sum()), dual + int(beyond.sum())
    want = sum(terms)
    want.backward()
    x = hidden(logp, mask).requires_grad_()
    function = getattr(algos, f"compute_policy_loss_{name}")
    loss, metrics = function(
        hidden(old, mask),
        x,
        hidden(A, mask),
        mask,
        "seq-mean-token-mean",
        Config(),
        None if correction is None else correction.to(mask.device),
    )
    loss.backward()
    torch.testing.assert_close(loss.cpu(), want.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(x.grad.cpu(), leaf.grad, rtol=1e-6, atol=1e-7)
    assert (metrics == {}) is (name == "gpg")
    if metrics:
        assert metrics["actor/pg_clipfrac"] == pytest.approx(clipped / int(m.sum()))
        assert metrics["actor/pg_clipfrac_lower"] == pytest.approx(dual / int(m.sum()))
        assert metrics["actor/ppo_kl"] == pytest.approx(-float((logp - old)[m].mean()))
    if name == "vanilla" and not weighted:
        found = algos.compute_policy_loss(
            hidden(old, mask), x, hidden(A, mask), mask, 0.2, None, 0.3, 1.5, "seq-mean-token-mean"
        )
        assert found[0].item() == pytest.approx(loss.item())
        assert found[1].item() == pytest.approx(metrics["actor/pg_clipfrac"])
        with pytest.raises(ValueError, match="expected verl's ActorConfig"):
            function(old, logp, A, mask)


def test_geometric_mean(mask):
    logp, m = -rand(0, B, T).abs(), mask.cpu() != 0
    old, A = logp + 0.5 * rand(1, B, T), rand(2, B, 1).expand(B, T)
    leaf, want = logp.clone().requires_grad_(), 0.0
    for b in range(B):
        d = (leaf[b] - old[b])[m[b]]
        bounded = d.clamp(max=0.3) if A[b, 0] > 0 else d.clamp(min=-0.2)
        want = want - A[b, 0] * bounded.mean().exp() / B
    want.backward()
    x = hidden(logp, mask).requires_grad_()
    loss, metrics = algos.compute_policy_loss_geo_mean(
        hidden(old, mask), x, hidden(A, mask), mask, config=Config()
    )
    loss.backward()
    torch.testing.assert_close(loss.cpu(), want.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(x.grad.cpu(), leaf.grad, rtol=1e-6, atol=1e-7)
    d = logp - old
    beyond = ((d < -0.2) | (d > 0.3)) & m
    assert metrics["actor/pg_clipfrac"] == pytest.approx(
        int((beyond & (A > 0)).sum()) / int(m.sum())
    )


def test_values_and_entropy(mask):
    m = mask.cpu() != 0
    new, old, returns, logits = rand(0, B, T), rand(1, B, T), rand(2, B, T), rand(3, B, T, 11)
    bounded = torch.minimum(torch.maximum(new, old - 0.2), old + 0.2)
    plain, cut = (new - returns) ** 2, (bounded - returns) ** 2
    loss, share = algos.compute_value_loss(
        *(hidden(x, mask) for x in (new, returns, old)), mask, 0.2, "token-mean"
    )
    close(loss, 0.5 * torch.maximum(plain, cut)[m].mean())
    assert share.item() == pytest.approx(float((cut > plain)[m].double().mean()))
    p = logits.softmax(-1)
    close(
        algos.compute_entropy_loss(logits.to(mask.device), mask, "token-mean"),
        -(p * p.log()).sum(-1)[m].mean(),
    )


@pytest.mark.parametrize("name", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"])
@pytest.mark.parametrize("plus", ["", "+"])
def test_kl_penalties(name, plus, device):
    logp, ref = 4 * rand(0, 40), rand(1, 40)
    leaf = logp.clone().requires_grad_()
    d = leaf - ref
    value = {
        "k1": d,
        "abs": d.abs(),
        "k2": d**2 / 2,
        "k3": ((-d).exp() - 1 + d).clamp(max=10),
    }[{"kl": "k1", "mse": "k2", "low_var_kl": "k3"}.get(name, name)]
    (d**2 / 2 if plus else value).sum().backward()
    x = logp.to(device).requires_grad_()
    got = algos.kl_penalty(x, ref.to(device), name + plus)
    got.sum().backward()
    close(got.detach(), value.detach())
    close(x.grad, leaf.grad)
    with pytest.raises(ValueError, match="expected one of kl, k1"):
        algos.kl_penalty(x, ref.to(device), "full")
    rewards = algos.compute_rewards(ref.to(device), logp.to(device), ref.to(device), 0.1)
    close(rewards, ref - 0.1 * (logp - ref))
