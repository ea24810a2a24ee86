"""Whole steps of training with a real model (`--model DIR`, a small Llama-like one).

PPO step, strict    64 x (16 + 64) tokens: generate, score against a frozen reference, advantages, 4
                    epochs; the same step with strict numerics, whose bits of
                    sampler and trainer are the same
GRPO step           8 prompts of 8 samples of 64 tokens, one optimizer step, no KL; TRL's
                    GRPOTrainer on the same weights, prompts and batch, as it generates by itself
                    and with our engine in its `rollout_func`

Every contestant draws all 64 tokens of every completion. A step is everything from its prompts to
its updated weights. TRL's logging, saving and progress bar are off, and so is the gradient
checkpointing that TRL does by default. TRL runs in the loop of its trainer, which halts between
steps.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.harness import DEVICE

from fusedrl.engine import HybridActor, SamplingParams
from fusedrl.engine.model.heads import ValueHead
from fusedrl.engine.tools.bench_step import PolicyStep
from fusedrl.engine.tools.workloads import Workload, forward_flops, random_workload

PROMPTS, SAMPLES, NEW = 8, 8, 64
TEXTS = [
    f"Once upon a time there was a {animal} who"
    for animal in ("cat", "dog", "fox", "pig", "cow", "hen", "bear", "duck")
]


@pytest.fixture(scope="module")
def path(request) -> Path:
    found = request.config.getoption("--model")
    if not found.is_dir():
        pytest.skip(f"no model in {found.name}/: name the directory of one by --model")
    return found


def endless(actor: HybridActor) -> HybridActor:
    actor.decoder.config = dataclasses.replace(actor.decoder.config, eos_token_ids=())
    actor.tokenizer = None
    return actor


def as_it_should(answer: tuple[int, int], other: tuple[int, int]) -> None:
    if answer != other:
        raise AssertionError(f"{answer} and {other} completions and tokens of a step")


def one(step: PolicyStep) -> Callable[[], tuple[int, int]]:
    def run() -> tuple[int, int]:
        step()
        return step.batch.num_sequences, int(step.batch.action_mask.sum())

    return run


def bench_strict(contest, path):
    actor = endless(HybridActor.from_pretrained(path, dtype=torch.float32, device=DEVICE))
    config = actor.decoder.config
    workload = random_workload(config.vocab_size, 64, 16, NEW)
    reference, contestants = HybridActor(copy.deepcopy(actor.decoder)), {}
    for name, strict in (("fusedrl", False), ("fusedrl, strict", True)):
        trained = HybridActor(
            copy.deepcopy(actor.decoder),
            value_head=ValueHead(config.hidden_size, device=DEVICE),
            strict=strict,
        )
        step = PolicyStep(trained, workload, algorithm="ppo", epochs=4, reference=reference)
        contestants[name] = one(step)
    contest(
        "PPO step, strict",
        "64 x (16 + 64), 4 epochs",
        torch.float32,
        contestants,
        flops=int(sum(step.flops().values())),
        same=as_it_should,
    )


def bench_grpo(contest, path, tmp_path):
    pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    actor = endless(HybridActor.from_pretrained(path, dtype=torch.float32, device=DEVICE))
    workload = Workload(
        "stories",
        tuple(tuple(tokenizer(text)["input_ids"]) for text in TEXTS),
        (NEW,) * PROMPTS,
        SAMPLES,
    )
    step = PolicyStep(actor, workload, algorithm="grpo")
    # Generation computes every position once, and the head where a token is drawn; training does so
    # once more, and twice as much backwards.
    flops = 4 * forward_flops(actor.decoder.config, workload.lengths(), workload.output_tokens)
    with ExitStack() as stack:
        theirs = {
            name: stack.enter_context(trl_step(path, tokenizer, tmp_path / name, engine))
            for name, engine in (("TRL", False), ("TRL, our rollouts", True))
        }
        contest(
            "GRPO step",
            f"{PROMPTS} x {SAMPLES} x {NEW}",
            torch.float32,
            {"fusedrl": one(step), **theirs},
            flops=flops,
            same=as_it_should,
        )


def trl_arguments(directory: Path, sequences: int, samples: int, new: int, parts: int) -> Any:
    """GRPOConfig of steps of so many completions of `new` tokens, trained on in `parts`."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=str(directory),
        per_device_train_batch_size=sequences // parts,
        gradient_accumulation_steps=parts,
        num_generations=samples,
        max_steps=1000,
        max_completion_length=new,
        generation_kwargs={"min_new_tokens": new},
        learning_rate=1e-6,
        temperature=1.0,
        beta=0.0,
        use_cpu=DEVICE.type == "cpu",
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        seed=0,
    )


@contextmanager
def trl_step(
    path: Path,
    tokenizer: Any,
    directory: Path,
    engine: bool = False,
    *,
    texts: Sequence[str] = TEXTS,
    samples: int = SAMPLES,
    new: int = NEW,
    parts: int = 1,
) -> Iterator[Callable[[], tuple[int, int]]]:
    """One step of a GRPOTrainer that stands in its loop, in a thread of its own, between two
    steps; its batch is trained on in so many parts."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
    from trl import GRPOTrainer

    from fusedrl.engine.rollout.trl import rollout_func

    go, done = threading.Semaphore(0), threading.Semaphore(0)
    state: dict[str, Any] = {"stop": False, "answer": (0, 0), "error": None}

    def share_of_even_ids(completion_ids, **_):
        state["answer"] = len(completion_ids), sum(map(len, completion_ids))
        return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

    class Halt(TrainerCallback):
        def on_step_begin(self, args, state_, control, **_):
            go.acquire()
            control.should_training_stop = state["stop"]

        def on_step_end(self, args, state_, control, **_):
            done.release()
            control.should_training_stop = state["stop"]

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    whole = SamplingParams(max_new_tokens=new, min_new_tokens=new)
    extra = {"rollout_func": rollout_func(params=whole)} if engine else {}
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=share_of_even_ids,
        args=trl_arguments(directory, len(texts) * samples, samples, new, parts),
        callbacks=[Halt()],
        train_dataset=Dataset.from_dict({"prompt": list(texts)}),
        **extra,
    )
    trainer.remove_callback(PrinterCallback)

    def train() -> None:
        torch.set_num_threads(1)  # OpenMP's number is a thread's own
        try:
            trainer.train()
        except BaseException as error:
            state["error"] = error
        done.release()

    thread = threading.Thread(target=train, daemon=True)
    thread.start()

    def run() -> tuple[int, int]:
        go.release()
        done.acquire()
        if state["error"] is not None:
            raise RuntimeError("TRL's trainer stopped") from state["error"]
        return state["answer"]

    try:
        yield run
    finally:
        state["stop"] = True
        go.release()
        thread.join()
