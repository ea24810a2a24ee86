"""Kernels that a layer launches on a GPU, counted on a machine without one: the composition runs
under Triton's interpreter, and every operation of torch that is no view, allocation or copy of
nothing counts as one launch, every launch of a Triton kernel as another."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fusedrl.engine.model import step
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.kernels import split_linear as split_module
from fusedrl.kernels.split_linear import split_linear

pytestmark = [
    pytest.mark.usefixtures("triton_runs"),
    pytest.mark.cpu_only("launches of the interpreter"),
]
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
FREE = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "split"}
FREE |= {"unbind", "unsqueeze", "squeeze", "detach", "alias", "empty", "empty_like", "new_empty"}
FREE |= {"_reshape_alias", "as_strided", "split_with_sizes", "chunk", "empty_strided", "lift_fresh"}


@pytest.fixture
def triton_runs(device):
    from fusedrl.kernels.runtime.dispatch import unavailable

    if why := unavailable("triton", device.type):
        pytest.skip(why)


class Launches(TorchDispatchMode):
    """Names of what is launched, in order."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = []
        from triton.runtime import interpreter

        run = interpreter.GridExecutor.__call__

        def counted(executor, *arguments, **options):
            self.names.append(executor.fn.__name__)
            return run(executor, *arguments, **options)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if function.namespace != "fusedrl" and name not in FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def launches(monkeypatch, device, layers, tokens, context, **options):
    """Launches of one step of as many sequences as `tokens`, each with `context` positions."""
    config = model_config(SIZES | {"num_hidden_layers": layers, "model_type": "qwen2"})
    decoder = Decoder.random(config, 0, dtype=torch.bfloat16, device=device)
    weights = decoder.weights()
    blocks = -(-context // 16)
    keys, values = step.allocate_cache(weights, tokens * blocks, 16, dtype=torch.float16)
    keys.zero_(), values.zero_()
    table = torch.arange(tokens * blocks, dtype=torch.int32, device=device).view(tokens, blocks)
    ids = torch.arange(tokens, device=device)
    weights.rope_table.upto(blocks * 16)
    positions, where = torch.full_like(ids, context - 1), (table, keys, values)
    with monkeypatch.context() as patched, Launches(patched) as seen:
        multiply = split_module.product

        def product(a, b):  # on a GPU one call of the BLAS; on a CPU its operands are widened first
            seen.names.append("product")
            with _disable_current_modes():
                return multiply(a, b)

        patched.setattr(split_module, "product", product)
        # on a CPU ranges are checked first, but not in a compiled call
        patched.setattr(torch.compiler, "is_compiling", lambda: True)
        step.decode_step(weights, ids, positions, ids, *where, impl="triton", **options)
    return seen.names


def of_a_layer(monkeypatch, device, *shape, **options):
    one, two, three = (
        launches(monkeypatch, device, layers, *shape, **options) for layers in (1, 2, 3)
    )
    assert len(three) - len(two) == len(two) - len(one)
    return len(two) - len(one), two


def test_launches_of_a_layer_that_decodes(device, monkeypatch):
    """docs/kernel-report.md cites these numbers."""
    count, names = of_a_layer(monkeypatch, device, 3, 40)
    assert count == 17, names
    of_products = ["_halves_kernel", "_join_kernel"]
    assert [names.count(name) for name in of_products] == [2 * 4, 2 * 4]
    # contexts beyond one split: one more, which merges
    assert of_a_layer(monkeypatch, device, 3, 300)[0] == 18
    # fixed numerics: a product is one launch
    assert of_a_layer(monkeypatch, device, 3, 40, fixed=True)[0] == 9


def test_halves_by_torch_are_counted_too(device, monkeypatch):
    """Negative control, and what a layer was before."""
    monkeypatch.setattr(step, "split_linear", lambda *a, impl, **k: split_linear(*a, impl="torch"))
    monkeypatch.setattr(
        step._Composition, "_norm_weight", lambda self, weight, dtype: weight.to(dtype)
    )
    count, names = of_a_layer(monkeypatch, device, 3, 40)
    assert count == 37, names
