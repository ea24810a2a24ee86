"""The reward model's report against examples worked by hand."""

import json
import math

import pytest
import torch
from rich.console import Console

from fusedrl.engine.preference.reward_report import BINS, report_table, reward_report, save_report


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_by_hand(device):
    # Three examples: a pair won by 1, a pair lost by 2, a list of three pairs of which two are won
    # (0.5, 0.5, -0.5).
    d = torch.tensor([1.0, -2.0, 0.5, 0.5, -0.5], device=device)
    found = reward_report(d, [0, 1, 2, 2, 2], [3, -1, 2, 0, 4])
    assert (found.examples, found.pairs) == (3, 5)
    assert found.accuracy == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert found.margin == pytest.approx((1 - 2 + 0.5 / 3) / 3)
    nll = [math.log(1 + math.exp(-x)) for x in d.tolist()]
    assert found.loss == pytest.approx((nll[0] + nll[1] + sum(nll[2:]) / 3) / 3)
    brier = [(1 - sigmoid(x)) ** 2 for x in d.tolist()]
    assert found.brier == pytest.approx((brier[0] + brier[1] + sum(brier[2:]) / 3) / 3)
    assert found.longer_wins == pytest.approx((1 + 0 + 2.5 / 3) / 3)
    assert found.shorter_wins == pytest.approx(1 - found.longer_wins)
    mixed, squares, lengths = (
        (3 + 2 + (1 + 0 - 2) / 3) / 3,
        (1 + 4 + 0.25) / 3,
        (9 + 1 + 20 / 3) / 3,
    )
    assert found.length_correlation == pytest.approx(mixed / math.sqrt(squares * lengths))
    # Bins of 0.05 from 0.5: sigmoid(.5) = .622 (two of three right), sigmoid(1) = .731 (right),
    # sigmoid(2) = .881 (wrong).
    assert [(round(b.low, 2), round(b.high, 2)) for b in found.bins] == [
        (0.6, 0.65),
        (0.7, 0.75),
        (0.85, 0.9),
    ]
    assert [b.weight for b in found.bins] == pytest.approx([1 / 3] * 3)
    assert [b.predicted for b in found.bins] == pytest.approx(
        [sigmoid(0.5), sigmoid(1), sigmoid(2)]
    )
    assert [b.observed for b in found.bins] == pytest.approx([2 / 3, 1, 0])
    assert found.ece == pytest.approx((abs(2 / 3 - sigmoid(0.5)) + 1 - sigmoid(1) + sigmoid(2)) / 3)
    assert found.confidence == pytest.approx((sigmoid(0.5) + sigmoid(1) + sigmoid(2)) / 3)
    assert found.ceiling is None


def test_the_interval_counts_examples_not_pairs(device):
    lists = reward_report(
        torch.tensor([1.0, 1.0, -1.0] * 20, device=device),
        [i for i in range(20) for _ in range(3)],
        [0] * 60,
    )
    pairs = reward_report(torch.tensor([1.0, 1.0, -1.0] * 20, device=device), range(60), [0] * 60)
    assert lists.accuracy == pytest.approx(pairs.accuracy)
    assert lists.accuracy_high - lists.accuracy_low > 1.6 * (
        pairs.accuracy_high - pairs.accuracy_low
    )


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("truth", [0.5, 1.0, 3.0])
def test_temperature_undoes_what_multiplied_the_scores(truth, noise, device):
    """Soft labels that are exactly the probabilities of scores / truth: that temperature is best,
    and the loss there is their entropy."""
    d = torch.linspace(-4, 4, 41, dtype=torch.float64, device=device) + 0.05
    said = noise + (1 - 2 * noise) * torch.sigmoid(d / truth)
    found = reward_report(d, range(41), [0] * 41, said.tolist(), label_noise=noise)
    assert found.temperature == pytest.approx(truth, rel=1e-3)
    entropy = -(said * said.log() + (1 - said) * (1 - said).log()).mean().item()
    assert found.loss_at_temperature == pytest.approx(entropy, rel=1e-6)
    assert found.loss >= found.loss_at_temperature - 1e-12
    assert found.ece == pytest.approx(0.0, abs=1e-12) if truth == 1.0 else found.ece > 0.01
    assert found.ceiling == (pytest.approx(0.8) if noise else None)


