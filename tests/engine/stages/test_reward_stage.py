"""The reward model stage: what it learns from pairs and lists, what it writes, and what it refuses.

One file: one configuration that all cases vary.
"""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fusedrl.engine.base.errors import ConfigError, DataError
from fusedrl.engine.base.estimates import wilson_interval
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import LoRAConfig, OptimConfig, RewardModelConfig, RunConfig
from fusedrl.engine.data.mixture import Mixture
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.heads import RewardModel, load_reward_model, save_reward_model
from fusedrl.engine.model.weights import load_tokenizer, save_pretrained
from fusedrl.engine.optim.learner import Update
from fusedrl.engine.preference.comparisons import Comparison
from fusedrl.engine.runs.run import held_out
from fusedrl.engine.stages.reward_model import (
    evaluate,
    gradients,
    new_model,
    score_pairs,
    train_reward_model,
)

# The preferred answer ends in w1, whatever the rest.
PAIRS = [
    {
        "prompt": f"w{i % 9}",
        "chosen": f"w{i % 13} " * (1 + i % 3) + "w1",
        "rejected": f"w{i % 11} " * (1 + i % 4) + "w2",
    }
    for i in range(60)
]


@pytest.fixture
def config(tiny_model, tmp_path, write_jsonl, device):
    return RewardModelConfig(
        model=str(tiny_model),
        device=str(device),
        dtype="float32",
        data=write_jsonl("pairs.jsonl", PAIRS),
        eval_fraction=0.2,
        epochs=6,
        pairs_per_step=12,
        tokens_per_microbatch=60,
        optim=OptimConfig(lr=1e-2),
        run=RunConfig(dir=str(tmp_path / "run"), progress=False),
    )


def _metrics(config):
    return [
        json.loads(line)
        for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    ]


def test_learns_what_is_preferred(config):
    result = train_reward_model(config)
    assert result.held_out == 12
    assert result.accuracy == 1.0
    assert result.interval[0] < 1.0
    assert result.interval == wilson_interval(12, 12)
    rows = _metrics(config)
    assert rows[0]["loss"] > 5 * rows[-1]["loss"]


def test_scores_are_the_same_everywhere_it_is_loaded(config, device):
    result = train_reward_model(config)
    ours = load_reward_model(result.model)
    theirs = AutoModelForSequenceClassification.from_pretrained(result.model).to(device)
    sequences = [[1, 5, 6, 5, 2], [1, 7, 2], [1, 4, 4, 4, 4, 4, 6, 2]]
    scores = (
        ours(PackedBatch.from_sequences(((ids, []) for ids in sequences), device=device))
        + ours.shift
    )
    for ids, score in zip(sequences, scores, strict=True):
        torch.testing.assert_close(
            theirs(torch.tensor([ids], device=device)).logits[0, 0], score, rtol=1e-4, atol=1e-4
        )


def test_normalised_so_that_chosen_answers_score_zero_on_average(config, device):
    whole = replace(config, eval_fraction=0.0, epochs=1)
    result = train_reward_model(whole)
    model = load_reward_model(result.model)
    vocabulary = {f"w{i}": i + 4 for i in range(28)}
    batch = PackedBatch.from_sequences(
        (
            ([1, vocabulary[row["prompt"]]], [*(vocabulary[w] for w in row["chosen"].split()), 2])
            for row in PAIRS
        ),
        device=device,
    )
    assert model(batch).mean().item() == pytest.approx(0.0, abs=1e-4)
    assert result.accuracy != result.accuracy  # nothing was held out: no figure is made up


