"""Generation with a real model (`--model DIR`, a Llama-like one): fusedrl against transformers, and n samples of a prompt against n requests.

generate                64 x 128 tokens; transformers' batched `generate`
generate, lengths       64 prompts that ask for 16 to 256 tokens each; transformers' batch runs all of them to the longest and is cut to what was asked
generate, continuous    64 x 32 tokens; transformers' continuous batching, its cache cut to the workload and, in one of two, its manager kept from call to call,
                        as our cache is. Cut and kept are to its advantage: as it comes, a call for 8 x 8 tokens took over 20 s here, nearly all of it for a cache
                        sized by the machine's memory. Fewer new tokens than above shrink the contest, not its batch
generate, n samples     16 samples of one prompt of 200 tokens; 16 requests of as many tokens each that share nothing

Nobody stops at an EOS, so that all make the same tokens; greedy tokens are checked to be equal before anything is timed. fusedrl returns the logprob of
every token beside it, transformers does not. Its prefix cache is emptied before every call.
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
from fusedrl.engine.bench import generate_batch
from fusedrl.engine.workloads import Workload

SEQUENCES, NEW, FEWER = 64, 128, 32
SHAPES = {"64 x (8 + 128)": [8] * SEQUENCES, "64 x (4..67 + 128)": list(range(4, 4 + SEQUENCES))}
SHORTEST, LONGEST = 16, 256
SAMPLES, PROMPT, SAMPLED = 16, 200, 64


def prompts(lengths: list[int], vocab: int) -> list[list[int]]:
    """Random ids behind a BOS."""
    generator = torch.Generator().manual_seed(0)
    return [[1, *torch.randint(3, vocab, (n - 1,), generator=generator).tolist()] for n in lengths]


def ours(actor: HybridActor, ids: list[list[int]], params: SamplingParams | list[SamplingParams]) -> Callable[[], list[list[int]]]:
    def generate() -> list[list[int]]:
        actor.mark_updated()  # no prefix of the round before is found again
        return [completion.token_ids for completions in actor.generate(ids, params) for completion in completions]

    return generate


def theirs(model: Any, ids: list[list[int]], new: list[int], temperature: float) -> Callable[[], list[list[int]]]:
    width = max(map(len, ids))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in ids], device=DEVICE)  # padded on the left
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=DEVICE)
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}

    @torch.no_grad()
    def generate() -> list[list[int]]:
        rows = model.generate(tokens, attention_mask=mask, max_new_tokens=max(new), pad_token_id=0, **how)[:, width:].tolist()
        return [row[:n] for row, n in zip(rows, new, strict=True)]

    return generate


def equal(a: list[list[int]], b: list[list[int]]) -> None:
    if a != b:
        raise AssertionError(f"greedy tokens that differ in {sum(x != y for x, y in zip(a, b, strict=True))} of {len(a)} sequences")


def needed(actor: HybridActor, lengths: list[int], new: list[int]) -> tuple[int, int]:
    """Bytes and flops that the problem needs: weights once a step, keys and values written once and read once by every later token; 2 flops a weight."""
    c, decoder = actor.decoder.config, actor.decoder
    weights = sum(p.numel() for p in decoder.parameters())
    cached = 2 * c.num_layers * c.num_kv_heads * c.head_dim
    size = decoder.embedding.element_size()
    # a step t reads its weights and, of every sequence, the n + t positions before and at its token; the prompts' pass reads the weights once more
    seen = sum(n + t for n, m in zip(lengths, new, strict=True) for t in range(m))
    computed = sum(n + m - 1 for n, m in zip(lengths, new, strict=True))
    traffic = size * (weights * max(new) + cached * seen + cached * computed)
    return traffic, 2 * weights * computed + 4 * c.num_layers * c.num_heads * c.head_dim * seen


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
    lengths, new = SHAPES[shape], [NEW] * SEQUENCES
    ids, (traffic, flops) = prompts(lengths, models.actor.decoder.config.vocab_size), needed(models.actor, lengths, new)
    params = SamplingParams(max_new_tokens=NEW, temperature=temperature)
    contest("generate, sampled" if temperature else "generate, greedy", shape, torch.float32,
            {"fusedrl": ours(models.actor, ids, params), "transformers": theirs(models.model, ids, new, temperature)}, bytes_moved=traffic, flops=flops,
            same=None if temperature else equal)


def bench_lengths(contest, models):
    """What an RLHF batch looks like: no two completions end together."""
    lengths = [8] * SEQUENCES
    new = torch.linspace(SHORTEST, LONGEST, SEQUENCES).round().int()[torch.randperm(SEQUENCES, generator=torch.Generator().manual_seed(0))].tolist()
    ids, (traffic, flops) = prompts(lengths, models.actor.decoder.config.vocab_size), needed(models.actor, lengths, new)
    params = [SamplingParams(max_new_tokens=n, temperature=0.0) for n in new]
    contest("generate, lengths", f"64 x (8 + {SHORTEST}..{LONGEST})", torch.float32,
            {"fusedrl": ours(models.actor, ids, params), "transformers": theirs(models.model, ids, new, 0.0)}, bytes_moved=traffic, flops=flops, same=equal)


def bench_continuous(contest, models):
    lengths, new = [8] * SEQUENCES, [FEWER] * SEQUENCES
    ids, (traffic, flops) = prompts(lengths, models.actor.decoder.config.vocab_size), needed(models.actor, lengths, new)
    workload = Workload("continuous", tuple(map(tuple, ids)), tuple(new))
    contestants = {"fusedrl": ours(models.actor, ids, SamplingParams(max_new_tokens=FEWER, temperature=0.0)),
                   "transformers, cut and kept": generate_batch(models.model, workload, 0.0),
                   "transformers, cut": generate_batch(models.model, workload, 0.0, keep=False)}
    contest("generate, continuous", f"64 x (8 + {FEWER})", torch.float32, contestants, bytes_moved=traffic, flops=flops, same=equal)


def bench_samples(contest, models):
    """Samples share their prompt's prefill; the requests' prompts differ from their first token on, so each is computed."""
    ids = prompts([PROMPT] * SAMPLES, models.actor.decoder.config.vocab_size)
    ids = [[3 + i, *row[1:]] for i, row in enumerate(ids)]
    contest("generate, n samples", f"16 x ({PROMPT} + {SAMPLED})", torch.float32,
            {"fusedrl": ours(models.actor, ids[:1], SamplingParams(max_new_tokens=SAMPLED, n=SAMPLES)),
             "fusedrl, 16 requests": ours(models.actor, ids, SamplingParams(max_new_tokens=SAMPLED))}, same=None)
