"""A critic of its own beside the policy: what it says at first, that it learns, that it is trained
apart, comes back, and is refused where it does not fit.

One file: the configurations of a critic that all cases vary.
"""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.cli.main import parse_config
from fusedrl.engine.config import (
    CriticConfig,
    GenerationConfig,
    KLConfig,
    LoRAConfig,
    LossConfig,
    OptimConfig,
    PolicyConfig,
    ReplayConfig,
    RunConfig,
)
from fusedrl.engine.config.algorithms import ALGORITHMS
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.heads import RewardModel, ValueHead, save_reward_model
from fusedrl.engine.model.weights import load_decoder, load_tokenizer, save_pretrained
from fusedrl.engine.policy.critic import SeparateCritic, load_critic
from fusedrl.engine.stages import policy
from fusedrl.engine.stages.policy import train_policy

OWN = CriticConfig("policy", optim=OptimConfig(lr=3e-3, schedule="constant"))
REWARDS = """
def by_prompt(prompts, completions, completion_ids, **columns):
    return [2.0 if prompt.split()[0] in ("w0", "w3", "w6", "w9") else -2.0 for prompt in prompts]

def likes_w3(prompts, completions, completion_ids, **columns):
    return [float(sum(word == "w3" for word in text.split())) for text in completions]
"""
OTHER = {
    "model_type": "gpt2",
    "vocab_size": 32,
    "n_embd": 24,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 40,
    "initializer_range": 0.2,
    "eos_token_id": 2,
}
SEQUENCES = [([1, 5, 6], [7, 8, 2]), ([1, 9], [10, 11, 12, 13]), ([1, 4, 4, 4], [2])]


@pytest.fixture
def ppo(tiny_model, tmp_path, write_jsonl, device):
    (tmp_path / "rewards.py").write_text(REWARDS)
    data = write_jsonl(
        "prompts.jsonl",
        [{"prompt": " ".join(f"w{(3 * i + j) % 28}" for j in range(1 + i % 5))} for i in range(12)],
    )

    def make(
        reward="likes_w3",
        name="run",
        algorithm="ppo",
        critic=OWN,
        **kwargs,
    ):
        defaults = dict(
            device=str(device),
            dtype="float32",
            steps=3,
            prompts_per_step=6,
            samples_per_prompt=2,
            epochs=2,
            minibatches=2,
            tokens_per_microbatch=60,
            generation=GenerationConfig(max_new_tokens=8),
            optim=OptimConfig(lr=3e-3, schedule="constant"),
            run=RunConfig(dir=str(tmp_path / name), progress=False),
        )
        return PolicyConfig(
            str(tiny_model),
            data,
            (f"{tmp_path / 'rewards.py'}:{reward}",),
            algorithm,
            critic=critic,
            **(defaults | kwargs),
        )

    return make


@pytest.fixture
def reward_model(tiny_model, tmp_path, device):
    """A reward model on another trunk than the policy's, with a shift."""
    model = RewardModel.from_decoder(
        Decoder.random(
            load_decoder(tiny_model, dtype="float32", device=device).config, seed=5, device=device
        ),
        seed=3,
    )
    model.shift = 0.75
    save_reward_model(model, tmp_path / "reward", tokenizer=load_tokenizer(tiny_model))
    return tmp_path / "reward", model


def _metrics(config):
    return [
        json.loads(line)
        for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    ]


def _weights(device, config, part="model"):
    directory = Path(config.run.dir) / part
    named = (
        load_critic(directory, dtype="float32", device=device).named_parameters()
        if part == "critic"
        else load_decoder(directory, dtype="float32", device=device).named_parameters()
    )
    return {name: p.detach() for name, p in named}