def test_no_finite_temperature(device):
    assert (
        reward_report(torch.tensor([1.0, 2.0], device=device), [0, 1], [0, 0]).temperature is None
    ), "all right: the sharper the better"
    assert (
        reward_report(torch.tensor([-1.0, -2.0], device=device), [0, 1], [0, 0]).temperature is None
    ), "all wrong: the flatter the better"


def test_a_calibrated_judge_of_flipped_labels(device):
    """Scores are the truth and labels are drawn from it, then flipped: calibrated if the rate is
    known, over-confident if it is not."""
    draw = torch.Generator().manual_seed(0)
    gap = torch.randn(40000, generator=draw, dtype=torch.float64).to(device) * 2
    wins = torch.rand(40000, generator=draw, dtype=torch.float64).to(device) < torch.sigmoid(gap)
    wins ^= torch.rand(40000, generator=draw, dtype=torch.float64).to(device) < 0.3
    d = torch.where(wins, gap, -gap)
    known, unknown = (
        reward_report(d, range(40000), [0] * 40000, label_noise=noise) for noise in (0.3, 0.0)
    )
    assert known.ece < 0.01 < 0.1 < unknown.ece
    assert known.confidence == pytest.approx(known.accuracy, abs=0.01)
    assert unknown.confidence > unknown.accuracy + 0.1
    assert known.temperature == pytest.approx(1.0, abs=0.1)
    assert unknown.temperature > 2
    assert known.accuracy < known.ceiling == pytest.approx(0.7)
    assert len(unknown.bins) == BINS


def test_order_of_a_pair_does_not_matter_to_calibration_and_length(device):
    d, lengths = torch.tensor([1.0, -0.3, 2.0, 0.7], device=device), [2, -1, 3, 1]
    labels = [1.0, 0.9, 0.2, 1.0]
    there = reward_report(d, range(4), lengths, labels)
    back = reward_report(-d, range(4), [-x for x in lengths], [1 - p for p in labels])
    for name in (
        "accuracy",
        "loss",
        "brier",
        "ece",
        "confidence",
        "temperature",
        "length_correlation",
        "longer_wins",
    ):
        assert getattr(there, name) == pytest.approx(getattr(back, name), rel=1e-6), name


def test_ties(device):
    assert reward_report(torch.tensor([1.0], device=device), [0], [0], [0.5]) is None
    assert reward_report(torch.zeros(0, device=device), [], []) is None
    found = reward_report(
        torch.tensor([0.0, 5.0, 1.0], device=device), [0, 1, 2], [1, 1, 1], [1.0, 0.5, 1.0]
    )
    assert (found.examples, found.accuracy) == (2, 0.5), (
        "a tie of labels is left out, one of scores is wrong"
    )
    assert found.bins[0].observed == 0.5, "but it was announced with 0.5"


def test_length_bias_shows(device):
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(-9, 10, (500,), generator=draw).to(device)
    found = reward_report(lengths * 0.1, range(500), lengths.tolist())
    assert found.length_correlation == pytest.approx(1.0)
    assert found.longer_wins == pytest.approx(
        found.accuracy + 0.5 * (lengths == 0).float().mean().item()
    )


def test_written_and_printed(tmp_path, device):
    found = reward_report(
        torch.tensor([1.0, -2.0, 0.5], device=device), [0, 1, 2], [3, -1, 2], label_noise=0.25
    )
    save_report(found, tmp_path / "report.json")
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["accuracy"] == found.accuracy
    assert told["ceiling"] == 0.75
    assert told["bins"][0] == vars(found.bins[0])
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report_table(found))
    shown = console.export_text()
    assert "3 pairs of 3 examples" in shown
    assert "66.7% (" in shown
    assert "where 25% of the labels are flipped" in shown
