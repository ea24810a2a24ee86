"""Adapters: this package's ops under the names and argument orders of other libraries' fused heads
and log-probabilities.

    verl   FusedLinearForPPO          -> linear_logprob
    trl    selective_log_softmax, entropy_from_logits -> logprob
    Liger  LigerFusedLinearGRPOLoss   -> linear_policy_loss, or linear_logprob

More of verl's functions stand in verl_algos.py; TRL's `add_fused_lm_head` is in
engine/rollout/trl_head.py.

To use an adapter, import it from this module instead of from the other library. Inputs and outputs
are the same, except for the differences that each docstring lists. Common to all adapters: results
are float32 (float64 for float64), whatever the dtype of the inputs, unless `like_inputs` asks for
that; and differentiable once. A masked row or token may hold NaN. The product of hidden states and
head is not rounded to their dtype before the softmax.

Source    verl 0.9 (verl/utils/experimental/torch_functional.py), liger-kernel 0.8
          (liger_kernel/chunked_loss/grpo_loss.py), trl 1.16 (trl/trainer/utils.py), whose
          definitions the tests repeat as eager code. None of these libraries is imported.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fusedrl.kernels.kl import MAX_LOG_RATIO
from fusedrl.kernels.linear_logprob import linear_logprob
from fusedrl.kernels.linear_policy_loss import linear_policy_loss
from fusedrl.kernels.logprob import logprob
from fusedrl.kernels.objective import PolicyObjective
from fusedrl.kernels.runtime.checks import check

_IGNORED = -100
_REINFORCE = PolicyObjective(kind="reinforce")


def _impl(x: Tensor) -> str | None:
    return "torch" if x.dtype == torch.float64 else None  # only torch takes float64


def _leading(x: Tensor) -> str:
    """Return the pattern for `check` of all dimensions but the last."""
    return " ".join(f"d{i}" for i in range(x.ndim - 1))


# ---- verl ----------------------------------------------------------------------------------------
class FusedLinearForPPO(torch.nn.Module):
    """Replacement for verl's module of this name: log-probability and entropy of one token per row,
    computed through the head without holding all logits at once.

    Differences: the entropy is float32, while verl rounds it to the dtype of the hidden states. A
    token id of -100 has log-probability 0, entropy 0 and no gradient, while verl's torch backend
    fails. Any number of leading dimensions is allowed.

    Args:
        chunk_size: number of rows whose logits are held at a time.
        impl_backend: "torch" or "liger", as verl passes it; both select this implementation.
        like_inputs: round the results to the dtype of the hidden states.
    """

    def __init__(
        self, chunk_size: int = 512, impl_backend: str = "torch", like_inputs: bool = False
    ) -> None:
        super().__init__()
        if chunk_size < 1:
            raise ValueError(f"FusedLinearForPPO: expected chunk_size >= 1, got {chunk_size!r}")
        if impl_backend not in ("torch", "liger"):
            raise ValueError(
                "FusedLinearForPPO: expected impl_backend to be torch or liger, got "
                f"{impl_backend!r}"
            )
        self.chunk_size, self.impl_backend = chunk_size, impl_backend
        self.like_inputs = like_inputs

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Return (log_probs, entropy), both [...], for hidden_states [..., H],
        vocab_weights [V, H] of the same dtype and input_ids [...]."""
        leading = _leading(hidden_states)
        *_, H, V = check(
            "FusedLinearForPPO",
            {
                "hidden_states": (hidden_states, f"{leading} H"),
                "vocab_weights": (vocab_weights, "V H"),
                "input_ids": (input_ids, leading),
            },
        )
        log_probs, entropy = linear_logprob(
            hidden_states.reshape(-1, H),
            vocab_weights,
            input_ids.reshape(-1),
            temperature=temperature,
            entropy=True,
            workspace_bytes=4 * V * self.chunk_size,
            impl=_impl(hidden_states),
        )
        dtype = hidden_states.dtype if self.like_inputs else log_probs.dtype
        return log_probs.view(input_ids.shape).to(dtype), entropy.view(input_ids.shape).to(dtype)


