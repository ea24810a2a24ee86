"""Workloads that models are measured on, and the least time (floor) a machine would need for each.

Workload  prompts as token ids, and for each prompt the number of new tokens and of samples. No
          sequence stops at an EOS. `WORKLOADS` names three:
          random   one length in, one length out, as vLLM's random dataset
          seed0    nano-vllm's: lengths in and out uniform in 100 .. 1024 under seed 0, 256
                   requests, 133,966 tokens out; shorter by smaller maxima
          group    64 prompts of 16 samples each, as a GRPO step has them
Floor     All prompts are read in one step; then every sequence draws one token a step until it has
          all its new tokens. A step takes at least the larger of
              bytes / copy bandwidth      bytes of all weights but an untied input embedding, of the
                                          keys and values that its tokens attend to (a prompt's
                                          once for all its samples), and of those it writes
              flops / GEMM rate           2 per weight and token (weights of the head only if a
                                          token is drawn), and 4 per query head, unit of its width
                                          and position attended to
          Activations and all other work count as free. Real engines run fewer sequences at once,
          and so read the weights more often.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.model.configuration import ModelConfig
from fusedrl.engine.model.decoder import Decoder

_QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
SHAPES: dict[str, dict[str, Any]] = {  # config.json of published models, for random weights
    "qwen2.5-0.5b": {
        **_QWEN2,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        **_QWEN2,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        **_QWEN2,
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        **_QWEN2,
        "model_type": "qwen3",
        "max_position_embeddings": 40960,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class Workload:
    """Workload in which prompt i gets `samples` completions of `new_tokens[i]` tokens each."""

    name: str
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: tuple[int, ...]
    samples: int = 1

    @property
    def num_sequences(self) -> int:
        """Number of sequences: prompts times samples."""
        return len(self.prompts) * self.samples

    @property
    def input_tokens(self) -> int:
        """Number of tokens of the prompts, each counted once."""
        return sum(map(len, self.prompts))

    @property
    def output_tokens(self) -> int:
        """Number of tokens to generate in all."""
        return sum(self.new_tokens) * self.samples

    def lengths(self) -> list[int]:
        """Number of tokens of every sequence, prompt and completion together."""
        return [
            len(prompt) + new
            for prompt, new in zip(self.prompts, self.new_tokens, strict=True)
            for _ in range(self.samples)
        ]

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError if a sequence is longer than the model's positions."""
        longest = max(
            range(len(self.prompts)), key=lambda i: len(self.prompts[i]) + self.new_tokens[i]
        )
        prompt, new = len(self.prompts[longest]), self.new_tokens[longest]
        if prompt + new > config.max_positions:
            raise ConfigError(
                f"bench: expected input and output to fit the model's {config.max_positions} "
                f"positions, got {prompt} + {new} = {prompt + new} "
                "tokens; lower --input-len or --output-len"
            )


# ---- the workloads -------------------------------------------------------------------------------
def random_workload(
    vocab_size: int,
    num_prompts: int = 64,
    input_len: int = 128,
    output_len: int = 128,
    samples: int = 1,
    seed: int = 0,
) -> Workload:
    """Make a workload of prompts of `input_len` random ids, with `output_len` new tokens for each
    sample."""
    draw = random.Random(seed)
    prompts = (
        tuple(draw.randrange(vocab_size) for _ in range(input_len)) for _ in range(num_prompts)
    )
    return Workload("random", tuple(prompts), (output_len,) * num_prompts, samples)


def seed0_workload(
    vocab_size: int,
    num_prompts: int = 256,
    input_len: int = 1024,
    output_len: int = 1024,
    samples: int = 1,
    seed: int = 0,
) -> Workload:
    """Make a workload whose lengths are uniform between 100 / 1024 of the maxima and the maxima.

    Numbers are drawn in the order of nano-vllm's bench.py: each prompt's length before its ids, all
    prompts before the first output length. Ids are below 10,001, as there, and wrap around in
    smaller vocabularies."""
    draw = random.Random(seed)

    def shortest(longest: int) -> int:
        return max(1, round(longest * 100 / 1024))

    prompts = [
        [draw.randint(0, 10_000) for _ in range(draw.randint(shortest(input_len), input_len))]
        for _ in range(num_prompts)
    ]
    new = [draw.randint(shortest(output_len), output_len) for _ in range(num_prompts)]
    return Workload(
        "seed0",
        tuple(tuple(token % vocab_size for token in prompt) for prompt in prompts),
        tuple(new),
        samples,
    )