def test_the_micro_batch_split_does_not_change_the_gradient(config):
    norms = []
    for name, tokens in (("a", 10_000), ("b", 20)):
        one = replace(
            config,
            epochs=1,
            pairs_per_step=60,
            eval_fraction=0.0,
            tokens_per_microbatch=tokens,
            run=replace(config.run, dir=config.run.dir + name),
        )
        train_reward_model(one)
        norms.append(_metrics(one)[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_wilson_interval_against_published_values():
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for successes, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=6e-5)


# ---- ranked lists --------------------------------------------------------------------------------
# The more often w1 comes, the better.
LISTS = [
    {
        "prompt": f"w{i % 9}",
        "completions": [
            " ".join(["w1"] * n + [f"w{4 + (i + n) % 7}"] * (3 - n))
            for n in (2, 0, 3, 1)[: 2 + i % 3]
        ],
        "ranks": [2, 4, 1, 3][: 2 + i % 3],
    }
    for i in range(48)
]


@pytest.fixture
def lists(config, write_jsonl):
    return replace(config, data=write_jsonl("lists.jsonl", LISTS), optim=OptimConfig(lr=3e-3))


def test_learns_from_ranked_lists(lists):
    result = train_reward_model(lists)
    assert result.steps == math.ceil(38 * 6 / 12)
    assert result.held_out == 10
    assert result.accuracy > 0.9
    told = json.loads((Path(lists.run.dir) / "report.json").read_text())
    assert told["examples"] == 10 < told["pairs"]
    assert (told["accuracy_low"], told["accuracy_high"]) == pytest.approx(
        wilson_interval(result.accuracy * 10, 10)
    )


def test_all_completions_of_a_prompt_share_a_forward(config, write_jsonl, monkeypatch):
    rows = [
        {
            "prompt": "w0",
            "completions": [f"w{i} w{j}" for j in range(2 + i % 8)],
            "ranks": list(range(2 + i % 8)),
        }
        for i in range(24)
    ]
    of = {
        (1, 4, 4 + i, 4 + j, 2): i for i, row in enumerate(rows) for j in range(len(row["ranks"]))
    }
    seen, original = [], RewardModel.hidden
    monkeypatch.setattr(
        RewardModel, "hidden", lambda self, batch: seen.append(batch) or original(self, batch)
    )
    for tokens in (1, 24, 60, 10_000):
        seen.clear()
        train_reward_model(
            replace(
                config,
                data=write_jsonl("many.jsonl", rows),
                epochs=1,
                pairs_per_step=24,
                eval_fraction=0.0,
                normalize="none",
                tokens_per_microbatch=tokens,
                run=replace(config.run, dir=f"{config.run.dir}{tokens}"),
            )
        )
        batches = [
            [of[tuple(ids.tolist())] for ids in batch.token_ids.split(list(batch.lengths))]
            for batch in seen
        ]
        assert sorted(i for batch in batches for i in batch) == sorted(of.values())
        assert all(batch.count(i) == len(rows[i]["ranks"]) for batch in batches for i in batch), (
            "never split, up to K = 9"
        )
        assert (len(seen) == 24) == (tokens == 1)
        assert (len(seen) == 1) == (tokens == 10_000)


def test_pairs_and_lists_mix(config, lists):
    both = replace(config, data=f"{config.data}@1,{lists.data}@1", epochs=4)
    result = train_reward_model(both)
    assert result.held_out == 12 + 10
    assert result.steps == math.ceil((48 + 38) * 4 / 12)
    assert result.accuracy > 0.8


def test_rows_of_a_prompt_are_held_out_together(config, monkeypatch):
    seen, original = [], Mixture.split
    monkeypatch.setattr(Mixture, "split", lambda *a: seen.append(original(*a)) or seen[-1])
    result = train_reward_model(replace(config, by_prompt=True, epochs=1))
    ((train, held),) = seen
    prompts = [{tuple(c.prompt) for c in part} for part in (train.examples, held)]
    assert not prompts[0] & prompts[1]
    assert len(prompts[1]) == 2 < result.held_out == len(held)
    assert result.interval == pytest.approx(wilson_interval(2 * result.accuracy, 2)), (
        "one vote each"
    )
    assert len(train) + len(held) == 60


# ---- the loss, through the model -----------------------------------------------------------------
MIXED = [
    Comparison([1, 5, 6], ([7, 8, 2], [9, 2]), (1, 2), margin=0.4),
    Comparison([1, 9], ([4, 2], [5, 6, 2], [7, 2], [8, 2]), (2, 1, 3, 2)),
    Comparison([1, 11], ([12, 2], [13, 14, 15, 2]), (1, 2), label=0.5, weight=2.0),
    Comparison([1], ([20, 2], [21, 2]), (2, 1)),
]


def in_float64(device, directory, head, comparisons, config):
    """The loss and the gradients of embedding, vocabulary head and reward head, by transformers, a
    sequence at a time, from the definitions."""
    peer = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager"
    ).to(device)
    vocabulary = peer.get_output_embeddings().weight.detach().clone().requires_grad_()
    w = head.double().clone().requires_grad_()
    ranking = centre = likelihood = 0.0
    tokens = 0
    for c in comparisons:
        hidden = [
            peer.model(torch.tensor([c.prompt + y], device=device)).last_hidden_state[0]
            for y in c.completions
        ]
        r = [(h[-1] * w[0]).sum() for h in hidden]
        pairs = [(i, j) for i in range(len(r)) for j in range(len(r)) if c.ranks[i] < c.ranks[j]]
        for i, j in pairs:
            p = torch.sigmoid(r[i] - r[j] - c.margin)
            p = (1 - config.label_noise) * p + config.label_noise * (1 - p)
            ranking = ranking - c.weight / len(pairs) * (
                c.label * p.log() + (1 - c.label) * (1 - p).log()
            )
            centre = centre + c.weight / len(pairs) * (r[i] + r[j]) ** 2
        for h, y, rank in zip(hidden, c.completions, c.ranks, strict=True):
            if rank == min(c.ranks) and c.label > 0.5:
                at = h[len(c.prompt) - 1 : -1]
                likelihood = (
                    likelihood + torch.log_softmax(at @ vocabulary.T, -1)[range(len(y)), y].sum()
                )
                tokens += len(y)
    weight = sum(c.weight for c in comparisons)
    loss = (
        ranking + config.center_coef * centre
    ) / weight - config.imitation_coef * likelihood / tokens
    loss.backward()
    return loss.item(), peer.get_input_embeddings().weight.grad, vocabulary.grad, w.grad


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_the_definition(config, tiny_model, tmp_path, tied, device):
    directory = tiny_model
    if not tied:
        directory = tmp_path / "untied"
        raw = json.loads((tiny_model / "config.json").read_text()) | {
            "tie_word_embeddings": False,
            "initializer_range": 0.2,
        }
        save_pretrained(
            Decoder.random(model_config(raw), seed=3, device=device),
            directory,
            tokenizer=load_tokenizer(tiny_model),
        )
    full = replace(
        config, model=str(directory), label_noise=0.15, center_coef=0.05, imitation_coef=0.7
    )
    for tokens in (1, 20, 1000):
        model, learner = new_model(replace(full, tokens_per_microbatch=tokens))
        metrics = gradients(
            Update(learner), model, MIXED, replace(full, tokens_per_microbatch=tokens)
        )
        loss, embedding, vocabulary, head = in_float64(
            device, directory, model.head.weight.detach(), MIXED, full
        )
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
        ours = model.lm_head if tied else model.decoder.head
        for found, expected in (
            (model.decoder.embedding.grad, embedding),
            (ours.grad, vocabulary),
            (model.head.weight.grad, head),
        ):
            assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
        assert (ours is model.decoder.embedding) is False, (
            "the second head does not pull at the embedding"
        )
        # The sign that was printed, + log-likelihood under a loss, would go the other way.
        wrong = metrics["loss"] - 2 * full.imitation_coef * metrics["imitation_loss"]
        assert abs(wrong - loss) > 1


