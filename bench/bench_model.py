"""The training forward and backward of a small Llama on packed sequences, against transformers on the same sequences padded; and attention alone.

    python -m bench.bench_model
"""
from __future__ import annotations

import torch
from bench.harness import Row, contest, one_thread, report
from transformers import AutoConfig, AutoModel

from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.families import model_config
from fusedrl.engine.model.weights import hf_views
from fusedrl.engine.packing import PackedBatch
from fusedrl.kernels.attention import varlen_attention

# The sizes of stories260k.
CONFIG = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8,
          "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True}


def close(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def some_lengths(sequences: int, low: int, high: int) -> list[int]:
    return torch.randint(low, high, (sequences,), generator=torch.Generator().manual_seed(0)).tolist()


def training(lengths: list[int]) -> list[Row]:
    decoder = Decoder.random(model_config(CONFIG), 0)
    peer = AutoModel.from_config(AutoConfig.for_model(**CONFIG))
    views = hf_views(decoder)
    peer.load_state_dict({name.removeprefix("model."): view for name, view in views.items()})
    generator = torch.Generator().manual_seed(1)
    batch = PackedBatch.from_sequences([(torch.randint(1, 512, (n,), generator=generator).tolist(), []) for n in lengths])
    ids_BT, mask_BT = batch.to_padded(batch.token_ids), batch.to_padded(torch.ones_like(batch.token_ids))
    upstream_NH = torch.randn(batch.num_tokens, 64, generator=generator)

    def both_ways(model, forward):
        hidden_NH = forward()
        return hidden_NH.detach(), *torch.autograd.grad(hidden_NH, list(model.parameters()), upstream_NH)

    def ours():
        hidden_NH, *grads = both_ways(decoder, lambda: decoder(batch.token_ids, batch.positions, batch.cu_seqlens, batch.max_length))
        return hidden_NH, grads[0]  # of the embedding, which all others reach

    def theirs():
        hidden_NH, *grads = both_ways(peer, lambda: batch.from_padded(peer(ids_BT, attention_mask=mask_BT).last_hidden_state))
        return hidden_NH, grads[0]

    return contest("decoder forward + backward", f"{batch.num_tokens} tokens", "float32", {"fusedrl": ours, "transformers, padded": theirs}, same=close)


def attention(heads: tuple[int, int, int], lengths: list[int]) -> list[Row]:
    Hq, Hkv, D = heads
    N, cu_seqlens = sum(lengths), torch.tensor([0, *lengths]).cumsum(0).int()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(N, h, D, generator=generator).requires_grad_() for h in (Hq, Hkv, Hkv))
    upstream = torch.randn(N, Hq, D, generator=generator)

    def run(impl: str):
        out = varlen_attention(q, k, v, cu_seqlens, max_length=max(lengths), impl=impl)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)

    # Multiply-adds of the causal half: two products forward, five backward.
    flops = 7 * 2 * Hq * D * sum(n * (n + 1) // 2 for n in lengths)
    return contest("varlen_attention, both ways", f"{len(lengths)} x <={max(lengths)}, {Hq}/{Hkv} x {D}", "float32",
                   {"fusedrl": lambda: run("cpp"), "scaled_dot_product, padded": lambda: run("torch")}, flops=flops, same=close)


def main() -> None:
    one_thread()
    rows = [row for lengths in (some_lengths(20, 100, 300), some_lengths(64, 8, 64)) for row in training(lengths)]
    for heads in ((8, 4, 8), (8, 2, 64)):
        rows += attention(heads, some_lengths(20, 100, 300))
    report("model", [*rows, *attention((4, 4, 64), [2048])])


if __name__ == "__main__":
    main()
