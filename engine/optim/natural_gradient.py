"""The step of a trust region: along the natural gradient, as long as a KL allows, and taken only if
the loss falls nearly as much as predicted.

    minimise L(theta)   subject to   KL(theta_old || theta) <= max_kl
    KL = d^T F d / 2 + O(|d|^3) for a move d, F the Fisher matrix

    (F + damping I) x = -grad L      solved by conjugate gradient, which needs only products with F
                                     (Hestenes and Stiefel, 1952)
    d = sqrt(2 max_kl / x^T F x) x   the longest move along x whose quadratic KL stays within
                                     max_kl; F without its damping
    d, r d, r^2 d, ...               accept the first with KL <= max_kl and a decrease of at least
                                     accept_ratio times the linear prediction

Shapes    P parameters, in one vector of one dtype.
Memory    `natural_step` holds 4 vectors of P, the gradient among them; the memory of computing a
          product comes on top.
Source    Schulman et al. (2015), Trust region policy optimization, appendix C; its released code
          for the line search.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fusedrl.engine.config import TRPOConfig

Product = Callable[[Tensor], Tensor]
_PART = 1 << 18  # elements whose products are added up in float32


class NaturalStep(NamedTuple):
    """The full move, and what the quadratic model predicts for it."""

    move_P: Tensor
    # linear prediction of the loss's decrease over the whole move; 0 if no direction was found
    decrease: float
    residual: float  # |(F + damping I) x - b| / |b| that conjugate gradient left


class LineSearch(NamedTuple):
    """Step that a line search accepted; `fraction` is 0 if it accepted none."""

    fraction: float  # of the full move
    loss: float
    kl: float
    tries: int


def _dot(x_P: Tensor, y_P: Tensor) -> float:
    """Compute a dot product in parts that are added up in float64. One float32 sum of 67M squares
    is 0.5% off on a CPU, and CUDA's takes fewer than 2^31 elements."""
    return (
        torch.stack(
            [torch.dot(x, y) for x, y in zip(x_P.split(_PART), y_P.split(_PART), strict=True)]
        )
        .double()
        .sum()
        .item()
    )


@torch.no_grad()
def conjugate_gradient(
    product: Product, b_P: Tensor, iterations: int, tolerance: float = 1e-5
) -> tuple[Tensor, float]:
    """Solve product(x) = b for a symmetric positive definite product. Return (x, residual); the
    residual is |product(x) - b| / |b| as the recursion computes it.

    Args:
        iterations: largest number of products.
        tolerance: relative residual at which to stop early.
    """
    x_P, r_P = torch.zeros_like(b_P), b_P.clone()
    p_P = b_P.clone()
    start = squared = _dot(r_P, r_P)
    for _ in range(iterations):
        if not squared > tolerance**2 * start:  # also where b is 0
            break
        Ap_P = product(p_P)
        curvature = _dot(p_P, Ap_P)
        # rounding, or a product that is not positive definite: what was reached so far is a descent
        # direction
        if not curvature > 0:
            break
        x_P.add_(p_P, alpha=squared / curvature)
        r_P.sub_(Ap_P, alpha=squared / curvature)
        before, squared = squared, _dot(r_P, r_P)
        p_P.mul_(squared / before).add_(r_P)
    return x_P, math.sqrt(squared / start) if start > 0 else 0.0


@torch.no_grad()
def natural_step(
    descent_P: Tensor, fisher: Product, config: TRPOConfig, whole: Product | None = None
) -> NaturalStep:
    """Return the full move in the direction in which the loss falls fastest for its KL.

    Args:
        descent_P: negative gradient of the loss.
        fisher: function v -> F v, without damping, that returns a new tensor.
        whole: if `fisher` covers only a part of the states, the product over all states, which sets
            the length of the move. Conjugate gradient finds directions that are flat on the part,
            so measured by the part alone, the move would be too long.
    """
    x_P, residual = conjugate_gradient(
        lambda v_P: fisher(v_P).add_(v_P, alpha=config.damping), descent_P, config.cg_iterations
    )
    quadratic = _dot(x_P, (whole or fisher)(x_P))
    if not (quadratic > 0 and math.isfinite(quadratic)):
        return NaturalStep(x_P.zero_(), 0.0, residual)
    length = math.sqrt(2 * config.max_kl / quadratic)
    return NaturalStep(x_P.mul_(length), _dot(descent_P, x_P), residual)


def line_search(
    evaluate: Callable[[float], tuple[float, float]],
    before: float,
    decrease: float,
    config: TRPOConfig,
) -> LineSearch:
    """Shorten the move until it is accepted.

    Args:
        evaluate: function fraction -> (loss, KL). It moves the parameters by that fraction of the
            full move and leaves them there.
        before: loss without a move.
        decrease: linear prediction of the full move's decrease (`natural_step`).
    Returns:
        The first step that is accepted; the parameters stay moved by it. If `fraction` is 0, no
        step was accepted, and the caller must move the parameters back.
    """
    for tries in range(config.backtracks + 1):
        fraction = config.backtrack_ratio**tries
        loss, kl = evaluate(fraction)
        if (
            kl <= config.max_kl
            and before - loss > 0
            and before - loss >= config.accept_ratio * fraction * decrease
        ):  # False for NaN
            return LineSearch(fraction, loss, kl, tries + 1)
    return LineSearch(0.0, before, 0.0, config.backtracks + 1)