def test_plain_options_train_as_before(config):
    """No option set: the mean over pairs of -log sigmoid of the difference, and nothing else in the
    checkpoint."""
    model, learner = new_model(config)
    pairs = [MIXED[3], Comparison([1, 9], ([4, 2], [5, 6, 2]), (1, 2))]
    metrics = gradients(Update(learner), model, pairs, config)
    better, worse = score_pairs(model, pairs, 100)
    assert metrics["loss"] == pytest.approx(
        -torch.nn.functional.logsigmoid(better - worse).mean().item(), rel=1e-6
    )
    assert set(metrics) == {"loss", "accuracy", "margin"}
    assert "lm_head" not in dict(model.named_parameters())
    assert evaluate(model, [], 100) == {}


def test_margins_come_from_the_file_and_widen_the_gap(config, write_jsonl):
    plain = replace(
        config, data=write_jsonl("plain.jsonl", PAIRS[:20]), epochs=8, eval_fraction=0.0
    )
    wide = replace(
        plain,
        data=write_jsonl("wide.jsonl", [row | {"margin": 4.0} for row in PAIRS[:20]]),
        run=replace(plain.run, dir=plain.run.dir + "w"),
    )
    gaps = [train_reward_model(c).metrics["margin"] for c in (plain, wide)]
    assert gaps[1] > gaps[0] + 2


