"""A policy that is a table over a tree of completions, small enough that every expectation is a sum
over all of them. In float64.

    J(pi) = E[r - beta log(pi / ref)]      V tokens, the last of them EOS, at most T of them, one
                                           prompt; a state is what was said so far

`expected` gives the expected gradient of the product's own estimate and loss: one backward through
the batch of all completions (or of all groups), each weighted by its probability.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import PolicyConfig
from fusedrl.engine.policy.advantages import Signals, estimate
from fusedrl.engine.policy.objectives import make_objective, objective_loss
from fusedrl.kernels.runtime.dispatch import use_impl


class Tree:
    """ref, logits [S, V], rewards [S, V] of completions that end with this token in this state;
    steps: of each completion its (state, token)."""

    def __init__(
        self,
        V: int = 3,
        T: int = 3,
        *,
        beta: float = 0.3,
        seed: int = 0,
        apart: float = 0.7,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.V, self.T, self.beta, self.dtype, self.eos, self.device = (
            V,
            T,
            beta,
            dtype,
            V - 1,
            device,
        )
        self.offsets = [sum((V - 1) ** i for i in range(d)) for d in range(T + 1)]
        self.states = self.offsets[T]
        self.ref, noise, self.rewards = (
            torch.randn(self.states, V, generator=rng, dtype=torch.float64).to(device, dtype)
            for _ in range(3)
        )
        self.ref = self.ref.log_softmax(1)
        self.logits = (self.ref + apart * noise).requires_grad_()
        # no good one
        self.critic = torch.randn(self.states, generator=rng, dtype=torch.float64).to(device, dtype)
        self.steps: list[list[tuple[int, int]]] = []
        self._grow([], 0)
        self.scores = torch.stack([self.rewards[steps[-1]] for steps in self.steps])

    def _grow(self, steps: list[tuple[int, int]], code: int) -> None:
        depth = len(steps)
        for token in range(self.V):
            now = [*steps, (self.offsets[depth] + code, token)]
            if token == self.eos or depth == self.T - 1:
                self.steps.append(now)
            else:
                self._grow(now, code * (self.V - 1) + token)

    # ---- the truth -------------------------------------------------------------------------------
    def logp(self) -> Tensor:
        return self.logits.log_softmax(1)

    def of_completions(self, table_SV: Tensor) -> Tensor:
        """[Y] the sum of a table's entries along each completion."""
        return torch.stack([sum(table_SV[step] for step in steps) for steps in self.steps])

    def probabilities(self) -> Tensor:
        """[Y], detached."""
        return self.of_completions(self.logp().detach()).exp()

    def gradient(self, value: Tensor) -> Tensor:
        """[S, V] d value / d logits."""
        return torch.autograd.grad(value, self.logits)[0]

    def objective(self, *, beta: float | None = None, gamma: float = 1.0) -> Tensor:
        """J; rewards and KL discounted by gamma^t."""
        beta, logp = self.beta if beta is None else beta, self.logp()
        total = torch.zeros((), dtype=self.dtype, device=self.device)
        for chance, steps, score in zip(
            self.of_completions(logp).exp(), self.steps, self.scores, strict=True
        ):
            value = gamma ** (len(steps) - 1) * score
            for t, step in enumerate(steps):
                value = value - gamma**t * beta * (logp[step] - self.ref[step])
            total = total + chance * value
        return total

    def sequence_kl(self) -> Tensor:
        """KL(pi || ref) of completions."""
        logp = self.logp()
        return (self.of_completions(logp).exp() * self.of_completions(logp - self.ref)).sum()

    def true_values(self, beta: float) -> Tensor:
        """[S] what is still to come in each state: reward less beta k1 of every token from here,
        undiscounted."""
        logp, values = (
            self.logp().detach(),
            torch.zeros(self.states, dtype=self.dtype, device=self.device),
        )
        for d in reversed(range(self.T)):
            for state in range(self.offsets[d], self.offsets[d + 1]):
                q = self.rewards[state].clone()
                if d < self.T - 1:
                    below = self.offsets[d + 1] + (state - self.offsets[d]) * (self.V - 1)
                    q[: self.eos] = values[below : below + self.V - 1]
                values[state] = (
                    logp[state].exp() * (q - beta * (logp[state] - self.ref[state]))
                ).sum()
        return values

    # ---- what the product makes of it ------------------------------------------------------------
    def batch(
        self,
        rows: Sequence[int],
        group: int = 1,
        old: Tensor | None = None,
        critic: Tensor | None = None,
    ) -> tuple[PackedBatch, Tensor, Tensor]:
        """These completions, `group` of them in a row of one prompt, with all columns; and the [N]
        states and tokens."""
        old = self.logp().detach() if old is None else old
        critic = self.critic if critic is None else critic
        flat = [[(0, 0), *self.steps[row]] for row in rows]
        states, tokens = (
            torch.tensor([step[i] for steps in flat for step in steps], device=self.device)
            for i in (0, 1)
        )
        batch = PackedBatch.from_sequences(
            (([0], [token for _, token in self.steps[row]]) for row in rows), device=self.device
        )
        mask = batch.action_mask
        batch = batch.with_columns(
            scores=self.scores[list(rows)],
            group_ids=torch.arange(len(rows), device=self.device) // group,
            old_logp=torch.where(mask, old[states, tokens], 0),
            ref_logp=torch.where(mask, self.ref[states, tokens], 0),
            values=torch.where(mask, critic[states], 0),
            greedy_scores=self.scores[self.probabilities().argmax()].expand(len(rows)),
        )
        return batch, states, tokens

    def loss(
        self, config: PolicyConfig, batch: PackedBatch, states: Tensor, tokens: Tensor
    ) -> Tensor:
        """Of the product: objective, KL and entropy of a batch with advantages and weights, under
        the table as it is."""
        logp, mask = self.logp(), batch.action_mask
        logp_N = torch.where(mask, logp[states, tokens], 0)
        entropy_N = torch.where(mask, -(logp.exp() * logp).sum(1)[states], 0)
        full_N = (
            torch.where(mask, (logp.exp() * (logp - self.ref)).sum(1)[states], 0)
            if config.kl.estimator == "full"
            else None
        )
        return objective_loss(
            config,
            make_objective(config, 1.0),
            config.kl.coef,
            batch,
            logp_N,
            entropy_N,
            None,
            full_N,
        )[0]

    def expected(
        self,
        config: PolicyConfig,
        *,
        group: int = 1,
        baseline: float = 0.4,
        old: Tensor | None = None,
        critic: Tensor | None = None,
        by_length: bool = False,
    ) -> Tensor:
        """[S, V] the expected *ascent* direction, - E[d loss / d logits], of one completion's loss,
        summed over its tokens (`by_length`: their mean).

        Completions are drawn from `old`, by default the policy itself; `group` of them at a time,
        of whose losses the mean is taken.
        """
        chance = self.probabilities() if old is None else self.of_completions(old).exp()
        rows = [row for rows in product(range(len(self.steps)), repeat=group) for row in rows]
        weights = (
            torch.stack(
                [chance[list(rows[i : i + group])].prod() for i in range(0, len(rows), group)]
            ).repeat_interleave(group)
            / group
        )
        batch, states, tokens = self.batch(rows, group, old, critic)
        lengths = batch.cu_seqlens.long().diff()
        if by_length:
            weights = weights / (lengths - 1)
        with use_impl("torch"):
            batch = estimate(config, Signals.of(config, batch, config.kl.coef, baseline))
            batch = batch.with_columns(
                weights=torch.where(batch.action_mask, weights.repeat_interleave(lengths), 0)
            )
            return -self.gradient(self.loss(config, batch, states, tokens))


def error(found: Tensor, right: Tensor) -> float:
    """|found - right| / |right|."""
    return ((found - right).norm() / right.norm()).item()


def bias(found: Tensor, right: Tensor) -> float:
    """The relative error that is left by the best factor: 0 where found is along right, 1 where it
    is across."""
    factor = (found * right).sum() / (found * found).sum()
    return error(factor * found, right)


def deviation(x: list[float]) -> float:
    mean = sum(x) / len(x)
    return math.sqrt(sum((y - mean) ** 2 for y in x) / max(1, len(x) - 1))


def standardised(x: list[float]) -> list[float]:
    return [(y - sum(x) / len(x)) / (deviation(x) + 1e-4) for y in x]
