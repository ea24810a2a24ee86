"""PPO-ptx: the gradient is the sum of both parts, in one optimizer step; the texts come by the
number of the step; and what is rehearsed is not forgotten."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusedrl.engine import HybridActor, PackedBatch
from fusedrl.engine.base.errors import ConfigError, DataError
from fusedrl.engine.cli.main import parse_config
from fusedrl.engine.config import (
    GenerationConfig,
    KLConfig,
    LoRAConfig,
    OptimConfig,
    PolicyConfig,
    PtxConfig,
    RunConfig,
)
from fusedrl.engine.data.mixture import Mixture
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.weights import load_decoder
from fusedrl.engine.optim.adamw import Optimizer
from fusedrl.engine.policy.ptx import Ptx
from fusedrl.engine.stages import policy
from fusedrl.engine.stages.policy import train_policy
from fusedrl.kernels.runtime.dispatch import use_impl

SMALL = {
    "model_type": "llama",
    "vocab_size": 13,
    "hidden_size": 8,
    "intermediate_size": 11,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.4,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
TEXTS = [
    ([1, 4, 5, 6, 2], [False, True, True, True, True]),
    ([1, 7, 2], [False, False, True]),
    ([1, 8, 9, 10, 11, 12, 3, 2], [False] + [True] * 7),
]


def small(device, dtype):
    return HybridActor(Decoder.random(model_config(SMALL), 0, dtype=dtype, device=device))


def gradients(actor):
    return torch.cat([p.grad.double().flatten() for p in actor.parameters()])


def cross_entropy(actor, texts):
    """The definition, in one packed forward: a mean over the learned tokens of all texts."""
    batch = PackedBatch.from_masked(texts, device=actor.decoder.device)
    logp = (actor.forward(batch) @ actor.decoder.head_weight.T).log_softmax(1)
    learned = batch.action_mask.nonzero()[:, 0]
    return -logp[learned - 1, batch.token_ids[learned]].mean()


# ---- the gradient --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str
)
def test_the_gradient_is_the_sum_however_it_is_cut(dtype, tolerance, device):
    with use_impl("torch"):  # which has float64
        check_gradients(device, small(device, dtype), tolerance)
    if dtype == torch.float32:
        check_gradients(device, small(device, dtype), tolerance)


def check_gradients(device, actor, tolerance, coef=27.8):
    batch = PackedBatch.from_sequences([([1, 3], [5, 6, 7])], device=device)

    def other():  # what stands there already: any loss of the policy's
        actor.logprobs(batch, actor.forward(batch))[0].square().sum().backward()

    other()
    (coef * cross_entropy(actor, [TEXTS[i] for i in (0, 1, 2, 0, 1)])).backward()
    want = gradients(actor)
    for tokens in (1, 7, 1000):
        ptx = Ptx(
            PtxConfig("unread", coef, sequences_per_step=5),
            Mixture([TEXTS]),
            seed=0,
            tokens_per_microbatch=tokens,
        )
        # in the order of `want`
        ptx.texts.draw = lambda seed, start, stop: [TEXTS[i % 3] for i in range(start, stop)]
        for p in actor.parameters():
            p.grad = None
        other()
        loss = ptx.backward(actor, 0)
        assert (gradients(actor) - want).abs().max() <= tolerance * want.abs().max()
        mean = cross_entropy(actor, [TEXTS[i] for i in (0, 1, 2, 0, 1)]).item()
        assert loss.item() == pytest.approx(coef * mean, rel=1e-6)
        assert ptx.loss(actor, 0).item() == pytest.approx(coef * mean, rel=1e-6)
        assert ptx.metrics() == {"loss/ptx": pytest.approx(mean, rel=1e-6)}
        assert ptx.metrics() == {}
    # a mean of means is another number
    wrong = sum(cross_entropy(actor, [TEXTS[i]]).item() for i in (0, 1, 2, 0, 1)) / 5
    assert abs(wrong / mean - 1) > 1e-3


def test_draws_follow_the_number_of_the_step(device):
    ptx = Ptx(
        PtxConfig("unread", 1.0, sequences_per_step=2),
        Mixture([TEXTS]),
        seed=3,
        tokens_per_microbatch=10,
    )
    asked = []
    ptx.texts.draw = lambda *args, draw=ptx.texts.draw: asked.append(args) or draw(*args)
    actor = small(device, torch.float32)
    forward = [ptx.backward(actor, index).item() for index in range(6)]
    assert asked == [(3, 2 * index, 2 * index + 2) for index in range(6)]
    # of nothing else
    assert [ptx.loss(actor, index).item() for index in reversed(range(6))] == forward[::-1]
    assert len(set(forward)) > 1


# ---- in the loop ---------------------------------------------------------------------------------
REWARD = (
    "def likes_w3(prompts, completions, completion_ids, **columns):\n    return "
    "[float(text.split().count('w3')) for text in completions]\n"
)


@pytest.fixture
def make(tiny_model, tmp_path, write_jsonl, device):
    (tmp_path / "rewards.py").write_text(REWARD)
    data = write_jsonl("prompts.jsonl", [{"prompt": f"w{i} w{i + 1}"} for i in range(12)])
    texts = write_jsonl(
        "texts.jsonl", [{"text": f"w{i} w{i + 4} w{i + 8} w{i} w{i + 4}"} for i in range(9)]
    )

    def config(algorithm="grpo", name="run", ptx=True, run=None, **kwargs):
        defaults = dict(
            device=str(device),
            dtype="float32",
            steps=2,
            prompts_per_step=4,
            samples_per_prompt=2,
            tokens_per_microbatch=30,
            generation=GenerationConfig(max_new_tokens=6),
            optim=OptimConfig(lr=3e-3, schedule="constant", max_grad_norm=0.0),
            kl=KLConfig(coef=0.0),
            run=RunConfig(dir=str(tmp_path / name), progress=False, **(run or {})),
        )
        ptx = PtxConfig(texts, coef=2.0, sequences_per_step=3) if ptx is True else ptx
        return PolicyConfig(
            str(tiny_model),
            data,
            (f"{tmp_path / 'rewards.py'}:likes_w3",),
            algorithm,
            ptx=ptx,
            **(defaults | kwargs),
        )

    return config


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


@pytest.fixture
def steps(monkeypatch):
    """The gradient before each optimizer step."""
    seen = []

    def step(self, original=Optimizer.step, **kwargs):
        seen.append(
            {name: p.grad.clone() for name, p in self._params.items() if p.grad is not None}
        )
        return original(self, **kwargs)

    monkeypatch.setattr(Optimizer, "step", step)
    return seen


def test_one_optimizer_step_has_both_gradients(make, steps, device):
    config, alone = (
        make(steps=1, minibatches=2),
        make(name="alone", steps=1, minibatches=2, ptx=None),
    )
    train_policy(config)
    train_policy(alone)
    assert len(steps) == 4  # two for each run: no step of the texts' own
    actor = HybridActor.from_pretrained(config.model, dtype="float32", device=device)
    rows = [[1] + [4 + w for w in (i, i + 4, i + 8, i, i + 4)] + [2] for i in range(9)]
    # of the first step: the weights are the model's
    texts = Mixture([[(ids, [False] + [True] * 6) for ids in rows]]).draw(config.run.seed, 0, 3)
    (2.0 * cross_entropy(actor, texts)).backward()
    largest = max(g.abs().max() for g in steps[0].values())
    for name, p in actor.named_parameters():
        assert (steps[0][name] - steps[2][name] - p.grad).abs().max() <= 1e-5 * largest, name
    ours, theirs = _metrics(config)[0], _metrics(alone)[0]
    assert "loss/ptx" in ours
    assert "loss/ptx" not in theirs
    assert ours["policy/first_ratio_max"] == 1.0
    assert ours["reward"] == theirs["reward"]


def test_the_micro_batch_split_does_not_change_the_update(make, device):
    moved, start = (
        [],
        dict(load_decoder(make().model, dtype="float32", device=device).named_parameters()),
    )
    for tokens in (8, 10_000):
        config = make(name=f"cut{tokens}", steps=1, tokens_per_microbatch=tokens)
        train_policy(config)
        moved.append(_weights(device, config))
    most = max((moved[0][name] - start[name]).abs().max().item() for name in start)
    for name in start:
        torch.testing.assert_close(moved[0][name], moved[1][name], rtol=0, atol=2e-3 * most)


@pytest.mark.cpu_only("bitwise resumption is promised on a CPU")
def test_resume_continues_bitwise(make, device):
    whole = make("ppo", name="whole", steps=3, epochs=2, run=dict(save_every=1))
    train_policy(whole)
    parts = replace(whole, run=replace(whole.run, dir=whole.run.dir + "_parts"))
    calls = iter(range(2))
    with pytest.MonkeyPatch.context() as patch:

        def dies(*args, original=policy.rollout, **kwargs):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        patch.setattr(policy, "rollout", dies)
        with pytest.raises(KeyboardInterrupt):
            train_policy(parts)
    train_policy(replace(parts, run=replace(parts.run, resume=True)))
    ours, theirs = _weights(device, whole), _weights(device, parts)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [row["loss/ptx"] for row in _metrics(whole)] == [
        row["loss/ptx"] for row in _metrics(parts)
    ]

    changed = replace(parts, run=replace(parts.run, resume=True), ptx=replace(parts.ptx, coef=3.0))
    with pytest.raises(ConfigError, match=r"ptx\.coef: 2\.0 -> 3\.0"):
        train_policy(changed)
    Path(parts.ptx.data).write_text('{"text": "w1"}\n')
    with pytest.raises(ConfigError, match="data_sha256"):
        train_policy(replace(parts, run=replace(parts.run, resume=True)))


def test_runs_of_before_resume(make):
    """A run directory whose configuration knows nothing of trpo and ptx."""
    config = make(ptx=None, steps=1)
    train_policy(config)
    path = Path(config.run.dir) / "config.json"
    saved = json.loads(path.read_text())
    del saved["config"]["ptx"], saved["config"]["trpo"]
    path.write_text(json.dumps(saved))
    train_policy(replace(config, steps=2, run=replace(config.run, resume=True)))
    assert len(_metrics(config)) == 2


def test_what_is_rehearsed_is_not_forgotten(make, device):
    common = dict(
        steps=12,
        prompts_per_step=8,
        samples_per_prompt=4,
        tokens_per_microbatch=4000,
        optim=OptimConfig(lr=1e-2, schedule="constant"),
    )
    free = make(name="free", ptx=None, **common)
    held = make(
        name="held", ptx=PtxConfig(make().ptx.data, coef=0.2, sequences_per_step=9), **common
    )
    actor = HybridActor.from_pretrained(held.model, dtype="float32", device=device)
    texts = [
        ([1] + [4 + w for w in (i, i + 4, i + 8, i, i + 4)] + [2], [False] + [True] * 6)
        for i in range(9)
    ]
    losses = {"start": cross_entropy(actor, texts).item()}
    for name, config in (("held", held), ("free", free)):
        train_policy(config)
        losses[name] = cross_entropy(
            HybridActor.from_pretrained(
                Path(config.run.dir) / "model", dtype="float32", device=device
            ),
            texts,
        ).item()
        rows = _metrics(config)
        assert rows[-1]["reward"] > rows[0]["reward"] + 1.0
    assert losses["held"] < losses["start"] < losses["free"] - 1.0


def test_a_coefficient_of_zero_is_none(make, device):
    config, alone = make(ptx=PtxConfig(make().ptx.data, coef=0.0)), make(name="alone", ptx=None)
    train_policy(config)
    train_policy(alone)
    assert all(
        torch.equal(p, _weights(device, alone)[name])
        for name, p in _weights(device, config).items()
    )
    assert "loss/ptx" not in _metrics(config)[0]


@pytest.mark.parametrize(
    "algorithm, more",
    [
        ("dapo", {}),
        ("remax", dict(lora=LoRAConfig(rank=2), strict=True)),
        ("reinforce", dict(checkpoint_activations=True)),
    ],
)
def test_it_runs_with(make, algorithm, more):
    config = make(algorithm, steps=1, **more)
    train_policy(config)
    assert 0 < _metrics(config)[0]["loss/ptx"] < 50


# ---- data and options ----------------------------------------------------------------------------
def test_what_is_learned_of_a_row(make, write_jsonl, capsys, monkeypatch):
    data = write_jsonl(
        "mixed.jsonl",
        [
            {"prompt": "w1 w2", "completion": "w3 w4"},
            {"prompt": "w5 w6 w7 w8", "completion": "w9 w10"},
        ],
    )
    seen = []
    monkeypatch.setattr(
        Ptx, "backward", lambda self, actor, index, update: seen.append(self.texts.examples)
    )
    for learn_prompts, actions in ((False, [False] * 3 + [True] * 3), (True, [False] + [True] * 5)):
        config = make(
            name=str(learn_prompts),
            steps=1,
            ptx=PtxConfig(data, max_length=7, learn_prompts=learn_prompts),
            run={},
        )
        train_policy(replace(config, run=replace(config.run, progress=True)))
        assert seen.pop() == [([1, 5, 6, 7, 8, 2], actions)]
    assert (
        "pretraining texts: 1 of 2 (50.0%) are longer than 7 tokens and were dropped"
        in capsys.readouterr().err
    )


def test_bad_texts_are_told_before_anything_is_generated(make, write_jsonl, monkeypatch):
    monkeypatch.setattr(policy, "rollout", lambda *args, **kwargs: pytest.fail("generated"))
    for name, ptx, error, message in (
        ("none", PtxConfig("no_such.jsonl"), FileNotFoundError, "no_such"),
        (
            "columns",
            PtxConfig(write_jsonl("bad.jsonl", [{"question": "w1"}])),
            DataError,
            "bad.jsonl",
        ),
        (
            "long",
            PtxConfig(make().ptx.data, max_length=3),
            DataError,
            "all 9 examples are longer than 3 tokens",
        ),
    ):
        with pytest.raises(error, match=message):
            train_policy(make(name=name, ptx=ptx))


def test_options(tmp_path):
    options = ["--model", "m", "--data", "d", "--reward", "r.py:f"]
    assert parse_config("ppo", options).ptx is None
    assert parse_config(
        "grpo", [*options, "--ptx.data", "a.jsonl@2,b.jsonl", "--ptx.coef", "3"]
    ).ptx == PtxConfig("a.jsonl@2,b.jsonl", coef=3.0)
    with pytest.raises(ConfigError, match=r"expected ptx\.data a file of texts"):
        parse_config("ppo", [*options, "--ptx.coef", "3"])
    with pytest.raises(ConfigError, match=r"expected ptx\.coef >= 0"):
        parse_config("ppo", [*options, "--ptx.data", "a.jsonl", "--ptx.coef", "-1"])
    file = tmp_path / "run.yaml"
    file.write_text("ptx:\n  data: a.jsonl\n  sequences_per_step: 4\ntrpo:\n  max_kl: 0.02\n")
    config = parse_config("trpo", ["--config", str(file), *options])
    assert (config.ptx, config.trpo.max_kl, config.epochs) == (
        PtxConfig("a.jsonl", sequences_per_step=4),
        0.02,
        10,
    )
    file.write_text("ptx: null\n")
    assert parse_config("trpo", ["--config", str(file), *options]).ptx is None
