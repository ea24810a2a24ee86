"""Definitions of every op, written a second time from the mathematics: `fusedrl verify` compares
all implementations with them.

Definitions share no code with fusedrl.kernels, not even with its torch implementations, which are
checked like the rest. They are plain loops over sequences, rows and tokens, and elementary
operations, and need not be fast. Arguments are those of the op, in float64. Of a description such
as a PolicyObjective, only the fields are read. Gradients come from autograd. If an op promises a
gradient that is not the derivative of its value (the KL terms), the definition has a formula for
that gradient.

Dtypes    Layers compute in the dtype of their arguments: in float32 they show the error of rounding
          alone.
Masks     Masked values are never read: a definition selects the unmasked ones.
Shapes    N is the tokens of sequences with bounds cu_seqlens [B + 1], or N rows; V vocabulary, H
          hidden, D head dim.
"""

from __future__ import annotations

from .advantages import (
    discounted_returns,
    gae,
    group_normalize,
    k_step_advantages,
    kwise_ranking_loss,
    masked_whiten,
    pairwise_ranking_loss,
    shaped_gae,
)
from .layers import (
    decode_step,
    linear,
    mlp_hidden,
    paged_attention,
    rms_norm,
    rope,
    rope_and_cache,
    varlen_attention,
)
from .losses import kl_loss, policy_loss, token_kl, value_loss
from .rows import (
    advance_rows,
    full_kl,
    linear_full_kl,
    linear_logprob,
    linear_policy_loss,
    logprob,
    sample,
)

__all__ = [
    "advance_rows",
    "decode_step",
    "discounted_returns",
    "full_kl",
    "gae",
    "group_normalize",
    "k_step_advantages",
    "kl_loss",
    "kwise_ranking_loss",
    "linear",
    "linear_full_kl",
    "linear_logprob",
    "linear_policy_loss",
    "logprob",
    "masked_whiten",
    "mlp_hidden",
    "paged_attention",
    "pairwise_ranking_loss",
    "policy_loss",
    "rms_norm",
    "rope",
    "rope_and_cache",
    "sample",
    "shaped_gae",
    "token_kl",
    "value_loss",
    "varlen_attention",
]
