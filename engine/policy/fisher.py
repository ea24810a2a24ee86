"""Distances between nearby policies: the Fisher matrix of a policy, as a product with vectors, and
the KL itself, both over the whole vocabulary.

    KL(old || new) = 1/R sum_n sum_v p_nv (log p_nv - log q_nv)
            p old, q new: softmax of logits / T, at the R slots with an action behind them
    F v            = 1/R sum_n J_n^T (diag p_n - p_n p_n^T) J_n v / T^2,   J_n = d logits_n / d
                   theta

F is the Hessian of the KL at new = old. The curvature of the logits plays no part there, because
their gradient is q - p = 0. To compute a product, J v comes from forward-mode differentiation of
the decoder in its torch implementations, since the fused kernels lack forward mode. J^T u comes
from the backward pass of training, with its fused kernels. Nothing is sampled or differenced: F v
is exact, up to rounding.

Shapes    N tokens, R rows, H hidden, V vocabulary, P trained parameters of the decoder, in one
          vector.
Time      of a product: a forward and a backward pass of training and a forward-mode pass; together
          3.7 forward and backward passes of the fused kernels on one core (a model of 260k
          parameters, 3072 tokens: 113 ms, and 421 for the product, of which forward mode is 304).
Memory    of a product: those of a training micro-batch, a gradient, and 4 x 64 MiB of rows of
          logits.
Source    Schulman et al. (2015), Trust region policy optimization, appendix C. The Gauss-Newton
          form: Schraudolph (2002), Martens (2010).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.packing import IGNORE, PackedBatch
from fusedrl.engine.model.decoder import Decoder
from fusedrl.kernels.linear_full_kl import linear_full_kl
from fusedrl.kernels.runtime.dispatch import use_impl

_WORKSPACE = 64 << 20  # bytes of logits held at a time, in four tensors


class FlatParameters:
    """The trained parameters of a decoder as one vector [P], in the order of `named_parameters`."""

    def __init__(self, decoder: Decoder) -> None:
        self.named: dict[str, nn.Parameter] = {
            name: p for name, p in decoder.named_parameters() if p.requires_grad
        }
        self._ends = list(accumulate(p.numel() for p in self.named.values()))

    def views(self, x_P: Tensor) -> dict[str, Tensor]:
        """Split a vector into views with the parameters' names and shapes."""
        parts = torch.tensor_split(x_P, self._ends[:-1])
        return {
            name: part.view(p.shape)
            for (name, p), part in zip(self.named.items(), parts, strict=True)
        }

    def values(self) -> Tensor:
        """Return a copy of the parameters [P]."""
        return torch.cat([p.detach().reshape(-1) for p in self.named.values()])

    def gradient(self) -> Tensor:
        """Return a copy of the accumulated gradient [P], and drop the gradient. It is 0 for
        parameters without one."""
        found_P = torch.cat(
            [
                (torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1)
                for p in self.named.values()
            ]
        )
        self.zero_grad()
        return found_P

    def zero_grad(self) -> None:
        """Drop every gradient."""
        for p in self.named.values():
            p.grad = None

    @torch.no_grad()
    def write(self, x_P: Tensor) -> None:
        """Set the parameters in place."""
        for name, part in self.views(x_P).items():
            self.named[name].copy_(part)


@torch.enable_grad()
def fisher_product(
    actor: HybridActor,
    parameters: FlatParameters,
    batch: PackedBatch,
    parts: Sequence[Sequence[int]],
    temperature: float,
    v_P: Tensor,
) -> Tensor:
    """Return [P] F v of the policy at the states of a batch.

    Args:
        parts: sequences of each micro-batch. How they are split changes nothing; sequences in none
            of the micro-batches are left out.
        temperature: T, above 0.
        v_P: vector [P], in the parameters' dtype.
    """
    decoder, tangents = actor.decoder, parameters.views(v_P)
    head_name = "embedding" if decoder.head is None else "head"
    batches = [batch.select(part) for part in parts]
    scale = 1 / (
        temperature**2 * max(1, sum(int((micro.labels() != IGNORE).sum()) for micro in batches))
    )
    parameters.zero_grad()
    for micro in batches:
        rows_R = (micro.labels() != IGNORE).nonzero()[:, 0]
        moved_NH = _forward_mode(decoder, parameters, tangents, micro)
        hidden_NH = actor.forward(micro)
        cotangent_NH, head_VH = torch.zeros_like(hidden_NH), decoder.head_weight
        trained, moved_head_VH = head_VH.requires_grad, tangents.get(head_name)
        with torch.no_grad():
            at_VH = torch.zeros_like(head_VH) if trained else None
            for rows in rows_R.split(max(1, _WORKSPACE // (head_VH.element_size() * len(head_VH)))):
                h_RH = hidden_NH[rows]
                moved_RV = moved_NH[rows] @ head_VH.T
                if moved_head_VH is not None:
                    moved_RV.addmm_(h_RH, moved_head_VH.T)
                p_RV = (h_RH @ head_VH.T).div_(temperature).softmax(1)
                u_RV = moved_RV.sub_((p_RV * moved_RV).sum(1, keepdim=True)).mul_(p_RV).mul_(scale)
                cotangent_NH[rows] = u_RV @ head_VH
                if at_VH is not None:
                    at_VH.addmm_(u_RV.T, h_RH)
        hidden_NH.backward(cotangent_NH)
        if at_VH is not None:
            head_VH.grad = at_VH if head_VH.grad is None else head_VH.grad.add_(at_VH)
    return parameters.gradient()


def _forward_mode(
    decoder: Decoder, parameters: FlatParameters, tangents: dict[str, Tensor], batch: PackedBatch
) -> Tensor:
    """Return [N, H]: how the hidden states change as the parameters move along `tangents`."""
    with torch.no_grad(), use_impl("torch"), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        moving = {
            name: forward_ad.make_dual(p.detach(), tangents[name])
            for name, p in parameters.named.items()
        }
        hidden_NH = functional_call(
            decoder, moving, (batch.token_ids, batch.positions, batch.cu_seqlens, batch.max_length)
        )
        tangent_NH = forward_ad.unpack_dual(hidden_NH).tangent
    return torch.zeros_like(hidden_NH) if tangent_NH is None else tangent_NH


def policy_kl(
    actor: HybridActor,
    batch: PackedBatch,
    hidden_NH: Tensor,
    old_hidden_NH: Tensor,
    old_head_VH: Tensor,
    temperature: float,
) -> Tensor:
    """Return the sum over a batch's actions of KL(old || new), in nats, 0-d float64. Each KL is of
    the distribution that the action is drawn from. Not differentiable.

    Args:
        hidden_NH: hidden states of the current policy.
        old_hidden_NH, old_head_VH: hidden states and head of the old policy.
    """
    return (
        linear_full_kl(
            hidden_NH.detach(),
            actor.decoder.head_weight.detach(),
            old_hidden_NH,
            old_head_VH,
            temperature=temperature,
            direction="forward",
            mask=batch.labels() != IGNORE,
        )
        .double()
        .sum()
    )
