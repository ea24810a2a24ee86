"""Convert a llama2.c checkpoint (model.bin, and its tokenizer.bin) into a Hugging Face directory.

    python examples/convert_llama2c.py stories260K.bin --tokenizer tok512.bin --out stories260k

Reads the format of https://github.com/karpathy/llama2.c: version 0 (a header of seven int32,
negative vocabulary: separate classifier) and version 1 ("ak42"). The rotary embedding of llama2.c
rotates neighbouring pairs (2i, 2i + 1), that of Hugging Face the pairs (i, i + D/2). So the rows of
the q and k weights are reordered.
"""

from __future__ import annotations

import argparse
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fusedrl.engine.model.configuration import ModelConfig, model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.weights import hf_views, save_pretrained

MAGIC = 0x616B3432
SPECIAL = ("<unk>", "<s>", "</s>")
# Short names in file order, once for all layers each; "rope" is version 0's table of angles, which
# is derived again.
ORDER = {
    0: (
        "embed",
        "norm1",
        "q",
        "k",
        "v",
        "o",
        "norm2",
        "gate",
        "down",
        "up",
        "norm",
        "rope",
        "head",
    ),
    1: ("norm1", "norm2", "norm", "embed", "q", "k", "v", "o", "gate", "down", "up", "head"),
}
NAMES = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "norm1": "model.layers.{}.input_layernorm.weight",
    "norm2": "model.layers.{}.post_attention_layernorm.weight",
    **{n: f"model.layers.{{}}.self_attn.{n}_proj.weight" for n in "qkvo"},
    **{n: f"model.layers.{{}}.mlp.{n}_proj.weight" for n in ("gate", "up", "down")},
}


def read_header(path: Path) -> tuple[int, int, ModelConfig]:
    """Return (version, offset of the weights, configuration). Raise ValueError if the file is not a
    llama2.c checkpoint."""
    with path.open("rb") as file:
        head = file.read(37).ljust(37, b"\0")
    magic, version = struct.unpack_from("<Ii", head)
    if magic == MAGIC and version != 1:
        raise ValueError(
            f"{path}: expected version 0 or 1 of the llama2.c format, got {version} (2 is "
            "quantised); export the float32 model"
        )
    version, offset = (1, 256) if magic == MAGIC else (0, 28)
    dim, hidden, layers, heads, kv_heads, vocabulary, positions = struct.unpack_from(
        "<7i", head, 8 if version else 0
    )
    tied = bool(head[36]) if version else vocabulary > 0
    # before anything is allocated for it
    least = 4 * (abs(vocabulary) * dim + layers * dim * (2 * dim + 3 * hidden))
    if (
        min(dim, hidden, layers, heads, kv_heads, abs(vocabulary), positions) < 1
        or dim % (2 * heads)
        or least > path.stat().st_size
    ):
        raise ValueError(
            f"{path}: not a whole llama2.c checkpoint: its {path.stat().st_size} bytes begin with "
            f"dim {dim}, hidden {hidden}, "
            f"layers {layers}, heads {heads}, kv_heads {kv_heads}, vocabulary {vocabulary}, "
            f"positions {positions}"
        )
    return (
        version,
        offset,
        model_config(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "vocab_size": abs(vocabulary),
                "hidden_size": dim,
                "intermediate_size": hidden,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "head_dim": dim // heads,
                "max_position_embeddings": positions,
                "rms_norm_eps": 1e-5,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
                "tie_word_embeddings": tied,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
                "hidden_act": "silu",
            }
        ),
    )