def group_workload(
    vocab_size: int,
    num_prompts: int = 64,
    input_len: int = 128,
    output_len: int = 128,
    samples: int = 16,
    seed: int = 0,
) -> Workload:
    """Make a `random_workload` with a group of samples of each prompt."""
    made = random_workload(vocab_size, num_prompts, input_len, output_len, samples, seed)
    return Workload("group", made.prompts, made.new_tokens, samples)


WORKLOADS: Mapping[str, Callable[..., Workload]] = {
    "random": random_workload,
    "seed0": seed0_workload,
    "group": group_workload,
}


# ---- what they need ------------------------------------------------------------------------------
class Weights(NamedTuple):
    """Weight counts of a model: all parameters, the matrices inside the layers, the head, and the
    weights that a step reads."""

    parameters: int
    layers: int
    head: int
    read: int


def count_weights(config: ModelConfig) -> Weights:
    """Count a model's weights without allocating any."""
    decoder = Decoder(config, device="meta")
    parameters, head = sum(p.numel() for p in decoder.parameters()), decoder.head_weight.numel()
    layers = sum(p.numel() for p in decoder.layers.parameters() if p.ndim > 1)
    return Weights(
        parameters,
        layers,
        head,
        parameters - (0 if config.tie_embeddings else decoder.embedding.numel()),
    )


def kv_bytes_per_token(config: ModelConfig, element_size: int) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * element_size


def pairs_seen(lengths: Sequence[int], window: int = 0) -> int:
    """Count the positions that all tokens of causal sequences attend to, themselves included. If
    `window` is not 0, a token attends to at most `window` positions."""
    return sum(
        n * (n + 1) // 2
        if not window or n <= window
        else window * (window + 1) // 2 + (n - window) * window
        for n in lengths
    )


def forward_flops(config: ModelConfig, lengths: Sequence[int], drawn: int) -> int:
    """Return the floating-point operations of one forward over whole sequences, with the head
    applied to `drawn` of their tokens. Forward and backward together have three times as many,
    without recomputation."""
    weights, width = count_weights(config), 4 * config.num_heads * config.head_dim
    return (
        2 * weights.layers * sum(lengths)
        + 2 * weights.head * drawn
        + width * sum(pairs_seen(lengths, window) for window in config.windows)
    )


def needed(config: ModelConfig, workload: Workload, element_size: int) -> tuple[Tensor, Tensor]:
    """Return (bytes, flops) of every step, in float64. Step 0 reads the prompts and draws the first
    tokens; step t draws token t of the sequences with more than t new tokens."""
    weights, width = count_weights(config), 4 * config.num_heads * config.head_dim
    prompt_G, new_G = (
        torch.tensor(x, dtype=torch.float64)
        for x in ([len(p) for p in workload.prompts], workload.new_tokens)
    )
    t_S = torch.arange(int(new_G.max()), dtype=torch.float64)[:, None]
    live_SG, n, cached = (
        new_G > t_S,
        workload.samples,
        kv_bytes_per_token(config, element_size) / config.num_layers,
    )  # of a layer
    drawn_S = n * live_SG.sum(1).double()
    moved_S = element_size * weights.read + config.num_layers * cached * drawn_S
    flops_S = 2.0 * (weights.layers + weights.head) * drawn_S
    for window in config.windows:
        limit = float(window) or torch.inf
        seen_SG = (prompt_G + t_S).clamp(max=limit)
        own_SG = t_S.clamp(max=limit)
        moved_S += cached * (live_SG * (seen_SG - own_SG + n * own_SG)).sum(1)
        flops_S += width * n * (live_SG * seen_SG).sum(1)
    moved_S[0] = element_size * weights.read + config.num_layers * cached * workload.input_tokens
    flops_S[0] = forward_flops(config, [len(p) for p in workload.prompts], len(workload.prompts))
    return moved_S, flops_S


class Floor(NamedTuple):
    """Floor of a workload: the least time in seconds, in all and for its two phases; and the bytes
    and flops that it is computed from."""

    seconds: float
    prefill_seconds: float
    decode_seconds: float
    bytes_moved: float
    flops: float


def floor_of(
    config: ModelConfig,
    workload: Workload,
    element_size: int,
    copy_bandwidth: float,
    gemm_rate: float,
) -> Floor:
    """Compute the floor of a workload, as defined at the top of this file. copy_bandwidth is in
    bytes per second, gemm_rate in flops per second."""
    moved_S, flops_S = needed(config, workload, element_size)
    seconds_S = torch.maximum(moved_S / copy_bandwidth, flops_S / gemm_rate)
    return Floor(
        seconds_S.sum().item(),
        seconds_S[0].item(),
        seconds_S[1:].sum().item(),
        moved_S.sum().item(),
        flops_S.sum().item(),
    )
