"""Losses of preference pairs: DPO and its relatives, in a table; and KTO's, of single answers. The
functions take log-probabilities; none of them needs a model.

    h = (log pi(w) - log ref(w)) - (log pi(l) - log ref(l))
    u = beta h - margin; for the pair with its answers swapped, -beta h - margin
    loss = q term(u) + (1 - q) term(-beta h - margin)

    w, l: the chosen and the rejected answer; log-probabilities are sums over their tokens, and by
       means those sums divided by the answer's number of tokens, each of w and of l
    m: by means and without a reference; log odds = log(e^m / (1 - e^m))
    q: the weight that the label gives to w being the better answer

    name      term(u)                  q of label p, smoothing e   minimum of one pair, no margin
    sigmoid   -log sigmoid(u)          p (1 - e) + (1 - p) e       beta h = logit q
    robust    -log sigmoid(u)          (p - e) / (1 - 2 e)         as sigmoid without noise, in
                                                                   expectation over flips
                                                                   of probability e
    ipo       ((u - 1/2) / beta)^2     p                           h = (2 p - 1) / (2 beta)
    ipo_mean  as ipo, of h by means    p                           as ipo, of h by means
    hinge     max(0, 1 - u)            p                           p = 1: any beta h >= 1
    simpo     as sigmoid, of           p                           none: nothing holds the policy
              h = m(w) - m(l)
    orpo      -beta log sigmoid(u      p                           none; the likelihood term, of
              / beta), of h = log                                  weight 1, takes the place of
              odds(w) - log odds(l)                                the reference

Suppose labels p = sigmoid(r_w - r_l) for all pairs, with equal weights. Then the minimum of sigmoid
is the policy ref exp(r / beta) / Z, which also maximises the KL-regularised reward; the minimum of
ipo is ref exp(mean_l p(w, l) / beta) / Z. A tie, p = 1/2, draws h to 0 (hinge: to within 1 / beta).

kto_loss  r = log pi(y) - log ref(y), z = max(0, mean of r over mismatched prompts and answers)
          wanted: desirable_weight (1 - sigmoid(beta (r - z)))
          unwanted: undesirable_weight (1 - sigmoid(beta (z - r)))

Sources   sigmoid: Rafailov et al. (2023), eq. 7; smoothed: Mitchell (2023), "A note on DPO with
          noisy preferences"; robust: Chowdhury et al. (2024); ipo: Azar et al. (2023), eq. 17, with
          sums over tokens; ipo_mean: TRL's ipo, which divides by lengths; hinge: RSO (Liu et
          al., 2023), after SLiC (Zhao et al., 2023), which has no reference; margins: ODPO (Amini
          et al., 2024); the likelihood term, a mean over an answer's tokens: Pang et al. (2024).
          simpo: Meng et al. (2024), eq. 6, whose gamma is the margin; orpo: Hong et al. (2024),
          eqs. 6 and 7, whose lambda is beta. kto_loss: Ethayarajh et al. (2024), eqs. 7 and 8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedrl.engine.base.packing import PackedBatch

Of = Literal["ratio", "mean_ratio", "mean", "odds"]


class PreferenceLoss(NamedTuple):
    """Loss from the table above: its functions term(u, beta) and q(p, smoothing), and the number
    of an answer that its h compares: the log-ratio, that per token, the log-probability per token,
    or the log odds of the last."""

    term: Callable[[Tensor, float], Tensor]
    label: Callable[[Tensor, float], Tensor]
    of: Of = "ratio"

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with a reference."""
        return self.of in ("ratio", "mean_ratio")


def _log_sigmoid(u: Tensor, beta: float) -> Tensor:
    return F.softplus(-u)


def _square(u: Tensor, beta: float) -> Tensor:
    return ((u - 0.5) / beta).square()


def _hinge(u: Tensor, beta: float) -> Tensor:
    return F.relu(1 - u)


def _odds_ratio(u: Tensor, beta: float) -> Tensor:
    return beta * F.softplus(-u / beta)


def _as_it_is(p: Tensor, smoothing: float) -> Tensor:
    return p


