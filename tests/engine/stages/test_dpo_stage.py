"""fusedrl train dpo on the tiny model: where it starts, what it learns, and that cuts, resuming and
data do what they should."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.errors import ConfigError, DataError
from fusedrl.engine.base.estimates import wilson_interval
from fusedrl.engine.config import DPOConfig, LoRAConfig, OptimConfig, RunConfig
from fusedrl.engine.data.mixture import Mixture
from fusedrl.engine.data.readers import Source
from fusedrl.engine.model.weights import load_decoder
from fusedrl.engine.optim.learner import Learner, Update
from fusedrl.engine.preference.pairs import TokenPair, pack_pairs, read_pairs, sequences_of
from fusedrl.engine.rollout.reference import Frozen
from fusedrl.engine.stages import dpo
from fusedrl.engine.stages.dpo import evaluate, train_dpo

# The preferred answer ends in w1, whatever the rest.
PAIRS = [
    {
        "prompt": f"w{i % 9}",
        "chosen": f"w{i % 13} " * (1 + i % 3) + "w1",
        "rejected": f"w{i % 11} " * (1 + i % 4) + "w2",
    }
    for i in range(40)
]


@pytest.fixture
def config(tiny_model, tmp_path, write_jsonl, device):
    return DPOConfig(
        model=str(tiny_model),
        device=str(device),
        dtype="float32",
        data=write_jsonl("pairs.jsonl", PAIRS),
        eval_fraction=0.2,
        epochs=2,
        pairs_per_step=8,
        tokens_per_microbatch=60,
        optim=OptimConfig(lr=3e-3, schedule="constant"),
        run=RunConfig(dir=str(tmp_path / "run"), progress=False),
    )


def _metrics(config):
    return [
        json.loads(line)
        for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    ]


def _weights(device, config):
    return {
        name: p.detach()
        for name, p in load_decoder(
            Path(config.run.dir) / "model", dtype="float32", device=device
        ).named_parameters()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=4)], ids=["full", "lora"])
def test_it_starts_at_exactly_log_2(config, dtype, lora):
    config = replace(config, dtype=dtype, lora=lora, epochs=1, pairs_per_step=32)
    train_dpo(config)
    (row,) = _metrics(config)
    # of 32 sums; each is log 2 to the bit
    assert row["loss"] == pytest.approx(math.log(2), rel=1e-15)
    assert [row[f"rewards/{name}"] for name in ("chosen", "rejected", "margins", "accuracies")] == [
        0.0
    ] * 4
    assert row["drift/chosen"] == 0.0
    assert row["grad_norm"] > 0
    assert row["logps/chosen"] < 0


def test_it_learns_what_is_preferred(config):
    result = train_dpo(replace(config, epochs=6))
    assert result.held_out == 8
    assert result.accuracy == 1.0
    assert result.interval == wilson_interval(8, 8)
    rows = _metrics(config)
    assert len(rows) == result.steps == 24
    assert rows[-1]["loss"] < 0.5 * math.log(2)
    assert rows[-1]["rewards/margins"] > 0.5
    assert rows[-1]["rewards/accuracies"] == 1.0
    assert rows[-1]["rewards/chosen"] > rows[-1]["rewards/rejected"]
    for row in rows:
        assert row["rewards/margins"] == pytest.approx(
            row["rewards/chosen"] - row["rewards/rejected"], abs=1e-9
        )
    AutoModelForCausalLM.from_pretrained(result.model)


def test_an_adapter_learns_against_the_model_without_it(config):
    train_dpo(
        replace(config, lora=LoRAConfig(rank=4), optim=OptimConfig(lr=1e-2, schedule="constant"))
    )
    rows = _metrics(config)
    assert rows[0]["rewards/margins"] == 0.0
    assert rows[-1]["rewards/margins"] > 0.3
    assert rows[-1]["eval_rewards/accuracies"] == 1.0


@pytest.mark.parametrize("loss", ["ipo", "ipo_mean", "hinge", "robust"])
def test_the_other_losses_train_too(config, loss):
    train_dpo(
        replace(
            config,
            loss=loss,
            epochs=5,
            label_smoothing=0.1 if loss == "robust" else 0.0,
            dtype="bfloat16" if loss == "hinge" else "float32",
        )
    )
    rows = _metrics(config)
    assert rows[-1]["eval_rewards/accuracies"] >= 0.75
    assert rows[-1]["loss"] < rows[0]["loss"]
    if loss.startswith("ipo"):  # (0 - 1 / (2 beta))^2
        assert rows[0]["loss"] == pytest.approx(25.0, rel=1e-12)


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_without_a_reference(config, loss, monkeypatch):
    """No second model is loaded; the answers that are preferred are found."""
    monkeypatch.setattr(dpo, "load_reference", lambda *args: pytest.fail("a reference was loaded"))
    own = DPOConfig(
        **{
            name: getattr(config, name)
            for name in ("model", "device", "dtype", "data", "pairs_per_step", "optim", "run")
        },
        loss=loss,
        eval_fraction=0.2,
        epochs=6,
        tokens_per_microbatch=60,
    )
    train_dpo(own)
    rows = _metrics(config)
    assert rows[-1]["eval_rewards/accuracies"] >= 0.75
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert not any("drift/chosen" in row or "ref" in " ".join(row) for row in rows)
    with pytest.raises(ConfigError, match=f"another one than {loss}"):
        replace(own, reference="frozen")


def _sums(device, model, tokenizer, row, side):
    """Summed log-probability of an answer, in float64."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    answer = [*tokenizer(row[side], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logp = model(torch.tensor([prompt + answer], device=device)).logits[0].log_softmax(-1)
    return sum(logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)), len(
        answer
    )


