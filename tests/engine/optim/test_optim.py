from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fusedrl.engine.optim.adamw import make_optimizer, optimizer_of


def parameters(device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "matrix": nn.Parameter(
            torch.randn(33, 17, generator=generator).to(device).mul_(0.02).to(dtype)
        ),
        "norm": nn.Parameter(torch.ones(17, dtype=dtype, device=device)),
    }


def give_gradients(device, params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params.values():
        p.grad = (torch.randn(p.shape, generator=generator).to(device) + 0.5).to(p.dtype)


def test_float32_is_adamw_by_its_definition(device):
    params = parameters(device)
    lr, b1, b2, eps, decay = 0.01, 0.9, 0.97, 1e-6, 0.3
    optimizer = make_optimizer(params, lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay)
    want = {n: p.detach().double() for n, p in params.items()}
    m, v = ({n: torch.zeros_like(w) for n, w in want.items()} for _ in range(2))
    for t in range(1, 6):
        optimizer.lr = lr_t = lr / t
        give_gradients(device, params, t)
        for n, p in params.items():
            g = p.grad.double()
            m[n], v[n] = b1 * m[n] + (1 - b1) * g, b2 * v[n] + (1 - b2) * g * g
            want[n] = want[n] * (1 - lr_t * (decay if p.ndim > 1 else 0.0)) - lr_t * (
                m[n] / (1 - b1**t)
            ) / ((v[n] / (1 - b2**t)).sqrt() + eps)
        assert optimizer.step().applied
    for n, p in params.items():
        torch.testing.assert_close(p.double(), want[n], rtol=1e-5, atol=1e-7)


def tensorflow_adam(params, gradients, lr, betas, eps):
    """float64 {name: parameter} after these gradients: tf.train.AdamOptimizer as its documentation
    has it; `eps` of the step's number."""
    b1, b2 = betas
    found = {n: p.detach().double().clone() for n, p in params.items()}
    m, v = ({n: torch.zeros_like(w) for n, w in found.items()} for _ in range(2))
    for t, step in enumerate(gradients, start=1):
        lr_t = lr * (1 - b2**t) ** 0.5 / (1 - b1**t)
        for n, g in step.items():
            m[n] += (1 - b1) * (g - m[n])
            v[n] += (1 - b2) * (g * g - v[n])
            found[n] -= lr_t * m[n] / (v[n].sqrt() + eps(t))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_epsilon_as_tensorflow_has_it(dtype, device):
    """Twenty steps of small gradients, where epsilon decides; torch's own epsilon is told apart,
    and so is one that is scaled the other way."""
    lr, betas, eps = 0.01, (0.9, 0.999), 1e-5
    start = {n: p.detach() for n, p in parameters(device, dtype).items()}
    gradients = []
    for t in range(20):
        draw = torch.Generator().manual_seed(t)
        gradients.append(
            {
                n: (1e-4 * torch.randn(p.shape, generator=draw).to(device)).to(dtype).double()
                for n, p in start.items()
            }
        )

    def run(optimizer, params):
        for t, step in enumerate(gradients):
            for n, p in params.items():
                p.grad = step[n].to(dtype)
            optimizer.step()
            if t == 6:  # as a checkpoint would
                state = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
                optimizer = make_optimizer(params, lr=lr, betas=betas, eps=eps, eps_mode=mode)
                optimizer.load_state_dict(state)
        state = optimizer.state_dict()
        return {n: state.get(f"{n}.master", p).detach().double() for n, p in params.items()}

    found = {}
    for mode in ("tensorflow", "torch"):
        params = {n: nn.Parameter(p.clone()) for n, p in start.items()}
        found[mode] = run(
            make_optimizer(params, lr=lr, betas=betas, eps=eps, eps_mode=mode), params
        )
    exact = tensorflow_adam(start, gradients, lr, betas, lambda t: eps)
    rtol, atol = (1e-12, 1e-14) if dtype == torch.float64 else (1e-5, 1e-6)
    for n in start:
        torch.testing.assert_close(found["tensorflow"][n], exact[n], rtol=rtol, atol=atol)
        assert (found["torch"][n] - exact[n]).abs().max() > 0.02
    # torch's eps times the root, not divided by it
    other_way = tensorflow_adam(start, gradients, lr, betas, lambda t: eps * (1 - betas[1] ** t))
    assert max((other_way[n] - exact[n]).abs().max().item() for n in start) > 0.02


def test_epsilon_modes_that_are_refused(device):
    from fusedrl.engine.base.errors import ConfigError
    from fusedrl.engine.config import OptimConfig

    with pytest.raises(ConfigError, match=r"optim.eps_mode torch with optim.state = int8"):
        OptimConfig(eps_mode="tensorflow", state="int8")
    with pytest.raises(ValueError, match='expected eps_mode "torch" with state "int8"'):
        make_optimizer(parameters(device), lr=0.1, eps_mode="tensorflow", state="int8")
    optimizer = optimizer_of(
        OptimConfig(lr=0.1, eps=1e-3, eps_mode="tensorflow"), parameters(device).items()
    )
    assert (optimizer._eps, optimizer._hat) == (1e-3, True)


def test_small_steps_move_low_precision_parameters(device):
    exact, low = parameters(device, torch.bfloat16), parameters(device, torch.bfloat16)
    exact = {n: nn.Parameter(p.detach().float()) for n, p in exact.items()}
    naive = parameters(device, torch.bfloat16)
    optimizers = [make_optimizer(params, lr=1e-6) for params in (exact, low)]
    plain = torch.optim.AdamW(naive.values(), lr=1e-6, weight_decay=0.0)
    start = exact["matrix"].detach().clone()
    for step in range(50):
        for params in (exact, low, naive):
            give_gradients(device, params, step)
        for p in exact.values():  # the gradients that a bfloat16 parameter can have
            p.grad = p.grad.bfloat16().float()
        for optimizer in optimizers:
            optimizer.step()
        plain.step()
    intended = exact["matrix"].detach() - start

    def share(weights):
        return ((weights.detach().float() - start) * intended).sum() / intended.square().sum()

    master = optimizers[1].state_dict()["matrix.master"]
    assert 0.9 <= share(master) <= 1.1
    assert share(naive["matrix"]) < 0.5  # what the masters are for
    assert torch.equal(low["matrix"], master.bfloat16())


def test_low_precision_parameters_follow_in_the_long_run(device):
    params = {"w": nn.Parameter(torch.full((64, 4), 0.02, dtype=torch.bfloat16, device=device))}
    address = params["w"].data_ptr()
    start = params["w"].detach().float().clone()
    optimizer = make_optimizer(params, lr=1e-6)
    for _ in range(1000):
        params["w"].grad = torch.ones_like(params["w"])
        optimizer.step()
        optimizer.zero_grad()
    # half a step of bfloat16 there
    torch.testing.assert_close(params["w"].detach().float(), start - 1e-3, rtol=0, atol=2**-14)
    assert params["w"].data_ptr() == address
    assert params["w"].dtype == torch.bfloat16


def test_clipping(device):
    params, same = parameters(device), parameters(device)
    optimizer, unclipped = (
        make_optimizer(params, lr=0.1, eps=1.0),
        make_optimizer(same, lr=0.1, eps=1.0),
    )
    give_gradients(device, params, 0)
    give_gradients(device, same, 0)
    norm = torch.cat([p.grad.flatten() for p in same.values()]).double().norm().item()
    assert unclipped.step(max_grad_norm=norm * 2).grad_norm == pytest.approx(norm, rel=1e-6)
    assert torch.cat([p.grad.flatten() for p in same.values()]).norm().item() == pytest.approx(
        norm, rel=1e-6
    )
    result = optimizer.step(max_grad_norm=0.5)
    assert result.grad_norm == pytest.approx(norm, rel=1e-6)
    assert torch.cat([p.grad.flatten() for p in params.values()]).norm().item() == pytest.approx(
        0.5, rel=1e-5
    )
    assert not torch.equal(params["matrix"], same["matrix"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype, poison, device):
    params = parameters(device, dtype)
    optimizer = make_optimizer(params, lr=0.1, weight_decay=0.1)
    give_gradients(device, params, 0)
    optimizer.step()
    weights = {n: p.detach().clone() for n, p in params.items()}
    state = {n: t.clone() for n, t in optimizer.state_dict().items()}
    give_gradients(device, params, 1)
    params["norm"].grad[3] = poison
    result = optimizer.step(max_grad_norm=1.0)
    assert not result.applied
    assert result.grad_norm != result.grad_norm or result.grad_norm == float("inf")
    assert all(torch.equal(p, weights[n]) for n, p in params.items())
    assert all(torch.equal(t, state[n]) for n, t in optimizer.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bitwise(tmp_path, dtype, device):
    def run(params, optimizer, steps):
        for step in steps:
            give_gradients(device, params, step)
            optimizer.step(max_grad_norm=1.0)

    params = parameters(device, dtype)
    optimizer = make_optimizer(params, lr=1e-3, weight_decay=0.1)
    run(params, optimizer, range(3))
    save_file(optimizer.state_dict(), tmp_path / "state.safetensors")
    resumed = {n: nn.Parameter(p.detach().clone()) for n, p in params.items()}
    other = make_optimizer(resumed, lr=1e-3, weight_decay=0.1)
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    run(params, optimizer, range(3, 6))
    run(resumed, other, range(3, 6))
    assert all(torch.equal(p, resumed[n]) for n, p in params.items())
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in optimizer.state_dict().items())


def test_state_of_other_parameters_is_refused(device):
    params = parameters(device, torch.bfloat16)
    optimizer = make_optimizer(params, lr=0.1)
    assert set(optimizer.state_dict()) == {"matrix.master", "norm.master"}  # no step yet
    fresh = make_optimizer(parameters(device, torch.bfloat16), lr=0.1)
    fresh.load_state_dict(optimizer.state_dict())
    give_gradients(device, params, 0)
    optimizer.step()
    state = optimizer.state_dict()
    before = fresh.state_dict()["matrix.master"].clone()
    cases = [
        ({k: v for k, v in state.items() if k != "norm.step"}, "missing norm.step"),
        (state | {"x.step": torch.ones((), device=device)}, "unknown x.step"),
        (
            state | {"norm.exp_avg": torch.ones(3, device=device)},
            r"norm.exp_avg: expected \[17\], got \[3\]",
        ),
        ({}, "missing matrix.master"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            fresh.load_state_dict(wrong)
    assert torch.equal(fresh.state_dict()["matrix.master"], before)
    assert len(fresh.state_dict()) == 2


def test_frozen_and_unused_parameters(device):
    params = parameters(device)
    params["norm"].requires_grad_(False)
    params["unused"] = nn.Parameter(torch.ones(2, 2, device=device))
    optimizer = make_optimizer(params, lr=0.1)
    params["matrix"].grad = torch.ones_like(params["matrix"])
    assert optimizer.step().applied
    assert (params["norm"] == 1).all()
    assert (params["unused"] == 1).all()
    assert {name.split(".")[0] for name in optimizer.state_dict()} == {"matrix"}
    optimizer.zero_grad()
    assert params["matrix"].grad is None
    with pytest.raises(RuntimeError, match="none of its 2 parameters has a gradient"):
        optimizer.step()
    with pytest.raises(ValueError, match="got none"):
        make_optimizer({}, lr=0.1)


def test_no_stage_leaves_an_option_out():
    """Stages hand their whole configuration to optimizer_of; arguments that are listed by hand miss
    the next option."""
    engine = Path(__file__).resolve().parents[3] / "engine"
    paths = [
        path
        for room in ("stages", "policy", "optim")
        for path in sorted((engine / room).glob("*.py"))
    ]
    assert [
        path.name for path in paths if "make_optimizer(" in path.read_text(encoding="utf-8")
    ] == ["adamw.py"]


# ---- epsilon -------------------------------------------------------------------------------------
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["torch", "tensorflow"])
def test_the_share_of_second_moments_that_epsilon_outweighs(state, mode, device):
    """Against a count over all of them; rows that met no gradient count on neither side."""
    params = {
        "small": nn.Parameter(torch.zeros(40, 300, dtype=state, device=device)),
        "large": nn.Parameter(torch.zeros(7, dtype=state, device=device)),
    }
    eps, b2 = 1e-5, 0.99
    optimizer = make_optimizer(
        params, lr=1e-3, betas=(0.9, b2), eps=eps, eps_mode=mode, accumulate="float32"
    )
    assert optimizer.below_epsilon() is None
    for t in range(1, 4):
        draw = torch.Generator().manual_seed(t)
        g = torch.randn(40, 300, generator=draw).to(device) * torch.logspace(
            -8, -2, 300, device=device
        )
        g[30:] = 0
        params["small"].grad, params["large"].grad = (
            g.to(state),
            torch.ones(7, dtype=state, device=device),
        )
        optimizer.step()
        moments = torch.cat(
            [optimizer.state_dict()[f"{name}.exp_avg_sq"].double().flatten() for name in params]
        )
        root = (moments / (1 - b2**t)).sqrt() if mode == "torch" else moments.sqrt()
        exact = ((root < eps) & (moments > 0)).sum() / (moments > 0).sum()
        assert 0.3 < exact < 0.8
        assert optimizer.below_epsilon() == pytest.approx(exact.item(), abs=0.04), (
            "of 1,000 out of 12,000"
        )
    again = make_optimizer(params, lr=1e-3, betas=(0.9, b2), eps=1e-30, eps_mode=mode)
    again.load_state_dict({name: tensor.clone() for name, tensor in optimizer.state_dict().items()})
    assert again.below_epsilon() == 0.0


def test_epsilon_is_the_algorithms(device):
    from fusedrl.engine.config import CriticConfig, OptimConfig, PolicyConfig, SFTConfig
    from fusedrl.engine.config.algorithms import ALGORITHMS

    for name, row in ALGORITHMS.items():
        config = PolicyConfig("m", "d", ("r.py:f",), name)
        assert config.optim.eps == row.eps == (1e-5 if name in ("ppo", "ppo_penalty") else 1e-8)
        assert (
            PolicyConfig("m", "d", ("r.py:f",), name, optim=OptimConfig(eps=1e-6)).optim.eps == 1e-6
        )
    assert (
        PolicyConfig("m", "d", ("r.py:f",), critic=CriticConfig("policy")).critic.optim.eps == 1e-5
    )
    assert optimizer_of(SFTConfig("m", "d").optim, parameters(device).items())._eps == 1e-8


def test_small_gradients_are_followed_at_full_length(device):
    """The steps of a model of 7e9 parameters at a gradient norm of .2: 2.4e-6 in each. With 1e-5
    they were a fifth."""
    lengths = {}
    for name, eps in (("ours", None), ("huang", 1e-5)):
        from fusedrl.engine.config import OptimConfig

        p = nn.Parameter(torch.zeros(1000, device=device))
        optimizer = optimizer_of(OptimConfig(lr=1.0, eps=eps), [("p", p)])
        p.grad = torch.full((1000,), 0.2 / 7e9**0.5, device=device)
        optimizer.step()
        lengths[name] = p.detach().abs().mean().item()
    assert lengths["ours"] > 0.99
    assert lengths["huang"] < 0.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["in place", "data", "copy", "one element", "transposed"])
def test_masters_follow_what_others_write(device, dtype, how):
    """An optimizer that was made after the write is the definition of what the next step gives
    where nothing of the moments is left: with betas 0."""
    params = {
        "m": nn.Parameter(
            torch.randn(700, 301, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        )
    }  # more than a part
    if how == "transposed":
        params["m"] = nn.Parameter(params["m"].detach().t())
    optimizer = make_optimizer(params, lr=1e-3, betas=(0.0, 0.0))
    for seed in range(3):
        give_gradients(device, params, seed)
        optimizer.step()
    p, before = params["m"], params["m"].detach().clone()
    masters = {
        name: master.clone()
        for name, master in optimizer.state_dict().items()
        if name.endswith("master")
    }
    with torch.no_grad():
        if how == "data":
            p.data = p.data * 1.5
        elif how == "copy":
            p.copy_(p * 1.5)
        elif how == "one element":
            p[13, 200] = 7.0
        else:
            p.mul_(1.5)
    written = p.detach().clone()
    fresh = {"m": nn.Parameter(written.clone())}
    other = make_optimizer(fresh, lr=1e-3, betas=(0.0, 0.0))
    for some in (params, fresh):
        give_gradients(device, some, 9)
    optimizer.step()
    other.step()
    changed = written != before
    assert torch.equal(p[changed], fresh["m"][changed])
    if how == "one element":
        gradient = p.grad[~changed].float()
        # not rounded on the way
        kept = masters["m.master"][~changed] - 1e-3 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(
            optimizer.state_dict()["m.master"][~changed], kept, rtol=0, atol=1e-6
        )


def test_weights_that_nobody_wrote_to_keep_their_masters(device):
    params, others = parameters(device, torch.bfloat16), parameters(device, torch.bfloat16)
    optimizer, other = (make_optimizer(some, lr=1e-6) for some in (params, others))
    for seed in range(20):
        give_gradients(device, params, seed)
        optimizer.step()
        give_gradients(device, others, seed)
        # a checkpoint at every step
        state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        other.load_state_dict(state)
        other.step()
    assert all(
        torch.equal(a, b)
        for a, b in zip(optimizer.state_dict().values(), other.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    "before, after", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_parameters_cast_since_are_refused(device, before, after):
    module = nn.Linear(5, 3, dtype=before, device=device)
    optimizer = make_optimizer(module.named_parameters(), lr=1e-3)
    module.to(after)
    give_gradients(device, dict(module.named_parameters()), 0)
    kept = module.weight.detach().clone()
    with pytest.raises(
        RuntimeError, match=r"weight was \w+ on [\w:]+ when the optimizer was made and is \w+ on"
    ):
        optimizer.step()
    assert torch.equal(kept, module.weight)


def test_parameters_replaced_since_are_refused(device):
    module = nn.Linear(5, 3, device=device)
    optimizer = make_optimizer(module.named_parameters(), lr=1e-3)
    module.load_state_dict(
        {name: tensor.clone() for name, tensor in module.state_dict().items()}, assign=True
    )
    module(torch.ones(2, 5, device=device)).sum().backward()
    with pytest.raises(RuntimeError, match="none of its 2 parameters has a gradient"):
        optimizer.step()
