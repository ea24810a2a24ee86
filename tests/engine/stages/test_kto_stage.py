"""fusedrl train kto on the tiny model: its formula, where it starts, what it learns, and that cuts,
resuming and data do what they should."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.estimates import wilson_interval
from fusedrl.engine.config import KTOConfig, LoRAConfig, OptimConfig, RunConfig
from fusedrl.engine.data.mixture import Mixture
from fusedrl.engine.data.readers import Source
from fusedrl.engine.model.weights import load_decoder
from fusedrl.engine.optim.learner import Learner, Update
from fusedrl.engine.preference.answers import mismatched, read_answers
from fusedrl.engine.preference.losses import kto_loss
from fusedrl.engine.rollout.reference import Frozen
from fusedrl.engine.stages import kto
from fusedrl.engine.stages.kto import evaluate, reference_point, train_kto, with_reference

# A wanted answer ends in w1, an unwanted one in w2, whatever the rest.
ANSWERS = [
    {
        "prompt": f"w{i % 9} w{i % 7}",
        "completion": f"w{i % 13} " * (1 + i % 3) + ("w1" if i % 2 else "w2"),
        "label": bool(i % 2),
    }
    for i in range(40)
]


@pytest.fixture
def config(tiny_model, tmp_path, write_jsonl, device):
    return KTOConfig(
        model=str(tiny_model),
        device=str(device),
        dtype="float32",
        data=write_jsonl("labelled.jsonl", ANSWERS),
        eval_fraction=0.2,
        epochs=2,
        answers_per_step=8,
        tokens_per_microbatch=40,
        optim=OptimConfig(lr=3e-3, schedule="constant"),
        run=RunConfig(dir=str(tmp_path / "run"), progress=False),
    )


def rows_of(config):
    return [
        json.loads(line)
        for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    ]


def weights_of(device, config):
    decoder = load_decoder(Path(config.run.dir) / "model", dtype="float32", device=device)
    return {name: p.detach() for name, p in decoder.named_parameters()}


def read(config, actor, limit=60):
    return read_answers(
        Source(config.data),
        actor.tokenizer,
        (2,),
        limit,
        skip_bad_lines=False,
        rejects=Path("none"),
        tell=lambda text: None,
    )


def moved(config, device):
    """A policy that has left the reference, and the reference."""
    actor, reference = (
        HybridActor.from_pretrained(config.model, dtype="float32", device=device) for _ in range(2)
    )
    with torch.no_grad():
        for p in actor.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(device)
    return actor, Frozen(reference)


# ---- the formula ---------------------------------------------------------------------------------
def test_losses_are_those_of_transformers_in_float64(config, tmp_path, device):
    """Log-probabilities by transformers in float64, then the paper's formula by a loop: loss, z and
    accuracy, with weights, and the gradient of one weight by differences."""
    actor, reference = moved(config, device)
    actor.save_pretrained(tmp_path / "moved")
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).to(device)
        for path in (tmp_path / "moved", config.model)
    )
    rows = ANSWERS[:7]

    def ids(row):
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        return tokenizer(row["prompt"])["input_ids"], [*answer, tokenizer.eos_token_id]

    def ratio(prompt, answer):
        total = 0.0
        for sign, model in ((1, ours), (-1, theirs)):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer], device=device)).logits[0]
            logp = logits.log_softmax(-1)
            total += sign * sum(
                logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)
            )
        return total

    pairs = [ids(row) for row in rows]
    apart = [ratio(x, pairs[(i + 1) % 7][1]) for i, (x, _) in enumerate(pairs)]
    z = max(0.0, sum(apart) / 7)
    r = [ratio(*pair) for pair in pairs]

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    answers = read(config, actor)[:7]
    for beta, wanted, unwanted in ((0.1, 1.0, 1.0), (0.5, 2.0, 0.25)):
        chosen = replace(config, beta=beta, desirable_weight=wanted, undesirable_weight=unwanted)
        found = evaluate(actor, reference, answers, chosen)
        losses = [
            wanted * (1 - sigmoid(beta * (x - z)))
            if row["label"]
            else unwanted * (1 - sigmoid(beta * (z - x)))
            for x, row in zip(r, rows, strict=True)
        ]
        assert found["eval_loss"] == pytest.approx(sum(losses) / 7, rel=1e-4)
        assert found["eval_kl"] == pytest.approx(z, rel=1e-4, abs=1e-4)
        means = [
            sum(x for x, row in zip(r, rows, strict=True) if row["label"] is kind) / count
            for kind, count in ((True, 3), (False, 4))
        ]
        assert found["eval_rewards/margins"] == pytest.approx(
            beta * (means[0] - means[1]), rel=1e-4
        )
        right = sum((x > z) if row["label"] else (x < z) for x, row in zip(r, rows, strict=True))
        assert found["eval_rewards/accuracies"] == right / 7
    assert abs(sum(apart)) > 0.1, "z is not at its bound by chance"


def test_the_gradient_leaves_z_alone(device):
    """By hand: d loss / d r is -+ beta weight s (1 - s), z a number. At r far from z it is 0, on
    either side."""
    r = torch.tensor([1.0, 1.0, 900.0, -900.0], dtype=torch.float64, device=device)
    r = r.requires_grad_()
    wanted = torch.tensor([True, False, True, True], device=device)
    loss = kto_loss(r, wanted, 0.5, beta=2.0, desirable_weight=3.0, undesirable_weight=5.0)
    s = 1 / (1 + math.exp(-2.0 * 0.5))
    assert loss.tolist() == pytest.approx([3 * (1 - s), 5 * s, 0.0, 3.0])
    (slope,) = torch.autograd.grad(loss.sum(), r)
    assert slope.tolist() == pytest.approx([-6 * s * (1 - s), 10 * s * (1 - s), 0.0, 0.0])


def test_each_prompt_meets_its_neighbours_answer(config, device):
    actor, reference = moved(config, device)
    answers = read(config, actor)[:3]
    found = mismatched(answers, 60)
    assert [prompt for prompt, _ in found] == [one.prompt for one in answers]
    assert [answer for _, answer in found] == [answers[i].answer for i in (1, 2, 0)]
    longest = max(len(one.prompt) for one in answers)
    assert all(len(answer) <= 2 for _, answer in mismatched(answers, longest + 2))
    assert mismatched(answers[:1], 60) == []
    assert reference_point(actor, reference, answers[:1], config) == 0.0
    # a policy that says neighbours' answers less often than its reference does is at 0, not below
    signs = [
        reference_point(actor, reference, read(config, actor)[i : i + 2], config)
        for i in range(0, 40, 2)
    ]
    assert min(signs) == 0.0 < max(signs)


# ---- training ------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=4)], ids=["full", "lora"])
def test_it_starts_at_exactly_half(config, dtype, lora):
    config = replace(config, dtype=dtype, lora=lora, epochs=1, answers_per_step=32)
    train_kto(config)
    (row,) = rows_of(config)
    assert row["loss"] == 0.5
    assert [row[name] for name in ("kl", "rewards/chosen", "rewards/rejected")] == [0.0] * 3
    assert row["grad_norm"] > 0
    assert row["logps/chosen"] < 0


@pytest.mark.parametrize("kind", ["labelled", "pairs"])
def test_it_learns_what_is_wanted(config, write_jsonl, kind):
    if kind == "pairs":
        pairs = [
            {"prompt": a["prompt"], "chosen": b["completion"], "rejected": a["completion"]}
            for a, b in zip(ANSWERS[::2], ANSWERS[1::2], strict=True)
        ]
        config = replace(config, data=write_jsonl("pairs.jsonl", pairs))
    result = train_kto(replace(config, epochs=8))
    assert result.held_out == 8
    assert result.accuracy >= 0.75
    assert result.interval == wilson_interval(round(8 * result.accuracy), 8)
    rows = rows_of(config)
    assert rows[-1]["loss"] < 0.45
    assert rows[-1]["rewards/margins"] > 0.3
    assert rows[-1]["rewards/chosen"] > rows[-1]["rewards/rejected"]
    AutoModelForCausalLM.from_pretrained(result.model)


def test_the_micro_batch_split_does_not_change_the_gradient(config, device):
    actor, reference = moved(config, device)
    answers, norms = read(config, actor)[:9], []
    for tokens in (10_000, 6):  # 6: each alone
        one = replace(config, tokens_per_microbatch=tokens)
        z = reference_point(actor, reference, answers, one)
        batch, cuts = with_reference(actor, reference, answers, one)
        learner = Learner(actor, config.optim)
        learner.optimizer.zero_grad()
        logp, loss = kto._backward(Update(learner), actor, batch, cuts, answers, z, one)
        gradient = torch.cat([p.grad.flatten() for p in actor.parameters() if p.grad is not None])
        norms.append((loss, z, gradient.norm().item(), len(cuts)))
        found = kto.describe(batch, logp, answers, z, one)
        assert found["rewards/margins"] == pytest.approx(
            found["rewards/chosen"] - found["rewards/rejected"]
        )
    assert norms[0][3] < norms[1][3]
    assert norms[0][:3] == pytest.approx(norms[1][:3], rel=1e-4)
    alone = [
        evaluate(actor, reference, [one], replace(config, beta=1e-9))["eval_loss"]
        for one in answers
    ]
    assert alone == pytest.approx([0.5] * 9, rel=1e-6), "companions reach an answer through z alone"


@pytest.mark.cpu_only("bitwise resumption is promised on a CPU")
@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=4)], ids=["full", "lora"])
def test_resume_continues_bitwise(config, monkeypatch, lora, device):
    whole = replace(config, lora=lora, run=replace(config.run, save_every=2))
    train_kto(whole)
    parts = replace(whole, run=replace(whole.run, dir=whole.run.dir + "_parts"))
    original, calls = Mixture.draw, iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(
            Mixture,
            "draw",
            lambda *a: (
                original(*a) if next(calls) < 4 else (_ for _ in ()).throw(KeyboardInterrupt)
            ),
        )
        with pytest.raises(KeyboardInterrupt):
            train_kto(parts)
    assert 0 < len(rows_of(parts)) < len(rows_of(whole))
    train_kto(replace(parts, run=replace(parts.run, resume=True)))
    ours, theirs = weights_of(device, whole), weights_of(device, parts)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    a, b = (
        [
            {k: v for k, v in row.items() if not k.startswith(("timing/", "tokens_per_s", "mem/"))}
            for row in rows_of(c)
        ]
        for c in (whole, parts)
    )
    assert a == b


# ---- data and options ----------------------------------------------------------------------------
def test_numbers_out_of_balance_are_told_of_with_the_remedy(config, write_jsonl, capsys):
    few = [row for i, row in enumerate(ANSWERS) if row["label"] or i % 8 == 0]
    config = replace(
        config,
        data=write_jsonl("few.jsonl", few),
        epochs=1,
        eval_fraction=0.0,
        run=replace(config.run, progress=True),
    )
    train_kto(config)
    told = capsys.readouterr().err
    assert "20 answers are wanted and 5 are not" in told
    assert "a ratio of 4, and 1 to 1.33 is advised; desirable_weight 0.25 to 0.333" in " ".join(
        told.split()
    )
    assert replace(config, desirable_weight=0.3).imbalance(20, 5) is None
    assert config.imbalance(10, 10) is None
    assert config.imbalance(4, 3) is None
    assert "bring both kinds" in config.imbalance(10, 0)
    assert "all 3 answers are unwanted" in config.imbalance(0, 3)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(beta=0.0), "beta > 0"),
        (dict(answers_per_step=1), "answers_per_step >= 2"),
        (dict(desirable_weight=-1.0), "desirable_weight >= 0"),
        (dict(desirable_weight=0.0, undesirable_weight=0.0), "nothing is learned"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        KTOConfig("m", "d", **options)


def test_a_last_step_of_one_answer_has_no_neighbour(config):
    train_kto(replace(config, eval_fraction=0.0, epochs=1, answers_per_step=13))
    rows = rows_of(config)
    assert [row["kl"] for row in rows][-1] == 0.0
    assert len(rows) == 4
    assert all(math.isfinite(x) for row in rows for x in row.values() if isinstance(x, float))
