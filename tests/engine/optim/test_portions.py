"""Copies of gradients that a step makes: few at a time, and of the same bits as all at once."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.optim import adamw
from fusedrl.engine.optim.adamw import make_optimizer

NUMBERS, COUNT = 1 << 14, 12


class Live(TorchDispatchMode):
    """Bytes of the tensors that operations make, at most at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in self.tensors((args, kwargs))}
        for tensor in self.tensors(out):
            key = tensor.untyped_storage().data_ptr()
            if key and key not in old and key not in self.seen:
                self.seen.add(key)
                self.now += tensor.nbytes
                self.most = max(self.most, self.now)
                weakref.finalize(tensor, self.gone, key, tensor.nbytes)
        return out

    @staticmethod
    def tensors(tree):
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

    def gone(self, key, nbytes):
        self.seen.discard(key)
        self.now -= nbytes


def trained(device, monkeypatch, many):
    """(parameters after three steps, largest bytes of the third) where `many` numbers are copied at
    a time."""
    monkeypatch.setattr(adamw, "_MANY", many)
    draw = torch.Generator().manual_seed(0)
    params = {
        f"p{i}": torch.nn.Parameter(
            torch.randn(64, NUMBERS // 64, generator=draw).to(device, dtype)
        )
        for i, dtype in enumerate([torch.bfloat16] * COUNT + [torch.float32])
    }
    optimizer = make_optimizer(params, lr=1e-3, weight_decay=0.1)
    live = Live()
    for step in range(3):
        for p in params.values():
            p.grad = torch.randn(p.shape, generator=draw).to(p)
        if step < 2:
            optimizer.step(max_grad_norm=1.0)
        else:
            with live:
                optimizer.step(max_grad_norm=1.0)
        optimizer.zero_grad()
    return params, live.most


def test_a_step_copies_a_portion_of_the_gradients_at_a_time(device, monkeypatch):
    whole, all_at_once = trained(device, monkeypatch, 1 << 30)
    params, most = trained(device, monkeypatch, 2 * NUMBERS)
    for name, p in params.items():
        assert torch.equal(p, whole[name])
    assert all_at_once >= 4 * NUMBERS * COUNT
    assert most < 4 * NUMBERS * COUNT / 2


def test_an_update_by_other_code_is_followed_in_every_portion(device, monkeypatch):
    monkeypatch.setattr(adamw, "_MANY", 1)
    params = {
        f"p{i}": torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16, device=device))
        for i in range(3)
    }
    optimizer = make_optimizer(params, lr=0.0)
    with torch.no_grad():
        params["p1"].fill_(3.0)
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [float(p.detach()[0, 0]) for p in params.values()] == [1.0, 3.0, 1.0]
    assert float(optimizer.state_dict()["p1.master"][0, 0]) == 3.0


@pytest.mark.cpu_only("tensors without numbers, of a card that is not there")
def test_a_card_draws_its_own_random_weights(device, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = model_config(
        {
            "model_type": "llama",
            "vocab_size": 64,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
        }
    )

    class Generator(torch.Generator):
        def __new__(cls, device="cpu"):
            asked.append(torch.device(device).type)
            return super().__new__(cls)

    class Drawn(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.normal_.default:
                drawn.append(args[0].device.type)
            if function is torch.ops.aten.copy_.default and args[1].device.type == "cpu":
                sent.append(args[1].nbytes)
            return function(*args, **(kwargs or {}))

    asked, drawn, sent = [], [], []
    monkeypatch.setattr(torch, "Generator", Generator)
    for where in ("cuda", "cpu"):
        del asked[:], drawn[:], sent[:]
        with FakeTensorMode(), Drawn():
            decoder = Decoder.random(config, 0, dtype=torch.bfloat16, device=where)
        matrices = [p for p in decoder.parameters() if p.ndim > 1]
        assert asked == [where]
        assert drawn == [where] * len(matrices)
        bytes_sent = sum(4 * p.numel() for p in matrices)
        assert sum(sent) == (0 if where == "cuda" else bytes_sent)