def _first_values(*configs):
    """The batch of the first rollout of each run, as advantages are estimated from it."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            policy,
            "estimate",
            lambda config, signals, original=policy.estimate: (
                seen.append(signals.batch) or original(config, signals)
            ),
        )
        for config in configs:
            train_policy(replace(config, steps=1))
    return seen


def _without_times(row):
    return {
        name: value
        for name, value in row.items()
        if not name.startswith(("timing/", "tokens_per_s", "mem/"))
    }


# ---- where it starts from ------------------------------------------------------------------------
def test_of_a_reward_model_the_first_value_is_its_score(reward_model, device):
    """V(s_t) is the score of what stands before token t: read at the position before, less the
    shift."""
    directory, reward = reward_model
    values = load_critic(directory, dtype="float32", device=device)(
        PackedBatch.from_sequences(SEQUENCES, device=device)
    ).detach()
    slot = 0
    for prompt, completion in SEQUENCES:
        ids = [*prompt, *completion]
        assert values[slot] == 0.0
        for t in range(1, len(ids)):
            score = reward(PackedBatch.from_sequences([(ids[:t], [])], device=device)).item()
            assert values[slot + t].item() == pytest.approx(score, abs=1e-5)
        slot += len(ids)
    unshifted = load_critic(directory, dtype="float32", device=device)
    torch.nn.init.zeros_(unshifted.head.bias)
    assert (
        unshifted(PackedBatch.from_sequences(SEQUENCES, device=device))[1:3] - values[1:3]
    ).detach().tolist() == pytest.approx([0.75] * 2, abs=1e-5)


def test_of_a_language_model_the_first_value_is_zero_and_of_a_trained_one_its_own(
    tiny_model, tmp_path, device
):
    batch = PackedBatch.from_sequences(SEQUENCES, device=device)
    assert not load_critic(tiny_model, dtype="float32", device=device)(batch).any()
    head = ValueHead(32, device=device)
    torch.nn.init.normal_(head.weight), torch.nn.init.constant_(head.bias, 0.3)
    actor = HybridActor(load_decoder(tiny_model, dtype="float32", device=device), value_head=head)
    actor.save_pretrained(tmp_path / "actor")
    assert torch.equal(
        load_critic(tmp_path / "actor", dtype="float32", device=device)(batch),
        actor.values(batch, actor.forward(batch)),
    )


@pytest.mark.parametrize(
    "kind", [{}, {"tie_word_embeddings": False}, OTHER], ids=["tied", "untied", "gpt2"]
)
def test_saved_and_loaded_it_is_the_same_and_transformers_reads_its_trunk(
    tiny_model, tmp_path, kind, device
):
    from transformers import AutoModel

    raw = (
        load_decoder(tiny_model, dtype="float32", device=device).config.raw | kind
        if kind is not OTHER
        else OTHER
    )
    save_pretrained(Decoder.random(model_config(raw), seed=1, device=device), tmp_path / "lm")
    critic = load_critic(tmp_path / "lm", dtype="float32", device=device)
    torch.nn.init.normal_(critic.head.weight)
    assert not any(
        name.endswith(("lm_head", "decoder.head")) for name, _ in critic.named_parameters()
    )  # nothing that has no gradient
    critic.save_pretrained(tmp_path / "critic")
    again = load_critic(tmp_path / "critic", dtype="float32", device=device)
    assert all(
        torch.equal(p, dict(again.named_parameters())[name])
        for name, p in critic.named_parameters()
    )
    theirs = (
        AutoModel.from_pretrained(tmp_path / "critic")
        .to(device)
        .eval()(torch.tensor([[1, 5, 6, 7]], device=device))
        .last_hidden_state[0]
    )
    values = critic(PackedBatch.from_sequences([([1, 5, 6, 7], [8])], device=device)).detach()
    torch.testing.assert_close(critic.head(theirs).detach(), values[1:], rtol=1e-4, atol=1e-4)


# ---- training ------------------------------------------------------------------------------------
def test_it_learns_what_the_prompt_tells(ppo):
    critic = CriticConfig("policy", optim=OptimConfig(lr=3e-3, schedule="constant"))
    config = ppo(
        reward="by_prompt",
        critic=critic,
        steps=18,
        prompts_per_step=24,
        samples_per_prompt=1,
        minibatches=1,
        epochs=4,
        tokens_per_microbatch=4000,
        kl=KLConfig(coef=0.0),
        loss=LossConfig(value_coef=0.5, value_clip=0.2),
        optim=OptimConfig(lr=1e-4),
    )
    train_policy(config)
    rows = _metrics(config)
    assert rows[0]["val/explained_variance"] == pytest.approx(0.0, abs=1e-6)  # a head of zeros
    assert rows[-1]["val/explained_variance"] > 0.5
    assert all(
        row["policy/first_ratio_min"] == row["policy/first_ratio_max"] == 1.0 for row in rows
    )
    assert all(
        {"loss/value_avg", "val/clipfrac_avg", "critic/grad_norm", "critic/learning_rate"}
        <= row.keys()
        for row in rows
    )
    assert not (Path(config.run.dir) / "model" / "value_head.safetensors").exists()


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        dict(strict=True),
        dict(lora=LoRAConfig(rank=4)),
        dict(algorithm="a2c", epochs=1, minibatches=1, kl=KLConfig(coef=0.0)),
        dict(algorithm="dro"),
        dict(checkpoint_activations=True),
    ],
    ids=["ppo", "strict", "lora", "unscored", "dro", "checkpointed"],
)
def test_every_algorithm_with_values_takes_one(ppo, kwargs, device):
    config = ppo(steps=2, **kwargs)
    train_policy(config)
    for row in _metrics(config):
        assert all(
            value == value and abs(value) < 1e6
            for value in row.values()
            if isinstance(value, float)
        )
        assert row["policy/first_ratio_min"] == row["policy/first_ratio_max"] == 1.0
        assert row["critic/grad_norm"] > 0.0
    start = dict(load_critic(config.model, dtype="float32", device=device).named_parameters())
    moved = {
        name: (p - start[name]).abs().max().item()
        for name, p in _weights(device, config, "critic").items()
    }
    assert min(moved.values()) > 0.0, moved
    assert max(moved.values()) > 1e-3, moved


def test_the_two_are_trained_apart(ppo, device):
    """One rollout on one optimizer step: what the critic is trained with does not reach the
    policy's weights, though its gradient is far above the clip."""
    found = []
    for name, weight, lr in (("plain", 0.1, 3e-3), ("loud", 1e4, 1.0)):
        config = ppo(
            name=name,
            steps=1,
            epochs=1,
            minibatches=1,
            loss=LossConfig(value_coef=weight),
            critic=CriticConfig("policy", optim=OptimConfig(lr=lr)),
        )
        train_policy(config)
        found.append(
            (_weights(device, config), _weights(device, config, "critic"), _metrics(config)[0])
        )
    (ours, critic, row), (same, other, loud) = found
    assert all(torch.equal(p, same[name]) for name, p in ours.items())
    assert not torch.equal(critic["head.weight"], other["head.weight"])
    assert row["grad_norm"] == loud["grad_norm"]
    assert loud["critic/grad_norm"] == pytest.approx(1e5 * row["critic/grad_norm"], rel=1e-4)
    shared = ppo(
        name="shared",
        critic=None,
        steps=1,
        epochs=1,
        minibatches=1,
        loss=LossConfig(value_coef=1e4),
    )
    train_policy(shared)
    # one trunk, one clip
    assert not all(torch.equal(p, _weights(device, shared)[name]) for name, p in ours.items())


