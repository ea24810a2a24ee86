"""Where the documents that this project started from misprint a formula, the corrected form is
built; docs/algorithms.md lists all of them.

Each check passes on the product and refuses the formula as it is printed. E2 and E8 are with the
reward model and the replay buffer, E4 in test_chain.py, E10 in test_gradient_facts.py; E3 and E6
are typing errors in names and sizes.
"""

import math
from dataclasses import replace

import pytest
import torch
from tests.engine.policy.enumeration import Tree, error

from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import GenerationConfig, KLConfig, LossConfig, PolicyConfig
from fusedrl.engine.policy.metrics import measure
from fusedrl.kernels.gae import discounted_returns
from fusedrl.kernels.logprob import logprob
from fusedrl.kernels.policy_loss import PolicyObjective, policy_loss, value_loss
from fusedrl.kernels.ranking_loss import pairwise_ranking_loss


def test_e1_the_ranking_loss_has_a_minus(device):
    """S3 prints log sigma(r_w - r_l) as the loss: descending it would prefer the rejected."""

    def check(loss):
        chosen, rejected = (
            torch.tensor([0.3], requires_grad=True, device=device),
            torch.tensor([0.1], requires_grad=True, device=device),
        )
        up, down = torch.autograd.grad(loss(chosen, rejected), (chosen, rejected))
        assert up < 0 < down

    check(lambda w, l: pairwise_ranking_loss(w, l))
    assert pairwise_ranking_loss(
        torch.zeros(1, device=device), torch.zeros(1, device=device)
    ).item() == pytest.approx(math.log(2))
    with pytest.raises(AssertionError):
        check(lambda w, l: torch.nn.functional.logsigmoid(w - l).mean())


def test_e5_the_gradient_weighs_log_p_and_not_p(device):
    """S2, equation 5, -mean(a p): its gradient is a p grad log p, which likely tokens dominate. The
    ratio of equation 6 gives a grad log p."""
    logp = torch.tensor([0.9, 0.05, 0.05], device=device).log()
    advantages, weights = (
        torch.tensor([1.0, 1.0, -1.0], device=device),
        torch.full((3,), 1 / 3, device=device),
    )

    def check(loss):
        leaf = logp.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(loss(leaf), leaf)[0], -advantages / 3)

    check(lambda x: policy_loss(x, logp, advantages, weights)[0])
    check(
        lambda x: policy_loss(
            x, logp, advantages, weights, objective=PolicyObjective(kind="reinforce")
        )[0]
    )
    with pytest.raises(AssertionError):
        check(lambda x: -(advantages * x.exp()).mean())


def test_e7_the_objective_is_differentiated_through_the_log_probabilities(device):
    """S0 has it that InstructGPT leaves grad log pi out. What is differentiated is a surrogate,
    whose gradient is that of E[r - beta KL]; of the sampled objective itself, rewards being
    constants, nothing but the KL's term of mean 0 is left."""
    tree = Tree(device=device)
    config = PolicyConfig(
        "m",
        "d",
        ("r.py:f",),
        "reinforce",
        kl=KLConfig(coef=tree.beta),
        generation=GenerationConfig(max_new_tokens=3),
    )
    true = tree.gradient(tree.objective())

    def check(found):
        assert error(found, true) < 1e-12

    check(tree.expected(config))
    logp = tree.logp()
    mean_of_samples = (
        tree.probabilities() * (tree.scores - tree.beta * tree.of_completions(logp - tree.ref))
    ).sum()
    with pytest.raises(AssertionError):
        check(tree.gradient(mean_of_samples))


def test_e9_a_bad_action_is_made_less_likely(device):
    """S2 has "A < 0 ... by reducing loss" the wrong way round: descent lowers its
    log-probability."""
    leaf = torch.tensor([-1.0, -1.0], requires_grad=True, device=device)
    loss, _ = policy_loss(
        leaf, leaf.detach(), torch.tensor([-1.0, 1.0], device=device), torch.ones(2, device=device)
    )
    bad, good = (leaf - 0.1 * torch.autograd.grad(loss, leaf)[0]).tolist()
    assert bad < -1.0 < good


