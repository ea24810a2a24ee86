"""The cut into micro-batches does not change the gradient in bfloat16 either: what the optimizer of
every stage is given, against the float32 gradient of the same weights, at 1, 16 and 256
micro-batches. (On a CPU activations are float32 beside bfloat16 weights, so that the float32 run
differs in the roundings of gradients alone.)"""

import math
from typing import Any

import pytest
import torch
from torch import nn

from fusedrl.engine.config import (
    CriticConfig,
    DPOConfig,
    GenerationConfig,
    LoRAConfig,
    PolicyConfig,
    PtxConfig,
    RejectionConfig,
    RewardModelConfig,
    RunConfig,
    SFTConfig,
)
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.weights import load_decoder, load_tokenizer, save_pretrained
from fusedrl.engine.model.wide import narrow_products
from fusedrl.engine.optim import adamw as optim
from fusedrl.engine.optim.adamw import Optimizer, StepResult, grad_norm, make_optimizer
from fusedrl.engine.optim.natural_gradient import _dot
from fusedrl.engine.rollout.rollout import rollout
from fusedrl.engine.stages import policy, rejection
from fusedrl.engine.stages.dpo import train_dpo
from fusedrl.engine.stages.policy import train_policy
from fusedrl.engine.stages.rejection import train_rejection
from fusedrl.engine.stages.reward_model import train_reward_model
from fusedrl.engine.stages.sft import train_sft

SEQUENCES = 256
REWARD = (
    "def f(prompts, completions, completion_ids, **columns):\n    return [float(sum(ids)) % "
    "7 for ids in completion_ids]\n"
)


@pytest.fixture(scope="module")
def rounded(tiny_model, tmp_path_factory):
    """The tiny model with weights that bfloat16 holds exactly."""
    decoder: Decoder = load_decoder(tiny_model, dtype="float32", device="cpu")
    with torch.no_grad():
        for p in decoder.parameters():
            p.copy_(p.bfloat16())
    directory = tmp_path_factory.mktemp("models") / "rounded"
    save_pretrained(decoder, directory, tokenizer=load_tokenizer(tiny_model))
    return directory


@pytest.fixture
def files(tmp_path, write_jsonl):
    words = [
        " ".join(f"w{(5 * i + 3 * j) % 28}" for j in range(2 + i % 4)) for i in range(SEQUENCES)
    ]
    (tmp_path / "rewards.py").write_text(REWARD)
    return {
        "sft": write_jsonl(
            "sft.jsonl", [{"prompt": word, "completion": words[-i]} for i, word in enumerate(words)]
        ),
        "pairs": write_jsonl(
            "pairs.jsonl",
            [
                {"prompt": word, "chosen": f"w1 {words[-i]}", "rejected": f"w2 {words[i - 7]}"}
                for i, word in enumerate(words)
            ],
        ),
        "prompts": write_jsonl("prompts.jsonl", [{"prompt": word} for word in words]),
        "reward": (f"{tmp_path / 'rewards.py'}:f",),
    }