def _by_paper(means):
    """SimPO's and ORPO's losses of pairs, from the mean log-probabilities of both answers."""
    return {
        "simpo": [math.log1p(math.exp(1 - 2 * (a - b))) for a, b in means],
        "orpo": [
            -a + 0.1 * math.log1p(math.exp(math.log(math.expm1(-a)) - math.log(math.expm1(-b))))
            for a, b in means
        ],
    }


def test_losses_are_those_of_transformers_in_float64(config, device):
    train_dpo(replace(config, epochs=1))
    trained, start, tokenizer = (
        Path(config.run.dir) / "model",
        config.model,
        AutoTokenizer.from_pretrained(config.model),
    )
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).to(device)
        for path in (trained, start)
    )
    rows = PAIRS[:7]
    (w, nw), (l, nl), (rw, _), (rl, _) = (
        zip(*(_sums(device, model, tokenizer, row, side) for row in rows), strict=True)
        for model in (ours, theirs)
        for side in ("chosen", "rejected")
    )
    h = [a - b - (c - d) for a, b, c, d in zip(w, rw, l, rl, strict=True)]
    means = [
        (a - b) / n - (c - d) / m for a, b, n, c, d, m in zip(w, rw, nw, l, rl, nl, strict=True)
    ]
    likelihood = sum(-a / n for a, n in zip(w, nw, strict=True)) / len(rows)
    actor, reference = (
        HybridActor.from_pretrained(path, dtype="float32", device=device)
        for path in (trained, start)
    )
    pairs = read_pairs(
        Source(config.data),
        actor.tokenizer,
        (),
        60,
        skip_bad_lines=False,
        rejects=Path("none"),
        tell=lambda text: None,
    )[:7]
    for options, expected in (
        ({}, lambda d: math.log1p(math.exp(-0.1 * d))),
        ({"loss": "ipo"}, lambda d: (d - 5) ** 2),
        ({"loss": "hinge"}, lambda d: max(0.0, 1 - 0.1 * d)),
        ({"nll_coef": 0.5}, lambda d: math.log1p(math.exp(-0.1 * d)) + 0.5 * likelihood),
    ):
        found = evaluate(actor, Frozen(reference), pairs, replace(config, **options))
        assert found["eval_loss"] == pytest.approx(sum(map(expected, h)) / len(h), rel=1e-4)
        assert found["eval_rewards/margins"] == pytest.approx(0.1 * sum(h) / len(h), rel=1e-4)
        assert found["eval_rewards/accuracies"] == sum(d > 0 for d in h) / len(h)
    m = [(a / n, b / k) for a, n, b, k in zip(w, nw, l, nl, strict=True)]
    for loss, losses in _by_paper(m).items():
        alone = DPOConfig(config.model, config.data, loss=loss, tokens_per_microbatch=60)
        found = evaluate(actor, None, pairs, alone)
        assert found["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
        margins = [alone.beta * (a - b) for a, b in m]
        assert found["eval_rewards/margins"] == pytest.approx(sum(margins) / len(m), rel=1e-4)
        assert found["eval_rewards/accuracies"] == sum(x > 0 for x in margins) / len(m)
    found = evaluate(actor, Frozen(reference), pairs, replace(config, loss="ipo_mean"))
    assert found["eval_loss"] == pytest.approx(sum((d - 5) ** 2 for d in means) / 7, rel=1e-4)


def test_the_micro_batch_split_does_not_change_the_gradient(config):
    norms = []
    for name, tokens in (("a", 10_000), ("b", 12)):  # 12: every pair alone
        one = replace(
            config,
            epochs=1,
            pairs_per_step=20,
            eval_fraction=0.0,
            tokens_per_microbatch=tokens,
            run=replace(config.run, dir=config.run.dir + name),
        )
        train_dpo(one)
        norms.append([row["grad_norm"] for row in _metrics(one)])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.cpu_only("bitwise resumption is promised on a CPU")
@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=4)], ids=["full", "lora"])
def test_resume_continues_bitwise(config, monkeypatch, lora, device):
    whole = replace(config, lora=lora, run=replace(config.run, save_every=2))
    train_dpo(whole)
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
            train_dpo(parts)
    assert len(_metrics(parts)) == 3  # one step past the checkpoint: it is cut and done again
    train_dpo(replace(parts, run=replace(parts.run, resume=True)))
    ours, theirs = _weights(device, whole), _weights(device, parts)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    a, b = (
        [
            {k: v for k, v in row.items() if not k.startswith(("timing/", "tokens_per_s", "mem/"))}
            for row in _metrics(c)
        ]
        for c in (whole, parts)
    )
    assert a == b
    assert (Path(parts.run.dir) / "adapter").is_dir() is (lora is not None)


