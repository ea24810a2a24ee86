"""What steers a run from step to step: the KL coefficient and the learning rate."""
from __future__ import annotations

import random

from fusedrl.engine.config import KLConfig, OptimConfig


class KLController:
    """The KL coefficient, fixed, or adapted towards a target.

        e = clip(kl / target - 1, -0.2, 0.2);  coef *= 1 + e * episodes / horizon

    `kl` is in nats per sequence (the sum over its tokens, averaged over sequences), `episodes` the sequences of the whole step. The update
    follows the step: step k is penalised with the coefficient that step k - 1 left.
    Source: Ziegler et al. (2019), Fine-Tuning Language Models from Human Preferences, section 2.2.
    """

    def __init__(self, config: KLConfig) -> None:
        self.config = config
        self.coef = config.coef

    def update(self, kl: float, episodes: int) -> None:
        """Adapt to the KL that the step measured; nothing happens without a target."""
        if self.config.target is not None:
            error = min(0.2, max(-0.2, kl / self.config.target - 1))
            self.coef *= 1 + error * episodes / self.config.horizon


def learning_rate(config: OptimConfig, step: int, total: int) -> float:
    """The learning rate of optimizer step `step` (from 0) of `total`: linear warm-up, then constant or linear to zero."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    return config.lr * max(0.0, (total - step) / max(1, total - config.warmup_steps))


def data_order(size: int, seed: int | str, start: int, stop: int) -> list[int]:
    """Items start .. stop of the endless stream of shuffled passes over `size` items. A function of its arguments alone, so that a resumed
    run needs no cursor but its step."""
    order: list[int] = []
    for epoch in range(start // size, (stop - 1) // size + 1) if stop > start else ():
        first, last = max(start, epoch * size), min(stop, (epoch + 1) * size)
        order += shuffled(size, seed, "epoch", epoch)[first - epoch * size:last - epoch * size]
    return order


def shuffled(size: int, *key: int | str) -> list[int]:
    """0 .. size - 1 in an order that is a function of the key. (torch's CPU generator keeps 32 bits of a seed, too few for a key of several numbers.)"""
    return random.Random(repr(key)).sample(range(size), size)