def test_without_one_a_run_is_what_it_was(ppo):
    """The first rollout and its four steps with a head on the trunk, as they came out once."""
    config = ppo(critic=None, optim=OptimConfig(lr=3e-3))
    train_policy(replace(config, run=replace(config.run, save_every=1)))
    recorded = {
        "entropy": 2.77406,
        "reward": 0.416667,
        "grad_norm": 1.8327,
        "loss/value_avg": 0.272053,
        "loss/policy_avg": -0.0373188,
        "policy/approxkl_avg": 0.184934,
    }
    row = _metrics(config)[0]
    assert {name: row[name] for name in recorded} == pytest.approx(recorded, rel=1e-3)
    assert not (Path(config.run.dir) / "critic").exists()
    state = sorted(
        path.name
        for path in (Path(config.run.dir) / "checkpoints" / "step_00000003").glob("*.safetensors")
    )
    assert state == ["model.safetensors", "optimizer.safetensors", "rng.safetensors"]


def test_a_critic_that_is_not_finite_stops_the_run(ppo, tiny_model, tmp_path, device):
    """At its fifth skipped update in a row, by its name; the policy is not trained on what it
    says."""
    head = ValueHead(32, device=device)
    torch.nn.init.constant_(head.weight, 3e38)
    HybridActor(
        load_decoder(tiny_model, dtype="float32", device=device),
        load_tokenizer(tiny_model),
        value_head=head,
    ).save_pretrained(tmp_path / "broken")
    with pytest.raises(
        RuntimeError, match="5 updates of the critic in a row had a non-finite gradient norm"
    ):
        train_policy(ppo(epochs=3, critic=CriticConfig(str(tmp_path / "broken"))))
    assert _metrics(ppo()) == []


def test_the_micro_batch_split_does_not_change_the_critic(ppo, device):
    found = []
    for name, tokens in (("whole", 10_000), ("cut", 25)):
        config = ppo(name=name, steps=1, epochs=1, tokens_per_microbatch=tokens)
        train_policy(config)
        found.append((_weights(device, config, "critic"), _metrics(config)[0]["critic/grad_norm"]))
    (whole, norm), (cut, other) = found
    assert norm == pytest.approx(other, rel=1e-4)
    start = dict(load_critic(config.model, dtype="float32", device=device).named_parameters())
    moved = max((whole[name] - start[name]).abs().max().item() for name in whole)
    assert all((whole[name] - cut[name]).abs().max().item() <= 2e-3 * moved for name in whole)


