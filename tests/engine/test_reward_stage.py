import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fusedrl.engine.config import OptimConfig, RewardModelConfig, RunConfig
from fusedrl.engine.estimates import wilson_interval
from fusedrl.engine.model.heads import load_reward_model
from fusedrl.engine.packing import PackedBatch
from fusedrl.engine.stages.reward_model import train_reward_model

# The preferred answer ends in w1, whatever the rest.
PAIRS = [{"prompt": f"w{i % 9}", "chosen": f"w{i % 13} " * (1 + i % 3) + "w1", "rejected": f"w{i % 11} " * (1 + i % 4) + "w2"} for i in range(60)]


@pytest.fixture
def config(tiny_model, tmp_path, write_jsonl):
    return RewardModelConfig(model=str(tiny_model), data=write_jsonl("pairs.jsonl", PAIRS), eval_fraction=0.2, epochs=6, pairs_per_step=12,
                             tokens_per_microbatch=60, optim=OptimConfig(lr=1e-2), run=RunConfig(dir=str(tmp_path / "run"), progress=False))


def _metrics(config):
    return [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]


def test_learns_what_is_preferred(config):
    result = train_reward_model(config)
    assert result.held_out == 12
    assert result.accuracy == 1.0
    assert result.interval[0] < 1.0
    assert result.interval == wilson_interval(12, 12)
    rows = _metrics(config)
    assert rows[0]["loss"] > 5 * rows[-1]["loss"]


def test_scores_are_the_same_everywhere_it_is_loaded(config):
    result = train_reward_model(config)
    ours = load_reward_model(result.model)
    theirs = AutoModelForSequenceClassification.from_pretrained(result.model)
    sequences = [[1, 5, 6, 5, 2], [1, 7, 2], [1, 4, 4, 4, 4, 4, 6, 2]]
    scores = ours(PackedBatch.from_sequences((ids, []) for ids in sequences)) + ours.shift
    for ids, score in zip(sequences, scores, strict=True):
        torch.testing.assert_close(theirs(torch.tensor([ids])).logits[0, 0], score, rtol=1e-4, atol=1e-4)


def test_normalised_so_that_chosen_answers_score_zero_on_average(config):
    whole = replace(config, eval_fraction=0.0, epochs=1)
    result = train_reward_model(whole)
    model = load_reward_model(result.model)
    vocabulary = {f"w{i}": i + 4 for i in range(28)}
    batch = PackedBatch.from_sequences(([1, vocabulary[row["prompt"]]], [*(vocabulary[w] for w in row["chosen"].split()), 2]) for row in PAIRS)
    assert model(batch).mean().item() == pytest.approx(0.0, abs=1e-4)
    assert result.accuracy != result.accuracy  # nothing was held out: no figure is made up


def test_the_micro_batch_split_does_not_change_the_gradient(config):
    norms = []
    for name, tokens in (("a", 10_000), ("b", 20)):
        one = replace(config, epochs=1, pairs_per_step=60, eval_fraction=0.0, tokens_per_microbatch=tokens, run=replace(config.run, dir=config.run.dir + name))
        train_reward_model(one)
        norms.append(_metrics(one)[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_wilson_interval_against_published_values():
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for successes, trials, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=6e-5)