# ---- Liger ---------------------------------------------------------------------------------------
_NO_REFERENCE = (
    "LigerFusedLinearGRPOLoss: expected ref_per_token_logps, or ref_input and ref_weight, with "
    "use_ref_model=True, got neither"
)


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """Replacement for Liger's module of this name: the GRPO losses from hidden states, whose
    gradients the forward pass computes.

    The loss of a token in a sequence with advantage A is as follows. r = exp(logp - old_logp), or
    for importance_sampling_level "sequence" the exponential of the mean of logp - old_logp over the
    sequence:

        l = max(-A r, -A clip(r, 1 - epsilon_low, 1 + epsilon_high))
                "sapo": -A sigmoid(tau (r - 1)) 4 / tau, tau by the sign of A
                "cispo": -A min(r, epsilon_high) logp, r without gradient
                with delta: max(-A min(r, delta), -A clip(r, 1 - epsilon_low, 1 + epsilon_high))
        l = l * vllm_is_ratio + beta (exp(ref_logp - logp) - 1 - (ref_logp - logp))
                with use_bias_correction_kl the term of beta is multiplied by r, with its gradient

    The loss is the sum of l over tokens with these weights, for n_b unmasked tokens in sequence b
    of B (B includes sequences without unmasked tokens):

        "grpo", "sapo"  1 / (B n_b)
        "bnpo"          1 / sum_b n_b
        "dr_grpo"       1 / (B max_completion_length)
        "dapo", "cispo" ranks / num_items_in_batch; the latter is by default the unmasked tokens of
                        all ranks of torch.distributed, or of this process

    Differences: a log ratio beyond +-20 is clamped inside exponentials and has no gradient there.
    `lin_weight` and `bias` are converted to the dtype of the hidden states (Liger adds a float32
    bias in float32). A token whose vllm_is_ratio is 0 does not count as clipped. Without
    old_per_token_logps the policy is its own old policy, as in Liger; this costs a scoring pass
    unless beta is 0 and the loss is not "sapo". Every non-zero mask entry counts as 1. "cispo",
    use_bias_correction_kl, and delta with level "sequence" or below 1 + epsilon_high are computed
    from log-probabilities, whose backward computes the logits a second time.

    Args: Liger's, in its order. `compiled` and `chunk_size` change nothing: nothing here is
    compiled, and linear_policy_loss bounds its workspace. The vespo_* arguments belong to a loss
    that is not supported. `delta` is the bound of two-sided clipping.
    Raises:
        ValueError: an argument cannot be supported exactly. These are the loss types "luspo" (which
            counts masked tokens) and "vespo", and level "sequence" with "sapo" or "cispo", as in
            Liger.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        op = "LigerFusedLinearGRPOLoss"
        if loss_type not in (types := ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "cispo")):
            raise ValueError(
                f"{op}: expected loss_type to be one of {', '.join(types)}, got "
                f"{loss_type!r}; see the class for what others are"
            )
        if importance_sampling_level not in ("token", "sequence") or (
            importance_sampling_level == "sequence" and loss_type in ("sapo", "cispo")
        ):
            raise ValueError(
                f"{op}: expected importance_sampling_level to be token, or sequence with a "
                "loss_type other than sapo and cispo, got "
                f"{importance_sampling_level!r} with {loss_type!r}"
            )
        if loss_type == "dr_grpo" and (max_completion_length is None or max_completion_length < 1):
            raise ValueError(
                f"{op}: expected max_completion_length >= 1 with loss_type dr_grpo, got "
                f"{max_completion_length!r}"
            )
        by_sequence = importance_sampling_level == "sequence"
        if loss_type in ("sapo", "cispo"):
            delta = None
        self.delta, self.use_bias_correction_kl = delta, use_bias_correction_kl
        self.composed = (
            loss_type == "cispo"
            or (use_bias_correction_kl and beta != 0)
            or (delta is not None and (by_sequence or delta < 1 + epsilon_high))
        )
        if loss_type == "cispo":
            self.objective = PolicyObjective(kind="cispo", clip_max=epsilon_high)
        elif loss_type == "sapo":
            self.objective = PolicyObjective(
                kind="sapo", tau_positive=sapo_temperature_pos, tau_negative=sapo_temperature_neg
            )
        elif by_sequence:
            self.objective = PolicyObjective(
                kind="gspo", clip_low=epsilon_low, clip_high=epsilon_high
            )
        else:
            self.objective = PolicyObjective(
                kind="clip",
                clip_low=epsilon_low,
                clip_high=epsilon_high,
                dual_clip=None if self.composed else delta,
            )
        (
            self.beta,
            self.use_ref_model,
            self.loss_type,
            self.max_completion_length,
            self.temperature,
        ) = (beta, use_ref_model, loss_type, max_completion_length, temperature)

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute the loss and its metrics.

        Args:
            _input: [B, T, H].
            lin_weight: [V, H].
            selected_token_ids, attention_mask: [B, T].
            advantages: [B].
            bias: [V].
            ref_per_token_logps, old_per_token_logps: [B, T].
            ref_input, ref_weight, ref_bias: hidden states and head of the reference, shaped as
                those of the policy, with any H. They are used only if ref_per_token_logps is None.
            vllm_is_ratio: [B], [B, 1] or [B, T].
        Returns:
            (loss, metrics). The loss is a scalar, differentiable in _input, lin_weight and bias.
            The metrics are (mean KL, clip ratio) over unmasked tokens; if beta is 0, only (clip
            ratio,).
        """
        no_reference = ref_per_token_logps is None and (ref_input is None or ref_weight is None)
        if self.use_ref_model and no_reference:
            raise ValueError(_NO_REFERENCE)
        ratio = vllm_is_ratio
        if ratio is not None and ratio.ndim == 1:
            ratio = ratio[:, None]
        of_ratio = "B 1" if ratio is not None and ratio.shape[1:] == (1,) else "B T"
        B, T, *_ = check(
            "LigerFusedLinearGRPOLoss",
            {
                "_input": (_input, "B T H"),
                "lin_weight": (lin_weight, "V H"),
                "selected_token_ids": (selected_token_ids, "B T"),
                "attention_mask": (attention_mask, "B T"),
                "advantages": (advantages, "B"),
                "bias": (bias, "V"),
                "ref_per_token_logps": (ref_per_token_logps, "B T"),
                "old_per_token_logps": (old_per_token_logps, "B T"),
                "ref_input": (ref_input, "B T R"),
                "ref_weight": (ref_weight, "V R"),
                "ref_bias": (ref_bias, "V"),
                "vllm_is_ratio": (ratio, of_ratio),
            },
        )
        wide, mask = torch.promote_types(_input.dtype, torch.float32), attention_mask != 0
        ids = torch.where(mask, selected_token_ids, _IGNORED).flatten()
        weights = self._weights(mask.to(wide), num_items_in_batch).flatten()
        ref_logp = self._reference(ref_per_token_logps, ref_input, ref_weight, ref_bias, ids, wide)
        if self.composed:
            logp = self._logp(_input, lin_weight, bias, ids, wide).view(B, T)
            old, ref = (
                None if x is None else x.to(wide).view(B, T)
                for x in (old_per_token_logps, ref_logp)
            )
            return self._composed(logp, mask, advantages, old, ref, ratio, weights.view(B, T))
        advantage = self._advantages(advantages, ratio, mask).to(wide).flatten()
        objective, at_ratio_one = self.objective, None
        if old_per_token_logps is not None:
            old_logp = old_per_token_logps.to(wide).flatten()
        # every ratio is 1: the gradient is that of -A logp, and the value is known
        elif ref_logp is None and objective.kind != "sapo":
            old_logp, objective, at_ratio_one = None, _REINFORCE, -(weights * advantage).sum()
        else:
            old_logp = self._score(_input, lin_weight, bias, ids, wide)
        ends = T * torch.arange(B + 1, device=mask.device)
        loss, stats, *_ = linear_policy_loss(
            *(_input.flatten(0, 1), lin_weight.to(_input.dtype), ids),
            *(old_logp, advantage, weights),
            objective=objective,
            ref_logp=ref_logp,
            kl_coef=self.beta if ref_logp is not None else 0.0,
            temperature=self.temperature,
            cu_seqlens=ends if objective.by_sequence else None,
            bias=None if bias is None else bias.to(_input.dtype),
            impl=_impl(_input),
        )
        if at_ratio_one is not None:
            loss = loss - loss.detach() + at_ratio_one
        clip_ratio = stats.clip_fraction_low + stats.clip_fraction_high
        return loss, (stats.ref_kl, clip_ratio) if self.beta else (clip_ratio,)

    def _reference(
        self,
        logp_BT: Tensor | None,
        hidden: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        ids: Tensor,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """Return the reference's log-probabilities [B T], given or computed; None without a KL."""
        if not (self.beta and self.use_ref_model):
            return None
        if logp_BT is None:
            return self._score(hidden, weight, bias, ids, dtype)
        return logp_BT.to(dtype).flatten()

    def _advantages(self, advantages_B: Tensor, ratio: Tensor | None, mask_BT: Tensor) -> Tensor:
        """Return [B, T] advantages times the sampler's ratios; 0 at masked tokens."""
        if ratio is not None and self.objective.by_sequence:  # its tokens share one term
            count = mask_BT.sum(1, keepdim=True).clamp(min=1)
            ratio = torch.where(mask_BT, ratio, 0).sum(1, keepdim=True) / count
        advantage = advantages_B[:, None] if ratio is None else advantages_B[:, None] * ratio
        return torch.where(mask_BT, advantage.expand(mask_BT.shape), 0)

    def _score(
        self,
        hidden: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        ids: Tensor,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """Return [B T] log-probabilities, without gradient."""
        if hidden is None or weight is None:
            return None
        with torch.no_grad():
            return self._logp(hidden, weight, bias, ids, dtype)

    def _logp(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        logp = linear_logprob(
            hidden.flatten(0, 1),
            weight.to(hidden.dtype),
            ids,
            bias=None if bias is None else bias.to(hidden.dtype),
            temperature=self.temperature,
            impl=_impl(hidden),
        )
        return cast(Tensor, logp).to(dtype)

    def _composed(
        self,
        logp_BT: Tensor,
        mask_BT: Tensor,
        advantages_B: Tensor,
        old_BT: Tensor | None,
        ref_BT: Tensor | None,
        is_ratio: Tensor | None,
        weights_BT: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute loss and metrics from log-probabilities with gradient."""

        def live(x: Tensor) -> Tensor:  # what a mask hides may be NaN
            return torch.where(mask_BT, x, 0)

        o, A = self.objective, advantages_B[:, None].to(logp_BT.dtype)
        d = live(logp_BT - (logp_BT.detach() if old_BT is None else old_BT))
        if o.by_sequence:
            d = d.sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1)
        ratio = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        low, high, _ = o.bounds
        if o.kind == "cispo":
            term = -ratio.detach().clamp(max=high) * A * logp_BT
        elif o.kind == "sapo":
            tau = torch.where(A > 0, o.coefficients["tau_positive"], o.coefficients["tau_negative"])
            term = -A * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
        else:
            first = ratio if self.delta is None else ratio.clamp(max=self.delta)
            term = -torch.minimum(first * A, ratio.clamp(low, high) * A)
        term = live(term.expand_as(logp_BT))
        if is_ratio is not None:
            term = live(term * is_ratio)
        kl = torch.zeros_like(logp_BT)
        if ref_BT is not None:
            gap = live(ref_BT - logp_BT)
            kl = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() - gap - 1
            kl = live(kl * ratio if self.use_bias_correction_kl else kl)
        tokens = mask_BT.sum().clamp(min=1)
        clipped = ((ratio < low) & (A < 0)) | ((ratio > high) & (A > 0))
        if o.kind == "sapo":
            clipped = torch.zeros_like(clipped)
        clip_ratio = live(clipped.expand_as(logp_BT).to(logp_BT.dtype)).sum() / tokens
        loss = (weights_BT * (term + self.beta * kl)).sum()
        return loss, (kl.detach().sum() / tokens, clip_ratio) if self.beta else (clip_ratio,)

    def _weights(self, mask_BT: Tensor, num_items_in_batch: float | Tensor | None) -> Tensor:
        # As token_weights, with one difference: its means over sequences leave out sequences
        # without tokens, while Liger's include them.
        B = mask_BT.shape[0]
        if self.loss_type in ("grpo", "sapo"):
            return mask_BT / (B * mask_BT.sum(1, keepdim=True).clamp(min=1))
        if self.loss_type == "bnpo":
            return mask_BT / mask_BT.sum().clamp(min=1)
        if self.loss_type == "dr_grpo":
            return mask_BT / (B * (self.max_completion_length or 1))
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        items = torch.as_tensor(
            mask_BT.sum() if num_items_in_batch is None else num_items_in_batch,
            dtype=mask_BT.dtype,
            device=mask_BT.device,
        )
        if distributed and num_items_in_batch is None:
            torch.distributed.all_reduce(items)
        return mask_BT / (items / (torch.distributed.get_world_size() if distributed else 1)).clamp(
            min=1
        )


# ---- trl -----------------------------------------------------------------------------------------
def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
    like_inputs: bool = False,
) -> Tensor:
    """Replacement for trl's function of this name: log-softmax of the logits at one index per row,
    or at K indices.

    Differences: the result is float32, while trl's eager code returns the dtype of the logits (its
    fused kernel float32 too). With one index per row, an index of -100 gives 0 instead of an error.
    With K indices and a gradient, a float32 copy of the logits is held.

    Args:
        logits: [..., V].
        index: [...], or [..., K] for K log-probabilities per row, which take two reads of the
            logits for any K.
        temperature: above 0.
        row_mask: in the shape of the index. Where the mask is 0, the result is 0 without gradient.
        like_inputs: round the result to the dtype of the logits.
    Returns:
        Log-probabilities in the shape of the index; float32 unless `like_inputs`.
    Raises:
        ValueError, TypeError, IndexError: as `logprob`.
        RuntimeError: one of K indices is out of range.
    """
    op, leading = "selective_log_softmax", _leading(logits)
    several = index.ndim == logits.ndim
    check(
        op,
        {
            "logits": (logits, f"{leading} V"),
            "index": (index, f"{leading} K" if several else leading),
            "row_mask": (row_mask, f"{leading} K" if several else leading),
        },
    )
    if not several:
        ids = index if row_mask is None else torch.where(row_mask != 0, index, _IGNORED)
        logp = cast(Tensor, logprob(logits, ids, temperature=temperature, impl=_impl(logits)))
        return logp.to(logits.dtype) if like_inputs else logp
    # All from the likeliest token of the row, logp_k = logp_top + (z_k - z_top) / T: it is never
    # -inf, and at it the gradients of the two z_top cancel, which they must do in float32.
    z = (
        logits.to(torch.promote_types(logits.dtype, torch.float32))
        if logits.requires_grad and torch.is_grad_enabled()
        else logits
    )
    top = z.detach().argmax(-1)
    shifted = (
        z.gather(-1, index.long()).to(torch.promote_types(z.dtype, torch.float32))
        - z.gather(-1, top[..., None])
    ) / temperature
    logp = (
        cast(Tensor, logprob(z, top, temperature=temperature, impl=_impl(z)))[..., None] + shifted
    )
    logp = logp if row_mask is None else torch.where(row_mask != 0, logp, 0)
    return logp.to(logits.dtype) if like_inputs else logp


def entropy_from_logits(logits: Tensor, chunk_size: int = 128, like_inputs: bool = False) -> Tensor:
    """Replacement for trl's function of this name: the entropy of softmax(logits), in nats; [...]
    for logits [..., V].

    Differences: the result is float32, while trl's eager code returns the dtype of the logits. -inf
    logits contribute nothing, while trl gives NaN. `chunk_size` has no effect: the logits are read
    once and no softmax is stored.

    Args:
        like_inputs: round the result to the dtype of the logits.
    """
    ids = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    entropy = logprob(logits, ids, entropy=True, impl=_impl(logits))[1]
    return entropy.to(logits.dtype) if like_inputs else entropy