def test_warm_up_trains_the_critic_alone(ppo):
    """The policy, its learning rate and the adaptive coefficients stand still; afterwards the run
    goes on as its configuration says."""
    critic = CriticConfig("policy", warmup_steps=2, optim=OptimConfig(lr=3e-3))
    common = dict(
        critic=critic,
        optim=OptimConfig(lr=3e-3, warmup_steps=2),
        kl=KLConfig(coef=0.1, target=0.5, horizon=50),
    )
    config = ppo(steps=4, **common)
    train_policy(config)
    rows = _metrics(config)
    assert ["learning_rate" in row for row in rows] == [False, False, True, True]
    assert [row["kl_coef"] for row in rows[:3]] == [0.1] * 3
    assert rows[3]["kl_coef"] != 0.1
    assert all(row["kl"] == pytest.approx(0.0, abs=1e-6) for row in rows[:3])
    assert all(row["critic/grad_norm"] > 0 for row in rows)
    # of eight steps the fourth: its own warm-up of two began here
    assert rows[2]["learning_rate"] == pytest.approx(3e-3 * (8 - 3) / (8 - 2))
    assert rows[3]["learning_rate"] == pytest.approx(3e-3 * (8 - 7) / (8 - 2))
    assert rows[3]["critic/learning_rate"] == pytest.approx(3e-3 / 16)
    config = ppo(
        name="unscored",
        algorithm="a2c",
        steps=2,
        epochs=1,
        minibatches=1,
        kl=KLConfig(coef=0.0),
        critic=CriticConfig("policy", warmup_steps=1),
    )
    # where the training forward is the scorer, but for the first rollout, which does not train
    train_policy(config)
    first, second = _metrics(config)
    assert first["entropy"] > 1.0
    assert "grad_norm" not in first
    assert second["grad_norm"] > 0.0


@pytest.mark.cpu_only("bitwise resumption is promised on a CPU")
@pytest.mark.parametrize(
    "model, warmup, stop",
    [
        ("policy", 0, 2),
        ("policy", 2, 1),
        ("policy", 2, 2),
        ("trunk", 2, 1),
        ("trunk", 2, 2),
    ],
)
def test_resume_continues_bitwise(ppo, model, warmup, stop, device):
    """Within the critic's warm-up, at its end, and after it."""
    critic = CriticConfig(model, warmup_steps=warmup, optim=OptimConfig(lr=3e-3))
    whole = ppo(
        name="whole",
        steps=3,
        critic=critic,
        loss=LossConfig(lam_critic=1.0, bootstrap_truncated=True),
        run=replace(ppo(name="whole").run, save_every=1),
    )
    train_policy(whole)
    parts = replace(whole, run=replace(whole.run, dir=f"{whole.run.dir}_parts"))
    calls = iter(range(stop))
    with pytest.MonkeyPatch.context() as patch:

        def dies(*args, original=policy.rollout, **kwargs):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        patch.setattr(policy, "rollout", dies)
        with pytest.raises(KeyboardInterrupt):
            train_policy(parts)
    train_policy(replace(parts, run=replace(parts.run, resume=True)))
    for part in ("model", "critic") if model == "policy" else ("model",):
        assert all(
            torch.equal(p, _weights(device, parts, part)[name])
            for name, p in _weights(device, whole, part).items()
        )
    assert [_without_times(row) for row in _metrics(whole)] == [
        _without_times(row) for row in _metrics(parts)
    ]


def test_the_values_of_a_run_are_those_of_what_it_starts_from(ppo, reward_model, device):
    """A critic that an earlier run saved, and a reward model: its score of what stands before each
    token; but for one constant, by which they are right on average."""
    first, (directory, reward) = ppo(name="first", steps=1), reward_model
    train_policy(first)
    saved = Path(first.run.dir) / "critic"
    seen = _first_values(
        *(
            ppo(name=name, critic=CriticConfig(str(start)))
            for name, start in (("second", saved), ("third", directory))
        )
    )
    for batch, start in zip(seen, (saved, directory), strict=True):
        expected = torch.cat(
            [
                load_critic(start, dtype="float32", device=device)(batch.select([b])).detach()
                for b in range(batch.num_sequences)
            ]
        )
        to_go = [
            float(score) - expected[slots][mask].double().mean().item()
            for score, slots, mask in zip(
                batch.scores,
                (slice(a, b) for a, b in pairwise(batch.cu_seqlens.tolist())),
                batch.action_mask.split(list(batch.lengths)),
                strict=True,
            )
        ]
        short = sum(to_go) / len(to_go)
        torch.testing.assert_close(
            batch.values,
            torch.where(batch.positions > 0, expected + short, 0.0),
            rtol=1e-5,
            atol=1e-5,
        )
        assert batch.values[batch.action_mask].abs().min() > 0
    batch = seen[1]
    ends = batch.cu_seqlens[1:].tolist()
    starts = batch.cu_seqlens[:-1].tolist()
    before_the_last = PackedBatch.from_sequences(
        [(batch.token_ids[a : b - 1].tolist(), []) for a, b in zip(starts, ends, strict=True)],
        device=device,
    )
    torch.testing.assert_close(
        batch.values[[b - 1 for b in ends]],
        reward(before_the_last).detach() + short,
        rtol=1e-5,
        atol=1e-5,
    )


