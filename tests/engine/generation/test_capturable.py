"""A proof without a GPU that a decoding step can be captured in a CUDA graph: it runs on fake CUDA
tensors, which have no values to look at.

A size that follows a value, a number read back, a copy between host and device: each raises here,
as it would fail or freeze under capture there.
"""

import contextlib
import functools

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedrl.engine.generation.cache import CacheConfig, KVCache
from fusedrl.engine.generation.generator import Generator
from fusedrl.engine.generation.graphs import pad
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.generation.state import DecodeState, advance
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.heads import ValueHead
from fusedrl.kernels.rope import RopeTable
from fusedrl.kernels.runtime.dispatch import unavailable, use_impl

SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
KINDS = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "gemma2": {
        "model_type": "gemma2",
        "sliding_window": 9,
        "query_pre_attn_scalar": 5,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
}
ASKED = {
    "plain": SamplingParams(),
    "greedy": SamplingParams(temperature=0.0),
    "everything": SamplingParams(
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        min_new_tokens=3,
        banned_token_ids=(4,),
        logit_bias={5: 1.0},
        stop_token_ids=(7, 8),
    ),
}
DEVICE = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def _no_pinned_memory(monkeypatch):
    """Which needs a card; the host's columns are sent before the steps that are watched."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)


class HostTouched(Exception):
    pass


class NothingFromTheHost(TorchDispatchMode):
    """Every tensor of every operation is on the device (a number beside tensors is an argument of
    the launch). What asks for a value is refused by FakeTensorMode itself."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations.append(str(function))
        if function in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default) and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        ):
            raise HostTouched(f"{function} by a mask")
        out = function(*args, **(kwargs or {}))
        tensors = [
            leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)
        ]
        hosts = [tensor for tensor in tensors if tensor.device.type != "cuda"]
        if any(tensor.ndim for tensor in hosts) or (
            hosts and function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        ):
            raise HostTouched(str(function))
        return out


