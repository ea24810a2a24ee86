"""AdamW with float32 masters for low-precision parameters.

A bfloat16 weight of 0.02 has neighbours 1.2e-4 away: a step of 1e-6 rounds back to where it started, and training stands still.
So every low-precision parameter has a float32 master; the step moves the master and rounds it into the parameter, in place.
Float32 parameters are their own masters.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class StepResult(NamedTuple):
    """What a step did."""

    grad_norm: float  # before clipping
    applied: bool  # False: the norm was not finite, and nothing changed


class Optimizer:
    """See `make_optimizer`. `lr` may be set between steps."""

    def __init__(self, params: Mapping[str, nn.Parameter], lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self._params = {name: p for name, p in params.items() if p.requires_grad}
        if not self._params:
            raise ValueError("make_optimizer: expected parameters that require a gradient, got none")
        self._masters = {name: p.detach().float() if p.dtype in (torch.bfloat16, torch.float16) else p for name, p in self._params.items()}
        matrices, vectors = ([m for m in self._masters.values() if (m.ndim > 1) is wide] for wide in (True, False))
        groups = [{"params": group, "weight_decay": decay} for group, decay in ((matrices, weight_decay), (vectors, 0.0)) if group]
        self._adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)

    @property
    def lr(self) -> float:
        return self._adamw.param_groups[0]["lr"]

    @lr.setter
    def lr(self, value: float) -> None:
        for group in self._adamw.param_groups:
            group["lr"] = value

    @torch.no_grad()
    def step(self, *, max_grad_norm: float | None = None) -> StepResult:
        """Clip the gradients to a global norm, and update.

        A parameter without a gradient stays. With a norm that is not finite nothing changes, the moments included. Reads the norm
        back from the device. Clipping may scale the gradients in place; call `zero_grad` afterwards.
        """
        grads = {name: p.grad if p.dtype == self._masters[name].dtype else p.grad.float() for name, p in self._params.items() if p.grad is not None}
        norm = grad_norm(grads.values())
        if not math.isfinite(norm):
            return StepResult(norm, False)
        if max_grad_norm is not None and norm > max_grad_norm:
            torch._foreach_mul_(list(grads.values()), max_grad_norm / norm)
        low = {name: grad for name, grad in grads.items() if self._masters[name] is not self._params[name]}
        for name, grad in low.items():
            self._masters[name].grad = grad
        self._adamw.step()
        for name in low:
            self._masters[name].grad = None
            self._params[name].copy_(self._masters[name])
        return StepResult(norm, True)

    def zero_grad(self) -> None:
        """Drop every gradient."""
        for p in self._params.values():
            p.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and masters as a flat {name: tensor} of live tensors (no copies): `<parameter>.exp_avg`, `.exp_avg_sq`, `.step`, `.master`.
        A parameter that was never updated has no moments. Learning rate and decay belong to the configuration."""
        state: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            moments = self._adamw.state.get(master, {})
            state |= {f"{name}.{key}": moments[key] for key in _MOMENTS if key in moments}
            if master is not self._params[name]:
                state[f"{name}.master"] = master
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy in what `state_dict` gave; nothing changes where it does not fit.

        Raises:
            ValueError: names that are missing or unknown, or shapes that differ.
        """
        expected: dict[str, torch.Size] = {}
        for name, master in self._masters.items():
            if f"{name}.exp_avg" in state:
                expected |= {f"{name}.step": torch.Size(), f"{name}.exp_avg": master.shape, f"{name}.exp_avg_sq": master.shape}
            if master is not self._params[name]:
                expected[f"{name}.master"] = master.shape
        wrong = [f"missing {name}" for name in expected if name not in state] + [f"unknown {name}" for name in state if name not in expected]
        wrong += [f"{n}: expected {list(s)}, got {list(state[n].shape)}" for n, s in expected.items() if n in state and state[n].shape != s]
        if wrong:
            raise ValueError(f"Optimizer.load_state_dict: the state is of other parameters: {'; '.join(wrong[:10])}")
        for name, master in self._masters.items():
            self._adamw.state.pop(master, None)
            if f"{name}.exp_avg" in state:
                self._adamw.state[master] = {key: state[f"{name}.{key}"].to(master.device, copy=True) for key in _MOMENTS}
            if master is not self._params[name]:
                master.copy_(state[f"{name}.master"])
                self._params[name].copy_(master)


def grad_norm(grads: Iterable[Tensor]) -> float:
    """The global L2 norm of these tensors, in float32 at least; 0 for none. NaN or infinite where any of them holds such a value."""
    grads = list(grads)
    return float(nn.utils.get_total_norm(grads)) if grads else 0.0


def make_optimizer(params: Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]], *, lr: float, betas: tuple[float, float] = (0.9, 0.95),
                   eps: float = 1e-8, weight_decay: float = 0.0) -> Optimizer:
    """AdamW (Loshchilov and Hutter, 2019) over named parameters, with float32 masters where they are bfloat16 or float16.

    Args:
        params: names and parameters, such as `module.named_parameters()`; frozen ones are left out.
        lr, betas, eps: AdamW's. weight_decay: decoupled; not applied to parameters of one dimension (norms, biases).
    Raises:
        ValueError: nothing to train, or values outside AdamW's range.
    """
    return Optimizer(dict(params), lr, betas, eps, weight_decay)
