"""TRL's fused head, computed by this package's kernel.

    with fused_head() as head:
        trainer = GRPOTrainer(...)
        trainer.train()
    print(head.calls)

GRPOTrainer, RLOOTrainer and their like get log-probabilities and entropies from the model itself,
which `add_fused_lm_head` gives a forward without logits. Here that forward ends in
`linear_logprob`: rows that are not scored take part in no product, and results are float32.
"""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from fusedrl.engine.rollout.patching import Name, Patched
from fusedrl.kernels.linear_logprob import linear_logprob

_SERVED = ("log_probs", "entropy")
# factors of the logits by which families differ, as TRL reads them
_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def fused_head() -> Patched:
    """Let TRL's trainers that are made from now on compute log-probabilities and entropies with
    this package's kernel. Return an object whose `calls` counts them, and which gives TRL its own
    function back (`undo`, or the end of a `with` block; trainers that were made meanwhile keep
    ours).

    Raises:
        ImportError: trl is not installed, or has no `add_fused_lm_head` (1.16 has).
        ValueError: later, where a trainer is made or computes, what the kernel does not compute:
            other outputs than log_probs and entropy, logits with a factor, a mixture of experts, a
            sharded head.
        RuntimeError: at an optimizer step before any call.
    """
    from trl.trainer import utils

    calls: Counter[str] = Counter()
    ours = functools.partial(_add_fused_lm_head, calls)
    return Patched(
        "trl",
        {"add_fused_lm_head": Name(utils.add_fused_lm_head, ours)},
        remedy="make the trainer after fused_head(), one that scores by TRL's fused head (GRPO, "
        "RLOO), or leave fused_head() out",
        calls=calls,
    )


def _add_fused_lm_head(
    calls: Counter[str],
    model: nn.Module,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """Do what TRL's function of this name does, by the same arguments."""
    if strange := [name for name in outputs if name not in _SERVED]:
        _refuse(f"outputs of {', '.join(_SERVED)}, got {', '.join(strange)}")
    config = cast(Any, model.config).get_text_config()
    if factors := [n for n in _FACTORS if getattr(config, n, None) not in (None, 1, 1.0)]:
        _refuse(f"logits without a factor, got {factors[0]} = {getattr(config, factors[0])}")
    original: Callable[..., Any] = model.forward
    softcap = getattr(config, "final_logit_softcapping", None)

    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        given = {
            "labels": labels,
            "shift_labels": shift_labels,
            "num_items_in_batch": num_items_in_batch,
        }
        if not fused_lm_head:
            given = {name: value for name, value in given.items() if value is not None}
            return original(*args, **given, **kwargs)
        if kwargs.get("output_router_logits") or getattr(config, "output_router_logits", False):
            _refuse("a model without a mixture of experts, whose loss would be left out")
        hidden_BTH = self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state
        if shift_labels is not None:
            labels_BT = shift_labels
        elif labels is not None:
            hidden_BTH, labels_BT = hidden_BTH[:, :-1], labels[:, 1:]
        else:
            _refuse("labels")
        calls["add_fused_lm_head"] += 1
        head = self.get_output_embeddings()
        logp_BT, entropy_BT = _scored(
            hidden_BTH, labels_BT, head, temperature, softcap, cast_lm_head_to_fp32
        )
        mask_BT = labels_BT != -100
        count = mask_BT.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return _output(-logp_BT.sum() / count, logp_BT, entropy_BT, mask_BT, outputs)

    cast(Any, model).forward = types.MethodType(forward, model)


def _scored(
    hidden_BTH: Tensor,
    labels_BT: Tensor,
    head: Any,
    temperature: float,
    softcap: float | None,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    weight_VH, bias_V = head.weight, getattr(head, "bias", None)
    if type(weight_VH.data) is not Tensor or hasattr(weight_VH, "ds_id"):
        _refuse("a head whose weights are whole, got a shard (FSDP2, ZeRO-3)")
    hidden_BTH, labels_BT = (x.to(weight_VH.device) for x in (hidden_BTH, labels_BT))
    dtype = torch.float32 if wide else hidden_BTH.dtype
    logp_N, entropy_N = linear_logprob(
        hidden_BTH.reshape(-1, hidden_BTH.shape[-1]).to(dtype),
        weight_VH.to(dtype),
        labels_BT.reshape(-1),
        bias=None if bias_V is None else bias_V.to(dtype),
        temperature=temperature,
        softcap=softcap,
        entropy=True,
    )
    return logp_N.view(labels_BT.shape), entropy_N.view(labels_BT.shape)


def _output(
    loss: Tensor, logp_BT: Tensor, entropy_BT: Tensor, mask_BT: Tensor, outputs: tuple[str, ...]
) -> Any:
    from trl.trainer.utils import FusedCausalLMOutput

    return FusedCausalLMOutput(
        loss=loss,
        log_probs=logp_BT,
        entropy=entropy_BT if "entropy" in outputs else None,
        label_mask=mask_BT,
    )


def _refuse(expected: str) -> NoReturn:
    raise ValueError(
        f"fused_head: expected {expected}; leave fused_head() out, and TRL computes it itself"
    )
