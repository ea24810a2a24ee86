"""Training of a model, the same for every stage: the optimizer, its schedule, the check of each
update and the new version of the weights. With several ranks, it also decides which rank does which
part of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fusedrl.engine.base.activity import Activity
from fusedrl.engine.base.memory import give_back
from fusedrl.engine.config import OptimConfig
from fusedrl.engine.optim.adamw import StepResult, measure_optimizer, optimizer_of
from fusedrl.engine.optim.schedule import learning_rate
from fusedrl.engine.parallel.lanes import Tree, deal
from fusedrl.engine.parallel.ranks import ALONE, Ranks

MOST_SKIPPED = 5  # number of skipped updates in a row after which training stops
T = TypeVar("T")


class Model(Protocol):
    """Model that a learner trains. If it has a method `mark_updated`, it is called after each
    update."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


class Work(Generic[T]):
    """This rank's parts of an update, one after the other, and the numbers that each part reports.

    Iterate over it once. Afterwards `rows` and `loss` return the results of all parts, on every
    rank.
    """

    def __init__(self, learner: Learner, parts: Sequence[T], costs: Sequence[int]) -> None:
        self._learner, self._parts, self._costs = learner, parts, costs
        self._losses: list[tuple[Tensor, ...] | None] = [None] * len(parts)
        self._told: list[tuple[Tensor, ...] | None] = [None] * len(parts)
        self._at = -1
        self.tree = learner.optimizer.tree() if learner.ranks.lanes > 1 else None

    def __iter__(self) -> Iterator[T]:
        ranks, activity = self._learner.ranks, self._learner.activity
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
        activity.begin(f"training the {self._learner.name}", "micro-batches", sum(map(len, lanes)))
        for lane in lanes:
            for self._at in lane:
                yield self._parts[self._at]
                activity.done += 1
            if self.tree is not None:
                self.tree.take(self._learner.optimizer.take())

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this part of the loss (0-d) to the gradients of the parameters."""
        loss.backward()
        self._losses[self._at] = (loss.detach(),)

    def tell(self, *numbers: Tensor) -> None:
        """Report numbers of this part, 0-d each. Every part must report the same number of them."""
        self._told[self._at] = numbers

    def rows(self) -> list[tuple[Tensor, ...]]:
        """Return the numbers that the parts reported, in the order of the parts. Parts without a
        report are left out. Errors are those of `Ranks.meet`."""
        return self._whole(self._told)

    def loss(self) -> Tensor | None:
        """Return the sum of the losses given to `backward`, 0-d, in their dtype and in the order of
        the parts; None without any. Errors are those of `Ranks.meet`."""
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
        # float64 holds every number of the dtypes in use
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
    """One optimizer step, while its gradients are computed.

    Attributes:
        grad_norm: norm of the gradient before clipping, set after the step; not finite if the step
            was skipped.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._shared: list[Tree] = []
        self.grad_norm = 0.0

    def share(self, parts: Sequence[T], costs: Sequence[int]) -> Work[T]:
        """Divide parts of the loss among the ranks by their costs (`costs_of`). Gradients are
        summed over all ranks. After several calls, the gradients of all of them are added.

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
    def lanes(self) -> int:
        """Number of equal shares in which `share` divides parts."""
        return self._learner.ranks.lanes

    @property
    def trees(self) -> list[Tree]:
        """The partial sums of the shared work; empty if every rank has whole gradients."""
        return self._shared


class Learner:
    """Trains the parameters of a model that require a gradient.

    Args:
        model: model to train, already complete: parameters added later, such as an adapter's, are
            not trained.
        config: configuration of the optimizer and its schedule.
        name: name of the model in messages.
        ranks: ranks that train the model together.
        activity: what is being computed right now, for whoever shows it; None: the model's own, if
            it has one.
    """

    def __init__(
        self,
        model: Model,
        config: OptimConfig,
        name: str = "model",
        ranks: Ranks = ALONE,
        activity: Activity | None = None,
    ) -> None:
        self.model, self.config, self.name, self.ranks = model, config, name, ranks
        self.activity: Activity = activity or getattr(model, "activity", None) or Activity()
        self.optimizer = optimizer_of(config, model.named_parameters(), ranks)
        self.device = next(p.device for _, p in model.named_parameters())
        self.skipped = 0  # updates skipped since this object was made
        self._in_a_row = 0

    @contextmanager
    def update(self, index: int, total: int) -> Iterator[Update]:
        """Make one optimizer step, the `index`-th (from 0) of `total`. Backward passes run inside
        the block, and the step follows at its end.

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
        self.activity.update = (index + 1, total)
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
        self.activity.update = None

    def check(self, result: StepResult) -> None:
        """Count an update that was skipped. Raise RuntimeError at the fifth in a row."""
        self._in_a_row = 0 if result.applied else self._in_a_row + 1
        self.skipped += not result.applied
        if self._in_a_row >= MOST_SKIPPED:
            raise RuntimeError(
                f"{MOST_SKIPPED} updates of the {self.name} in a row had a non-finite gradient "
                "norm; stopped. The weights are those of the "
                "last finite update. Start another run from this run's model or the one before it, "
                "with a lower optim.lr or a score_clip"
            )

    def metrics(self, rate: str = "learning_rate", epsilon: str = "optim/") -> dict[str, float]:
        """Return the learning rate of the last update, under the name `rate`, and the share of
        second moments below epsilon, under the prefix `epsilon`."""
        return {rate: self.optimizer.lr} | measure_optimizer(self.optimizer, epsilon)

    def release(self) -> None:
        """Drop the gradients and release their memory."""
        give_back(self.optimizer.zero_grad())
