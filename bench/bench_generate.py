"""Generation of 64 x 128 tokens of a real model (`--model DIR`, a Llama-like one): fusedrl against transformers' batched `generate`.

Neither side stops at an EOS, so that both make the same tokens; greedy tokens are checked to be equal before anything is timed. fusedrl returns the
logprob of every token beside it, transformers does not.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench.harness import DEVICE
from transformers import AutoModelForCausalLM

from fusedrl.engine import HybridActor, SamplingParams

SEQUENCES, NEW = 64, 128
SHAPES = {"64 x (8 + 128)": [8] * SEQUENCES, "64 x (4..67 + 128)": list(range(4, 4 + SEQUENCES))}


def prompts(lengths: list[int], vocab: int) -> list[list[int]]:
    """Random ids behind a BOS."""
    generator = torch.Generator().manual_seed(0)
    return [[1, *torch.randint(3, vocab, (n - 1,), generator=generator).tolist()] for n in lengths]


def ours(actor: HybridActor, ids: list[list[int]], temperature: float) -> Callable[[], list[list[int]]]:
    params = SamplingParams(max_new_tokens=NEW, temperature=temperature)
    return lambda: [completions[0].token_ids for completions in actor.generate(ids, params)]


def theirs(model: Any, ids: list[list[int]], temperature: float) -> Callable[[], list[list[int]]]:
    width = max(map(len, ids))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in ids], device=DEVICE)  # padded on the left
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=DEVICE)
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}

    @torch.no_grad()
    def generate() -> list[list[int]]:
        return model.generate(tokens, attention_mask=mask, max_new_tokens=NEW, pad_token_id=0, **how)[:, width:].tolist()

    return generate


def needed(actor: HybridActor, lengths: list[int]) -> tuple[int, int]:
    """Bytes and flops that the problem needs: weights once a step, keys and values written once and read once by every later token; 2 flops a weight."""
    c, decoder = actor.decoder.config, actor.decoder
    weights = sum(p.numel() for p in decoder.parameters())
    cached = 2 * c.num_layers * c.num_kv_heads * c.head_dim
    size = decoder.embedding.element_size()
    # a step t reads its weights and, of every sequence, the n + t positions before and at its token; the prompts' pass reads the weights once more
    seen = sum(n + t for n in lengths for t in range(NEW))
    traffic = size * (weights * NEW + cached * seen + cached * sum(n + NEW - 1 for n in lengths))
    matmuls = 2 * weights * sum(n + NEW - 1 for n in lengths)
    attention = sum(4 * c.num_layers * c.num_heads * c.head_dim * (n + t) for n in lengths for t in range(NEW))
    return traffic, matmuls + attention


@pytest.fixture(scope="module")
def models(request) -> SimpleNamespace:
    """The same weights in both, neither of which stops at an EOS."""
    path = request.config.getoption("--model")
    if not path.is_dir():
        pytest.skip(f"no model in {path.name}/: name the directory of one by --model")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().to(DEVICE)
    model.generation_config.eos_token_id = None
    actor = HybridActor.from_pretrained(path, dtype=torch.float32, device=DEVICE)
    actor.decoder.config = dataclasses.replace(actor.decoder.config, eos_token_ids=())
    actor.tokenizer = None
    return SimpleNamespace(actor=actor, model=model)


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_generate(contest, models, shape, temperature):
    actor, lengths = models.actor, SHAPES[shape]
    ids, (traffic, flops) = prompts(lengths, actor.decoder.config.vocab_size), needed(actor, lengths)

    def same(a: list[list[int]], b: list[list[int]]) -> None:
        if temperature == 0 and a != b:
            raise AssertionError(f"greedy tokens that differ in {sum(x != y for x, y in zip(a, b, strict=True))} of {len(a)} sequences")

    contest("generate, sampled" if temperature else "generate, greedy", shape, torch.float32,
            {"fusedrl": ours(actor, ids, temperature), "transformers": theirs(models.model, ids, temperature)}, bytes_moved=traffic, flops=flops, same=same)
