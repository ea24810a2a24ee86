"""A decoder step over the paged cache against a dense decoder written a second time.

One file: the dense decoder and the layouts that every case is made of.
"""

import functools
import math
import operator

import pytest
import torch

from fusedrl.engine.model.layer import LayerWeights, Options
from fusedrl.engine.model.step import Adapter, DecoderWeights, allocate_cache, decode_step
from fusedrl.engine.tools.verify.grid import interpreted
from fusedrl.kernels import paged_attention as paged_attention_module
from fusedrl.kernels.kv_cache import copy_blocks
from fusedrl.kernels.rope import RopeTable
from fusedrl.kernels.runtime import native

# What the families differ in, with odd sizes: D below, at and beside a vector of 8; groups of 1, 2,
# 7 query heads; F and V off any multiple.
KINDS = {
    "plain": {"heads": 4, "kv_heads": 2, "D": 8, "H": 32, "F": 43},
    "biased": {"heads": 7, "kv_heads": 1, "D": 16, "H": 40, "F": 33, "bias": True},
    "normed": {
        "heads": 3,
        "kv_heads": 3,
        "D": 12,
        "H": 24,
        "F": 17,
        "qk_norm": True,
        "rope_scale": 1.25,
    },
    "windowed": {"heads": 4, "kv_heads": 2, "D": 6, "H": 300, "F": 270, "windows": (3, 0, 17)},
    "behind": {
        "heads": 6,
        "kv_heads": 3,
        "D": 8,
        "H": 40,
        "F": 29,
        "qk_norm": "together",
        "norms": "behind",
        "ropes": (0, -1),
    },
    "both": {
        "heads": 5,
        "kv_heads": 1,
        "D": 10,
        "H": 300,
        "F": 33,
        "qk_norm": True,
        "norms": "both",
        "ropes": (1, 0, -1),
        "windows": (4, 0, 9),
        "pairs": 4,
        "tables": 2,
        "rope_scale": 0.75,
        "options": Options(0.4, 1.5, 3.0, 2.5, 0.75, "gelu_tanh"),
    },
    "classic": {
        "heads": 3,
        "kv_heads": 3,
        "D": 7,
        "H": 21,
        "F": 85,
        "bias": True,
        "layer_norm": True,
        "gated": False,
        "ropes": (-1, -1),
        "pairs": 0,
        "positions": 70,
        "options": Options(activation="gelu_tanh"),
    },
    "parallel": {
        "heads": 4,
        "kv_heads": 2,
        "D": 8,
        "H": 300,
        "F": 33,
        "layer_norm": True,
        "gated": False,
        "positions": 64,
        "ropes": (0, -1),
        "pairs": 2,
        "options": Options(activation="gelu", parallel=True),
    },
}


DEFAULTS = {
    "bias": False,
    "qk_norm": False,
    "rope_scale": 1.0,
    "windows": (0, 0),
    "norms": "before",
    "tables": 1,
    "options": Options(),
    "layer_norm": False,
    "gated": True,
    "positions": None,
}


class Drawn:
    """The random weights of a kind."""

    def __init__(self, device, k, dtype, seed):
        self.device, self.k, self.dtype = device, k, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def rand(self, *shape, scale=None):
        x = torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.device)
        return (x * (scale or shape[-1] ** -0.5)).to(self.dtype)

    def norm(self, size):
        x = torch.randn(size, generator=self.generator, dtype=torch.float64).to(self.device)
        return (1 + 0.2 * x).to(self.dtype)

    def norm_bias(self, size):
        return self.rand(size, scale=0.3) if self.k["layer_norm"] else None

    def bias(self, size):
        return self.rand(size, scale=0.3) if self.k["bias"] else None

    def norm_if(self, present, size):
        return self.norm(size) if present else None

    def layer(self, window, turned):
        k = self.k
        heads, kv, D, H, F = (k[name] for name in ("heads", "kv_heads", "D", "H", "F"))
        qkv, up = (heads + 2 * kv) * D, 2 * F if k["gated"] else F
        q_size, k_size = (heads * D, kv * D) if k["qk_norm"] == "together" else (D, D)
        before, behind = (k["norms"] in (where, "both") for where in ("before", "behind"))
        return LayerWeights(
            self.norm_if(before, H),
            self.rand(qkv, H, scale=2 * H**-0.5),
            self.bias(qkv),
            self.norm_if(k["qk_norm"], q_size),
            self.norm_if(k["qk_norm"], k_size),
            self.rand(H, heads * D),
            self.bias(H),
            self.norm_if(before, H),
            self.rand(up, H),
            self.bias(up),
            self.rand(H, F),
            self.bias(H),
            window,
            self.norm_if(behind, H),
            self.norm_if(behind, H),
            turned,
            self.norm_bias(H),
            self.norm_bias(H),
        )


