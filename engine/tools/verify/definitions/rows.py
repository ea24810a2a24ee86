"""Definitions of ops on rows of logits, heads and sampling: one row at a time, over the tokens that
the row has."""

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
    """Stack the rows' results to [N]. The result depends on the logits for autograd, even if no
    row's does."""
    nothing = logits[..., :0].sum(-1)
    return nothing + torch.stack(rows) if rows else nothing


def _log_softmax(z: Tensor, T: float) -> Tensor:
    """Return the log-softmax of a row of finite logits."""
    d = (z - z.detach().max()) / T
    return d - d.exp().sum().log()


def logprob(
    logits: Tensor, token_ids: Tensor, temperature: float | Tensor = 1.0, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (log-probability of the token, entropy) of each row of softmax(z / T); both are 0 if
    the token is -100.

    Only logits above -inf count. If a row has none, the token's log-probability is -inf and the
    entropy 0. `kept` [N, V] is True for the tokens that top-k, top-p and min-p left. In a row with
    at least one True, only the kept tokens count; a row without any is not restricted."""
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
    """Return the divergence of each pair of rows p = softmax(z / T), r = softmax(z_r / T).

    "reverse" is KL(p || r), "forward" KL(r || p), "jsd" the mean of KL(p || m) and KL(r || m), m =
    (p + r) / 2. A KL is infinite if its second distribution lacks a token of its first, and NaN if
    a row holds NaN or +inf. Kullback and Leibler (1951); Lin (1991)."""
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

    # middle: log of the mean; a token of only one distribution has half its probability there
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
    """Return (logp, entropy) [N] of the live rows; 0 in all other rows."""
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
    """Return `logprob` of the logits hidden W^T + b, softcapped."""
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
    """Return `full_kl` of the logits of two heads; only the first head has the bias."""
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
    """Return the results of `policy_loss` with the log-probabilities and entropies that the head
    gives, and these log-probabilities and entropies. `settings` are arguments of `policy_loss`."""
    logp, entropy = _head_rows(weights != 0, hidden, weight, token_ids, bias, temperature, None)
    return (
        *policy_loss(logp, old_logp, advantages, weights, entropy=entropy, **settings),
        logp,
        entropy,
    )


# ---- sampling ------------------------------------------------------------------------------------
def philox(counter: list[int], key: list[int]) -> list[int]:
    """Apply Philox 4x32-10 to a counter of four 32-bit words and a key of two. Salmon et al.
    (2011), section 3.3."""
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
    """Draw a token per row from softmax(z / T), truncated to top-k, then top-p, then min-p. It is
    the first token, in the order of the vocabulary, at which the running sum of probabilities
    exceeds u times the total. With temperature 0 it is the token of the largest logit, and its
    log-probability is that at T = 1 without truncation.

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
    """Advance rows by a decoding step: store the token in the ring; then end the row if it is at
    its last position or drew a stop id, else move it to the next position."""
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
