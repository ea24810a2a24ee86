"""The preference losses as functions: against formulas written out in plain Python, and what holds
of all of them."""

import math
from typing import get_args, get_type_hints

import pytest
import torch

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import DPOConfig
from fusedrl.engine.preference.losses import (
    PREFERENCE_LOSSES,
    pair_loss,
    pair_scores,
    preference_loss,
)


def by_hand(name, h, p, margin, beta, e):
    """The definitions, one number at a time."""

    def log_sigmoid(x):
        return -math.log1p(math.exp(-x)) if x > -500 else x

    plus, minus = beta * h - margin, -beta * h - margin
    if name == "sigmoid":  # cDPO mixes the two labels
        return -(
            (1 - e) * (p * log_sigmoid(plus) + (1 - p) * log_sigmoid(minus))
            + e * (p * log_sigmoid(minus) + (1 - p) * log_sigmoid(plus))
        )
    if name == "robust":

        def one(x, y):
            return (-(1 - e) * log_sigmoid(x) + e * log_sigmoid(y)) / (1 - 2 * e)

        return p * one(plus, minus) + (1 - p) * one(minus, plus)
    if name in ("ipo", "ipo_mean"):
        return (
            p * (h - margin / beta - 1 / (2 * beta)) ** 2
            + (1 - p) * (-h - margin / beta - 1 / (2 * beta)) ** 2
        )
    if name == "simpo":
        return -p * log_sigmoid(plus) - (1 - p) * log_sigmoid(minus)
    if name == "orpo":
        return -beta * (p * log_sigmoid(plus / beta) + (1 - p) * log_sigmoid(minus / beta))
    return p * max(0.0, 1 - plus) + (1 - p) * max(0.0, 1 - minus)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_the_definition(name, device):
    e = 0.2 if name in ("sigmoid", "robust") else 0.0
    cases = [
        (h, p, margin)
        for h in (-30.0, -1.5, 0.0, 0.3, 12.0)
        for p in (0.0, 0.25, 0.5, 1.0)
        for margin in (0.0, 0.7)
    ]
    h, p, margin = (
        torch.tensor(column, dtype=torch.float64, device=device)
        for column in zip(*cases, strict=True)
    )
    for beta in (0.1, 0.5):
        found = preference_loss(name, h, p, margin, beta=beta, label_smoothing=e)
        assert found.tolist() == pytest.approx(
            [by_hand(name, *case, beta, e) for case in cases], rel=1e-12, abs=1e-14
        )
    assert preference_loss(name, h[:0], p[:0], beta=0.1).shape == (0,)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_slopes(name, device):
    h = torch.tensor(
        [-3.0, -0.4, 0.0, 0.9, 4.0], dtype=torch.float64, requires_grad=True, device=device
    )
    p, margin = (
        torch.tensor([1.0, 0.3, 0.5, 1.0, 0.0], dtype=torch.float64, device=device),
        torch.tensor([0.0, 0.1, 0.0, 0.2, 0.0], dtype=torch.float64, device=device),
    )
    assert torch.autograd.gradcheck(
        lambda x: preference_loss(name, x, p, margin, beta=0.3, label_smoothing=0.1), (h,)
    )
    if not name.startswith(
        "ipo"
    ):  # a larger h is better for the chosen side, however large; ipo has a best h
        one = torch.tensor(
            [-50.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True, device=device
        )
        preference_loss(
            name, one, torch.ones(3, dtype=torch.float64, device=device), beta=0.5
        ).sum().backward()
        assert (one.grad < 0).all()


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_the_pair_the_other_way_round_is_the_same_pair(name, device):
    h, p = (
        torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device),
        torch.linspace(0, 1, 50, dtype=torch.float64, device=device),
    )
    margin = torch.full_like(p, 0.3)
    torch.testing.assert_close(
        preference_loss(name, h, p, margin, beta=0.2, label_smoothing=0.1),
        preference_loss(name, -h, 1 - p, margin, beta=0.2, label_smoothing=0.1),
        rtol=1e-12,
        atol=1e-12,
    )


def test_half_of_the_labels_wrong_teach_nothing(device):
    h = torch.zeros(3, dtype=torch.float64, requires_grad=True, device=device)
    preference_loss(
        "sigmoid",
        h,
        torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64, device=device),
        beta=0.5,
        label_smoothing=0.5,
    ).sum().backward()
    assert h.grad.tolist() == [0.0] * 3
    h = torch.zeros(len(PREFERENCE_LOSSES), dtype=torch.float64, requires_grad=True, device=device)
    sum(
        preference_loss(
            name, h[i : i + 1], torch.full((1,), 0.5, dtype=torch.float64, device=device), beta=0.5
        )
        for i, name in enumerate(PREFERENCE_LOSSES)
    ).sum().backward()
    assert h.grad.tolist() == [0.0] * len(PREFERENCE_LOSSES), "a tie"


