"""Rows of logits, heads and sampling by definition: a row at a time, over the tokens that it
has."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedrl.engine.tools.verify.definitions.common import Columns
from fusedrl.engine.tools.verify.definitions.losses import policy_loss

# a token this far below the likeliest one, in logarithms of probability, is never drawn
RARE = -87.0


# ---- rows of logits ------------------------------------------------------------------------------
def _per_row(rows: list[Tensor], logits: Tensor) -> Tensor:
    """[N]; it hangs on the logits also where no row does."""
    nothing = logits[..., :0].sum(-1)
    return nothing + torch.stack(rows) if rows else nothing


def _log_softmax(z: Tensor, T: float) -> Tensor:
    """Of a row of finite logits."""
    d = (z - z.detach().max()) / T
    return d - d.exp().sum().log()


def logprob(
    logits: Tensor, token_ids: Tensor, temperature: float | Tensor = 1.0, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(log-probability of the token, entropy) of each row of softmax(z / T); 0 where the token is
    -100.

    Only tokens above -inf are looked at: with none of them the token's is -inf and the entropy 0.
    kept: bool [N, V]; a row that lists tokens has no others."""
    logps, entropies = [], []
    zero = logits.new_zeros(())
    for n, token in enumerate(token_ids.tolist()):
        present = logits[n].detach() != -math.inf
        if kept is not None and bool(kept[n].any()):
            present = present & kept[n]
        if token == -100 or not bool(present.any()):
            logps.append(zero if token == -100 else zero - math.inf)
            entropies.append(zero)
            continue
        T = float(temperature[n]) if isinstance(temperature, Tensor) else temperature
        log_p = _log_softmax(logits[n][present], T)
        place = int(present[:token].sum())
        logps.append(log_p[place] if bool(present[token]) else zero - math.inf)
        entropies.append(-(log_p.exp() * log_p).sum())
    return _per_row(logps, logits), _per_row(entropies, logits)


def full_kl(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, temperature: float, direction: str
) -> Tensor:
    """Return the divergence in a direction of each pair of rows p = softmax(z / T), r = softmax(z_r
    / T).

    "reverse" KL(p || r), "forward" KL(r || p), "jsd" the mean of KL(p || m) and KL(r || m), m = (p
    + r) / 2. Infinite where a token of the first is none of the second; NaN where a row holds NaN
    or +inf. Kullback and Leibler (1951); Lin (1991)."""
    read = [True] * len(logits) if mask is None else mask.tolist()
    pairs = zip(read, logits, ref_logits.detach(), strict=True)
    rows = [
        _row_kl(z, ref, temperature, direction) if seen else z.new_zeros(())
        for seen, z, ref in pairs
    ]
    return _per_row(rows, logits)


def _row_kl(z: Tensor, z_ref: Tensor, T: float, direction: str) -> Tensor:
    if not (bool((z.detach() < math.inf).all()) and bool((z_ref < math.inf).all())):
        return z.sum() * math.nan
    in_p, in_r = z.detach() > -math.inf, z_ref > -math.inf
    log_p, log_r = (torch.full_like(x, -math.inf) for x in (z, z_ref))
    if bool(in_p.any()):
        log_p = log_p.masked_scatter(in_p, _log_softmax(z[in_p], T))
    if bool(in_r.any()):
        log_r = log_r.masked_scatter(in_r, _log_softmax(z_ref[in_r], T))

    def divergence(mine: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (a[mine].exp() * (a[mine] - b[mine])).sum()

    # log of the mean; a token of one alone has half of its probability there
    if direction == "jsd":
        shared = in_p & in_r
        middle = torch.logaddexp(log_p[shared], log_r[shared]) - math.log(2)
        of_p, of_r = (
            (x[shared].exp() * (x[shared] - middle)).sum() + math.log(2) * x[alone].exp().sum()
            for x, alone in ((log_p, in_p & ~in_r), (log_r, in_r & ~in_p))
        )
        return (of_p + of_r) / 2
    first, other = (in_p, in_r) if direction == "reverse" else (in_r, in_p)
    if bool((first & ~other).any()):
        return z.new_full((), math.inf)
    return (
        divergence(in_p, log_p, log_r) if direction == "reverse" else divergence(in_r, log_r, log_p)
    )


# ---- heads: what takes hidden states through one -------------------------------------------------
def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    z = hidden @ weight.T
    z = z if bias is None else z + bias
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _head_rows(
    live: Tensor,
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(logp, entropy) [N] of the live rows, 0 in the others."""
    T = temperature[live] if isinstance(temperature, Tensor) else temperature
    z = _logits(hidden[live], weight, bias, softcap)
    found = logprob(z, token_ids[live], T, None if kept is None else kept[live])
    logp, entropy = (
        hidden.new_zeros(len(live)).index_put((live.nonzero()[:, 0],), each) for each in found
    )
    return logp, entropy


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`logprob` of the logits hidden W^T + b, softcapped."""
    live = token_ids != -100
    return _head_rows(live, hidden, weight, token_ids, bias, temperature, softcap, kept)


def linear_full_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    direction: str,
) -> Tensor:
    """`full_kl` of the logits of two heads; the bias is the first one's."""
    live = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device) if mask is None else mask
    z, ref = (
        _logits(hidden[live], weight, bias, None),
        _logits(ref_hidden[live], ref_weight, None, None),
    )
    kl = full_kl(z, ref, None, temperature, direction)
    return hidden.new_zeros(len(hidden)).index_put((live.nonzero()[:, 0],), kl)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    **settings: Any,
) -> tuple[Tensor, Columns, Tensor, Tensor]:
    """`policy_loss` of what the head says of the tokens, and what it says; the rest of the
    arguments is its own."""
    logp, entropy = _head_rows(weights != 0, hidden, weight, token_ids, bias, temperature, None)
    return (
        *policy_loss(logp, old_logp, advantages, weights, entropy=entropy, **settings),
        logp,
        entropy,
    )