def run_of(stage, model, files, **options):
    """One step of a stage."""
    sampled = {"steps": 1, "generation": GenerationConfig(max_new_tokens=6)}
    groups = {"prompts_per_step": SEQUENCES // 8, "samples_per_prompt": 8, "minibatches": 1}
    if stage == "sft":
        return train_sft(SFTConfig(model, files["sft"], sequences_per_step=SEQUENCES, **options))
    if stage in ("reward", "imitation"):
        return train_reward_model(
            RewardModelConfig(
                model,
                files["pairs"],
                eval_fraction=0.0,
                pairs_per_step=SEQUENCES,
                normalize="none",
                imitation_coef=0.5 * (stage == "imitation"),
                **options,
            )
        )
    if stage in ("dpo", "lora"):
        lora = LoRAConfig(rank=4) if stage == "lora" else None
        return train_dpo(
            DPOConfig(
                model,
                files["pairs"],
                eval_fraction=0.0,
                pairs_per_step=SEQUENCES,
                lora=lora,
                **options,
            )
        )
    if stage == "rejection":
        return train_rejection(
            RejectionConfig(
                model,
                files["prompts"],
                files["reward"],
                prompts_per_step=SEQUENCES,
                samples_per_prompt=2,
                **sampled,
                **options,
            )
        )
    more = {
        "grpo": groups,
        "strict": groups | {"strict": True},
        "ppo": {"prompts_per_step": SEQUENCES, "epochs": 1, "minibatches": 1},
        "critic": {
            "prompts_per_step": SEQUENCES,
            "epochs": 1,
            "minibatches": 1,
            "critic": CriticConfig("policy"),
        },
        "ptx": groups | {"ptx": PtxConfig(files["sft"], sequences_per_step=SEQUENCES)},
    }[stage]
    algorithm = {"ppo": "ppo", "critic": "ppo"}.get(stage, "grpo")
    return train_policy(
        PolicyConfig(
            model, files["prompts"], files["reward"], algorithm, **sampled, **more, **options
        )
    )


@pytest.fixture
def gradients(rounded, files, tmp_path, monkeypatch, device):
    """(stage, dtype, tokens of a micro-batch) -> what each optimizer is given, as one vector, and
    the backward passes that made it."""
    seen: list[list[torch.Tensor]] = []
    passes = [0]
    backward = torch.Tensor.backward

    def counted(self, *args, **kwargs):
        passes[0] += 1
        return backward(self, *args, **kwargs)

    def step(self, *, max_grad_norm=None, trees=()):
        seen.append([g.double().flatten() for g in self.gradients().values()])
        return StepResult(1.0, True)

    # completions, of which one in some thousands is another one in the other dtype
    first: dict[str, Any] = {}

    def same(*args, **kwargs):
        if "rollout" not in first:
            first["rollout"] = rollout(*args, **kwargs)
        return first["rollout"]

    for module in (policy, rejection):
        monkeypatch.setattr(module, "rollout", same)
    monkeypatch.setattr(torch.Tensor, "backward", counted)
    monkeypatch.setattr(Optimizer, "step", step)

    def run(stage, dtype, tokens):
        seen.clear()
        passes[0] = 0
        run_of(
            stage,
            str(rounded),
            files,
            dtype=dtype,
            device=str(device),
            tokens_per_microbatch=tokens,
            run=RunConfig(str(tmp_path / f"{stage}{dtype}{tokens}"), progress=False),
        )
        return [torch.cat(parts) for parts in seen], passes[0]

    return run


def apart(found, right):
    return ((found - right).norm() / right.norm()).item()


def errors(gradients, stage):
    """{backward passes of the optimizers together: relative error}, the largest of the
    optimizers'."""
    exact, _ = gradients(stage, "float32", 10_000)
    found = {}
    for tokens in (10_000, 260, 1):
        got, passes = gradients(stage, "bfloat16", tokens)
        found[passes] = max(apart(a, b) for a, b in zip(got, exact, strict=True))
    return found


QUICK = ("sft", "ppo", "critic", "ptx")


@pytest.mark.parametrize(
    "stage",
    [
        stage if stage in QUICK else pytest.param(stage, marks=pytest.mark.full)
        for stage in (
            "sft",
            "reward",
            "imitation",
            "dpo",
            "lora",
            "rejection",
            "grpo",
            "strict",
            "ppo",
            "critic",
            "ptx",
        )
    ],
)
def test_more_micro_batches_are_no_less_exact(gradients, stage):
    found = errors(gradients, stage)
    (few, one), (_, some), (most, many) = sorted(found.items())
    assert (few, most) == {"critic": (2, 2 * SEQUENCES), "ptx": (2, 2 * SEQUENCES)}.get(
        stage, (1, SEQUENCES)
    )
    # weights and what comes of them are rounded, and on some processors what goes into the products
    # of the backward pass
    narrow = narrow_products(torch.device("cpu"), torch.bfloat16)
    assert one < torch.finfo(torch.bfloat16).eps / (1 if narrow else 2), found
    # each micro-batch's gradient rounded once, their sum not at all
    assert max(some, many) < 1.2 * one, found


def test_sums_in_bfloat16_would_not_pass(gradients, monkeypatch):
    monkeypatch.setattr(optim, "_adder", lambda sums, name: lambda p: None)
    found = errors(gradients, "sft")
    assert found[SEQUENCES] > 1e-2, found


# ---- the optimizer -------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_dropped_and_leave_with_the_optimizer(dtype, device):
    p = nn.Parameter(torch.ones(70_001, dtype=dtype, device=device))  # more than is wide at a time
    plain, wide = make_optimizer({"p": p}, lr=0.1), None
    (3 * p).sum().backward()
    assert torch.equal(p.grad, torch.full_like(p, 3)), "without sums .grad is torch's"
    plain.zero_grad()
    wide = make_optimizer({"p": p}, lr=0.1, accumulate="float32")
    for _ in range(1000):
        (1.0078125 * p).sum().backward()
    assert p.grad is None
    assert torch.equal(wide.gradients()["p"], torch.full((70_001,), 1007.8125, device=device)), (
        "1,000 times, in an exact sum"
    )
    assert wide.zero_grad() == 4 * 70_001
    assert wide.gradients() == {}
    (2 * p).sum().backward()
    p.grad = torch.ones_like(p)  # by hand, beside the sum
    assert torch.equal(wide.gradients()["p"], torch.full((70_001,), 3.0, device=device))
    assert wide.step(max_grad_norm=1.0).grad_norm == pytest.approx(3 * math.sqrt(70_001), rel=1e-6)
    del wide
    p.grad = None
    p.sum().backward()
    assert p.grad is not None


@pytest.mark.parametrize("numel", [0, 1, 4095, 4097, 1 << 24])
def test_norms_of_large_tensors(numel, device):
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(device).mul_(1e-3)
    exact = x.double().square().sum().item()
    assert grad_norm([x, x]) == pytest.approx(math.sqrt(2 * exact), rel=1e-6)
    if numel:
        assert _dot(x, x) == pytest.approx(exact, rel=2e-5)
    if numel == 1 << 24:
        assert abs(float(torch.linalg.vector_norm(x)) - math.sqrt(exact)) > 3e-4 * math.sqrt(
            exact
        ), "what one float32 sum makes of it"
    for value in (math.inf, math.nan):
        assert not math.isfinite(grad_norm([torch.tensor([value, 1.0], device=device)]))