def make(device, kind, dtype=torch.float32, V=37, seed=0):
    k = DEFAULTS | (KINDS[kind] if isinstance(kind, str) else kind)
    drawn, heads, D, H = Drawn(device, k, dtype, seed), k["heads"], k["D"], k["H"]
    layers = [
        drawn.layer(window, turned)
        for window, turned in zip(
            k["windows"], k.get("ropes", (0,) * len(k["windows"])), strict=True
        )
    ]
    embedding = drawn.rand(V, H, scale=1.0)
    inv_freq = 1.0 / 100.0 ** (
        torch.arange(k.get("pairs", D // 2), dtype=torch.float32, device=device) / (D // 2)
    )
    inv_freq = (
        inv_freq
        if k["tables"] == 1
        else torch.stack([inv_freq / (1 + 3 * t) for t in range(k["tables"])])
    )
    learned = None if k["positions"] is None else drawn.rand(k["positions"], H, scale=0.5)
    return DecoderWeights(
        embedding,
        tuple(layers),
        drawn.norm(H),
        embedding,
        RopeTable(inv_freq, k["rope_scale"]),
        heads,
        k["kv_heads"],
        D,
        1e-5,
        k["options"],
        learned,
        drawn.norm_bias(H),
    )


def convert(weights, dtype):
    to = lambda t: t.to(dtype) if isinstance(t, torch.Tensor) else t  # noqa: E731
    layers = tuple(LayerWeights(*map(to, layer)) for layer in weights.layers)
    names = ("embedding", "norm", "head", "position_embedding", "norm_bias")
    return weights._replace(layers=layers, **{name: to(getattr(weights, name)) for name in names})


# Slices of the four products, in the order of Adapter: every part of every product; whole products;
# q and v, up alone, and half of o's rows.
def slices_of(kind, which):
    heads, kv, D, H, F = (KINDS[kind][name] for name in ("heads", "kv_heads", "D", "H", "F"))
    q, k, gate = heads * D, kv * D, F if KINDS[kind].get("gated", True) else 0
    up = ((2, 0, F), (2, gate, F)) if gate else ((2, 0, F),)
    return {
        "parts": ((0, 0, q), (0, q, k), (0, q + k, k), (1, 0, H), *up, (3, 0, H)),
        "whole": ((0, 0, q + 2 * k), (1, 0, H), (2, 0, gate + F), (3, 0, H)),
        "some": ((0, 0, q), (0, q + k, k), (1, 0, H // 2), up[-1]),
    }[which]


def adapted(device, kind, which, dtype=torch.float32, rank=3, seed=5, b_scale=1.0):
    weights, found, generator = (
        make(device, kind, dtype),
        slices_of(kind, which),
        torch.Generator().manual_seed(seed),
    )
    layers = []
    for layer in weights.layers:
        parts = []
        for product, weight in enumerate((layer.qkv, layer.o, layer.gate_up, layer.down)):
            rows = [count for at, _, count in found if at == product]
            shapes = ((len(rows) * rank, weight.shape[1]), (sum(rows), rank))
            parts += [
                torch.randn(shape, generator=generator)
                .to(device)
                .mul(scale * shape[1] ** -0.5)
                .to(dtype)
                if rows
                else None
                for shape, scale in zip(shapes, (1.0, b_scale), strict=True)
            ]
        layers.append(tuple(parts))
    return weights._replace(adapter=Adapter(tuple(layers), found, 0.7))


def merged(weights):
    """The same in float64 with the adapter multiplied out, row by row."""
    wide, adapter = convert(weights, torch.float64)._replace(adapter=None), weights.adapter
    for layer, parts in zip(wide.layers, adapter.layers, strict=True):
        for product, weight in enumerate((layer.qkv, layer.o, layer.gate_up, layer.down)):
            done = 0
            for index, (_, first, rows) in enumerate(
                found for found in adapter.slices if found[0] == product
            ):
                a, b = (part.double() for part in parts[2 * product : 2 * product + 2])
                r = b.shape[1]
                for row in range(rows):
                    weight[first + row] += adapter.scale * sum(
                        b[done + row, i] * a[index * r + i] for i in range(r)
                    )
                done += rows
    return wide


ACTIVATIONS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * torch.special.ndtr(x),
    "gelu_tanh": lambda x: x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
}


def normed(x, g, b=None, *, offset, eps):
    """RMSNorm, or with a bias LayerNorm, of the last dimension; without a weight nothing."""
    if b is not None:
        centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
        return centred / (centred.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * g + b
    if g is None:
        return x
    return (g + offset) * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def dense(device, weights, ids):
    """One whole sequence in float64 with no cache, position by position: the definition, written
    independently."""
    w, T, D = convert(weights, torch.float64), len(ids), weights.head_dim
    group = w.num_heads // w.num_kv_heads

    options = w.options
    tables = w.rope_table.inv_freq.double()
    P = tables.shape[1]

    norm = functools.partial(normed, offset=options.norm_offset, eps=w.norm_eps)

    def turn(x, t, inv_freq):
        z = torch.complex(x[..., :P], x[..., P : 2 * P]) * torch.polar(
            torch.tensor(w.rope_table.scale, device=device).double(), t * inv_freq
        )
        return torch.cat([z.real, z.imag, x[..., 2 * P :]], -1)

    x = w.embedding[ids] * options.embedding_scale
    x = x if w.position_embedding is None else x + w.position_embedding[:T]
    for layer in w.layers:
        zero = lambda b: 0.0 if b is None else b  # noqa: E731
        qkv = (
            norm(x, layer.input_norm, layer.input_norm_bias) @ layer.qkv.T + zero(layer.qkv_bias)
        ).view(T, -1, D)
        q, k, v = qkv.split((w.num_heads, w.num_kv_heads, w.num_kv_heads), 1)
        if layer.q_norm is not None and layer.q_norm.numel() == D:
            q, k = norm(q, layer.q_norm), norm(k, layer.k_norm)
        elif layer.q_norm is not None:
            q, k = (
                norm(y.reshape(T, -1), g).view(y.shape)
                for y, g in ((q, layer.q_norm), (k, layer.k_norm))
            )
        if layer.rope >= 0:
            q, k = (
                torch.stack([turn(row, t, tables[layer.rope]) for t, row in enumerate(y)])
                for y in (q, k)
            )
        scale, cap = options.attention_scale or 1 / math.sqrt(D), options.attention_softcap
        rows = []
        for t in range(T):
            start = max(0, t - layer.window + 1) if layer.window else 0
            for h in range(w.num_heads):
                z = k[start : t + 1, h // group] @ q[t, h] * scale
                p = torch.softmax(z if cap is None else cap * torch.tanh(z / cap), 0)
                rows.append(p @ v[start : t + 1, h // group])
        before = x
        x = x + norm(
            torch.stack(rows).view(T, -1) @ layer.o.T + zero(layer.o_bias), layer.attention_out_norm
        )
        h = norm(
            before if options.parallel else x, layer.post_norm, layer.post_norm_bias
        ) @ layer.gate_up.T + zero(layer.gate_up_bias)
        gate, up = h.chunk(2, -1) if h.shape[-1] > layer.down.shape[1] else (h, 1.0)
        gate = ACTIVATIONS[options.activation](gate)
        x = x + norm((gate * up) @ layer.down.T + zero(layer.down_bias), layer.mlp_out_norm)
    return norm(x, w.norm, w.norm_bias)


class Cache:
    """A paged cache with the blocks of `lengths` sequences dealt out at random; what is not written
    is `fill`, and unused table entries are wild."""

    def __init__(self, weights, lengths, size=16, fill=math.nan, seed=1, dtype=None):
        need = [-(-n // size) for n in lengths]
        self.k, self.v = allocate_cache(weights, sum(need) + 3, size, dtype=dtype)
        self.k.fill_(fill)
        self.v.fill_(fill)
        blocks = (
            torch.randperm(sum(need) + 3, generator=torch.Generator().manual_seed(seed))
            .to(self.k.device)
            .int()
        )
        self.table = torch.full(
            (len(lengths), max(need) + 1), 2**31 - 1, dtype=torch.int32, device=self.k.device
        )
        for row, n in enumerate(need):
            self.table[row, :n] = blocks[sum(need[:row]) :][:n]


def step(device, weights, cache, tokens, impl, out_slots=None):
    """tokens: (row, position, id) triples."""
    rows, positions, ids = (
        torch.tensor(tokens, dtype=torch.int64, device=device).reshape(-1, 3).unbind(1)
    )
    return decode_step(
        weights, ids, positions, rows, cache.table, cache.k, cache.v, out_slots, impl=impl
    )


def sequences(device, lengths, V=37, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, V, (n,), generator=generator).to(device).tolist() for n in lengths]


def triples(ids, start=0, stop=None):
    return [
        [(row, t, token) for t, token in enumerate(sequence)][start:stop]
        for row, sequence in enumerate(ids)
    ]


# Tokens are the lanes of a vector: a function that takes another path for all lanes where one of
# them is large, small or no number (a vector library's cos and sin, some of its erf) would change
# the bits of the others. No norm stands before the products, so that activations and scores are as
# wild as the embedding.
@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("kind", ["plain", "parallel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_companions_of_any_magnitude(kind, activation, cap, dtype, device):
    scales = [
        0.0,
        1e-42,
        1e-30,
        1e-3,
        0.3,
        1.0,
        3.0,
        30.0,
        1e4,
        1e10,
        1e20,
        3e38,
        math.inf,
        math.nan,
    ]
    weights = make(device, kind, torch.float32, V=len(scales))
    embedding = torch.stack(
        [
            row.sign() * row.abs().clamp(min=0.1) * s
            for row, s in zip(weights.embedding, scales, strict=True)
        ]
    )
    layers = tuple(
        layer._replace(
            input_norm=None, post_norm=None, input_norm_bias=None, post_norm_bias=None, rope=0
        )
        for layer in weights.layers
    )
    options = weights.options._replace(activation=activation, attention_softcap=cap)
    weights = convert(
        weights._replace(
            embedding=embedding, layers=layers, options=options, position_embedding=None
        ),
        dtype,
    )
    last, count = 20, len(scales)

    def run(ids, fill):
        cache = Cache(weights, [last + 1] * len(ids), fill=fill, dtype=torch.float32)
        hidden = [
            step(device, weights, cache, [(row, t, token) for row, token in enumerate(ids)], "cpp")
            for t in (18, 19, 20)
        ]
        return torch.stack(hidden), cache

    # Positions 0 to 17 hold what the cache was filled with; slots behind the last hold it too, and
    # may not be seen.
    for token in range(count):
        alone, _ = run([token], 0.5)
        for other in range(count):
            among, _ = run([other] * 3 + [token] + [other] * 14, 0.5)
            assert torch.equal(
                alone[:, 0].view(torch.uint8), among[:, 3].view(torch.uint8)
            ) or bool(alone.isnan().any()), (scales[token], scales[other])


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("kind", ["plain", "normed", "windowed"])
def test_bits_do_not_depend_on_what_unseen_slots_hold(kind, cap, device):
    """Scores of a block are made together, those of slots that were never written among them."""
    weights = make(device, kind)._replace(options=Options(attention_softcap=cap))
    (ids,) = sequences(device, [21])
    said = []
    for fill in (0.0, 1e-42, 1.0, 100.0, 1e30, math.inf, math.nan):
        cache = Cache(weights, [21], fill=fill)
        said.append(
            torch.cat(
                [
                    step(device, weights, cache, [(0, t, token)], "cpp")
                    for t, token in enumerate(ids)
                ]
            )
        )
    assert all(torch.equal(said[0], x) for x in said)


# Block sizes at, off and below the vector; lengths at one token, around a block, over several; a
# cache of NaN.
@pytest.mark.each_impl("decode_step", interpreted=False)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [16, 5, 1, 24])
def test_matches_a_dense_decoder_in_float64(impl, kind, size, device):
    weights, lengths = make(device, kind), [1, 16, 17, 41]
    ids, cache = sequences(device, lengths), Cache(make(device, kind), lengths, size)
    want = [dense(device, weights, sequence) for sequence in ids]
    # prompts in one call, the rest a token of each at a time
    first = [chunk for row in triples(ids, 0, 15) for chunk in row]
    got = step(device, weights, cache, first, impl)
    for (row, t, _), hidden in zip(first, got, strict=True):
        torch.testing.assert_close(hidden.double(), want[row][t], rtol=2e-5, atol=2e-5)
    for t in range(15, max(lengths)):
        tokens = [(row, t, sequence[t]) for row, sequence in enumerate(ids) if t < len(sequence)]
        for (row, _, _), hidden in zip(
            tokens, step(device, weights, cache, tokens, impl), strict=True
        ):
            torch.testing.assert_close(hidden.double(), want[row][t], rtol=2e-5, atol=2e-5)


@pytest.mark.each_impl("decode_step")
@pytest.mark.parametrize(
    ("kind", "which"),
    [
        ("biased", "parts"),
        ("windowed", "some"),
        ("behind", "whole"),
        ("both", "parts"),
        ("both", "some"),
    ],
)
def test_an_adapter_is_its_product_multiplied_out(impl, kind, which, device):
    weights, lengths = (
        adapted(device, kind, which),
        [1, 19] if not interpreted(impl, device) else [1, 5],
    )
    ids, cache = sequences(device, lengths), Cache(weights, lengths, 4)
    want = [dense(device, merged(weights), sequence) for sequence in ids]
    assert (dense(device, weights._replace(adapter=None), ids[1]) - want[1]).abs().max() > 0.1
    short, long = triples(ids)
    for tokens in (long[:2], short + long[2:-1], long[-1:]):
        for (row, t, _), hidden in zip(
            tokens, step(device, weights, cache, tokens, impl), strict=True
        ):
            torch.testing.assert_close(hidden.double(), want[row][t], rtol=3e-5, atol=3e-5)


@pytest.mark.each_impl("decode_step", interpreted=False)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_of_zeros_changes_no_bit(impl, dtype, device):
    for kind in ("biased", "both"):
        weights, lengths = adapted(device, kind, "parts", dtype, b_scale=0.0), [3, 80]
        tokens = [token for row in triples(sequences(device, lengths)) for token in row]
        assert torch.equal(
            step(device, weights, Cache(weights, lengths), tokens, impl),
            step(device, make(device, kind, dtype), Cache(weights, lengths), tokens, impl),
        )


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_an_adapter_in_bfloat16_errs_no_more_than_torch(device):
    weights, (ids,) = adapted(device, "both", "parts", torch.bfloat16), sequences(device, [40])
    want = dense(device, merged(weights), ids)
    errors = {
        impl: (step(device, weights, Cache(weights, [40]), triples([ids])[0], impl).double() - want)
        .square()
        .mean()
        .sqrt()
        for impl in ("torch", "cpp")
    }
    assert errors["cpp"] <= errors["torch"] < 0.1 * want.square().mean().sqrt()


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_cpp_refuses_adapters_that_do_not_fit(device):
    weights = adapted(device, "plain", "parts")
    cache, layers = Cache(weights, [20]), weights.adapter.layers
    for adapter, error, what in (
        (
            Adapter(layers[:1], *weights.adapter[1:]),
            ValueError,
            "8 adapter matrices of each of 2 layers",
        ),
        (
            weights.adapter._replace(slices=((1, 1, 32),)),
            ValueError,
            "slice of 32 rows from 1 on is none of product 1",
        ),
        (weights.adapter._replace(slices=((4, 0, 1),)), ValueError, "none of product 4"),
        (
            weights.adapter._replace(slices=weights.adapter.slices[1:]),
            ValueError,
            "expected an adapter's a",
        ),
        (
            weights.adapter._replace(
                layers=((layers[0][0], layers[0][1].double(), *layers[0][2:]), layers[1])
            ),
            TypeError,
            "an adapter's b in the embedding's dtype",
        ),
    ):
        with pytest.raises(error, match=what):
            step(device, weights._replace(adapter=adapter), cache, [(0, 0, 0)], "cpp")


def test_reference_in_float64(device):
    for kind in KINDS:
        weights, (ids,) = make(device, kind, torch.float64), sequences(device, [20])
        torch.testing.assert_close(
            step(device, weights, Cache(weights, [20]), triples([ids])[0], "torch"),
            dense(device, weights, ids),
            rtol=1e-10,
            atol=1e-10,
        )


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("plain", 4),
        ("biased", 5),
        ("normed", 8),
        ("windowed", 4),
        ("behind", 4),
        ("both", 4),
        ("classic", 4),
        ("parallel", 4),
    ],
)
def test_triton_matches_a_dense_decoder_in_float64(kind, size, monkeypatch, device):
    monkeypatch.setattr(paged_attention_module, "_SPLIT", 8)
    weights, lengths = make(device, kind), [1, 10]
    ids, cache = sequences(device, lengths), Cache(make(device, kind), lengths, size)
    want = [dense(device, weights, sequence) for sequence in ids]
    short, long = triples(ids)
    # a chunk, a chunk beside a whole prompt, and one token at a time
    for tokens in (long[:2], short + long[2:8], long[8:9], long[9:]):
        for (row, t, _), hidden in zip(
            tokens, step(device, weights, cache, tokens, "triton"), strict=True
        ):
            torch.testing.assert_close(hidden.double(), want[row][t], rtol=2e-5, atol=2e-5)


@pytest.mark.cpu_only("values are read on the host, or an implementation is named, on a CPU alone")
@pytest.mark.usefixtures("triton_runs")
def test_triton_reads_out_slots_and_compiles(device):
    weights, (ids,) = make(device, "biased"), sequences(device, [4])
    tokens, slots = triples([ids])[0], torch.tensor([3, 0, 3], device=device)
    want = step(device, weights, Cache(weights, [4]), tokens, "torch", slots)
    torch.testing.assert_close(
        step(device, weights, Cache(weights, [4]), tokens, "triton", slots),
        want,
        rtol=2e-5,
        atol=2e-5,
    )
    assert step(device, weights, Cache(weights, [4]), [], "triton").shape == (0, 40)
    cache, n = Cache(weights, [4], fill=0.0), torch.arange(4, device=device)
    compiled = torch.compile(decode_step, fullgraph=True, backend="aot_eager")
    got = compiled(
        weights,
        torch.tensor(ids, device=device),
        n,
        torch.zeros(4, dtype=torch.int64, device=device),
        cache.table.clamp(max=3),
        cache.k,
        cache.v,
        slots,
        impl="triton",
    )
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    with pytest.raises(RuntimeError, match="'triton' cannot run on cpu: it computes in float32"):
        step(
            device,
            make(device, "plain", torch.float64),
            Cache(make(device, "plain", torch.float64), [4]),
            tokens,
            "triton",
        )
    with pytest.raises(IndexError, match="token_ids"):
        step(device, weights, cache, [(0, 0, 37)], "triton")


@pytest.mark.each_impl("decode_step", interpreted=False)
@pytest.mark.parametrize("kind", ["plain", "windowed"])
def test_what_was_not_written_changes_nothing(impl, kind, device):
    weights, ids = make(device, kind), sequences(device, [3, 21, 40])
    tokens = [token for row in triples(ids) for token in row]
    caches = [Cache(weights, [3, 21, 40], fill=fill) for fill in (math.nan, 0.0, 1e30)]
    results = [step(device, weights, cache, tokens, impl) for cache in caches]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    written = ~caches[0].k.isnan()
    assert torch.equal(written, caches[1].k != 0)  # the caches differ in nothing but the fill
    assert torch.equal(caches[0].k[written], caches[1].k[written])
    assert written.sum() == 64 * len(weights.layers) * weights.num_kv_heads * weights.head_dim
    assert (~caches[0].v.isnan()).sum() == written.sum()


# Widths of a panel: one lane, around a vector, around a panel, several panels; companions behind
# and before.
@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
@pytest.mark.parametrize("companions", [0, 14, 15, 16, 50, 63, 64, 150])
@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("biased", torch.float32),
        ("biased", torch.bfloat16),
        ("both", torch.float32),
        ("both", torch.bfloat16),
        ("classic", torch.float32),
        ("classic", torch.bfloat16),
        ("parallel", torch.float32),
    ],
)
def test_cpp_bits_do_not_depend_on_companions_or_chunks(companions, kind, dtype, device):
    weights, lengths = adapted(device, kind, "parts", dtype), [23, *[4] * companions]
    # beside bfloat16 weights both, in turn
    ids, cached = sequences(device, lengths), torch.float32 if companions % 4 else None
    rows = triples(ids)
    whole = step(device, weights, Cache(weights, lengths, dtype=cached), rows[0], "cpp")
    cache, alone = Cache(weights, lengths, dtype=cached), []
    alone += step(device, weights, cache, rows[0][:9], "cpp")
    alone += [step(device, weights, cache, [token], "cpp")[0] for token in rows[0][9:20]]
    others = [token for row in rows[1:] for token in row]
    alone += step(
        device,
        weights,
        cache,
        others[: len(others) // 2] + rows[0][20:] + others[len(others) // 2 :],
        "cpp",
    )[len(others) // 2 :][:3]
    assert torch.equal(whole, torch.stack(alone))


# A prompt's tokens are attended to in tiles where blocks and heads are whole vectors; each has the
# bits that it has alone. Positions beyond a stretch of 128, a tile that begins inside of one,
# windows shorter and longer than a stretch, blocks of one vector, of several and of a part of one.
@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "D", "size", "windows", "cap", "length"),
    [
        (6, 2, 32, 16, (0, 0), None, 330),
        (7, 1, 16, 32, (40, 0), 2.0, 330),
        (4, 4, 64, 16, (200, 3), None, 450),
        (8, 2, 48, 64, (0, 129), None, 290),
        (2, 1, 32, 256, (0, 300), None, 600),
        (3, 1, 24, 16, (0, 50), None, 200),
        (3, 1, 32, 12, (0, 50), 3.0, 200),
        (3, 1, 32, 16, (0, 700), None, 1100),
    ],
)
@pytest.mark.parametrize("cached", [torch.float32, torch.bfloat16], ids=str)
def test_a_prompt_in_tiles_has_the_bits_of_its_tokens_alone(
    heads, kv_heads, D, size, windows, cap, length, cached, device
):
    shape = {"heads": heads, "kv_heads": kv_heads, "D": D, "H": 32, "F": 43, "windows": windows}
    weights = make(device, {**shape, "options": Options(attention_softcap=cap)}, cached)
    lengths = [length, 37]
    rows = triples(sequences(device, lengths))
    alone, whole, cut = (Cache(weights, lengths, size) for _ in range(3))
    want = torch.cat([step(device, weights, alone, [token], "cpp") for token in rows[0]])
    assert torch.equal(step(device, weights, whole, rows[0], "cpp"), want)
    got, begin = [], 0
    for count in (1, 2, 15, 17, 100, 3, length):  # beside tokens of another row
        some = rows[0][begin : begin + count]
        others = rows[1][: len(some) % 5]
        found = step(device, weights, cut, [*others, *some, *others], "cpp")
        got.append(found[len(others) :][: len(some)])
        begin += count
    assert torch.equal(torch.cat(got), want)
    assert want.isfinite().all()
    if cached == torch.float32:
        errors = (want.double() - dense(device, weights, [t for _, _, t in rows[0]])).abs()
        assert errors.max() < 5e-5


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_cpp_bits_do_not_depend_on_threads(device):
    weights, lengths = adapted(device, "windowed", "parts"), [150, 90]
    tokens = [token for row in triples(sequences(device, lengths)) for token in row]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(step(device, weights, Cache(weights, lengths), tokens, "cpp"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_bfloat16_errs_no_more_than_torch(kind, device):
    weights, (ids,) = make(device, kind, torch.bfloat16), sequences(device, [40])
    want = dense(device, weights, ids)
    errors = {
        impl: (step(device, weights, Cache(weights, [40]), triples([ids])[0], impl).double() - want)
        .square()
        .mean()
        .sqrt()
        for impl in ("torch", "cpp")
    }
    assert errors["cpp"] <= errors["torch"] < 0.1 * want.square().mean().sqrt()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_a_float32_cache_beside_bfloat16_weights_rounds_nothing_but_the_result(kind, device):
    weights, lengths = make(device, kind, torch.bfloat16), [40, 3]
    ids = sequences(device, lengths)
    wide = [Cache(weights, lengths, dtype=torch.float32) for _ in range(2)]
    tokens = [token for row in triples(ids) for token in row]
    got = step(device, weights, wide[0], tokens[:9], "cpp").double()
    got = torch.cat([got, step(device, weights, wide[0], tokens[9:], "cpp").double()])
    want = torch.cat([dense(device, weights, sequence) for sequence in ids])
    # in float64 not rounded, elsewhere to the weights' dtype
    scale = weights.options.embedding_scale
    assert scale == torch.tensor(scale, device=device).bfloat16().item()
    torch.testing.assert_close(got, want, rtol=0.51 * 2**-7, atol=2e-4)
    narrow = [Cache(weights, lengths) for _ in range(2)]
    step(device, weights, narrow[0], tokens, "cpp")
    # of the first layer, which has read no cache yet
    for kept, rounded in ((wide[0].k, narrow[0].k), (wide[0].v, narrow[0].v)):
        assert torch.equal(kept[0].bfloat16().nan_to_num(), rounded[0].nan_to_num())
        assert not torch.equal(kept[0].nan_to_num(), rounded[0].float().nan_to_num())
    torch.testing.assert_close(
        step(device, weights, wide[1], tokens, "torch").double(), want, rtol=0.51 * 2**-7, atol=2e-4
    )
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            step(device, weights, narrow[1], tokens, "torch").double(),
            want,
            rtol=0.51 * 2**-7,
            atol=2e-4,
        )
    with pytest.raises(TypeError, match="expected v_cache of dtype float32"):
        decode_step(
            weights,
            *torch.zeros(3, 1, dtype=torch.int64, device=device),
            wide[0].table,
            wide[0].k,
            narrow[0].v,
        )


@pytest.mark.usefixtures("triton_runs")
def test_triton_caches_what_the_weights_allow(device):
    for dtype, refused in (
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float64),
        (torch.float16, torch.float32),
    ):
        weights = make(device, "plain", dtype)
        with pytest.raises(TypeError, match="expected k_cache of dtype "):
            step(device, weights, Cache(weights, [4], dtype=refused), [(0, 0, 1)], "triton")


@pytest.mark.each_impl("decode_step", interpreted=False)
def test_out_slots(impl, device):
    weights, ids = make(device, "plain"), sequences(device, [30, 60])
    tokens = [token for row in triples(ids) for token in row]
    every = step(device, weights, Cache(weights, [30, 60]), tokens, impl)
    slots = torch.tensor([89, 0, 29, 64, 64], device=device)
    assert torch.equal(
        step(device, weights, Cache(weights, [30, 60]), tokens, impl, slots), every[slots]
    )
    assert step(device, weights, Cache(weights, [30, 60]), tokens, impl, slots[:0]).shape == (0, 32)
    assert step(device, weights, Cache(weights, [1]), [], impl).shape == (0, 32)
    # twice the same bits
    assert torch.equal(step(device, weights, Cache(weights, [30, 60]), tokens, impl), every)


@pytest.mark.each_impl("decode_step", interpreted=False)
def test_reads_the_weights_as_they_are_now(impl, device):
    weights, (ids,) = make(device, "plain"), sequences(device, [5])
    step(device, weights, Cache(weights, [5]), triples([ids])[0], impl)
    weights.layers[0].gate_up.mul_(-1.5)
    got = step(device, weights, Cache(weights, [5]), triples([ids])[0], impl)
    torch.testing.assert_close(got.double(), dense(device, weights, ids), rtol=2e-5, atol=2e-5)


@pytest.mark.each_impl("decode_step", interpreted=False)
def test_agrees_with_the_training_decoder(impl, shared, device):
    from fusedrl.engine.model.weights import load_decoder

    decoder = load_decoder(shared / "models/stories260k")
    weights, lengths = decoder.weights(), [5, 64, 130]
    ids = sequences(device, lengths, V=512)
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])
    want = decoder(
        torch.tensor(functools.reduce(operator.iadd, ids, []), device=device),
        positions,
        torch.tensor([0, 5, 69, 199], dtype=torch.int32, device=device),
        130,
    )
    got = step(
        device,
        weights,
        Cache(weights, lengths),
        [token for row in triples(ids) for token in row],
        impl,
    )
    logp = [torch.log_softmax(hidden @ weights.head.T, -1) for hidden in (got, want)]
    torch.testing.assert_close(*logp, rtol=0, atol=1e-4)


def test_copy_blocks_reads_before_it_writes(device):
    weights = make(device, "plain")
    k, v = allocate_cache(weights, 5, 4)
    assert k.shape == (2, 5, 2, 8, 4)
    assert v.shape == (2, 5, 2, 4, 8)
    k.copy_(torch.randn(k.shape, device=device))
    v.copy_(torch.randn(v.shape, device=device))
    old_k, old_v = k.clone(), v.clone()
    copy_blocks(k, v, [(0, 1), (1, 4)])
    copy_blocks(k, v, [])
    for new, old in ((k, old_k), (v, old_v)):
        assert torch.equal(new, old[:, [0, 0, 2, 3, 1]])


@pytest.mark.cpu_only("values are read on the host, or an implementation is named, on a CPU alone")
@pytest.mark.each_impl("decode_step", interpreted=False)
def test_refuses_what_would_read_or_write_elsewhere(impl, device):
    weights = make(device, "plain")
    cache = Cache(weights, [20])
    good = {"row": 0, "position": 2, "id": 3}
    for change, what in (
        ({"id": 37}, "token_ids"),
        ({"id": -1}, "token_ids"),
        ({"row": 1}, "rows"),
        ({"row": -1}, "rows"),
        ({"position": -1}, "positions"),
        ({"position": 48}, "positions"),
        ({"position": 33}, "block_table"),
    ):
        with pytest.raises(IndexError, match=what):
            step(device, weights, cache, [tuple({**good, **change}.values())], impl)
    with pytest.raises(IndexError, match="out_slots"):
        step(device, weights, cache, [(0, 0, 0)], impl, torch.tensor([1], device=device))
    with pytest.raises(IndexError, match="positions"):
        step(
            device,
            weights._replace(position_embedding=torch.zeros(2, 32, device=device)),
            cache,
            [(0, 2, 3)],
            impl,
        )
    with pytest.raises(ValueError, match="k_cache does not fit its pattern"):
        decode_step(
            weights,
            *torch.zeros(3, 1, dtype=torch.int64, device=device),
            cache.table,
            cache.v,
            cache.v,
            impl=impl,
        )
    with pytest.raises(TypeError, match="expected block_table of dtype int32"):
        decode_step(
            weights,
            *torch.zeros(3, 1, dtype=torch.int64, device=device),
            cache.table.long(),
            cache.k,
            cache.v,
            impl=impl,
        )
    with pytest.raises(TypeError, match="expected k_cache of dtype float32"):
        decode_step(
            weights,
            *torch.zeros(3, 1, dtype=torch.int64, device=device),
            cache.table,
            cache.k.double(),
            cache.v,
            impl=impl,
        )


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_cpp_refuses_weights_that_do_not_fit(device):
    weights, cache = make(device, "plain"), Cache(make(device, "plain"), [20])
    for change, error, what in (
        ({"down": weights.layers[0].down.T.contiguous()}, ValueError, "expected gate_up"),
        ({"qkv_bias": torch.zeros(3, device=device)}, ValueError, "qkv_bias"),
        ({"o": weights.layers[0].o.double()}, TypeError, "expected o in"),
        ({"gate_up": None}, ValueError, "gate_up"),
        ({"rope": 1}, ValueError, "below the 1 rotary tables"),
        ({"mlp_out_norm": torch.ones(3, device=device)}, ValueError, "mlp_out_norm"),
        ({"qkv": weights.layers[0].qkv.T.contiguous().T}, ValueError, "expected qkv contiguous"),
    ):
        broken = weights._replace(layers=(weights.layers[0]._replace(**change), weights.layers[1]))
        with pytest.raises(error, match=what):
            step(device, broken, cache, [(0, 0, 0)], "cpp")
    for change, what in (
        (
            {"position_embedding": torch.zeros(9, 31, device=device)},
            "expected position_embedding contiguous",
        ),
        ({"norm_bias": torch.zeros(3, device=device)}, "norm_bias"),
        (
            {"options": Options(activation="relu")},
            "expected activation silu, gelu_tanh or gelu, got relu",
        ),
    ):
        with pytest.raises(ValueError, match=what):
            step(device, weights._replace(**change), cache, [(0, 0, 0)], "cpp")
    with pytest.raises(TypeError, match="float32, bfloat16"):
        step(
            device,
            make(device, "plain", torch.float64),
            Cache(make(device, "plain", torch.float64), [20]),
            [(0, 0, 0)],
            "cpp",
        )


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_opcheck_and_compile(device):
    weights, cache = make(device, "biased"), Cache(make(device, "biased"), [20], fill=0.0)
    ids, positions, rows = (
        torch.tensor([3, 4, 5], device=device),
        torch.arange(3, device=device),
        torch.zeros(3, dtype=torch.int64, device=device),
    )
    parts = [part for layer in weights.layers for part in layer.parts()]
    arguments = (
        ids,
        positions,
        rows,
        cache.table,
        cache.k,
        cache.v,
        torch.tensor([2], device=device),
        weights.embedding,
        None,
        weights.norm,
        None,
        *weights.rope_table.upto(20),
        parts,
        [0, 0],
        [0, 0],
        1e-5,
        0.25,
        0.0,
        1.0,
        0.0,
        "silu",
        False,
    )
    adapter = adapted(device, "biased", "some").adapter
    adapters = (
        [part for layer in adapter.layers for part in layer],
        [n for found in adapter.slices for n in found],
        adapter.scale,
    )
    for of_adapters in (([], [], 1.0), adapters):
        torch.library.opcheck(torch.ops.fusedrl.decode_step.default, (*arguments, *of_adapters))
    compiled = torch.compile(decode_step, fullgraph=True, backend="aot_eager")
    others = Cache(weights, [20])
    assert torch.equal(
        compiled(weights, ids, positions, rows, cache.table, cache.k, cache.v),
        decode_step(weights, ids, positions, rows, others.table, others.k, others.v),
    )
    # the graph writes the cache too
    assert torch.equal(cache.k[~others.k.isnan()], others.k[~others.k.isnan()])