PREFERENCE_LOSSES = {
    "sigmoid": PreferenceLoss(_log_sigmoid, lambda p, e: p * (1 - e) + (1 - p) * e),
    "robust": PreferenceLoss(_log_sigmoid, lambda p, e: (p - e) / (1 - 2 * e)),
    "ipo": PreferenceLoss(_square, _as_it_is),
    "ipo_mean": PreferenceLoss(_square, _as_it_is, "mean_ratio"),
    "hinge": PreferenceLoss(_hinge, _as_it_is),
    "simpo": PreferenceLoss(_log_sigmoid, _as_it_is, "mean"),
    "orpo": PreferenceLoss(_odds_ratio, _as_it_is, "odds"),
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
    """Return the losses [P] of pairs, differentiable in h_P. Names and formulas are at the top of
    this file.

    Args:
        h_P: number of the chosen answer minus that of the rejected answer (`PairScores.h_of`), in
            nats.
        label_P: the probability that the chosen answer is the better one.
        margin_P: the margin that beta h should exceed; if None, 0.
    """
    loss = PREFERENCE_LOSSES[name]
    q_P, u_P = loss.label(label_P, label_smoothing), beta * h_P
    margin = 0.0 if margin_P is None else margin_P
    return q_P * loss.term(u_P - margin, beta) + (1 - q_P) * loss.term(-u_P - margin, beta)


class PairScores(NamedTuple):
    """Scores of a batch of pairs, [P] float64 each. For each answer: the sums over its tokens of
    log pi (`logp`) and of log pi - log ref (`ratio`), and the number of its tokens."""

    chosen_logp: Tensor
    rejected_logp: Tensor
    chosen_ratio: Tensor
    rejected_ratio: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def h(self) -> Tensor:
        """Log-ratio [P] of the chosen answer minus that of the rejected answer."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def mean_h(self) -> Tensor:
        """Mean log-ratio per token [P] of the chosen answer minus that of the rejected answer."""
        return self.h_of("mean_ratio")

    def h_of(self, of: Of) -> Tensor:
        """Number of the chosen answer minus that of the rejected answer [P]."""
        chosen, rejected = self.of_answers(of)
        return chosen - rejected

    def of_answers(self, of: Of) -> tuple[Tensor, Tensor]:
        """Return that number of the chosen and of the rejected answers, [P] each. The odds of an
        answer whose tokens are all certain are cut off at 1e9, without gradient beyond."""
        if of == "ratio":
            return self.chosen_ratio, self.rejected_ratio
        chosen, rejected = (
            (self.chosen_ratio, self.rejected_ratio)
            if of == "mean_ratio"
            else (self.chosen_logp, self.rejected_logp)
        )
        chosen, rejected = chosen / self.chosen_tokens, rejected / self.rejected_tokens
        return (_log_odds(chosen), _log_odds(rejected)) if of == "odds" else (chosen, rejected)


def _log_odds(mean_logp: Tensor) -> Tensor:
    m = mean_logp.clamp(max=-1e-9)
    return m - torch.log(-torch.expm1(m))


def pair_scores(batch: PackedBatch, logp_N: Tensor) -> PairScores:
    """Score a batch of pairs: sequences are chosen and rejected answers alternately. The scores are
    differentiable in logp_N. Without the column ref_logp, ratios are the log-probabilities
    themselves.

    Log-ratios are taken token by token and then summed in float64. If policy and reference give the
    same log-probabilities bit for bit, the ratios are exactly 0.
    """
    mask_N = batch.action_mask
    lengths = torch.tensor(batch.lengths, device=logp_N.device)

    def sums(x_N: Tensor) -> tuple[Tensor, Tensor]:
        of_B = torch.segment_reduce(
            torch.where(mask_N, x_N, 0).double(), "sum", lengths=lengths, unsafe=True, initial=0.0
        )
        return of_B[0::2], of_B[1::2]

    ratio_N = logp_N if batch.ref_logp is None else logp_N - batch.ref_logp
    return PairScores(*sums(logp_N), *sums(ratio_N), *sums(torch.ones_like(logp_N)))


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
    """Return the losses [P]: `preference_loss` plus nll_coef times the better answer's mean
    negative log-probability per token. A soft label averages that term over both answers."""
    h_P = scores.h_of(PREFERENCE_LOSSES[name].of)
    loss_P = preference_loss(
        name, h_P, label_P, margin_P, beta=beta, label_smoothing=label_smoothing
    )
    if not nll_coef:
        return loss_P
    chosen_P, rejected_P = (
        -scores.chosen_logp / scores.chosen_tokens,
        -scores.rejected_logp / scores.rejected_tokens,
    )
    return loss_P + nll_coef * (label_P * chosen_P + (1 - label_P) * rejected_P)


# ---- single answers ------------------------------------------------------------------------------
def answer_sums(batch: PackedBatch, logp_N: Tensor, *, ratios: bool) -> Tensor:
    """Return [B] float64: of each sequence the sum over its actions of logp, or with `ratios` of
    logp - ref_logp. Differentiable in logp_N. Ratios are exactly 0 where the two agree bit for bit.
    """
    x_N = logp_N - batch.column("ref_logp") if ratios else logp_N
    return torch.segment_reduce(
        torch.where(batch.action_mask, x_N, 0).double(),
        "sum",
        lengths=torch.tensor(batch.lengths, device=logp_N.device),
        unsafe=True,
        initial=0.0,
    )


def kto_loss(
    ratio_B: Tensor,
    wanted_B: Tensor,
    z: float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return the losses [B] of single answers, differentiable in ratio_B. The formula is at the top
    of this file.

    Args:
        ratio_B: log pi - log ref of each answer, summed over its tokens, in nats.
        wanted_B: bool, which answers are wanted.
        z: estimate of KL(pi || ref) in nats per answer, at least 0. It has no gradient.
    """
    u_B = beta * (ratio_B - z)
    return torch.where(
        wanted_B,
        desirable_weight * torch.sigmoid(-u_B),  # 1 - sigmoid(u) = sigmoid(-u)
        undesirable_weight * torch.sigmoid(u_B),
    )