# ---- a constant in the reward --------------------------------------------------------------------
@pytest.mark.parametrize("model", ["trunk", "policy", "reward"])
def test_the_bias_begins_at_the_mean_return_of_the_first_rollout(
    ppo, reward_model, tmp_path, model
):
    """And is in the checkpoint. Rewards around 1000, of which a bias that learns by steps of its
    learning rate would never hear."""
    (tmp_path / "far.py").write_text(
        "def far(prompts, completions, completion_ids, **columns):\n    return [1000.0 + len(ids) "
        "for ids in completion_ids]\n"
    )
    critic = (
        None
        if model == "trunk"
        else CriticConfig(
            str(reward_model[0]) if model == "reward" else model, optim=OptimConfig(lr=1e-9)
        )
    )
    config = replace(
        ppo(critic=critic, optim=OptimConfig(lr=1e-9)), reward=(f"{tmp_path / 'far.py'}:far",)
    )
    (batch,) = _first_values(config)
    row, group = _metrics(config)[0], "model" if model == "trunk" else "critic"
    values = (
        torch.stack(
            [
                part[mask].double().mean()
                for part, mask in zip(
                    batch.values.split(list(batch.lengths)),
                    batch.action_mask.split(list(batch.lengths)),
                    strict=True,
                )
            ]
        )
        .mean()
        .item()
    )
    assert values == pytest.approx(row["reward"], rel=1e-6)
    if model != "reward":  # a head of zeros: the bias is all it says
        saved = load_file(
            Path(config.run.dir) / "checkpoints" / "step_00000001" / f"{group}.safetensors"
        )
        head = "value_head." if model == "trunk" else "head."
        state = json.loads(
            (Path(config.run.dir) / "checkpoints" / "step_00000001" / "state.json").read_text()
        )
        assert state["value_level"] + state["unit"] * saved[f"{head}bias"].item() == pytest.approx(
            row["reward"], rel=1e-6
        )
        assert row["completions/mean_length"] < row["completions/max_length"]
    if model == "trunk":
        assert row["sampling/value_diff_max"] < 1e-3


SHIFTS = {  # options under which a constant has ways of its own to matter
    "ppo": {},
    "strict": dict(strict=True),
    "lora": dict(lora=LoRAConfig(rank=4)),
    "td": dict(algorithm="actor_critic"),
    "k steps": dict(algorithm="a2c"),
    "its own": dict(critic=CriticConfig("policy", optim=OptimConfig(lr=3e-3))),
    "from a reward model": dict(critic="reward model"),
    "warm-up": dict(critic=CriticConfig(warmup_steps=1, optim=OptimConfig(lr=1e-2))),
    "no baseline": dict(algorithm="reinforce"),
    "running mean": dict(algorithm="reinforce_baseline"),
    "sequence ratio": dict(algorithm="sequence_ratio"),
    "replay": dict(replay=ReplayConfig()),
    "scaled": dict(scale_scores=True, score_clip=1.5),
    "normalised": dict(algorithm="ppo_max", epochs=2),
    "cut off": dict(missing_eos_penalty=1.0),
    "remax": dict(algorithm="remax"),
    "dro": dict(algorithm="dro"),
    "learned": dict(algorithm="reinforce_learned"),
    "bootstrapped": dict(loss=LossConfig(bootstrap_truncated=True, lam_critic=1.0, lam_alpha=0.4)),
    "bootstrapped td": dict(algorithm="actor_critic", loss=LossConfig(bootstrap_truncated=True)),
    "bootstrapped, its own": dict(
        critic=CriticConfig("policy", optim=OptimConfig(lr=3e-3)),
        loss=LossConfig(bootstrap_truncated=True),
    ),
    "future": dict(algorithm="a2c", kl=KLConfig(coef=0.05, level="future")),
}
QUICK = ("ppo", "its own", "no baseline", "scaled", "warm-up", "bootstrapped")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in SHIFTS],
)
def test_a_constant_in_the_reward_changes_no_course(ppo, reward_model, tmp_path, name, device):
    """Three rollouts, at 0 and at +-8: the same draws, and weights that are the same to rounding.
    The loss of a head of zeros would be 64 times as large."""
    options = {"critic": None} | SHIFTS[name]
    options["critic"] = (
        CriticConfig(str(reward_model[0]))
        if options["critic"] == "reward model"
        else options["critic"]
    )
    found = {}
    for shift in (0, 8, -8):
        (tmp_path / f"at{shift}.py").write_text(
            "def at(prompts, completions, **columns):\n"
            f"    return [{shift} + t.count('w3') for t in completions]\n"
        )
        config = replace(
            ppo(name=f"run{shift}", optim=OptimConfig(lr=1e-3, eps=1e-8), **options),
            reward=(f"{tmp_path}/at{shift}.py:at",),
        )
        train_policy(config)
        found[shift] = _weights(device, config), _metrics(config)
    start = dict(load_decoder(config.model, dtype="float32", device=device).named_parameters())
    weights, rows = found[0]
    moved = max((p - start[n]).abs().max().item() for n, p in weights.items())
    assert moved > 1e-3
    for shift in (8, -8):
        for row, other in zip(rows, found[shift][1], strict=True):
            assert other["completions/mean_length"] == row["completions/mean_length"]
            assert other["reward"] == pytest.approx(row["reward"] + shift, abs=1e-5)
            assert all(
                other[key] == pytest.approx(row[key], rel=1e-2, abs=1e-4)
                for key in ("kl", "val/explained_variance", "entropy")
                if key in row
            )
        apart = torch.cat([(p - weights[n]).flatten() for n, p in found[shift][0].items()]).abs()
        # Adam's first steps are of the sign of gradients that may be rounding
        assert apart.mean().item() < 0.02 * moved


