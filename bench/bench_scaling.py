"""Scaling of decoding: tokens per second by the number of sequences that run at once, and by the
length of the context of each sequence.

decode, sequences    1 to 256 sequences behind 128 tokens each
decode, context      16 sequences behind 128 to 4032 tokens each

The model is a Llama of stories260k's sizes with 4,096 positions and random weights; each sequence
gets 32 tokens. The prompts, except their last tokens, are in the prefix cache, so only decoding is
timed. The ceiling counts 32 steps, each of which reads the weights once, and all keys and values
before its tokens. `python -m bench.scaling_plot` draws the results into docs/scaling.svg;
docs/engine-numbers.md explains the shape of the curves.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from bench.harness import DEVICE

from fusedrl.engine import HybridActor, SamplingParams
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.tools.workloads import needed, random_workload

CONFIG = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "eos_token_id": [],
}
NEW, CONTEXT, SEQUENCES = 32, 128, 16


@cache
def actor() -> HybridActor:
    return HybridActor(Decoder.random(model_config(CONFIG), 0, device=DEVICE))


def decode(contest, what: str, sequences: int, context: int) -> None:
    asked = random_workload(CONFIG["vocab_size"], sequences, context, NEW + 1)
    prompts, params = [list(prompt) for prompt in asked.prompts], SamplingParams(max_new_tokens=NEW)
    moved_S, flops_S = needed(actor().decoder.config, asked, 4)
    # nothing of the contest before takes up the cache; the check of the answers then fills it
    actor().mark_updated()
    contest(
        what,
        f"{sequences} x {context}",
        torch.float32,
        {"fusedrl": lambda: actor().generate(prompts, params)},
        same=None,
        bytes_moved=int(moved_S[1:].sum()),
        flops=int(flops_S[1:].sum()),
        derive=lambda times: {
            "tokens/s": 1e3 * sequences * NEW / torch.tensor(times["fusedrl"]).median().item()
        },
    )


@pytest.mark.parametrize("sequences", [1, 4, 16, 64, 256])
def bench_sequences(contest, sequences):
    decode(contest, "decode, sequences", sequences, CONTEXT)


@pytest.mark.parametrize("context", [128, 256, 512, 1024, 2048, 4032])
def bench_context(contest, context):
    decode(contest, "decode, context", SEQUENCES, context)
