"""One layer function for training, the reference and the composition: they agree in every family,
and what is wrong in it is wrong in all of them alike."""

import ast
from pathlib import Path

import pytest
import torch

from fusedrl.engine.config import LoRAConfig
from fusedrl.engine.model import layer as layer_module
from fusedrl.engine.model import step as step_module
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.families import FAMILIES
from fusedrl.engine.model.layer import Ops
from fusedrl.engine.model.lora import add_adapter
from fusedrl.engine.model.step import allocate_cache, decode_step
from fusedrl.kernels.runtime import dispatch, native

pytestmark = pytest.mark.cpu_only("float64, and the composition over the CPU's ops")
SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
KINDS = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 5},
    "phi3": {"sliding_window": 9, "partial_rotary_factor": 0.5},
    "smollm3": {"no_rope_layer_interval": 2},
    "gemma2": {"sliding_window": 9, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 9, "query_pre_attn_scalar": 5},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt2": {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 256, "n_inner": 56},
}
LENGTHS = (1, 23, 140, 7)


@pytest.fixture
def composition(monkeypatch):
    """The composition over the CPU's best ops; in Triton's interpreter a token takes a second."""
    monkeypatch.setattr(step_module, "_INTERPRETED", None)
    monkeypatch.setitem(dispatch._WHY_NOT, ("triton", "cpu"), None)


def decoder_of(kind, dtype):
    """With every kind of parameter off its initial value, and with an adapter where the family has
    them."""
    decoder = Decoder.random(
        model_config(SIZES | {"model_type": kind} | KINDS.get(kind, {})), 0, dtype=dtype
    )
    if decoder.config.gated:
        add_adapter(decoder, LoRAConfig(rank=2, targets=("all-linear",)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            if p.ndim == 1 or "lora" in name:
                p.add_(
                    (0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(dtype)
                )
    return decoder


def trained(decoder):
    ids = torch.randint(0, 61, (sum(LENGTHS),), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    with torch.no_grad():
        return decoder(ids, positions, cu_seqlens, max(LENGTHS))


def stepped(decoder, impl):
    """Prompts of all but the last token in one call, then the last of each."""
    ids = torch.randint(0, 61, (sum(LENGTHS),), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    rows = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    weights, width = decoder.weights(), -(-max(LENGTHS) // 16)
    k, v = allocate_cache(weights, len(LENGTHS) * width)
    table = (
        torch.randperm(len(LENGTHS) * width, generator=torch.Generator().manual_seed(3))
        .int()
        .view(len(LENGTHS), width)
    )
    last, found = (
        positions == torch.tensor(LENGTHS)[rows] - 1,
        torch.empty(len(ids), decoder.config.hidden_size, dtype=decoder.dtype),
    )
    for part in (~last, last):
        found[part] = decode_step(
            weights, ids[part], positions[part], rows[part], table, k, v, impl=impl
        )
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_training_is_the_reference_in_float64(kind):
    """No copy of a layer beside another one could drift by less than this shows."""
    decoder = decoder_of(kind, torch.float64)
    torch.testing.assert_close(stepped(decoder, "torch"), trained(decoder), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.usefixtures("composition")
def test_the_composition_errs_as_little_as_training(kind):
    """And so does the C++ step, which stands beside them."""
    decoder, wide = decoder_of(kind, torch.float32), decoder_of(kind, torch.float64)
    wide.load_state_dict({name: tensor.double() for name, tensor in decoder.state_dict().items()})
    want = trained(wide)
    found = {
        impl: stepped(decoder, impl) for impl in ("triton", *(["cpp"] if native.capability else []))
    }
    errors = {
        impl: float((x - want).square().mean().sqrt())
        for impl, x in (found | {"training": trained(decoder)}).items()
    }
    assert max(errors.values()) <= 4 * errors["training"] < 4e-4, errors


# What each family's layers go through, one thing wrong at a time.
FAULTS = {
    "add_norm": lambda right: (
        lambda self, delta, stream, *rest: right(self, delta + 0.1, stream, *rest)
    ),
    "heads": lambda right: lambda self, weights, qkv: right(self, weights, qkv * 1.25),
    "norm": lambda right: lambda self, x, weight, bias=None: right(self, x, weight, bias) * 1.25,
    "embed": lambda right: lambda self, *tensors: right(self, *tensors) * 1.25,
    "_turn": lambda right: lambda self, q, k, cos, sin: right(self, q, k, sin, cos),
}


@pytest.mark.parametrize(
    "kind, name",
    [
        ("llama", "add_norm"),
        ("phi3", "heads"),
        ("gemma2", "norm"),
        ("gpt2", "norm"),
        ("gpt_neox", "embed"),
        ("smollm3", "_turn"),
        ("olmo2", "_turn"),
    ],
)
def test_a_fault_is_in_all_of_them_alike(kind, name, monkeypatch):
    decoder = decoder_of(kind, torch.float64)
    right = trained(decoder)
    monkeypatch.setattr(Ops, name, FAULTS[name](getattr(Ops, name)))
    wrong = trained(decoder)
    assert (wrong - right).abs().max() > 1e-2
    torch.testing.assert_close(stepped(decoder, "torch"), wrong, rtol=1e-11, atol=1e-11)


def test_what_families_differ_in_is_looked_at_in_one_file():
    """Names that only the mathematics of a layer reads: who read them elsewhere would write a part
    of it again."""
    root, names = (
        Path(layer_module.__file__).parents[2],
        {"attention_out_norm", "mlp_out_norm", "post_norm_bias", "parallel"},
    )
    read = {}
    for path in [*(root / "engine" / "model").glob("*.py"), *(root / "kernels").glob("*.py")]:
        used = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute)
        } & names
        if used:
            read[path.name] = used
    # which tensors there are, and where
    held = {"configuration.py", "families.py", "weights.py", "sharing.py"}
    assert read.pop("layer.py") == names
    assert read.pop("step.py") == {"parallel"}  # handed to the C++ op
    assert read.pop("decoder.py") == names  # handed to `LayerWeights` and `Options`
    assert set(read) <= held, read
