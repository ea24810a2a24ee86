"""Training with a model of a real size (`--instruct DIR`, SmolLM2-135M-Instruct from
examples/smollm2.py).

training pass       trunk, head and log-probabilities of the completions' tokens, forward and
                    backward, of 8 problems of GSM8K with their answers; transformers pads them as
                    TRL does, prompts to the left and completions to the right, and computes logits
                    of the completions alone
two threads         generation and the training pass, on two threads and on one: what a second core
                    adds
GRPO step           8 prompts of GSM8K (`--questions FILE`), 8 samples of 128 tokens each, one
                    optimizer step, no KL, beside TRL's GRPOTrainer
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from bench.bench_decode import NEW, PROMPT, as_many, models
from bench.bench_generate import ceilings, workload
from bench.bench_step import as_it_should, one, trl_step
from bench.harness import DEVICE, Random, agree, resident
from transformers import AutoTokenizer

from fusedrl.engine import HybridActor
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.tools.bench import ours as generated
from fusedrl.engine.tools.bench_step import PolicyStep
from fusedrl.engine.tools.workloads import Workload, forward_flops

# tokens of (question, answer): the first eight problems of GSM8K's training set
GSM8K = ((39, 61), (34, 66), (61, 103), (56, 130), (27, 77), (65, 168), (62, 90), (107, 117))
SAMPLES, TOKENS = 8, 128


@pytest.fixture
def path(request) -> Path:
    found = request.config.getoption("--instruct")
    if not found.is_dir():
        pytest.skip(f"no model in {found}: python examples/smollm2.py {found} writes it")
    return found


@cache
def batch_of(vocab: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(1)

    def some(n: int) -> list[int]:
        return torch.randint(1, vocab, (n,), generator=generator).tolist()

    return PackedBatch.from_sequences([(some(q), some(a)) for q, a in GSM8K]).to(DEVICE)


def padded(batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Ids and mask [B, longest prompt + longest completion], and the longest completion."""
    P, C = (max(sizes) for sizes in zip(*GSM8K, strict=True))
    ids = torch.zeros(len(GSM8K), P + C, dtype=torch.int64, device=DEVICE)
    mask = torch.zeros_like(ids)
    for b, (q, a) in enumerate(GSM8K):
        ids[b, P - q : P + a] = batch.token_ids[batch.slots([b])]
        mask[b, P - q : P + a] = 1
    return ids, mask, C


def training_pass(actor: HybridActor) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Log-probabilities of the completions' tokens, and the gradient of the embedding."""
    batch, parameters = batch_of(actor.decoder.config.vocab_size), list(actor.parameters())
    upstream_N = Random(1).normal(batch.num_tokens) * batch.action_mask

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        logp_N, _ = actor.logprobs(batch, actor.forward(batch))
        gradient = torch.autograd.grad(logp_N, parameters, upstream_N)[0]
        return logp_N.detach()[batch.action_mask], gradient

    return run


def peers_training_pass(model: Any) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    batch, parameters = batch_of(model.config.vocab_size), list(model.parameters())
    ids_BT, mask_BT, C = padded(batch)
    drawn_BC = mask_BT[:, -C:].bool()
    upstream_N = Random(1).normal(batch.num_tokens)[batch.action_mask]

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        logits_BCV = model(
            ids_BT, attention_mask=mask_BT, position_ids=positions_BT, logits_to_keep=C + 1
        ).logits[:, :-1]
        # in float32, as TRL's selective_log_softmax has it for float32 alone
        logp_BC = logits_BCV.float().log_softmax(-1).gather(-1, ids_BT[:, -C:, None])[..., 0]
        logp_A = logp_BC[drawn_BC]
        return logp_A.detach(), torch.autograd.grad(logp_A, parameters, upstream_N)[0]

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_training_pass(contest, path, dtype):
    both = models(path, dtype)
    lengths, answered = [q + a for q, a in GSM8K], sum(a for _, a in GSM8K)
    both.model.train()
    contest(
        "training pass, 135M",
        f"8 of GSM8K: {sum(lengths)} tokens",
        dtype,
        {
            "fusedrl": training_pass(both.actor),
            "transformers, padded": peers_training_pass(both.model),
        },
        flops=3 * forward_flops(both.actor.decoder.config, lengths, answered),
        same=agree(1e-3, of_max=1e-3 if dtype == torch.float32 else 0.2),
    )


