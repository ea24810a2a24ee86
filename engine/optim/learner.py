"""What trains a model, once for every stage: the optimizer, its schedule, the check of each update
and the new version of the weights; among several ranks, who does which part of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fusedrl.engine.base.memory import give_back
from fusedrl.engine.config import OptimConfig
from fusedrl.engine.optim.adamw import StepResult, measure_optimizer, optimizer_of
from fusedrl.engine.optim.schedule import learning_rate
from fusedrl.engine.parallel.lanes import Tree, deal
from fusedrl.engine.parallel.ranks import ALONE, Ranks

MOST_SKIPPED = 5  # updates in a row that changed nothing
T = TypeVar("T")


class Model(Protocol):
    """A model that a learner trains. Where it has a `mark_updated`, that is called after each
    update."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


class Work(Generic[T]):
    """The parts of an update that are this rank's, one after the other, and what they say of
    themselves. Iterate over it once; `rows` and `loss` are then of all parts, on every rank."""

    def __init__(self, learner: Learner, parts: Sequence[T], costs: Sequence[int]) -> None:
        self._learner, self._parts, self._costs = learner, parts, costs
        self._losses: list[tuple[Tensor, ...] | None] = [None] * len(parts)
        self._told: list[tuple[Tensor, ...] | None] = [None] * len(parts)
        self._at = -1
        self.tree = learner.optimizer.tree() if learner.ranks.lanes > 1 else None

    def __iter__(self) -> Iterator[T]:
        ranks = self._learner.ranks
        lanes = [list(range(len(self._parts)))]
        if self.tree is not None:
            each = ranks.lanes // ranks.size
            dealt = deal(self._costs, ranks.lanes)
            lanes = dealt[each * ranks.rank : each * (ranks.rank + 1)]
            loads = [
                sum(self._costs[i] for lane in dealt[each * r : each * (r + 1)] for i in lane)
                for r in range(ranks.size)
            ]
            if sum(loads):
                ranks.loads.append(max(loads) * ranks.size / sum(loads))
        for lane in lanes:
            for self._at in lane:
                yield self._parts[self._at]
            if self.tree is not None:
                self.tree.take(self._learner.optimizer.take())

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this part of the loss, 0-d, to the parameters'."""
        loss.backward()
        self._losses[self._at] = (loss.detach(),)

    def tell(self, *numbers: Tensor) -> None:
        """Numbers of this part, 0-d, as many of each."""
        self._told[self._at] = numbers

    def rows(self) -> list[tuple[Tensor, ...]]:
        """Return what the parts told, in their order; those that told nothing are left out. Errors
        as `Ranks.meet`."""
        return self._whole(self._told)

    def loss(self) -> Tensor | None:
        """0-d: the sum of what `backward` was given, in its dtype and in the order of the parts;
        None without any. Errors as `Ranks.meet`."""
        total: Tensor | None = None
        for (part,) in self._whole(self._losses):
            total = part if total is None else total + part
        return total

    def _whole(self, mine: Sequence[tuple[Tensor, ...] | None]) -> list[tuple[Tensor, ...]]:
        ranks, own = self._learner.ranks, {i: row for i, row in enumerate(mine) if row is not None}
        if ranks.size == 1:
            return list(own.values())
        here = next(iter(own.values()), ())
        names = [str(number.dtype).removeprefix("torch.") for number in here]
        kinds = [kind for kind in ranks.gather("kinds of rows", names) if kind]
        if not kinds:
            return []
        dtypes = [getattr(torch, name) for name in kinds[0]]
        # float64 holds every number of the others' dtypes
        table = torch.zeros(
            len(mine), 1 + len(dtypes), dtype=torch.float64, device=self._learner.device
        )
        for index, row in own.items():
            table[index, 0] = 1.0
            table[index, 1:] = torch.stack([number.detach().double() for number in row])
        ranks.sum("rows", table)
        there = table[:, 0].tolist()
        return [
            tuple(x.to(dtype) for x, dtype in zip(row[1:], dtypes, strict=True))
            for row, is_there in zip(table, there, strict=True)
            if is_there
        ]


class Update:
    """One optimizer step, in the making.

    grad_norm: afterwards the norm of the gradient before clipping; not finite where the step was
    skipped.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._shared: list[Tree] = []
        self.grad_norm = 0.0

    def share(self, parts: Sequence[T], costs: Sequence[int]) -> Work[T]:
        """Divide parts of the loss among the ranks, by what they cost (`costs_of`). Their
        gradients are summed over all ranks; called again, those of both are.

            work = update.share(groups, costs)
            for group in work:
                work.backward(loss_of(group))
            loss = work.loss()
        """
        work = Work(self._learner, parts, costs)
        if work.tree is not None:
            self._shared.append(work.tree)
        return work

    @property
    def trees(self) -> list[Tree]:
        """The sums of what was shared; none where the gradients are whole on every rank."""
        return self._shared


class Learner:
    """Trains the parameters of a model that require a gradient.

    Args:
        model: make it whole first; parameters that come later, an adapter's for one, are not
            trained.
        config: of the optimizer and its schedule.
        name: what messages call the model.
        ranks: that train it together.
    """

    def __init__(
        self, model: Model, config: OptimConfig, name: str = "model", ranks: Ranks = ALONE
    ) -> None:
        self.model, self.config, self.name, self.ranks = model, config, name, ranks
        self.optimizer = optimizer_of(config, model.named_parameters(), ranks)
        self.device = next(p.device for _, p in model.named_parameters())
        self.skipped = 0  # updates left out, since this object was made
        self._in_a_row = 0

    @contextmanager
    def update(self, index: int, total: int) -> Iterator[Update]:
        """One optimizer step, the `index`-th (from 0) of `total`: backward passes in the block, the
        step at its end.

            with learner.update(step, steps) as update:
                work = update.share(groups, costs_of(batch.lengths, groups))
                for group in work:
                    micro = batch.select(group)
                    work.backward(actor.cross_entropy(micro, actor.forward(micro), 1 / count))

        Raises:
            RuntimeError: five updates in a row had a gradient that is not finite, or no parameter
                has a gradient.
        """
        self.optimizer.zero_grad()
        update = Update(self)
        yield update
        self.optimizer.lr = learning_rate(self.config, index, total)
        result = self.optimizer.step(
            max_grad_norm=self.config.max_grad_norm or None, trees=update.trees
        )
        self.check(result)
        if (mark := getattr(self.model, "mark_updated", None)) is not None:
            mark()
        update.grad_norm = result.grad_norm

    def check(self, result: StepResult) -> None:
        """Count an update that was skipped. Raises RuntimeError at the fifth in a row."""
        self._in_a_row = 0 if result.applied else self._in_a_row + 1
        self.skipped += not result.applied
        if self._in_a_row >= MOST_SKIPPED:
            raise RuntimeError(
                f"{MOST_SKIPPED} updates of the {self.name} in a row had a non-finite gradient "
                "norm; stopped. The weights are those of the "
                "last finite update. Start another run from this run's model or the one before it, "
                "with a lower optim.lr or a score_clip"
            )

    def metrics(self, rate: str = "lr", epsilon: str = "optim/") -> dict[str, float]:
        """The learning rate of the last update, and the share of second moments below epsilon, by
        these names."""
        return {rate: self.optimizer.lr} | measure_optimizer(self.optimizer, epsilon)

    def release(self) -> None:
        """Drop the gradients, and give their memory back."""
        give_back(self.optimizer.zero_grad())
