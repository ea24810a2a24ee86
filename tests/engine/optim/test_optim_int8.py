"""Moments of 8 bits through torchao: near the float32 ones, a quarter of their size, and resumed
bit for bit."""

import builtins

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fusedrl.engine.base.errors import SetupError
from fusedrl.engine.optim.adamw import make_optimizer


def parameters(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": nn.Parameter(torch.randn(96, 128, generator=generator).mul_(0.02).to(dtype)),
        "odd": nn.Parameter(torch.ones(71, 67, dtype=dtype, device=device)),
        "norm": nn.Parameter(torch.ones(17, dtype=dtype, device=device)),
    }


def train(params, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params.values():
            p.grad = (torch.randn(p.shape, generator=generator) + 0.5).to(p.dtype)
        optimizer.lr = 1e-3 / (step + 1)
        assert optimizer.step(max_grad_norm=1.0).applied


@pytest.fixture
def eager():
    """torchao compiles its step, which takes a CPU many seconds; the arithmetic is the same
    without."""
    pytest.importorskip("torchao.optim")
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_moves_as_float32_moments_do_and_takes_a_quarter(eager, dtype, device):
    runs = {}
    for state in ("float32", "int8"):
        params = parameters(device, dtype)
        optimizer = make_optimizer(params, lr=1e-3, weight_decay=0.1, state=state)
        train(params, optimizer, range(6))
        moments = {
            name: t for name, t in optimizer.state_dict().items() if name.startswith("matrix.exp")
        }
        runs[state] = (
            {n: p.detach().double() for n, p in params.items()},
            sum(t.nbytes for t in moments.values()),
        )
        assert optimizer.lr == pytest.approx(1e-3 / 6)
    start = {n: p.detach().double() for n, p in parameters(device, dtype).items()}
    (exact, size), (coded, small) = runs["float32"], runs["int8"]
    assert small == size // 4 + size // 256, "a byte an element, and a float32 scale to 256"
    for name in start:
        moved = (exact[name] - start[name]).norm()
        assert (coded[name] - exact[name]).norm() < (0.05 if name == "matrix" else 1e-3) * moved, (
            name
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume_is_bitwise(eager, tmp_path, dtype, device):
    params = parameters(device, dtype)
    optimizer = make_optimizer(params, lr=1e-3, weight_decay=0.1, state="int8")
    train(params, optimizer, range(3))
    save_file(optimizer.state_dict(), tmp_path / "state.safetensors")
    resumed = {n: nn.Parameter(p.detach().clone()) for n, p in params.items()}
    other = make_optimizer(resumed, lr=1e-3, weight_decay=0.1, state="int8")
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    train(params, optimizer, range(3, 6))
    train(resumed, other, range(3, 6))
    assert all(torch.equal(p, resumed[n]) for n, p in params.items())
    found = other.state_dict()
    assert set(found) == set(optimizer.state_dict())
    assert all(torch.equal(t, found[n]) for n, t in optimizer.state_dict().items())
    with pytest.raises(ValueError, match=r"missing matrix.exp_avg; .*unknown matrix.exp_avg.codes"):
        make_optimizer(resumed, lr=1e-3).load_state_dict(found)


@pytest.mark.full
def test_the_compiled_step_resumes_bitwise(tmp_path, device):
    pytest.importorskip("torchao.optim")
    test_resume_is_bitwise(None, tmp_path, torch.bfloat16)


def test_without_torchao_it_is_refused_by_name(monkeypatch, device):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torchao"):
            raise ModuleNotFoundError("No module named 'torchao'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SetupError, match=r"optim.state = int8 needs torchao.*pip install"):
        make_optimizer(parameters(device), lr=1e-3, state="int8")
