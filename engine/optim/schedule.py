"""The learning rate as a function of the step."""

from __future__ import annotations

from fusedrl.engine.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, total: int) -> float:
    """Return the learning rate of optimizer step `step` (from 0) of `total`: linear warm-up, then
    constant or linear to zero."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    return config.lr * max(0.0, (total - step) / max(1, total - config.warmup_steps))
