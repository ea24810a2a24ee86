"""Generation with a real model (`--model DIR`, a Llama-like one): fusedrl compared with
transformers, and n samples of one prompt compared with n requests.

generate                64 x 128 tokens; transformers' batched `generate`
generate, lengths       64 prompts that ask for 16 to 256 tokens each; transformers' batch runs all
                        of them to the longest and is cut to what was asked
generate, continuous    64 x 32 tokens; transformers' continuous batching, its cache cut to the
                        workload and its manager kept from call to call, as ours are.
                        Both are to its advantage: as it comes it fills 60% of the machine's memory
                        in every call, and took over 20 s for 8 x 8 tokens. Fewer new tokens than
                        above keep the contest short; the batch is as large
generate, n samples     16 samples of one prompt of 200 tokens; 16 requests of as many tokens each
                        that share nothing

No contestant stops at an EOS, so that all generate the same number of tokens; greedy tokens are
checked to be equal before the timing. fusedrl also returns the logprob of every token, transformers
does not. fusedrl's prefix cache is emptied before every call. The contestants are in
engine/tools/bench.py; their least possible bytes and flops are in engine/tools/workloads.py.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from bench.harness import DEVICE
from transformers import AutoModelForCausalLM

from fusedrl.engine import HybridActor
from fusedrl.engine.tools.bench import generate_batch, ours, padded_generate
from fusedrl.engine.tools.workloads import Workload, needed

SEQUENCES, NEW, FEWER = 64, 128, 32
SHAPES = {"64 x (8 + 128)": [8] * SEQUENCES, "64 x (4..67 + 128)": list(range(4, 4 + SEQUENCES))}
SHORTEST, LONGEST = 16, 256
SAMPLES, PROMPT, SAMPLED = 16, 200, 64


def workload(lengths: list[int], new: list[int], vocab: int) -> Workload:
    """Random ids behind a BOS."""
    generator = torch.Generator().manual_seed(0)
    prompts = (
        (1, *torch.randint(3, vocab, (n - 1,), generator=generator).tolist()) for n in lengths
    )
    return Workload("contest", tuple(prompts), tuple(new))


def equal(a: list[list[int]], b: list[list[int]]) -> None:
    if a != b:
        raise AssertionError(
            f"greedy tokens that differ in {sum(x != y for x, y in zip(a, b, strict=True))} of "
            f"{len(a)} sequences"
        )


def ceilings(models: SimpleNamespace, asked: Workload) -> dict[str, int]:
    """Bytes and flops that the workload needs."""
    decoder = models.actor.decoder
    moved_S, flops_S = needed(decoder.config, asked, decoder.dtype.itemsize)
    return {"bytes_moved": int(moved_S.sum()), "flops": int(flops_S.sum())}


@pytest.fixture(scope="module")
def models(request) -> SimpleNamespace:
    """The same weights in both, neither of which stops at an EOS."""
    path = request.config.getoption("--model")
    if not path.is_dir():
        pytest.skip(f"no model in {path.name}/: name the directory of one by --model")
    model = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
        .eval()
        .to(DEVICE)
    )
    model.generation_config.eos_token_id = None
    actor = HybridActor.from_pretrained(path, dtype=torch.float32, device=DEVICE)
    actor.decoder.config = dataclasses.replace(actor.decoder.config, eos_token_ids=())
    actor.tokenizer = None
    return SimpleNamespace(actor=actor, model=model, vocab=actor.decoder.config.vocab_size)


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_generate(contest, models, shape, temperature):
    asked = workload(SHAPES[shape], [NEW] * SEQUENCES, models.vocab)
    contest(
        "generate, sampled" if temperature else "generate, greedy",
        shape,
        torch.float32,
        {
            "fusedrl": ours(models.actor, asked, temperature),
            "transformers": padded_generate(models.model, asked, temperature),
        },
        **ceilings(models, asked),
        same=None if temperature else equal,
    )


def bench_lengths(contest, models):
    """Time a batch as in RLHF, in which completions have different lengths."""
    new = (
        torch.linspace(SHORTEST, LONGEST, SEQUENCES)
        .round()
        .int()[torch.randperm(SEQUENCES, generator=torch.Generator().manual_seed(0))]
        .tolist()
    )
    asked = workload([8] * SEQUENCES, new, models.vocab)
    contest(
        "generate, lengths",
        f"64 x (8 + {SHORTEST}..{LONGEST})",
        torch.float32,
        {
            "fusedrl": ours(models.actor, asked, 0.0),
            "transformers": padded_generate(models.model, asked, 0.0),
        },
        **ceilings(models, asked),
        same=equal,
    )


def bench_continuous(contest, models):
    asked = workload([8] * SEQUENCES, [FEWER] * SEQUENCES, models.vocab)
    contest(
        "generate, continuous",
        f"64 x (8 + {FEWER})",
        torch.float32,
        {
            "fusedrl": ours(models.actor, asked, 0.0),
            "transformers, cut and kept": generate_batch(models.model, asked, 0.0),
        },
        **ceilings(models, asked),
        same=equal,
    )


def bench_samples(contest, models):
    """Samples share their prompt's prefill; the requests' prompts differ from their first token on,
    so each is computed."""
    apart = workload([PROMPT] * SAMPLES, [SAMPLED] * SAMPLES, models.vocab)
    apart = dataclasses.replace(
        apart, prompts=tuple((3 + i, *prompt[1:]) for i, prompt in enumerate(apart.prompts))
    )
    together = Workload("samples", apart.prompts[:1], (SAMPLED,), SAMPLES)
    contest(
        "generate, n samples",
        f"16 x ({PROMPT} + {SAMPLED})",
        torch.float32,
        {
            "fusedrl": ours(models.actor, together, 1.0),
            "fusedrl, 16 requests": ours(models.actor, apart, 1.0),
        },
        same=None,
    )