def test_e11_what_is_paid_for_the_kl_is_negative(device):
    """Printed as beta * kl; the code that it describes has -beta * kl."""
    batch = PackedBatch.from_sequences([([1], [2, 3]), ([1], [4])], device=device)
    old, ref = (
        torch.where(batch.action_mask, x, 0.0)
        for x in (torch.full((5,), -1.0, device=device), torch.full((5,), -1.5, device=device))
    )
    batch = batch.with_columns(
        old_logp=old,
        ref_logp=ref,
        rollout_logp=old,
        old_entropy=torch.zeros(5, device=device),
        scores=torch.tensor([2.0, 4.0], device=device),
    )
    row = measure(batch, 0.1, PolicyConfig("m", "d", ("r.py:f",), "rloo", kl=KLConfig(coef=0.1)))
    kl = (2 * 0.5 + 0.5) / 2

    def check(paid):
        assert paid == pytest.approx(-0.1 * kl)

    assert row["kl"] == pytest.approx(kl)
    check(row["objective/non_score_reward"])
    assert row["objective/rlhf_reward"] == pytest.approx(3.0 - 0.1 * kl)
    with pytest.raises(AssertionError):
        check(0.1 * row["kl"])


def test_e12_the_kl_of_ptx_belongs_in_the_reward(device):
    """S4 leaves -beta log(pi / pi_SFT) outside the ratio: differentiated it is k1 as a loss, of
    mean 0; detached, in the reward, it is exact."""
    tree = Tree(seed=4, device=device)
    no_kl = tree.gradient(tree.objective(beta=0.0))
    true = tree.gradient(tree.objective())
    base = PolicyConfig(
        "m",
        "d",
        ("r.py:f",),
        "reinforce",
        generation=GenerationConfig(max_new_tokens=3),
        loss=LossConfig(advantage="monte_carlo"),
        kl=KLConfig(coef=tree.beta),
    )
    assert error(tree.expected(base), true) < 1e-12
    outside = tree.expected(
        replace(base, kl=KLConfig(coef=tree.beta, placement="loss", estimator="k1"))
    )
    assert error(outside, no_kl) < 1e-12
    assert error(outside, true) > 0.1


def test_e13_entropy_is_a_kl_from_uniform_and_no_cross_entropy(device):
    """S0: "entropy = cross-entropy with uniform". H = log V - KL(pi || uniform); the cross-entropy
    with it is log V for every policy."""
    z = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).to(device)
    entropy = logprob(z, torch.zeros(4, dtype=torch.int64, device=device), entropy=True)[1]
    p = z.double().softmax(1)

    def check(formula):
        torch.testing.assert_close(entropy.double(), formula, rtol=1e-5, atol=1e-6)

    check(math.log(9) - (p * (p.log() + math.log(9))).sum(1))
    with pytest.raises(AssertionError):
        check(-(p * math.log(1 / 9)).sum(1))


def test_e14_one_hot_times_log_p_is_log_p_and_g_t_starts_with_r_t(device):
    """S3 calls the product with [0, 1, 0] a gradient; it picks log p of the second action. Its G_t
    begins at r_{t+1} in one place and at r_t in another."""
    z = torch.tensor([[0.2, 1.3, -0.4]], device=device)
    torch.testing.assert_close(
        logprob(z, torch.tensor([1], device=device)),
        (torch.tensor([[0.0, 1.0, 0.0]], device=device) * z.log_softmax(1)).sum(1),
    )
    rewards = torch.tensor([[1.0, 10.0, 100.0]], device=device)

    def check(returns):
        torch.testing.assert_close(returns, torch.tensor([[31.0, 60.0, 100.0]], device=device))

    check(discounted_returns(rewards, gamma=0.5))
    with pytest.raises(AssertionError):
        check(torch.tensor([[10.0 + 50.0, 100.0, 0.0]], device=device))


def test_e15_the_critic_regresses_on_returns(device):
    """S2's critic_loss_func(rewards, values): the true values would not be its minimum."""
    rewards, weights = (
        torch.tensor([0.0, 0.0, 1.0], device=device),
        torch.full((3,), 1 / 3, device=device),
    )
    returns = discounted_returns(rewards[None], gamma=1.0)[0]

    def check(targets):
        values = returns.clone().requires_grad_()
        assert not torch.autograd.grad(
            value_loss(values, values.detach(), targets, weights)[0], values
        )[0].any()

    check(returns)
    with pytest.raises(AssertionError):
        check(rewards)