def test_robust_is_unbiased(device):
    """The mean over labels flipped with probability e is the loss of the clean label (Chowdhury et
    al., 2024); the smoothed loss is not."""
    h, e, one = (
        torch.linspace(-6, 6, 13, dtype=torch.float64, device=device),
        0.3,
        torch.ones(13, dtype=torch.float64, device=device),
    )
    clean = preference_loss("sigmoid", h, one, beta=0.5)

    def expected(name):
        return (1 - e) * preference_loss(
            name, h, one, beta=0.5, label_smoothing=e
        ) + e * preference_loss(name, h, 1 - one, beta=0.5, label_smoothing=e)

    torch.testing.assert_close(expected("robust"), clean, rtol=1e-12, atol=1e-12)
    assert (expected("sigmoid") - clean).abs().max() > 0.1


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_extremes_are_finite(name, device):
    h = torch.tensor([-1e6, -1e3, 1e3, 1e6], dtype=torch.float64, requires_grad=True, device=device)
    loss = preference_loss(
        name, h, torch.ones(4, dtype=torch.float64, device=device), beta=0.1, label_smoothing=0.1
    )
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(h.grad).all()


# ---- from log-probabilities of tokens ------------------------------------------------------------
def batch_of(device, lengths, ref, *, prompt=2):
    """(batch of chosen and rejected in turn, slots of the answers' tokens); nan everywhere else in
    ref_logp."""
    batch = PackedBatch.from_sequences(([1] * prompt, [3] * n) for n in lengths).to(device)
    column = torch.full((batch.num_tokens,), math.nan, device=device)
    column[batch.action_mask] = torch.tensor(ref, device=device)
    return batch.with_columns(ref_logp=column)


def test_sums_not_means_and_nothing_of_the_prompt(device):
    batch = batch_of(device, [1, 3], [-1.0, -0.5, -0.25, -2.0])
    logp = torch.full((batch.num_tokens,), math.nan, device=device)
    logp[batch.action_mask] = torch.tensor([-0.75, -1.0, -1.0, -4.0], device=device)
    scores = pair_scores(batch, logp.requires_grad_())
    assert (scores.chosen_logp.item(), scores.rejected_logp.item()) == (-0.75, -6.0)
    assert (scores.chosen_ratio.item(), scores.rejected_ratio.item()) == (0.25, -3.25)
    assert (scores.chosen_tokens.item(), scores.rejected_tokens.item()) == (1.0, 3.0)
    loss = pair_loss("sigmoid", scores, torch.ones(1, dtype=torch.float64, device=device), beta=0.5)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.5 * 3.5)), rel=1e-12)
    assert loss.item() != pytest.approx(math.log1p(math.exp(-0.5 * (0.25 + 3.25 / 3))), rel=1e-3), (
        "of means it would be"
    )
    loss.sum().backward()
    slope = -0.5 / (1 + math.exp(0.5 * 3.5))
    assert logp.grad.tolist() == pytest.approx([0, 0, slope, 0, 0, *[-slope] * 3], rel=1e-6), (
        "the same at every token of an answer, 0 at prompts"
    )


@pytest.mark.parametrize("label", [1.0, 0.3, 0.5])
def test_the_likelihood_term_is_of_the_better_answer_by_its_tokens(label, device):
    batch = batch_of(device, [2, 4], [-1.0] * 6)
    logp = torch.full((batch.num_tokens,), math.nan, device=device)
    logp[batch.action_mask] = torch.tensor([-0.5, -1.5, -2.0, -2.0, -2.0, -6.0], device=device)
    scores, p = pair_scores(batch, logp), torch.tensor([label], dtype=torch.float64, device=device)
    plain, more = (pair_loss("ipo", scores, p, beta=0.1, nll_coef=coef) for coef in (0.0, 2.0))
    assert (more - plain).item() == pytest.approx(
        2.0 * (label * 1.0 + (1 - label) * 3.0), rel=1e-12
    )


