"""Generation of 64 x 128 tokens of a real model, one thread: fusedrl against transformers' batched `generate`; and one draw against eager torch.

    python -m bench.bench_generate [directory of a Llama-like model]

Neither side stops at an EOS, so that both make the same tokens; greedy tokens are checked to be equal before anything is timed. fusedrl returns the
logprob of every token beside it, transformers does not.
"""
from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench.harness import Row, contest, one_thread, report
from torch import Tensor
from transformers import AutoModelForCausalLM

from fusedrl.engine import HybridActor, SamplingParams
from fusedrl.kernels.sampling import sample

SEQUENCES, NEW = 64, 128
MODEL = Path(__file__).resolve().parents[2] / "shared/models/stories260k"


def prompts(lengths: list[int], vocab: int) -> list[list[int]]:
    """Random ids behind a BOS."""
    generator = torch.Generator().manual_seed(0)
    return [[1, *torch.randint(3, vocab, (n - 1,), generator=generator).tolist()] for n in lengths]


def ours(actor: HybridActor, ids: list[list[int]], temperature: float) -> Callable[[], list[list[int]]]:
    params = SamplingParams(max_new_tokens=NEW, temperature=temperature)
    return lambda: [completions[0].token_ids for completions in actor.generate(ids, params)]


def theirs(model: Any, ids: list[list[int]], temperature: float) -> Callable[[], list[list[int]]]:
    width = max(map(len, ids))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in ids])  # padded on the left
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
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


def generation(path: str) -> list[Row]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    actor = HybridActor.from_pretrained(path)
    actor.decoder.config = dataclasses.replace(actor.decoder.config, eos_token_ids=())
    actor.tokenizer = None
    rows: list[Row] = []
    shapes = {"64 x (8 + 128)": [8] * SEQUENCES, "64 x (4..67 + 128)": list(range(4, 4 + SEQUENCES))}
    for shape, lengths in shapes.items():
        ids, (traffic, flops) = prompts(lengths, actor.decoder.config.vocab_size), needed(actor, lengths)
        for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            def same(a: list[list[int]], b: list[list[int]], temperature: float = temperature) -> None:
                if temperature == 0 and a != b:
                    raise AssertionError(f"greedy tokens differ in {sum(x != y for x, y in zip(a, b, strict=True))} of {len(a)} sequences")

            rows += contest(f"generate, {name}", shape, "float32", {"fusedrl": ours(actor, ids, temperature), "transformers": theirs(model, ids, temperature)},
                            rounds=9, bytes_moved=traffic, flops=flops, same=same)
    return rows


def eager_draw(logits_BV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token, logprob and entropy by the usual torch calls."""
    logp = torch.log_softmax(logits_BV, -1)
    p = logp.exp()
    token_ids = torch.multinomial(p, 1)
    return token_ids[:, 0], logp.gather(-1, token_ids)[:, 0], -(p * logp).sum(-1)


def eager_top_p(logits_BV: Tensor, top_p: float) -> tuple[Tensor, Tensor, Tensor]:
    ordered, order = logits_BV.sort(descending=True)
    p = ordered.softmax(-1)
    drop = p.cumsum(-1) - p >= top_p
    return eager_draw(logits_BV.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf))


def draws() -> list[Row]:
    rows: list[Row] = []
    for B, V in ((64, 512), (64, 32_000), (8, 128_256)):
        logits = torch.randn(B, V, generator=torch.Generator().manual_seed(1)) * 2
        keys = torch.arange(4 * B).view(B, 4)
        for name, top_p in (("sample", 1.0), ("sample, top-p 0.9", 0.9)):
            rows += contest(name, f"{B} x {V}", "float32", {"fusedrl": lambda z=logits, k=keys, p=top_p: sample(z, temperature=1.0, top_p=p, keys=k),
                                                            "eager": lambda z=logits, p=top_p: eager_draw(z) if p == 1 else eager_top_p(z, p)},
                            rounds=31 if V < 1000 else 11, bytes_moved=4 * B * V)  # one read of the logits
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(MODEL), help="a directory with a Llama-like model")
    arguments = parser.parse_args()
    one_thread()
    report("generate", generation(arguments.model) + draws())