@pytest.mark.parametrize("name", ["ppo", "td", "k steps", "learned", "its own"])
def test_a_reward_counted_in_another_unit_changes_no_course(ppo, tmp_path, name, device):
    """Three rollouts, with the KL's coefficient counted in the same and no bound on the gradient:
    the same draws, and weights that are the same to rounding. Where advantages are not whitened a
    value loss in units of its own would be 64 times too strong, or too weak, against the policy.
    Whitening adds 1e-8 to a variance, which the second rollout's, whose rewards are all alike but
    for the KL, is not far from: whitened rows are not made smaller."""
    options, found = {"critic": None} | SHIFTS.get(name, dict(algorithm="reinforce_learned")), {}
    others = (64.0, 4096.0) if name in ("ppo", "its own") else (1 / 64, 64.0)
    for times in (1.0, *others):
        (tmp_path / f"by{times}.py").write_text(
            f"def by(prompts, completions, **columns):\n    return [{times} * t.count('w3') for t "
            "in completions]\n"
        )
        optim = OptimConfig(lr=1e-3, eps=1e-12, max_grad_norm=0.0)
        options |= (
            {"critic": replace(options["critic"], optim=replace(optim, lr=3e-3))}
            if options["critic"] is not None
            else {}
        )
        config = replace(
            ppo(name=f"run{times}", optim=optim, kl=KLConfig(coef=0.05 * times), **options),
            reward=(f"{tmp_path}/by{times}.py:by",),
        )
        train_policy(config)
        found[times] = _weights(device, config), _metrics(config)
    start = dict(load_decoder(config.model, dtype="float32", device=device).named_parameters())
    weights, rows = found[1.0]
    moved = max((p - start[n]).abs().max().item() for n, p in weights.items())
    assert moved > 1e-3
    for times in others:
        for row, other in zip(rows, found[times][1], strict=True):
            assert other["completions/mean_length"] == row["completions/mean_length"]
            assert other["reward"] == pytest.approx(times * row["reward"], rel=1e-5)
            assert all(
                other[key] == pytest.approx(row[key], rel=1e-2, abs=1e-4)
                for key in ("kl", "val/explained_variance", "entropy")
                if key in row
            )
        apart = torch.cat([(p - weights[n]).flatten() for n, p in found[times][0].items()]).abs()
        assert apart.mean().item() < 0.02 * moved


# ---- the warm-up of a head on the trunk ----------------------------------------------------------
def test_a_head_on_the_trunk_warms_up_alone(ppo, device):
    """The policy stands still bit by bit, the head learns at a rate of its own, and then one loss
    trains both."""
    critic = CriticConfig(warmup_steps=2, optim=OptimConfig(lr=1e-2))
    config = ppo(
        critic=critic,
        steps=4,
        optim=OptimConfig(lr=3e-3),
        kl=KLConfig(coef=0.1, target=0.5, horizon=50),
        run=replace(ppo().run, save_every=1, keep=9),
    )
    train_policy(config)
    rows = _metrics(config)
    assert (
        ["learning_rate" in row for row in rows]
        == ["critic/learning_rate" not in row for row in rows]
        == [False, False, True, True]
    )
    assert [row["kl_coef"] for row in rows[:3]] == [0.1] * 3
    assert rows[1]["critic/learning_rate"] == pytest.approx(1e-2 / 8)  # of eight steps the last
    assert rows[2]["learning_rate"] == pytest.approx(3e-3 * (8 - 3) / 8)
    start, saved = (
        dict(
            load_decoder(config.model, dtype="float32", device=device).named_parameters(
                prefix="decoder"
            )
        ),
        {},
    )
    for step in range(1, 4):
        saved[step] = load_file(
            Path(config.run.dir) / "checkpoints" / f"step_0000000{step}" / "model.safetensors"
        )
    for step in (1, 2):
        assert all(torch.equal(saved[step][name], p.cpu()) for name, p in start.items())
    assert not torch.equal(saved[1]["value_head.weight"], saved[2]["value_head.weight"])
    assert saved[2]["value_head.weight"].abs().max() > 1e-3
    assert not any(torch.equal(saved[3][name], p) for name, p in start.items())
    assert not (Path(config.run.dir) / "critic").exists()  # it is the policy's