def test_ties_are_kept_where_asked(config, write_jsonl):
    scores = [(0.5, -0.5), (0.0, 0.0), (-0.25, 0.25)]
    rows = [
        {
            "question": {"full_text": f"w{i}?"},
            "answer_0": f"w{i % 9} w1",
            "answer_1": f"w{i % 7} w2",
            "score_0": scores[i % 3][0],
            "score_1": scores[i % 3][1],
        }
        for i in range(60)
    ]
    data = write_jsonl("webgpt.jsonl", rows)
    hard, soft = (
        train_reward_model(
            replace(
                config,
                data=data,
                soft_labels=keep,
                epochs=1,
                imitation_coef=0.1,
                run=replace(config.run, dir=f"{config.run.dir}{keep}"),
            )
        )
        for keep in (False, True)
    )
    assert (hard.held_out, soft.held_out) == (8, 12)
    assert (hard.steps, soft.steps) == (3, 4)
    told = json.loads((Path(config.run.dir + "True") / "report.json").read_text())
    assert told["examples"] < 12, "a tie has no right answer"


# ---- the second head, adapters, and going on -----------------------------------------------------
VARIANTS = {
    "imitation": {"imitation_coef": 0.5, "center_coef": 0.01},
    "lora": {"lora": LoRAConfig(rank=3, alpha=6.0)},
    "both": {
        "imitation_coef": 0.5,
        "lora": LoRAConfig(rank=3, alpha=6.0),
        "label_noise": 0.1,
        "normalize": "mean_std",
    },
    "denoised": {"denoise_folds": 2, "denoise_threshold": 0.1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_continues_bitwise(config, monkeypatch, variant):
    whole = replace(
        config, epochs=2, eval_every=3, run=replace(config.run, save_every=2), **VARIANTS[variant]
    )
    train_reward_model(whole)
    parts = replace(whole, run=replace(whole.run, dir=whole.run.dir + "_parts"))
    original, calls = Mixture.draw, iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(
            Mixture,
            "draw",
            lambda *a: (
                original(*a) if next(calls) < 3 else (_ for _ in ()).throw(KeyboardInterrupt)
            ),
        )
        with pytest.raises(KeyboardInterrupt):
            train_reward_model(parts)
    resumed = replace(parts, run=replace(parts.run, resume=True))
    monkeypatch.setattr(
        "fusedrl.engine.stages.reward_model.cross_fitted_margins",
        lambda *a: pytest.fail("they are in denoise.json"),
    )
    train_reward_model(resumed)
    assert [r["loss"] for r in _metrics(whole)] == [r["loss"] for r in _metrics(parts)]
    files = [
        load_file(
            next(Path(c.run.dir, "checkpoints").glob(f"step_{len(_metrics(whole)):08d}"))
            / "model.safetensors"
        )
        for c in (whole, parts)
    ]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    before = [(p.name, p.read_bytes()) for p in sorted(Path(parts.run.dir, "model").iterdir())]
    assert before == [
        (p.name, p.read_bytes()) for p in sorted(Path(whole.run.dir, "model").iterdir())
    ]
    assert [row.get("eval_accuracy") is not None for row in _metrics(whole)] == [
        (i + 1) % 3 == 0 or i + 1 == len(_metrics(whole)) for i in range(len(_metrics(whole)))
    ]
    again = train_reward_model(resumed)  # finished already
    assert before == [(p.name, p.read_bytes()) for p in sorted(Path(again.model).iterdir())]


def test_the_second_head_learns_to_write_and_stays_at_home(config):
    run = replace(config, imitation_coef=1.0, normalize="none", optim=OptimConfig(lr=3e-3))
    result = train_reward_model(run)
    rows = _metrics(run)
    assert rows[-1]["imitation_loss"] < 0.6 * rows[0]["imitation_loss"], (
        "the likelihood of what is preferred goes up (erratum E2 would send it down)"
    )
    assert rows[-1]["loss"] == pytest.approx(rows[-1]["ranking_loss"] + rows[-1]["imitation_loss"])
    saved = load_file(Path(result.model) / "model.safetensors")
    assert not [name for name in saved if "lm_head" in name]
    _, report = AutoModelForSequenceClassification.from_pretrained(
        result.model, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    checkpoint = load_file(
        sorted(Path(run.run.dir, "checkpoints").iterdir())[-1] / "model.safetensors"
    )
    assert checkpoint["lm_head"].shape == checkpoint["decoder.embedding"].shape
    assert not torch.equal(checkpoint["lm_head"], checkpoint["decoder.embedding"])


def test_without_a_second_head_there_is_nothing_to_imitate_with(config, device):
    model, _ = new_model(config)
    batch = PackedBatch.from_sequences([([1], [2])], device=device)
    with pytest.raises(ValueError, match="build the model with imitation=True"):
        model.imitation_logp(batch, model.hidden(batch))


def test_adapters_are_merged_where_it_is_exported(config, tiny_model, monkeypatch, device):
    kept = []
    monkeypatch.setattr(
        "fusedrl.engine.stages.reward_model.save_reward_model",
        lambda model, *a, **k: kept.append(model) or save_reward_model(model, *a, **k),
    )
    result = train_reward_model(
        replace(
            config,
            lora=LoRAConfig(rank=4, alpha=8.0),
            optim=OptimConfig(lr=2e-2),
            normalize="mean_std",
        )
    )
    model = kept[0]
    assert result.accuracy > 0.8
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "head.weight" in trained
    assert all(name == "head.weight" or ".lora." in name for name in trained)
    batch = PackedBatch.from_sequences(
        ((ids, []) for ids in ([1, 5, 6, 5, 2], [1, 7, 2], [1, 4, 4, 4, 4, 4, 6, 2])), device=device
    )
    with torch.no_grad():
        unmerged = model(batch)
        torch.testing.assert_close(
            load_reward_model(result.model)(batch), unmerged, rtol=1e-5, atol=1e-5
        )
        with model.decoder.disable_adapter():
            assert (model(batch) - unmerged).abs().max() > 0.01
    base = load_file(tiny_model / "model.safetensors")
    assert torch.equal(model.decoder.embedding, base["model.embed_tokens.weight"]), (
        "the trunk is frozen"
    )


# ---- normalisation -------------------------------------------------------------------------------
def _best_scores(device, model, rows):
    vocabulary = {f"w{i}": i + 4 for i in range(28)}
    batch = PackedBatch.from_sequences(
        (
            ([1, vocabulary[row["prompt"]]], [*(vocabulary[w] for w in row["chosen"].split()), 2])
            for row in rows
        ),
        device=device,
    )
    with torch.no_grad():
        return model(batch).double()


@pytest.mark.parametrize("normalize", ["none", "mean", "mean_std"])
def test_normalisation(config, normalize, device):
    result = train_reward_model(replace(config, eval_fraction=0.0, epochs=2, normalize=normalize))
    scores = _best_scores(device, load_reward_model(result.model), PAIRS)
    if normalize == "none":
        assert "score_shift" not in result.metrics
        assert abs(scores.mean()) > 0.01
    else:
        assert scores.mean().item() == pytest.approx(0.0, abs=1e-5)
        assert (scores.std(correction=0).item() == pytest.approx(1.0, abs=1e-5)) == (
            normalize == "mean_std"
        )


def test_scaling_changes_no_order(config, device):
    plain, scaled = (
        train_reward_model(
            replace(config, normalize=n, run=replace(config.run, dir=config.run.dir + n))
        )
        for n in ("none", "mean_std")
    )
    assert plain.accuracy == scaled.accuracy
    a, b = (_best_scores(device, load_reward_model(r.model), PAIRS) for r in (plain, scaled))
    torch.testing.assert_close(
        (a - a.mean()) / (a - a.mean()).norm(),
        (b - b.mean()) / (b - b.mean()).norm(),
        atol=1e-5,
        rtol=1e-4,
    )


@pytest.mark.parametrize(("old", "new"), [(True, "mean"), (False, "none")])
def test_runs_from_before_go_on(config, old, new):
    """config.json of a run that knew none of the newer options, and normalize as true or false."""
    now = replace(config, epochs=2, normalize=new, run=replace(config.run, save_every=2))
    train_reward_model(now)
    path = Path(config.run.dir) / "config.json"
    saved = json.loads(path.read_text())
    for name in (
        "by_prompt",
        "eval_every",
        "label_noise",
        "soft_labels",
        "center_coef",
        "imitation_coef",
        "denoise_folds",
        "denoise_threshold",
        "lora",
    ):
        del saved["config"][name]
    saved["config"]["normalize"] = old
    path.write_text(json.dumps(saved))
    again = replace(now, run=replace(now.run, resume=True))
    train_reward_model(again)
    path.write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match=r"label_noise: 0\.0 -> 0\.3"):
        train_reward_model(replace(again, label_noise=0.3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"normalize": True},
            r"normalize none, mean or mean_std \(it was true or false: mean or none\), got True",
        ),
        ({"label_noise": 0.5}, "label_noise in"),
        ({"label_noise": -0.1}, "label_noise in"),
        ({"center_coef": -1.0}, "center_coef >= 0"),
        ({"imitation_coef": -0.5}, "imitation_coef >= 0"),
        ({"imitation_coef": math.nan}, "imitation_coef to be finite"),
        ({"eval_every": -1}, "eval_every >= 0"),
        ({"denoise_folds": 1}, "denoise_folds 0, or 2"),
        ({"pairs_per_step": 0}, "pairs_per_step >= 1"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ConfigError, match=message):
        RewardModelConfig("m", "d", **options)


# ---- noise ---------------------------------------------------------------------------------------
def test_flipped_labels_are_found_by_the_other_folds(config, write_jsonl):
    """Three in ten labels are flipped; most of those left out are, and what remains is cleaner.
    What is held out is left alone."""
    draw = torch.Generator().manual_seed(0)
    flips = (torch.rand(200, generator=draw) < 0.3).tolist()
    clean = [
        {
            "prompt": f"w{i % 25}",
            "chosen": f"w{i % 13 + 4} w{i % 5 + 7} w1",
            "rejected": f"w{i % 11 + 4} w{i % 7 + 7} w2",
        }
        for i in range(200)
    ]
    rows = [
        {"prompt": r["prompt"], "chosen": r["rejected"], "rejected": r["chosen"]} if flip else r
        for r, flip in zip(clean, flips, strict=True)
    ]
    noisy = replace(
        config,
        data=write_jsonl("noisy.jsonl", rows),
        epochs=2,
        optim=OptimConfig(lr=3e-3),
        denoise_folds=2,
        label_noise=0.3,
        denoise_threshold=1.0,
        eval_fraction=0.1,
    )
    result = train_reward_model(noisy)
    assert result.held_out == 20
    margins = json.loads((Path(noisy.run.dir) / "denoise.json").read_text())["margins"]
    assert len(margins) == 180
    left_out = sum(m < -1.0 for m in margins)
    assert result.steps == math.ceil((180 - left_out) * 2 / 12)
    train, _ = held_out(flips, 0.1, noisy.run.seed)
    wrong = [flip for flip, m in zip(train, margins, strict=True) if m < -1.0]
    assert sum(wrong) > 0.9 * len(wrong) > 0.9 * 20
    assert (sum(train) - sum(wrong)) / (180 - left_out) < 0.6 * sum(train) / 180


@pytest.mark.full
def test_the_noise_likelihood_says_the_true_probabilities_better(config, write_jsonl, device):
    """5,000 pairs labelled by Bradley and Terry from known scores, three in ten flipped, one pass:
    against the true probabilities of fresh pairs."""
    draw = random.Random(0)

    def pair():
        a, b = ([draw.randrange(20) for _ in range(6)] for _ in "ab")
        return (
            [draw.randrange(28)],
            a,
            b,
            sum((x < 6) - (x > 13) for x in a) - sum((x < 6) - (x > 13) for x in b),
        )

    def words(ids):
        return " ".join(f"w{i}" for i in ids)

    rows = []
    for _ in range(5000):
        prompt, a, b, gap = pair()
        better = (draw.random() < 1 / (1 + math.exp(-gap))) ^ (draw.random() < 0.3)
        rows.append(
            {
                "prompt": words(prompt),
                "chosen": words(a if better else b),
                "rejected": words(b if better else a),
            }
        )
    fresh = [pair() for _ in range(1000)]
    asked = [
        Comparison(
            [1, *(i + 4 for i in prompt)],
            ([*(i + 4 for i in a), 2], [*(i + 4 for i in b), 2]),
            (1, 2),
        )
        for prompt, a, b, _ in fresh
    ]
    truth = torch.sigmoid(
        torch.tensor([gap for *_, gap in fresh], dtype=torch.float64, device=device)
    )
    errors = {}
    for noise in (0.0, 0.3):
        result = train_reward_model(
            replace(
                config,
                data=write_jsonl("rater.jsonl", rows),
                epochs=1,
                pairs_per_step=32,
                tokens_per_microbatch=4096,
                label_noise=noise,
                optim=OptimConfig(lr=3e-3),
                run=replace(config.run, dir=f"{config.run.dir}{noise}"),
            )
        )
        better, worse = score_pairs(load_reward_model(result.model), asked, 8192)
        errors[noise] = (
            (torch.sigmoid((better - worse).double()) - truth).square().mean().sqrt().item()
        )
    assert errors[0.3] < 0.93 * errors[0.0], errors


def test_too_few_prompts_for_the_folds(config, write_jsonl):
    few = replace(
        config,
        data=write_jsonl(
            "few.jsonl", [row | {"prompt": f"w{i % 2}"} for i, row in enumerate(PAIRS)]
        ),
        denoise_folds=3,
    )
    with pytest.raises(
        ConfigError, match="needs as many different prompts, and the training examples have 2"
    ):
        train_reward_model(few)


def test_lists_that_all_tie_are_no_data(config, write_jsonl):
    with pytest.raises(DataError, match="all answers tie"):
        train_reward_model(
            replace(
                config,
                data=write_jsonl(
                    "ties.jsonl", [{"prompt": "w1", "completions": ["w2", "w3"], "ranks": [1, 1]}]
                ),
            )
        )