def halves(rows: Tensor, heads: int) -> Tensor:
    """Reorder each head's rows from (0, 1), (2, 3), ... to (0, D/2), (1, D/2 + 1), ..."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def convert_weights(path: Path) -> Decoder:
    """The model of a checkpoint, as our decoder in float32. Raises ValueError where the file is not
    as long as its header says."""
    version, offset, config = read_header(path)
    decoder = Decoder(config)
    views = hf_views(decoder)
    sizes: dict[str, tuple[int, ...]] = {
        name: tuple(views[full.format(0)].shape)
        for name, full in NAMES.items()
        if full.format(0) in views
    }
    sizes["rope"] = (config.max_positions, config.head_dim)
    order = [name for name in ORDER[version] if name in sizes]
    counts = {name: config.num_layers if "{}" in NAMES.get(name, "") else 1 for name in order}
    expected = offset + 4 * sum(counts[name] * int(np.prod(sizes[name])) for name in order)
    if path.stat().st_size != expected:
        raise ValueError(
            f"{path}: expected {expected} bytes for its header, got {path.stat().st_size}; the "
            "file is truncated or of another format"
        )
    values = np.memmap(path, dtype="<f4", mode="r", offset=offset)
    at = 0
    for name in order:
        size = int(np.prod(sizes[name]))
        for layer in range(counts[name]):
            tensor = torch.from_numpy(np.array(values[at : at + size])).view(sizes[name])
            at += size
            if name in "qk":
                tensor = halves(tensor, config.num_heads if name == "q" else config.num_kv_heads)
            if name in NAMES:
                views[NAMES[name].format(layer)].copy_(tensor)
    return decoder


def read_pieces(path: Path) -> list[tuple[str, float]]:
    """Return (piece, score) of each token of a tokenizer.bin. Raise ValueError if the file is cut
    short."""
    data = path.read_bytes()
    pieces: list[tuple[str, float]] = []
    at = 4  # after the longest piece's length
    while at < len(data):
        if (
            at + 8 > len(data)
            or at + 8 + (length := struct.unpack_from("<i", data, at + 4)[0]) > len(data)
            or length < 0
        ):
            raise ValueError(
                f"{path}: piece {len(pieces)} runs past the end of the file; it is truncated or no "
                "llama2.c tokenizer"
            )
        pieces.append(
            (
                data[at + 8 : at + 8 + length].decode(errors="surrogateescape").replace(" ", "▁"),
                struct.unpack_from("<f", data, at)[0],
            )
        )
        at += 8 + length
    return pieces


def convert_tokenizer(path: Path, config: ModelConfig) -> PreTrainedTokenizerFast:
    """The SentencePiece vocabulary of a tokenizer.bin as a fast tokenizer. Raises ValueError where
    it does not fit the model."""
    pieces = read_pieces(path)
    if len(pieces) != config.vocab_size:
        raise ValueError(
            f"{path}: expected {config.vocab_size} pieces, as the model has tokens, got "
            f"{len(pieces)}"
        )
    ranks = {
        piece: (-score, index)
        for index, (piece, score) in enumerate(pieces)
        if index >= len(SPECIAL)
    }
    vocabulary = {name: index for index, name in enumerate(SPECIAL)} | {
        piece: index for piece, (_, index) in ranks.items()
    }
    if len(vocabulary) != len(pieces):
        raise ValueError(f"{path}: the pieces are not distinct")
    # SentencePiece joins the neighbours whose union scores highest; so merges are all splits of all
    # pieces, best piece first.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(piece))
        if piece[:cut] in ranks and piece[cut:] in ranks
    ]
    tokenizer: Any = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False, special=True) for name in SPECIAL]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        padding_side="left",
        model_max_length=config.max_positions,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="llama2.c model.bin")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="its tokenizer.bin; without it the directory has no tokenizer",
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    args = parser.parse_args(arguments)
    decoder = convert_weights(args.checkpoint)
    tokenizer = convert_tokenizer(args.tokenizer, decoder.config) if args.tokenizer else None
    save_pretrained(decoder, args.out, tokenizer=tokenizer)
    print(f"{args.out}: {sum(p.numel() for p in decoder.parameters()):,} parameters")


if __name__ == "__main__":
    main()