def test_the_likelihood_term_holds_the_chosen_answers(config):
    ends = {}
    for coef in (0.0, 1.0):
        one = replace(
            config, nll_coef=coef, epochs=4, run=replace(config.run, dir=f"{config.run.dir}{coef}")
        )
        train_dpo(one)
        ends[coef] = _metrics(one)[-1]
    assert ends[1.0]["logps/chosen"] > ends[0.0]["logps/chosen"] + 1.0
    assert ends[1.0]["drift/chosen"] < ends[0.0]["drift/chosen"]


def test_ties_teach_nothing_and_are_not_judged(config, write_jsonl):
    rows = [
        {
            "question": {"full_text": f"w{i}"},
            "answer_0": f"w{i} w1",
            "answer_1": f"w{i} w2",
            "score_0": 0.0,
            "score_1": 0.0,
        }
        for i in range(8)
    ]
    config = replace(config, data=write_jsonl("webgpt.jsonl", rows), eval_fraction=0.25, epochs=1)
    result = train_dpo(config)
    (row,) = _metrics(config)
    assert row["grad_norm"] == 0.0
    assert row["loss"] == pytest.approx(math.log(2), rel=1e-15)
    assert "rewards/accuracies" not in row
    assert "eval_rewards/accuracies" not in row
    assert row["eval_pairs"] == 2.0
    assert math.isnan(result.accuracy)


def test_pairs_of_a_ranked_list_weigh_one_together(tiny_model, write_jsonl):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    data = write_jsonl(
        "ranked.jsonl",
        [
            {"prompt": "w1", "completions": ["w2", "w3", "w4"], "ranks": [1, 2, 3]},
            {"prompt": "w5", "completions": ["w6", "w7"], "ranks": [2, 1]},
        ],
    )
    pairs = read_pairs(
        Source(data),
        tokenizer,
        (2,),
        60,
        skip_bad_lines=False,
        rejects=Path("none"),
        tell=lambda text: None,
    )
    assert [pair.weight for pair in pairs] == pytest.approx([1 / 3] * 3 + [1.0])


