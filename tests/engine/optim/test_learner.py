"""One update of every stage: against torch's AdamW by hand, and what happens where it cannot be
made."""

import math

import pytest
import torch
from torch import nn

from fusedrl.engine.config import OptimConfig
from fusedrl.engine.optim.learner import MOST_SKIPPED, Learner


class Line(nn.Module):
    """y = w . x, which counts its versions."""

    def __init__(self, device, marks=True):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, -2.0, 0.5]], device=device))
        self.versions = 0
        if marks:
            self.mark_updated = self._mark

    def _mark(self):
        self.versions += 1


def parts(device, count=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 3, generator=generator).to(device) for _ in range(count)]


def test_updates_are_those_of_adamw_at_the_schedules_rate(device):
    config = OptimConfig(
        lr=0.1,
        warmup_steps=2,
        schedule="linear",
        max_grad_norm=0.7,
        weight_decay=0.01,
        betas=(0.8, 0.9),
        eps=1e-6,
    )
    model, by_hand = Line(device), Line(device)
    learner = Learner(model, config)
    adam = torch.optim.AdamW(
        by_hand.parameters(), lr=0.0, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.01
    )
    for step, rate in enumerate([0.05, 0.1, 0.1, 0.1 * 2 / 3, 0.1 / 3]):
        with learner.update(step, 5) as update:
            work = update.share(parts(device), [1] * 4)
            for x in work:
                work.backward((x @ model.weight.T).square().sum() / 20)
            total = work.loss()
        assert model.versions == step + 1
        adam.zero_grad()
        loss = sum(
            (x.double() @ by_hand.weight.double().T).square().sum() / 20 for x in parts(device)
        )
        loss.backward()
        norm = by_hand.weight.grad.norm().item()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.7)
        adam.param_groups[0]["lr"] = rate
        adam.step()
        assert total.item() == pytest.approx(loss.item(), rel=1e-5)
        assert update.grad_norm == pytest.approx(norm, rel=1e-5)
        assert learner.metrics()["learning_rate"] == pytest.approx(rate)
        torch.testing.assert_close(model.weight, by_hand.weight, rtol=1e-5, atol=1e-6)
    assert set(learner.metrics("critic/learning_rate", "critic/")) == {
        "critic/learning_rate",
        "critic/below_epsilon",
    }
    learner.release()
    assert model.weight.grad is None
    assert learner.skipped == 0


def test_an_error_in_the_block_is_no_update(device):
    """And the gradients that were there before it are none of the next one's."""
    model, other = Line(device), Line(device)
    learner, undisturbed = Learner(model, OptimConfig(lr=0.1)), Learner(other, OptimConfig(lr=0.1))
    before = model.weight.detach().clone()
    with pytest.raises(KeyboardInterrupt), learner.update(0, 2) as update:
        for _ in (work := update.share([0], [1])):
            work.backward(model.weight.sum())
        raise KeyboardInterrupt
    assert torch.equal(model.weight, before)
    assert (model.versions, learner.skipped, learner.optimizer.begun) == (0, 0, 0)
    for one in (learner, undisturbed):
        with one.update(0, 2) as update:
            for _ in (work := update.share([0], [1])):
                work.backward(one.model.weight.square().sum())
    assert torch.equal(model.weight, other.weight)


def test_updates_without_an_end_are_skipped_and_the_fifth_in_a_row_is_told(device):
    model = Line(device, marks=False)
    learner, before = Learner(model, OptimConfig(lr=0.1), "critic"), model.weight.detach().clone()

    def one(factor):
        with learner.update(0, 1) as update:
            for _ in (work := update.share([0], [1])):
                work.backward(model.weight.sum() * factor)
        return update.grad_norm

    for _ in range(MOST_SKIPPED - 1):
        assert not math.isfinite(one(math.nan))
    assert torch.equal(model.weight, before)
    assert math.isfinite(one(1.0))
    assert not torch.equal(model.weight, before)
    for _ in range(MOST_SKIPPED - 1):
        one(math.inf)
    with pytest.raises(
        RuntimeError, match="5 updates of the critic in a row had a non-finite gradient norm"
    ):
        one(math.nan)
    assert learner.skipped == 2 * MOST_SKIPPED - 1


def test_a_block_without_a_backward_pass_is_told(device):
    learner = Learner(Line(device), OptimConfig(lr=0.1))
    with (
        pytest.raises(RuntimeError, match="none of its 1 parameters has a gradient"),
        learner.update(0, 1),
    ):
        pass
