"""Decoding with a model of a real size (`--instruct DIR`, SmolLM2-135M-Instruct from
examples/smollm2.py), with few and with many sequences. fusedrl is compared with transformers, and
with llama.cpp if its package is installed (bench/llamacpp.py).

Prompts are 8 random tokens; decoding is greedy, and no contestant stops at an EOS. The ceiling
counts every weight once per step, the keys and values that are read, and the multiplications. In
float32 the tokens are checked to be equal. In bfloat16 fusedrl and transformers round differently,
so only the number of tokens is checked. The same holds for llama.cpp, whose keys and values are
float16.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench import llamacpp
from bench.bench_generate import ceilings, equal, workload
from bench.harness import DEVICE
from transformers import AutoModelForCausalLM

from fusedrl.engine import HybridActor
from fusedrl.engine.tools.bench import ours, padded_generate

NEW = {1: 32, 8: 24, 16: 16, 64: 8}  # tokens of each of so many sequences
PROMPT = 8


@cache
def models(path: Path, dtype: torch.dtype) -> SimpleNamespace:
    """The same weights in both, neither of which stops at an EOS."""
    model = (
        AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False)
        .eval()
        .to(DEVICE)
    )
    model.generation_config.eos_token_id = None
    actor = HybridActor.from_pretrained(path, dtype=dtype, device=DEVICE)
    actor.decoder.config = dataclasses.replace(actor.decoder.config, eos_token_ids=())
    actor.tokenizer = None
    return SimpleNamespace(actor=actor, model=model, vocab=actor.decoder.config.vocab_size)


def as_many(a: list[list[int]], b: list[list[int]]) -> None:
    if list(map(len, a)) != list(map(len, b)):
        raise AssertionError(f"{list(map(len, a))} and {list(map(len, b))} tokens")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path | None:
    """Folder of llama.cpp's files; None without its package, or on a GPU."""
    there = all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))
    return tmp_path_factory.mktemp("gguf") if there and DEVICE.type == "cpu" else None


@pytest.mark.parametrize("sequences", NEW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_decode(contest, request, dtype, sequences, gguf):
    path = request.config.getoption("--instruct")
    if not path.is_dir():
        pytest.skip(f"no model in {path}: python examples/smollm2.py {path} writes it")
    both = models(path, dtype)
    asked = workload([PROMPT] * sequences, [NEW[sequences]] * sequences, both.vocab)
    contestants = {
        "fusedrl": ours(both.actor, asked, 0.0),
        "transformers": padded_generate(both.model, asked, 0.0),
    }
    if gguf is not None:
        contestants["llama.cpp"] = llamacpp.contestant(
            path, dtype, asked.prompts, NEW[sequences], gguf
        )
    contest(
        "decode, 135M",
        f"{sequences} x ({PROMPT} + {NEW[sequences]})",
        dtype,
        contestants,
        **ceilings(both, asked),
        same=equal if dtype == torch.float32 else as_many,
        unchecked=["llama.cpp"],
    )