def test_ipo_by_means_is_of_each_answers_mean(device):
    """TRL's formula: (mean log-ratio of w - that of l - 1 / (2 beta))^2, by hand. Answers of equal
    lengths n have the h of sums, divided by n."""
    batch = batch_of(device, [2, 4], [-1.0] * 6)
    logp = torch.full((batch.num_tokens,), math.nan, device=device)
    logp[batch.action_mask] = torch.tensor([-0.5, -1.5, -2.0, -2.0, -2.0, -6.0], device=device)
    scores, p = pair_scores(batch, logp), torch.ones(1, dtype=torch.float64, device=device)
    mean_h = (-2.0 + 2.0) / 2 - (-12.0 + 4.0) / 4
    assert scores.mean_h.item() == mean_h
    assert scores.h.item() == 8.0
    assert pair_loss("ipo_mean", scores, p, beta=0.1).item() == pytest.approx((mean_h - 5.0) ** 2)
    assert pair_loss("ipo", scores, p, beta=0.1).item() == pytest.approx((8.0 - 5.0) ** 2)


def test_losses_without_a_reference_are_their_papers_formulas(device):
    """SimPO's eq. 6 and ORPO's eqs. 4 to 7 from the answers' log-probabilities, by hand, at the
    defaults; nothing of ref_logp is read."""
    batch = PackedBatch.from_sequences([([1] * 2, [3] * n) for n in (2, 4)], device=device)
    logp = torch.full((batch.num_tokens,), math.nan, device=device)
    logp[batch.action_mask] = torch.tensor([-0.5, -1.5, -2.0, -2.0, -2.0, -6.0], device=device)
    scores, p = pair_scores(batch, logp), torch.ones(1, dtype=torch.float64, device=device)
    w, l = -2.0 / 2, -12.0 / 4
    simpo, orpo = (DPOConfig("m", "d", loss=name) for name in ("simpo", "orpo"))
    assert (simpo.beta, simpo.margin, simpo.nll_coef) == (2.0, 1.0, 0.0)
    assert (orpo.beta, orpo.margin, orpo.nll_coef) == (0.1, 0.0, 1.0)
    found = pair_loss("simpo", scores, p, p * simpo.margin, beta=simpo.beta)
    assert found.item() == pytest.approx(math.log1p(math.exp(-(2.0 * w - 2.0 * l - 1.0))))
    odds = [math.exp(m) / (1 - math.exp(m)) for m in (w, l)]
    found = pair_loss("orpo", scores, p, beta=orpo.beta, nll_coef=orpo.nll_coef)
    ratio = math.log(odds[0] / odds[1])
    assert found.item() == pytest.approx(-w + 0.1 * math.log1p(math.exp(-ratio)))


def test_the_odds_of_a_certain_answer_are_finite(device):
    batch = PackedBatch.from_sequences([([1], [3]), ([1], [3, 3])], device=device)
    logp = torch.zeros(batch.num_tokens, device=device, requires_grad=True)
    scores = pair_scores(batch, logp)
    loss = pair_loss("orpo", scores, torch.ones(1, device=device), beta=0.1, nll_coef=1.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.1 * math.log(2), rel=1e-6)
    assert torch.isfinite(logp.grad).all()


def test_equal_policies_are_exactly_at_zero(device):
    draw = torch.Generator().manual_seed(0)
    ref = (-5 * torch.rand(57, generator=draw).to(device)).tolist()
    batch = batch_of(device, [20, 17, 3, 17], ref)
    scores = pair_scores(batch, batch.ref_logp)
    assert scores.h.tolist() == [0.0, 0.0]
    assert (
        pair_loss(
            "sigmoid", scores, torch.ones(2, dtype=torch.float64, device=device), beta=0.1
        ).tolist()
        == [math.log(2.0)] * 2
    )
    assert pair_loss(
        "ipo", scores, torch.ones(2, dtype=torch.float64, device=device), beta=0.1
    ).tolist() == pytest.approx([25.0] * 2)


# ---- configuration -------------------------------------------------------------------------------
def test_every_loss_has_a_name_in_the_configuration():
    assert set(get_args(get_type_hints(DPOConfig)["loss"])) == set(PREFERENCE_LOSSES)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": 0.0}, "beta > 0"),
        ({"beta": -1.0}, "beta > 0"),
        ({"label_smoothing": 0.5}, "label_smoothing in"),
        ({"label_smoothing": -0.1}, "label_smoothing in"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing 0 with loss ipo"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "0 with loss hinge"),
        ({"loss": "robust"}, "label_smoothing > 0 with loss robust"),
        ({"nll_coef": -1.0}, "nll_coef >= 0"),
        ({"reference": "adapter_off"}, "without lora"),
        ({"eval_fraction": 1.0}, "eval_fraction in"),
        ({"pairs_per_step": 0}, "pairs_per_step >= 1"),
        ({"epochs": 0}, "epochs >= 1"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        DPOConfig("m", "d", **options)