class Spelled(TorchFunctionMode):
    """x[...] and ~x as the operations that they stand for: of a CUDA tensor, Python's own way asks
    for the device, which a torch without CUDA refuses."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if (
            function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
            and args[0].device.type == "cuda"
        ):
            view, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
            tensors, dim = [], 0
            for i in index:
                if isinstance(i, int):
                    view = view.select(dim, i)
                    continue
                if i is None:
                    view = view.unsqueeze(dim)
                elif isinstance(i, slice):
                    view = (
                        view
                        if i == slice(None)
                        else torch.ops.aten.slice(view, dim, i.start, i.stop, i.step or 1)
                    )
                tensors.append(i if isinstance(i, torch.Tensor) else None)
                dim += 1
            if function is torch.Tensor.__setitem__:
                return torch.ops.aten.index_put_(view, tensors, args[2])
            return (
                torch.ops.aten.index(view, tensors) if any(i is not None for i in tensors) else view
            )
        return (
            torch.bitwise_not(args[0])
            if function is torch.Tensor.__invert__
            else function(*args, **(kwargs or {}))
        )


def columns_of(device, params, rows=3, count=5):
    """What a generator would give the device for `rows` sequences, padded to `count`."""
    generator = Generator(
        Decoder.random(model_config(SIZES | KINDS["llama"]), 0, device=device),
        None,
        CacheConfig(block_size=4, max_sequences=8),
    )
    for slot in range(rows):
        generator._table.put(slot, params, slot, 0, frozenset({2, *params.stop_token_ids}), 4)
    slots = generator.scheduler.slots
    slots.reserve(40)
    slots.length[:rows], slots.limit[:rows] = 4, 30
    seen = {}

    class Graphs:
        @staticmethod
        def state(columns, numbers, window, device, drew, values):
            seen.update(columns=columns, numbers=numbers)

    generator._graphs = Graphs()
    generator._rows_of(np.arange(rows), captured=True)
    return pad(seen["columns"], count, 8), seen["numbers"]


def on_the_device(x):
    if isinstance(x, torch.Tensor):
        return torch.empty(x.shape, dtype=x.dtype, device=DEVICE)
    if isinstance(x, RopeTable):
        x = RopeTable(on_the_device(x.inv_freq), x.scale)
        x.upto(SIZES["max_position_embeddings"])  # as a generator does before it captures
        return x
    return (
        type(x)(*map(on_the_device, x))
        if hasattr(x, "_fields")
        else tuple(map(on_the_device, x))
        if isinstance(x, tuple)
        else x
    )


def watch(device, step, kind="llama", dtype=torch.bfloat16, params=None, value_head=False):
    """Names of the operations of `step(weights, state, block table, cache)` on fake tensors of a
    CUDA device; with a value head, it is its last argument."""
    columns, numbers = columns_of(device, params or SamplingParams())
    weights = Decoder.random(
        model_config(SIZES | KINDS[kind]), 0, dtype=dtype, device=device
    ).weights()
    with FakeTensorMode(), Spelled(), torch.no_grad():
        weights, state = (
            on_the_device(weights),
            DecodeState(columns, numbers, 8, DEVICE, values=value_head),
        )
        if value_head:
            step = functools.partial(
                step, value_head=ValueHead(SIZES["hidden_size"], device=DEVICE)
            )
        cache, table_BM = (
            KVCache(CacheConfig(block_size=4, num_blocks=40), weights, 96),
            torch.empty(9, 16, dtype=torch.int32, device=DEVICE),
        )
        addresses = [id(column) for column in state.columns.values()]
        with NothingFromTheHost() as seen:
            step(weights, state, table_BM, cache)
            step(weights, state, table_BM, cache)
        assert [id(column) for column in state.columns.values()] == addresses
    assert len(seen.operations) % 2 == 0
    assert (
        seen.operations[: len(seen.operations) // 2] == seen.operations[len(seen.operations) // 2 :]
    )
    return seen.operations[: len(seen.operations) // 2]


@pytest.mark.parametrize("impl", ["the default of CUDA", "torch"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", ASKED)
def test_a_step_never_waits_for_the_host(impl, kind, asked, device):
    if impl != "torch" and unavailable("triton", "cuda"):
        pytest.skip(str(unavailable("triton", "cuda")))
    for dtype in (torch.bfloat16, torch.float32):
        with use_impl("torch") if impl == "torch" else contextlib.nullcontext():
            operations = watch(
                device, lambda *step: advance(*step, False), kind, dtype, ASKED[asked]
            )
            with_values = watch(
                device,
                lambda *step, value_head: advance(*step, False, value_head=value_head),
                kind,
                dtype,
                ASKED[asked],
                value_head=True,
            )
        assert len(operations) < len(with_values) <= len(operations) + 12, (
            "one product, what prepares it, its unit and its level"
        )
        ours = {name for name in operations if name.startswith("fusedrl.")}
        assert bool(ours) == (impl != "torch")
        if ours:
            assert {
                f"fusedrl.{op}_triton.default"
                for op in ("rope_and_cache", "paged_attention", "sample")
            } <= ours


@pytest.mark.parametrize(
    "touch",
    [
        lambda ids: ids.tolist(),
        lambda ids: ids[ids > 0],
        lambda ids: torch.ops.aten.nonzero(ids),
        lambda ids: bool(ids.any()),
        lambda ids: ids.cpu(),
        lambda ids: ids + torch.from_numpy(np.zeros(len(ids))).to(DEVICE),
        lambda ids: ids * torch.tensor(2, device=DEVICE),
        lambda ids: torch.repeat_interleave(ids, ids),
        lambda ids: torch.masked_select(ids, ids > 0),
    ],
    ids=[
        "tolist",
        "mask",
        "nonzero",
        "any",
        "cpu",
        "from_numpy",
        "constant",
        "repeat",
        "masked_select",
    ],
)
def test_a_step_that_does_is_caught(touch, device):
    def step(weights, state, table_BM, cache):
        advance(weights, state, table_BM, cache, False)
        touch(state.columns["token_ids"])

    with pytest.raises((HostTouched, DataDependentOutputException, DynamicOutputShapeException)):
        watch(device, step)
