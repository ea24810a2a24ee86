"""The converter, against a model that is computed here the way llama2.c does."""

import importlib.util
import json
import struct
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PATH = Path(__file__).resolve().parents[3] / "examples" / "convert_llama2c.py"
DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCABULARY, POSITIONS = 24, 20, 2, 6, 2, 19, 16
HEAD = DIM // HEADS


@pytest.fixture(scope="module")
def converter():
    spec = importlib.util.spec_from_file_location("convert_llama2c", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def weights():
    """llama2.c's own names and layout; matrices are [out, in]."""
    generator = torch.Generator().manual_seed(0)
    kv = KV_HEADS * HEAD
    shapes = {
        "embed": (VOCABULARY, DIM),
        "norm1": (LAYERS, DIM),
        "wq": (LAYERS, DIM, DIM),
        "wk": (LAYERS, kv, DIM),
        "wv": (LAYERS, kv, DIM),
        "wo": (LAYERS, DIM, DIM),
        "norm2": (LAYERS, DIM),
        "w1": (LAYERS, HIDDEN, DIM),
        "w2": (LAYERS, DIM, HIDDEN),
        "w3": (LAYERS, HIDDEN, DIM),
        "norm": (DIM,),
        "head": (VOCABULARY, DIM),
    }
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def write(path, weights, version, tied):
    sizes = (DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCABULARY, POSITIONS)
    if version == 0:
        head = struct.pack("<7i", *sizes[:5], VOCABULARY if tied else -VOCABULARY, POSITIONS)
        names = ["embed", "norm1", "wq", "wk", "wv", "wo", "norm2", "w1", "w2", "w3", "norm"]
    else:
        head = (struct.pack("<Ii7iB", 0x616B3432, 1, *sizes, tied)).ljust(256, b"\0")
        names = ["norm1", "norm2", "norm", "embed", "wq", "wk", "wv", "wo", "w1", "w2", "w3"]
    parts = [weights[name] for name in names]
    if version == 0:
        # its tables of cos and sin
        parts += [torch.rand(POSITIONS, HEAD // 2), torch.rand(POSITIONS, HEAD // 2)]
    path.write_bytes(
        head
        + b"".join(part.numpy().tobytes() for part in parts + ([] if tied else [weights["head"]]))
    )


def forward(weights, ids, tied):
    """Token by token, head by head, pairs (2i, 2i + 1), in float64."""
    w = {name: x.double() for name, x in weights.items()}

    def norm(x, scale):
        return x / (x.square().mean() + 1e-5).sqrt() * scale

    def rotate(x, position):
        out = x.clone()
        for i in range(0, x.numel(), 2):
            angle = torch.tensor(position * 10000.0 ** -((i % HEAD) / HEAD), dtype=torch.float64)
            out[i] = x[i] * angle.cos() - x[i + 1] * angle.sin()
            out[i + 1] = x[i] * angle.sin() + x[i + 1] * angle.cos()
        return out

    keys, values, logits = [[] for _ in range(LAYERS)], [[] for _ in range(LAYERS)], []
    for position, token in enumerate(ids):
        x = w["embed"][token]
        for n in range(LAYERS):
            h = norm(x, w["norm1"][n])
            q = rotate(w["wq"][n] @ h, position)
            keys[n].append(rotate(w["wk"][n] @ h, position))
            values[n].append(w["wv"][n] @ h)
            out = []
            for head in range(HEADS):
                at = slice(
                    head // (HEADS // KV_HEADS) * HEAD, (head // (HEADS // KV_HEADS) + 1) * HEAD
                )
                scores = (
                    torch.stack([q[head * HEAD : (head + 1) * HEAD] @ k[at] for k in keys[n]])
                    / HEAD**0.5
                )
                out.append(
                    sum(p * v[at] for p, v in zip(scores.softmax(0), values[n], strict=True))
                )
            x = x + w["wo"][n] @ torch.cat(out)
            h = norm(x, w["norm2"][n])
            x = x + w["w2"][n] @ (torch.nn.functional.silu(w["w1"][n] @ h) * (w["w3"][n] @ h))
        logits.append(w["embed" if tied else "head"] @ norm(x, w["norm"]))
    return torch.stack(logits)


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_llama2c(converter, weights, tmp_path, version, tied, capsys):
    write(tmp_path / "model.bin", weights, version, tied)
    converter.main([str(tmp_path / "model.bin"), "--out", str(tmp_path / "out")])
    assert "parameters" in capsys.readouterr().out
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == tied
    ids = [1, 5, 5, 18, 0, 7, 2]
    with torch.no_grad():
        torch.testing.assert_close(
            peer(torch.tensor([ids])).logits[0].double(),
            forward(weights, ids, tied),
            rtol=1e-4,
            atol=1e-5,
        )


def test_refuses_other_files(converter, weights, tmp_path):
    path = tmp_path / "model.bin"
    write(path, weights, 0, True)
    whole = path.read_bytes()
    for data, message in (
        (whole[:-4], "expected .* bytes for its header"),
        (b"", "not a whole llama2.c checkpoint"),
        (b"PK\x03\x04" * 20, "80 bytes begin with"),
        (struct.pack("<Ii", 0x616B3432, 2).ljust(300, b"\0"), "expected version 0 or 1"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            converter.main([str(path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_tokenizer(converter, shared, tmp_path):
    """A tokenizer.bin made from a real vocabulary gives the real tokenizer's ids."""
    directory = shared / "models" / "stories260k"
    vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    pieces[1:3] = ["\n<s>\n", "\n</s>\n"]  # as llama2.c writes them
    encoded = [piece.replace("▁", " ").encode() for piece in pieces]
    parts = [
        struct.pack("<fi", -(i - 259.0) if i > 258 else 0.0, len(piece)) + piece
        for i, piece in enumerate(encoded)
    ]
    path = tmp_path / "tok512.bin"
    path.write_bytes(struct.pack("<i", max(map(len, encoded))) + b"".join(parts))
    config = converter.model_config(directory)
    converter.convert_tokenizer(path, config).save_pretrained(tmp_path / "out")
    ours, theirs = (
        AutoTokenizer.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(directory),
    )
    for text in (
        "Once upon a time, there was a little girl named Lily.",
        "",
        "  two  spaces\n",
        "Zoë said: “héllo” 🙂",
        "the the\tThe THE",
    ):
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id, ours.padding_side) == (
        1,
        2,
        0,
        "left",
    )
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="piece 511 runs past the end"):
        converter.convert_tokenizer(path, config)
