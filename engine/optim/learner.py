"""What trains a model, once for every stage: the optimizer, its schedule, the check of each update
and the new version of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn

from fusedrl.engine.base.memory import give_back
from fusedrl.engine.config import OptimConfig
from fusedrl.engine.optim.adamw import StepResult, measure_optimizer, optimizer_of
from fusedrl.engine.optim.schedule import learning_rate

MOST_SKIPPED = 5  # updates in a row that changed nothing


class Model(Protocol):
    """A model that a learner trains. Where it has a `mark_updated`, that is called after each
    update."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


class Update:
    """One optimizer step: the loss of its backward passes, and afterwards the norm of the gradient.

    loss: 0-d, the sum of what `backward` was given, in its dtype; None before the first. grad_norm:
    before clipping; not finite where the step was skipped.
    """

    def __init__(self) -> None:
        self.loss: Tensor | None = None
        self.grad_norm = 0.0

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a part of the loss, 0-d, to the parameters'."""
        loss.backward()
        self.loss = loss.detach() if self.loss is None else self.loss + loss.detach()


class Learner:
    """Trains the parameters of a model that require a gradient.

    Args:
        model: make it whole first; parameters that come later, an adapter's for one, are not
            trained.
        config: of the optimizer and its schedule.
        name: what messages call the model.
    """

    def __init__(self, model: Model, config: OptimConfig, name: str = "model") -> None:
        self.model, self.config, self.name = model, config, name
        self.optimizer = optimizer_of(config, model.named_parameters())
        self.skipped = 0  # updates left out, since this object was made
        self._in_a_row = 0

    @contextmanager
    def update(self, index: int, total: int) -> Iterator[Update]:
        """One optimizer step, the `index`-th (from 0) of `total`: backward passes in the block, the
        step at its end.

            with learner.update(step, steps) as update:
                for micro in batch.micro_batches(tokens):
                    update.backward(actor.cross_entropy(micro, actor.forward(micro), 1 / count))

        Raises:
            RuntimeError: five updates in a row had a gradient that is not finite, or no parameter
                has a gradient.
        """
        self.optimizer.zero_grad()
        update = Update()
        yield update
        self.optimizer.lr = learning_rate(self.config, index, total)
        result = self.optimizer.step(max_grad_norm=self.config.max_grad_norm or None)
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