# ---- sampling ------------------------------------------------------------------------------------
def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10 of four and two words of 32 bits. Salmon et al. (2011), section 3.3."""
    word = 2**32
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second // word ^ c[1] ^ k[0], second % word, first // word ^ c[3] ^ k[1], first % word]
        k = [(k[0] + 0x9E3779B9) % word, (k[1] + 0xBB67AE85) % word]
    return c


def uniform(seed: int, request: int, sample: int, position: int) -> float:
    """Return a number in [0, 1), from 53 bits of the generator. Only the low 32 bits of sample and
    position are used."""
    word = 2**32
    counter = [request % word, request // word % word, sample % word, position % word]
    bits = philox(counter, [seed % word, seed // word % word])
    return ((bits[0] >> 5) * 2**26 + (bits[1] >> 6)) / 2**53


def sample(
    logits: Tensor,
    keys: Tensor,
    suppress: Tensor | None,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Columns:
    """A token a row from softmax(z / T) cut to top-k, then top-p, then min-p: the first whose
    running sum, in the order of the vocabulary, exceeds u times the whole. Temperature 0: the
    largest logit, with the numbers of T = 1, uncut.

    Fan et al. (2018); Holtzman et al. (2020); Nguyen et al. (2024)."""
    found: dict[str, list] = {
        "token_ids": [],
        "logp": [],
        "logp_processed": [],
        "entropy": [],
        "kept_count": [],
    }
    greedy, T = temperature == 0, temperature or 1.0
    for n in range(logits.shape[0]):
        z = logits[n].double().numpy()
        may = np.isfinite(z) if suppress is None else np.isfinite(z) & ~suppress[n].numpy()
        x = (z - z.max()) / T
        log_p = x - math.log(np.exp(x).sum())
        p = np.exp(log_p)
        y = np.where(may, (z - z[may].max()) / T, -np.inf)
        ranking = np.argsort(-y, kind="stable")  # by logit, then by id
        ranking = ranking[y[ranking] >= RARE]
        if not greedy and top_k:
            ranking = ranking[:top_k]
        if not greedy and top_p < 1:
            sums = np.cumsum(np.exp(y[ranking]))
            ranking = ranking[: 1 + int((sums[:-1] < top_p * sums[-1]).sum())]
        if not greedy and min_p:
            ranking = ranking[y[ranking] >= math.log(min_p)]
        kept = np.sort(ranking)
        running = np.cumsum(np.exp(y[kept]))
        drawn = int((running <= uniform(*keys[n].tolist()) * running[-1]).sum())
        token = int(np.argmax(y)) if greedy else int(kept[min(drawn, len(kept) - 1)])
        found["token_ids"].append(token)
        found["logp"].append(log_p[token])
        found["logp_processed"].append(y[token] - math.log(running[-1]))
        found["entropy"].append(-(p[p > 0] * log_p[p > 0]).sum())
        found["kept_count"].append(len(kept))
    whole = ("token_ids", "kept_count")
    return {
        n: torch.tensor(v, dtype=torch.int64 if n in whole else torch.float64)
        for n, v in found.items()
    }


def advance_rows(x: Columns) -> Columns:
    """Advance rows by a decoding step: the token in the ring; a row ended by its last position or a
    stop id, or moved."""
    changed = (
        "token_ids",
        "positions",
        "finished",
        "ring_tokens",
        "ring_logp",
        "cursor",
        "ring_values",
    )
    n = {name: t.tolist() for name, t in x.items()}
    step = n["cursor"][0]
    for r, token in enumerate(n["drawn"]):
        for ring, value in (
            ("ring_tokens", token),
            ("ring_logp", n["logp"][r]),
            ("ring_values", n["values"][r]),
        ):
            n[ring][step][r] = value
        stopped = any(stops[r] == token for stops in n["stops"])
        n["finished"][r] = (
            n["finished"][r] or n["positions"][1][r] >= n["last_positions"][r] or stopped
        )
        if not n["finished"][r]:
            n["token_ids"][r] = token
            n["positions"][0][r] += 1
            n["positions"][1][r] += 1
    n["cursor"][0] += 1
    return {
        name: torch.tensor(n[name], dtype=x[name].dtype).view(x[name].shape) for name in changed
    }
