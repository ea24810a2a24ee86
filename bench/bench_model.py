"""Training passes on packed sequences, compared with transformers on the same sequences padded. The
percentage of the ceiling is the MFU (model FLOPs utilisation): recomputed operations do not count.

decoder forward + backward    the trunk of a small Llama alone
training pass                 trunk, head and log-probabilities of every token, forward and
                              backward: what a policy gradient needs; sequences of equal length
                              (no padding to save), ragged ones, and a wider model whose time is its
                              matrix products
"""

from __future__ import annotations

import pytest
import torch
from bench.harness import DEVICE, Random, agree
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fusedrl.engine import HybridActor
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.weights import hf_views
from fusedrl.engine.tools.workloads import forward_flops

# The sizes of stories260k.
CONFIG = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
WIDE = {
    **CONFIG,
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
}


def some_lengths(sequences: int, low: int, high: int) -> list[int]:
    return torch.randint(
        low, high, (sequences,), generator=torch.Generator().manual_seed(0)
    ).tolist()


RAGGED = some_lengths(20, 100, 300)


def inputs(lengths: list[int], vocab_size: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(1)
    return PackedBatch.from_sequences(
        [
            ([1], torch.randint(1, vocab_size, (n - 1,), generator=generator).tolist())
            for n in lengths
        ]
    ).to(DEVICE)


@pytest.mark.parametrize(
    "lengths", [RAGGED, some_lengths(64, 8, 64)], ids=["20 sequences", "64 sequences"]
)
def bench_decoder(contest, lengths):
    config = model_config(CONFIG)
    decoder = Decoder.random(config, 0).to(DEVICE)
    peer = AutoModel.from_config(AutoConfig.for_model(**CONFIG), trust_remote_code=False).to(DEVICE)
    peer.load_state_dict(
        {name.removeprefix("model."): view for name, view in hf_views(decoder).items()}
    )
    batch = inputs(lengths, config.vocab_size)
    ids_BT, mask_BT = (
        batch.to_padded(batch.token_ids),
        batch.to_padded(torch.ones_like(batch.token_ids)),
    )
    upstream_NH = Random(1).normal(batch.num_tokens, config.hidden_size)

    def both_ways(model, forward):
        hidden_NH = forward()
        grads = torch.autograd.grad(hidden_NH, list(model.parameters()), upstream_NH)
        return hidden_NH.detach(), grads[0]  # of the embedding, which all others reach

    def ours():
        return both_ways(
            decoder,
            lambda: decoder(batch.token_ids, batch.positions, batch.cu_seqlens, batch.max_length),
        )

    def theirs():
        return both_ways(
            peer, lambda: batch.from_padded(peer(ids_BT, attention_mask=mask_BT).last_hidden_state)
        )

    contest(
        "decoder forward + backward",
        f"{batch.num_tokens} tokens",
        torch.float32,
        {"fusedrl": ours, "transformers, padded": theirs},
        flops=3 * forward_flops(config, lengths, 0),
        same=agree(1e-4, of_max=1e-4),
    )


@pytest.mark.parametrize(
    "shape, raw, lengths",
    [
        ("32 x 128 tokens", CONFIG, [128] * 32),
        (f"20 x 100..300: {sum(RAGGED)} tokens", CONFIG, RAGGED),
        ("8 x 64 tokens, hidden 512", WIDE, [64] * 8),
    ],
    ids=["equal", "ragged", "wide"],
)
def bench_training_pass(contest, shape, raw, lengths):
    config = model_config(raw)
    actor = HybridActor(Decoder.random(config, 0).to(DEVICE))
    peer = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**raw), trust_remote_code=False
    ).to(DEVICE)
    peer.load_state_dict(hf_views(actor.decoder), strict=False)  # a tied head is not listed
    peer.tie_weights()
    batch = inputs(lengths, config.vocab_size)
    ids_BT, mask_BT = (
        batch.to_padded(batch.token_ids),
        batch.to_padded(torch.ones_like(batch.token_ids)),
    )
    upstream_N = Random(1).normal(batch.num_tokens) * batch.action_mask

    def ours():
        logp_N, _ = actor.logprobs(batch, actor.forward(batch))
        return logp_N.detach(), torch.autograd.grad(logp_N, list(actor.parameters()), upstream_N)[0]

    def theirs():
        logits_BTV = peer(ids_BT, attention_mask=mask_BT).logits[:, :-1]
        logp_BT = torch.nn.functional.pad(
            logits_BTV.log_softmax(-1).gather(-1, ids_BT[:, 1:, None])[..., 0], (1, 0)
        )
        logp_N = batch.from_padded(logp_BT)
        return logp_N.detach(), torch.autograd.grad(logp_N, list(peer.parameters()), upstream_N)[0]

    contest(
        "training pass",
        shape,
        torch.float32,
        {"fusedrl": ours, "transformers, padded": theirs},
        flops=3 * forward_flops(config, lengths, int(batch.action_mask.sum())),
        same=agree(1e-4, of_max=1e-4),
    )