@pytest.mark.full
def test_real_courses_are_the_same_with_a_constant_in_the_reward(shared, tmp_path):
    """stories260k, 12 rollouts of 32 completions that may end at a full stop, at 0 and at +-10, all
    rows. With a head that begins at 0 a constant of 10 takes the mean length of ppo from 22.6 to
    1.5, and -10 to 38. Length, score and KL of the last four rollouts; about five minutes. The
    rewards are exact in float32 with and without the constant: rounding alone takes a policy to
    other samples within a step or two."""
    data = Path(__file__).resolve().parents[3] / "examples" / "prompts" / "stories.jsonl"
    for algorithm, row in ALGORITHMS.items():
        found = {}
        for shift in (0, 10, -10):
            score = "round(320 * sum(map('aeiou'.count, t)) / max(1, len(t))) / 64"
            (tmp_path / f"at{shift}.py").write_text(
                f"def at(prompts, completions, **columns):\n    return [{shift} + {score} for t in "
                "completions]\n"
            )
            config = PolicyConfig(
                str(shared / "models" / "stories260k"),
                str(data),
                (f"{tmp_path}/at{shift}.py:at",),
                algorithm,
                steps=12,
                device="cpu",
                prompts_per_step=32 // row.samples_per_prompt,
                optim=OptimConfig(lr=3e-4),
                run=RunConfig(str(tmp_path / f"{algorithm}{shift}"), progress=False),
                kl=KLConfig(measure=True),
                generation=GenerationConfig(max_new_tokens=40, stop_token_ids=(1, 426)),
            )
            train_policy(config)
            rows = _metrics(config)
            assert [line["completions/mean_length"] for line in rows[:2]] == [
                line["completions/mean_length"] for line in found.get(0, rows)[:2]
            ], algorithm
            found[shift] = rows
        ends = {
            shift: [
                sum(line[key] for line in rows[-4:]) / 4
                for key in ("completions/mean_length", "reward", "kl")
            ]
            for shift, rows in found.items()
        }
        for shift in (10, -10):
            length, reward, kl = ends[shift]
            assert (length, reward - shift, kl) == (
                pytest.approx(ends[0][0], abs=4),
                pytest.approx(ends[0][1], abs=0.1),
                pytest.approx(ends[0][2], abs=1),
            ), (algorithm, ends)


# ---- configuration -------------------------------------------------------------------------------
def test_the_options_turn_it_on():
    options = ["--model", "m", "--data", "d", "--reward", "r.py:f"]
    assert parse_config("ppo", options).critic is None
    config = parse_config(
        "ppo",
        [
            *options,
            "--critic.model",
            "runs/reward/model",
            "--critic.optim.lr",
            "3e-6",
            "--critic.warmup_steps",
            "5",
        ],
    )
    assert config.critic == CriticConfig("runs/reward/model", 5, OptimConfig(lr=3e-6, eps=1e-5))
    warm = parse_config(
        "ppo", [*options, "--critic.optim.lr", "3e-4", "--critic.warmup_steps", "5"]
    )
    assert warm.critic == CriticConfig("trunk", 5, OptimConfig(lr=3e-4, eps=1e-5))
    # a warm-up alone makes no second model
    assert (warm.own_critic, config.own_critic) == (None, config.critic)
    with pytest.raises(
        ConfigError, match=r"critic\.optim only with critic\.model .* or critic\.warmup_steps"
    ):
        parse_config("ppo", [*options, "--critic.optim.lr", "3e-6"])


def test_options_that_contradict_each_other():
    for kwargs, message in (
        (
            dict(algorithm="grpo"),
            "critic to be left out with grpo, whose advantage grpo has no use for values "
            ".*contradict",
        ),
        (dict(loss=LossConfig(advantage="reward_to_go")), "critic to be left out"),
        (dict(steps=3, critic=CriticConfig(warmup_steps=3)), r"critic.warmup_steps < steps = 3"),
        (dict(critic=None, algorithm="grpo", samples_per_prompt=1), "samples_per_prompt"),
    ):
        with pytest.raises(ConfigError, match=message):
            PolicyConfig("m", "d", ("r.py:f",), **({"critic": CriticConfig()} | kwargs))
    with pytest.raises(ConfigError, match=r"critic.warmup_steps >= 0"):
        CriticConfig(warmup_steps=-1)


