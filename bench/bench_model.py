"""The training forward and backward of a small Llama on packed sequences, against transformers on the same sequences padded."""
from __future__ import annotations

import pytest
import torch
from bench.harness import DEVICE, Random, agree
from transformers import AutoConfig, AutoModel

from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.families import model_config
from fusedrl.engine.model.weights import hf_views
from fusedrl.engine.packing import PackedBatch

# The sizes of stories260k.
CONFIG = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8,
          "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True}


def some_lengths(sequences: int, low: int, high: int) -> list[int]:
    return torch.randint(low, high, (sequences,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("lengths", [some_lengths(20, 100, 300), some_lengths(64, 8, 64)], ids=["20 sequences", "64 sequences"])
def bench_decoder(contest, lengths):
    decoder = Decoder.random(model_config(CONFIG), 0).to(DEVICE)
    peer = AutoModel.from_config(AutoConfig.for_model(**CONFIG)).to(DEVICE)
    peer.load_state_dict({name.removeprefix("model."): view for name, view in hf_views(decoder).items()})
    generator = torch.Generator().manual_seed(1)
    batch = PackedBatch.from_sequences([(torch.randint(1, 512, (n,), generator=generator).tolist(), []) for n in lengths]).to(DEVICE)
    ids_BT, mask_BT = batch.to_padded(batch.token_ids), batch.to_padded(torch.ones_like(batch.token_ids))
    upstream_NH = Random(1).normal(batch.num_tokens, 64)

    def both_ways(model, forward):
        hidden_NH = forward()
        grads = torch.autograd.grad(hidden_NH, list(model.parameters()), upstream_NH)
        return hidden_NH.detach(), grads[0]  # of the embedding, which all others reach

    def ours():
        return both_ways(decoder, lambda: decoder(batch.token_ids, batch.positions, batch.cu_seqlens, batch.max_length))

    def theirs():
        return both_ways(peer, lambda: batch.from_padded(peer(ids_BT, attention_mask=mask_BT).last_hidden_state))

    # Two flops a weight and token forward and four backward; the embedding is a look-up. Attention as in bench_attention.py.
    weights = sum(p.numel() for p in decoder.parameters()) - CONFIG["vocab_size"] * CONFIG["hidden_size"]
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    flops = 6 * weights * batch.num_tokens + 14 * CONFIG["num_hidden_layers"] * CONFIG["hidden_size"] * pairs
    contest("decoder forward + backward", f"{batch.num_tokens} tokens", torch.float32, {"fusedrl": ours, "transformers, padded": theirs}, flops=flops,
            same=agree(1e-4, of_max=1e-4))
