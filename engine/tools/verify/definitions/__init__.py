"""What every op computes, written down a second time from the mathematics: `fusedrl verify`
measures by it.

Nothing here shares code with fusedrl.kernels, whose torch implementations are measured like all
others: plain loops over sequences, rows and tokens, and elementary operations. A definition is slow
and wants no speed. Arguments are those of the op, in float64; of a description such as a
PolicyObjective only the fields are read. Gradients come by autograd. Where an op promises a slope
that is not its value's (the KL terms), the definition states that slope in a formula.

Dtypes    the layers compute in the dtype of their arguments: in float32 they show what rounding
          alone costs.
Masks     what a mask hides is never read into anything: a definition picks what counts.
Shapes    N tokens of sequences that cu_seqlens [B + 1] bounds, or N rows; V vocabulary, H hidden, D
          head dim.
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
