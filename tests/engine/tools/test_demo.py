"""The demo: the whole path in small, and (in `make test-full`) what it promises in full."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fusedrl.engine.tools.demo import KL_TARGET, DemoSize, run_demo


def test_whole_path_in_small(tmp_path, capsys) -> None:
    size = DemoSize(
        stories=800, sft_epochs=3, pairs=400, ppo_steps=3, prompts_per_step=16, held_out=48
    )
    result = run_demo(tmp_path / "demo", 1, size=size)
    assert result.directory == tmp_path / "demo"
    assert result.sft.metrics["eval_loss"] < 2.5  # from log(112) = 4.7
    assert result.reward_model.held_out == 50
    assert result.before.kl.mean == 0
    assert result.before.kl.error == 0
    assert 0 < abs(result.after.kl.mean) < 5
    assert all(len(e.completions) == 48 for e in (result.before, result.after))
    printed = capsys.readouterr().out
    for part in (
        "gold reward",
        "proxy reward",
        "KL to the reference",
        "perplexity",
        "length",
        "standard errors",
    ):
        assert part in printed
    for stage, steps in (
        ("sft", result.sft.steps),
        ("reward", result.reward_model.steps),
        ("ppo", 3),
    ):
        lines = [
            json.loads(line)
            for line in (tmp_path / "demo" / stage / "metrics.jsonl").read_text().splitlines()
        ]
        assert len({line["step"] for line in lines}) >= steps
    ids = torch.tensor([[1, 5, 6, 7]])
    assert AutoModelForCausalLM.from_pretrained(result.ppo.model)(ids).logits.isfinite().all()
    assert (
        AutoModelForSequenceClassification.from_pretrained(result.reward_model.model, num_labels=1)(
            ids
        )
        .logits.isfinite()
        .all()
    )
    page = (result.directory / "report.html").read_text(encoding="utf-8")
    assert "Run ppo" in page
    assert "samples_eval" not in page  # nothing is missing or broken


def test_an_earlier_demo_is_left_alone(tmp_path, capsys) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "mine.txt").write_text("kept")
    size = DemoSize(stories=64, sft_epochs=1, pairs=64, ppo_steps=1, prompts_per_step=4, held_out=8)
    result = run_demo(tmp_path / "demo", size=size, progress=False)
    assert result.directory == tmp_path / "demo-2"
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["mine.txt"]
    assert capsys.readouterr().out == ""


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_promises(tmp_path, seed) -> None:
    result = run_demo(tmp_path / "demo", seed, progress=False)
    assert result.gain.mean > 3 * result.gain.error
    assert result.after.kl.mean < 1.5 * KL_TARGET
    assert result.after.rewards["proxy"].mean > result.before.rewards["proxy"].mean
    assert result.after.ended.mean > 0.9