def on_threads(count: int, function: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        torch.set_num_threads(count)
        try:
            return function()
        finally:
            torch.set_num_threads(1)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("work", ["generate", "train"])
def bench_two_threads(contest, path, work, dtype):
    both = models(path, dtype)
    asked = workload([PROMPT] * 16, [NEW[16]] * 16, both.vocab)
    batch = batch_of(both.vocab)
    run = generated(both.actor, asked, 0.0) if work == "generate" else training_pass(both.actor)
    contest(
        f"two threads: {work}, 135M",
        f"16 x ({PROMPT} + {NEW[16]})" if work == "generate" else f"{batch.num_tokens} tokens",
        dtype,
        {"fusedrl": on_threads(2, run), "fusedrl, one thread": on_threads(1, run)},
        **(ceilings(both, asked) if work == "generate" else {}),
        same=as_many if work == "generate" else agree(1e-3, of_max=1e-3),
    )


def questions(file: Path) -> list[str]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line)["question"] for line, _ in zip(lines, range(8), strict=False)]


def our_step(path: Path, texts: list[str], tokenizer: Any) -> PolicyStep:
    actor = HybridActor.from_pretrained(path, dtype=torch.float32, device=DEVICE)
    actor.decoder.config = dataclasses.replace(actor.decoder.config, eos_token_ids=())
    actor.tokenizer = None
    prompts = tuple(tuple(tokenizer(text)["input_ids"]) for text in texts)
    asked = Workload("GSM8K", prompts, (TOKENS,) * len(prompts), SAMPLES)
    return PolicyStep(actor, asked, algorithm="grpo", tokens_per_microbatch=2048)


def their_step(path: Path, texts: list[str], tokenizer: Any, directory: Path) -> Any:
    sizes = {"texts": texts, "samples": SAMPLES, "new": TOKENS, "parts": len(texts)}
    return trl_step(path, tokenizer, directory, **sizes)


def two_steps(contestant: str, path: str, file: str) -> None:
    """Print the peak of resident memory of this process after two steps, in bytes."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    asked = Path(path), questions(Path(file)), tokenizer
    with TemporaryDirectory() as directory, ExitStack() as stack:
        step = (
            our_step(*asked)
            if contestant == "fusedrl"
            else stack.enter_context(their_step(*asked, Path(directory)))
        )
        step(), step()  # the moments of the first stand while the second is computed
        print(resident("VmHWM"))


def memory(path: Path, file: Path) -> dict[str, float]:
    """Peak of a process that makes two steps, model and libraries included; malloc as it comes."""

    def peak(contestant: str) -> int:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "from bench.bench_instruct import two_steps; "
                f"two_steps({contestant!r}, {str(path)!r}, {str(file)!r})",
            ],
            capture_output=True,
            text=True,
            env=os.environ | {"MALLOC_MMAP_MAX_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"},
        )
        if done.returncode:
            raise RuntimeError(f"{contestant}: expected a peak of memory, got\n{done.stderr}")
        return int(done.stdout.split()[-1])

    mine, theirs = peak("fusedrl"), peak("TRL")
    return {
        "peak memory of the process, MB": mine / 1e6,
        "TRL's, MB": theirs / 1e6,
        "ours / TRL's, %": 100 * mine / theirs,
    }


def bench_grpo(contest, request, path, tmp_path):
    pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    file = request.config.getoption("--questions")
    if not file.is_file():
        pytest.skip(
            f"no questions in {file}: name a JSON lines file with `question` by --questions"
        )
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    asked = path, questions(file), tokenizer
    step = our_step(*asked)
    config, work = step.actor.decoder.config, step.workload
    with their_step(*asked, tmp_path) as theirs:
        contest(
            "GRPO step, 135M",
            f"8 of GSM8K x {SAMPLES} x {TOKENS}",
            torch.float32,
            {"fusedrl": one(step), "TRL": theirs},
            flops=4 * forward_flops(config, work.lengths(), work.output_tokens),
            same=as_it_should,
            derive=lambda _: memory(path, file) if DEVICE.type == "cpu" else {},
        )