def test_another_vocabulary_is_refused(ppo, tiny_model, tmp_path, device):
    raw = load_decoder(tiny_model, dtype="float32", device=device).config.raw
    small, large = raw | {"vocab_size": 31}, raw | {"vocab_size": 40}
    tokenizer = load_tokenizer(tiny_model)
    for name, shape, with_tokenizer in (
        ("small", small, True),
        ("large", large, False),
        ("padded", large, True),
    ):
        save_pretrained(
            Decoder.random(model_config(shape), seed=0, device=device),
            tmp_path / name,
            tokenizer=tokenizer if with_tokenizer else None,
        )
    for name, message in (
        ("small", "read the policy's token ids .a vocabulary of 32., got a vocabulary of 31"),
        ("large", "got a vocabulary of 40 in"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_policy(ppo(name=f"run_{name}", critic=CriticConfig(str(tmp_path / name))))
        assert not (tmp_path / f"run_{name}").exists()
    # more rows, the same ids
    train_policy(ppo(name="run_padded", steps=1, critic=CriticConfig(str(tmp_path / "padded"))))
    renamed = load_tokenizer(tiny_model)
    renamed.add_tokens(["another"])
    save_pretrained(
        Decoder.random(model_config(large), seed=0, device=device),
        tmp_path / "renamed",
        tokenizer=renamed,
    )
    with pytest.raises(ConfigError, match="and a tokenizer that gives other ids"):
        train_policy(ppo(name="run_renamed", critic=CriticConfig(str(tmp_path / "renamed"))))


def test_a_critic_of_another_size(ppo, tiny_model, tmp_path, device):
    """Of another family and width it works; with fewer positions it is refused, with the remedy."""
    raw = load_decoder(tiny_model, dtype="float32", device=device).config.raw
    tokenizer = load_tokenizer(tiny_model)
    save_pretrained(
        Decoder.random(model_config(raw | {"max_position_embeddings": 16}), seed=0, device=device),
        tmp_path / "short",
        tokenizer=tokenizer,
    )
    with pytest.raises(
        ConfigError, match=r"have the 64 positions .* got 16 .*lower max_prompt_length to 8 or less"
    ):
        train_policy(ppo(name="run_short", critic=CriticConfig(str(tmp_path / "short"))))
    train_policy(
        ppo(
            name="run_fits",
            steps=1,
            max_prompt_length=8,
            critic=CriticConfig(str(tmp_path / "short")),
        )
    )
    save_pretrained(
        Decoder.random(model_config(OTHER), seed=0, device=device),
        tmp_path / "gpt2",
        tokenizer=tokenizer,
    )
    train_policy(
        ppo(
            name="run_gpt2",
            steps=1,
            max_prompt_length=8,
            critic=CriticConfig(str(tmp_path / "gpt2")),
        )
    )  # another family and size


def test_a_resumed_run_whose_critic_is_another_model_is_refused(ppo, tiny_model, tmp_path, device):
    raw = load_decoder(tiny_model, dtype="float32", device=device).config.raw
    save_pretrained(Decoder.random(model_config(raw), seed=0, device=device), tmp_path / "start")
    config = ppo(steps=2, critic=CriticConfig(str(tmp_path / "start")))
    train_policy(replace(config, steps=1))
    save_pretrained(
        Decoder.random(model_config(raw | {"intermediate_size": 64}), seed=0, device=device),
        tmp_path / "start",
    )
    with pytest.raises(
        ConfigError, match=r"critic\.model: model\.safetensors holds something else than before"
    ):
        train_policy(replace(config, run=replace(config.run, resume=True)))


def test_what_the_critic_holds_is_lent_the_cache_but_for_its_weights(device):
    raw = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
    }
    actor = HybridActor(Decoder.random(model_config(raw), 0, device=device))
    critic = SeparateCritic(
        Decoder.random(model_config(raw), 1, device=device), ValueHead(64, device=device)
    )
    actor.generate([[1, 2, 3]], SamplingParams(max_new_tokens=2))
    batch, used = PackedBatch.from_sequences([([1] * 50, [2] * 50)], device=device), []
    for others in ((), (critic,)):
        with actor.lend_cache(*others) as arena:
            values = critic(batch)
            used.append(arena.used)
            values.sum().backward()
            del values
    assert 0 < used[1] < used[0]