def test_weights_and_labels_stay_with_their_pairs(config, device):
    """A step of pairs of all lengths, labels and weights in micro-batches of their own, longest
    first, against one pair at a time."""
    actor, reference = (
        HybridActor.from_pretrained(config.model, dtype="float32", device=device) for _ in range(2)
    )
    with torch.no_grad():
        for p in actor.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(device)
    pairs = [
        TokenPair(
            [1] * (1 + i % 3),
            [4 + i] * (1 + 2 * i % 5),
            [9] * (1 + i),
            (1.0, 0.5, 0.0)[i % 3],
            0.1 * i,
            1.0 + i,
        )
        for i in range(7)
    ]
    alone = [
        evaluate(actor, Frozen(reference), [replace(pair, weight=1.0)], config) for pair in pairs
    ]
    expected = sum(
        pair.weight * one["eval_loss"] for pair, one in zip(pairs, alone, strict=True)
    ) / sum(pair.weight for pair in pairs)
    together = replace(config, tokens_per_microbatch=15)
    assert evaluate(actor, Frozen(reference), pairs, together)["eval_loss"] == pytest.approx(
        expected, rel=1e-5
    )
    batch, cuts = pack_pairs(pairs, 15, torch.device("cpu"))
    assert [i for cut in cuts for i in cut] != list(range(7))
    update = Update(Learner(actor, config.optim))
    scores, loss = dpo._backward(
        update, actor, dpo.with_reference(Frozen(reference), batch, cuts), cuts, pairs, together
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    assert (0.1 * scores.h).tolist() == pytest.approx(
        [one["eval_rewards/margins"] for one in alone], rel=1e-4, abs=1e-7
    )
    right = sum(
        one["eval_rewards/margins"] * (pair.label - 0.5) > 0
        for pair, one in zip(pairs, alone, strict=True)
    )
    assert dpo.agreement(scores.h, pairs) == (right, 5)


def test_what_cannot_be_learnt_from_is_counted_or_refused(
    config, tiny_model, tmp_path, write_jsonl, capsys
):
    same = {"prompt": "w1", "chosen": "odd", "rejected": "peculiar"}  # both are <unk>
    data = write_jsonl(
        "same.jsonl",
        [
            *PAIRS,
            same,
            {"prompt": "w1", "chosen": "", "rejected": "w2"},
            {"prompt": "w1", "chosen": "w2", "rejected": "w2"},
        ],
    )
    train_dpo(replace(config, data=data, epochs=1, run=replace(config.run, progress=True)))
    told = capsys.readouterr().err
    assert "1 of 41 are not used: the answers are equal in tokens" in told
    assert "an answer is empty" in told
    assert "the answers are equal" in told
    with pytest.raises(DataError, match="all 2 pairs have answers that are equal in tokens"):
        train_dpo(
            replace(
                config,
                data=write_jsonl("all.jsonl", [same, same]),
                run=replace(config.run, dir=str(tmp_path / "none")),
            )
        )
    assert not (tmp_path / "none" / "model").exists()
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    with pytest.raises(DataError, match="the model's directory has none"):
        train_dpo(
            replace(
                config, model=str(bare), run=replace(config.run, dir=str(tmp_path / "bare_run"))
            )
        )


def test_both_sides_of_a_pair_share_a_micro_batch():
    pairs = [TokenPair([1] * (1 + i % 2), [3] * (1 + i), [4] * 2) for i in range(7)]
    batch, cuts = pack_pairs(pairs, 14, torch.device("cpu"))
    assert sorted(i for cut in cuts for i in cut) == list(range(7))
    for cut in cuts:
        tokens = sum(batch.lengths[b] for b in sequences_of(cut))
        assert tokens == sum(pairs[i].num_tokens for i in cut)
        assert tokens <= 14 or len(cut) == 1
    assert batch.lengths[2 * 5] == len(pairs[5].prompt) + len(pairs[5].chosen)


def test_companions_do_not_change_a_pair(config, device):
    actor = HybridActor.from_pretrained(config.model, dtype="float32", device=device)
    pairs = read_pairs(
        Source(config.data),
        actor.tokenizer,
        (2,),
        60,
        skip_bad_lines=False,
        rejects=Path("none"),
        tell=lambda text: None,
    )
    reference = Frozen(HybridActor.from_pretrained(config.model, dtype="float32", device=device))
    with torch.no_grad():
        for p in actor.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(device)
    whole = replace(config, tokens_per_microbatch=10_000)
    together = evaluate(actor, reference, pairs[:6], whole)["eval_loss"]
    apart = [evaluate(actor, reference, [pair], whole)["eval_loss"] for pair in reversed(pairs[:6])]
    assert together == pytest.approx(sum(apart) / 6, rel=1e-5)
    assert abs(together - math.log(2)) > 1e-3
