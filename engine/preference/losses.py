"""Losses of preference pairs against a reference, as data: DPO and its relatives. A user of this
file brings log-probabilities; nothing here knows a model.

    h = (log pi(w) - log ref(w)) - (log pi(l) - log ref(l))
    u = beta h - margin, and of the pair the other way round -beta h - margin
    loss = q term(u) + (1 - q) term(-beta h - margin)

    w, l: the chosen and the rejected answer, their log-probabilities summed over tokens
    q: how much the label says that w is the better one

    name      term(u)                  q of label p, smoothing e   minimum of one pair, no margin
    sigmoid   -log sigmoid(u)          p (1 - e) + (1 - p) e       beta h = logit q
    robust    -log sigmoid(u)          (p - e) / (1 - 2 e)         as sigmoid without noise, in
                                                                   expectation over flips
                                                                   of probability e
    ipo       ((u - 1/2) / beta)^2     p                           h = (2 p - 1) / (2 beta)
    hinge     max(0, 1 - u)            p                           p = 1: any beta h >= 1

With labels p = sigmoid(r_w - r_l) of all pairs, each weighing alike, sigmoid's minimum is ref exp(r
/ beta) / Z, that of the KL-regularised reward, and ipo's is ref exp(mean_l p(w, l) / beta) / Z. A
tie, p = 1/2, draws h to 0 (hinge: to within 1 / beta).

Sources   sigmoid: Rafailov et al. (2023), eq. 7; smoothed: Mitchell (2023), "A note on DPO with
          noisy preferences"; robust: Chowdhury et al. (2024); ipo: Azar et al. (2023), eq. 17, of
          sums (TRL divides h by lengths, which is another loss); hinge: RSO (Liu et al., 2023),
          after SLiC (Zhao et al., 2023), which has no reference; margins: ODPO (Amini et al.,
          2024); the likelihood term: Pang et al. (2024), of whom the mean over an answer's tokens
          is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrl.engine.base.packing import PackedBatch


class PreferenceLoss(NamedTuple):
    """A row of the table above: term(u, beta), and q(p, smoothing)."""

    term: Callable[[Tensor, float], Tensor]
    label: Callable[[Tensor, float], Tensor]


def _log_sigmoid(u: Tensor, beta: float) -> Tensor:
    return F.softplus(-u)


def _square(u: Tensor, beta: float) -> Tensor:
    return ((u - 0.5) / beta).square()


def _hinge(u: Tensor, beta: float) -> Tensor:
    return F.relu(1 - u)


def _as_it_is(p: Tensor, smoothing: float) -> Tensor:
    return p


PREFERENCE_LOSSES = {
    "sigmoid": PreferenceLoss(_log_sigmoid, lambda p, e: p * (1 - e) + (1 - p) * e),
    "robust": PreferenceLoss(_log_sigmoid, lambda p, e: (p - e) / (1 - 2 * e)),
    "ipo": PreferenceLoss(_square, _as_it_is),
    "hinge": PreferenceLoss(_hinge, _as_it_is),
}


def preference_loss(
    name: str,
    h_P: Tensor,
    label_P: Tensor,
    margin_P: Tensor | None = None,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """[P] losses of pairs, differentiable in h_P; names and formulas are at the head of this file.

    Args:
        h_P: log-ratio of the chosen answer less that of the rejected one, in nats.
        label_P: the probability that the chosen one is the better.
        margin_P: what beta h should exceed; None: 0.
    """
    loss = PREFERENCE_LOSSES[name]
    q_P, u_P = loss.label(label_P, label_smoothing), beta * h_P
    margin = 0.0 if margin_P is None else margin_P
    return q_P * loss.term(u_P - margin, beta) + (1 - q_P) * loss.term(-u_P - margin, beta)


class PairScores(NamedTuple):
    """Scores of a batch of pairs, [P] float64 each: sums over the tokens of an answer of log pi
    (`logp`) and of log pi - log ref (`ratio`), and its tokens."""

    chosen_logp: Tensor
    rejected_logp: Tensor
    chosen_ratio: Tensor
    rejected_ratio: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def h(self) -> Tensor:
        """[P]: the log-ratio of the chosen answer less that of the rejected one."""
        return self.chosen_ratio - self.rejected_ratio


def pair_scores(batch: PackedBatch, logp_N: Tensor) -> PairScores:
    """Score a batch whose sequences are chosen and rejected answers in turn, with the column
    ref_logp. Differentiable in logp_N.

    Ratios are taken token by token and then summed, in float64: where policy and reference are the
    same bits they are exactly 0.
    """
    mask_N = batch.action_mask
    lengths = torch.tensor(batch.lengths, device=logp_N.device)

    def sums(x_N: Tensor) -> tuple[Tensor, Tensor]:
        of_B = torch.segment_reduce(
            torch.where(mask_N, x_N, 0).double(), "sum", lengths=lengths, unsafe=True, initial=0.0
        )
        return of_B[0::2], of_B[1::2]

    return PairScores(
        *sums(logp_N), *sums(logp_N - batch.column("ref_logp")), *sums(torch.ones_like(logp_N))
    )


def pair_loss(
    name: str,
    scores: PairScores,
    label_P: Tensor,
    margin_P: Tensor | None = None,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    nll_coef: float = 0.0,
) -> Tensor:
    """[P] losses: `preference_loss`, and nll_coef times the mean negative log-probability of the
    tokens of the better answer, as the label has it."""
    loss_P = preference_loss(
        name, scores.h, label_P, margin_P, beta=beta, label_smoothing=label_smoothing
    )
    if not nll_coef:
        return loss_P
    chosen_P, rejected_P = (
        -scores.chosen_logp / scores.chosen_tokens,
        -scores.rejected_logp / scores.rejected_tokens,
    )
    return loss_P + nll_coef * (label_P * chosen_P + (1 - label_P) * rejected_P)
