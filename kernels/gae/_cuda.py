"""gae and shaped_gae in CUDA C++ (csrc/cuda/gae.cu): their launches, and their custom ops for
torch.compile. The mathematics is in __init__.py."""

from __future__ import annotations

import math
from ctypes import c_float, c_int32, c_int64
from typing import Any

import torch
from torch import Tensor

from fusedrl.kernels.normalize import WHITEN_EPS
from fusedrl.kernels.runtime import nvrtc
from fusedrl.kernels.runtime.nvrtc import Launch

_THREADS = 256  # kThreads of gae.cu
_WHITEN_BLOCKS = 512  # at most: each reads every sequence's moments
# what tests compile: a file's sets of options
OFFLINE_SOURCES = {"gae.cu": [("-DALIGNED=1",), ("-DALIGNED=0",)]}


# ---- launchers: allocate, grid -------------------------------------------------------------------
def _options(tokens: list[Tensor | None], mask: Tensor | None) -> tuple[str, ...]:
    return (f"-DALIGNED={int(nvrtc.aligned(tokens) and nvrtc.aligned([mask], 4))}",)


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def plan_gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    last_values: Tensor | None,
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Allocate the outputs of `gae` and plan the launches that write them."""
    advantages, returns = (
        torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device) for _ in range(2)
    )
    rewards, values, mask, cu_seqlens, last_values = _contiguous(
        rewards, values, mask, cu_seqlens, last_values
    )
    B = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if rewards.numel() == 0:
        return (advantages, returns), []
    arguments = (
        rewards,
        values,
        mask,
        cu_seqlens,
        last_values,
        advantages,
        returns,
        c_int64(rewards.shape[-1]),
        c_float(gamma),
        c_float(gamma * lam),
    )
    options = _options([rewards, values, advantages, returns], mask)
    return (advantages, returns), [Launch("gae.cu", "gae", arguments, (B, 1, 1), _THREADS, options)]


def plan_shaped_gae(
    logp: Tensor,
    ref_logp: Tensor,
    values: Tensor,
    scores: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    kl_coef: float,
    kl_coef_tensor: Tensor | None,
    kl_estimator: int,
    gamma: float,
    lam: float,
    token_rewards: Tensor | None,
    score_clip: float | None,
    whiten: bool,
    whiten_unbiased: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], list[Launch]]:
    """Allocate the outputs of `shaped_gae` and plan the launches that write them."""
    N, B = logp.numel(), scores.shape[0]
    advantages, returns, rewards = (
        torch.empty(logp.shape, dtype=torch.float32, device=logp.device) for _ in range(3)
    )
    kl_B, score_B = (torch.empty(B, dtype=torch.float32, device=logp.device) for _ in range(2))
    outputs = (advantages, returns, rewards, kl_B, score_B)
    if B == 0:
        return outputs, []
    logp, ref_logp, values, scores, mask, cu_seqlens, token_rewards = _contiguous(
        logp, ref_logp, values, scores, mask, cu_seqlens, token_rewards
    )
    moments = torch.empty(3 * B, dtype=torch.float64, device=logp.device) if whiten else None
    options = _options([logp, ref_logp, values, token_rewards, advantages, returns, rewards], mask)
    launches = [
        Launch(
            "gae.cu",
            "shaped_gae",
            (
                *(logp, ref_logp, values, scores, mask, cu_seqlens, kl_coef_tensor, token_rewards),
                *(*outputs, moments, c_int64(logp.shape[-1])),
                *(c_float(kl_coef), c_float(gamma), c_float(gamma * lam)),
                c_float(math.inf if score_clip is None else score_clip),
                c_int32(kl_estimator),
            ),
            (B, 1, 1),
            _THREADS,
            options,
        )
    ]
    if whiten and N:
        arguments = (
            advantages,
            mask,
            moments,
            c_int64(N),
            c_int32(B),
            c_int32(whiten_unbiased),
            c_float(WHITEN_EPS),
        )
        launches.append(
            Launch(
                "gae.cu",
                "whiten",
                arguments,
                (min(-(-N // _THREADS), _WHITEN_BLOCKS), 1, 1),
                _THREADS,
                options,
            )
        )
    return outputs, launches


# ---- custom ops: what torch.compile sees ---------------------------------------------------------
@torch.library.custom_op("fusedrl::gae_cuda", mutates_args=(), device_types="cuda")
def _gae_cuda(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    last_values: Tensor | None,
) -> tuple[Tensor, Tensor]:
    outputs, launches = plan_gae(rewards, values, mask, cu_seqlens, gamma, lam, last_values)
    nvrtc.run(launches, rewards.device)
    return outputs


@_gae_cuda.register_fake
def _(rewards, values, mask, cu_seqlens, gamma, lam, last_values):
    like = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    return like, torch.empty_like(like)


@torch.library.custom_op("fusedrl::shaped_gae_cuda", mutates_args=(), device_types="cuda")
def _shaped_gae_cuda(
    logp: Tensor,
    ref_logp: Tensor,
    values: Tensor,
    scores: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    kl_coef: float,
    kl_coef_tensor: Tensor | None,
    kl_estimator: int,
    gamma: float,
    lam: float,
    token_rewards: Tensor | None,
    score_clip: float | None,
    whiten: bool,
    whiten_unbiased: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs, launches = plan_shaped_gae(
        logp,
        ref_logp,
        values,
        scores,
        mask,
        cu_seqlens,
        kl_coef,
        kl_coef_tensor,
        kl_estimator,
        gamma,
        lam,
        token_rewards,
        score_clip,
        whiten,
        whiten_unbiased,
    )
    nvrtc.run(launches, logp.device)
    return outputs


@_shaped_gae_cuda.register_fake
def _(
    logp,
    ref_logp,
    values,
    scores,
    mask,
    cu_seqlens,
    kl_coef,
    kl_coef_tensor,
    kl_estimator,
    gamma,
    lam,
    token_rewards,
    score_clip,
    whiten,
    whiten_unbiased,
):
    like, per_sequence = (
        torch.empty(logp.shape, dtype=torch.float32, device=logp.device),
        torch.empty(scores.shape, dtype=torch.float32, device=logp.device),
    )
    return (
        like,
        torch.empty_like(like),
        torch.empty_like(like),
        per_sequence,
        torch.empty_like(per_sequence),
    )
