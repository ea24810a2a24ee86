"""sample in Triton: one program per row. If the kept ids are requested, a second launch lists them.

The mathematics and numerics are those of __init__.py. A row is read once with an online maximum;
the sums of up to 256 groups of consecutive tokens stay in registers, one per thread. So the draw
finds its group in registers and reads only that group again. Truncation does not sort. It searches
for the key of the last kept token by its bits, two bits per pass, from the sums over all tokens at
or above three keys. The search ends when only one token is left to decide on. The device decides
for each row whether it needs this search.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedrl.kernels.sampling._fused import Outputs, empty_outputs, step

_BLOCK, _SEARCH_BLOCK, _GROUPS, _WARPS = 4096, 2048, 256, 8
# leading bits of the float32, in which all values of a dtype differ; a multiple of 2
_BITS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 20}
_SMALLEST = tl.constexpr(-87.0)


# ---- Triton --------------------------------------------------------------------------------------
@triton.jit
def _tile(row_ptr, suppress_ptr, start, V, BLOCK: tl.constexpr):
    """Load ids, logits, and the logits with suppressed tokens at -inf; positions past the end are
    -inf."""
    v = start + tl.arange(0, BLOCK)
    z = tl.load(row_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
    c = z
    if suppress_ptr is not None:
        c = tl.where(tl.load(suppress_ptr + v, mask=v < V, other=1) != 0, -float("inf"), z)
    return v, z, c


@triton.jit
def _weights(c, top, inverse):
    """Return scaled logits and weights. NaN stays NaN."""
    x = (c - top) * inverse
    return x, tl.where(x < _SMALLEST, 0.0, tl.exp(x))


@triton.jit
def _keys(z, BITS: tl.constexpr):
    """Map logits to integers of the same order; 0 and -0 give the same integer."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - BITS)


@triton.jit
def _logit(key, BITS: tl.constexpr):
    """Return the logit of a key."""
    bits = (key << (32 - BITS)) | tl.where(key < 0, (1 << (32 - BITS)) - 1, 0)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _search(
    row_ptr,
    suppress_ptr,
    top,
    inverse,
    V,
    target,
    floor,
    MASS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the largest key t, not below `floor`, such that the number (MASS: the weight) of the
    candidates at or above t is at least `target`. Also return this number above t, and whether t
    may be a key between two tokens. In that case all candidates at or above t stay, and no tie has
    to be decided."""
    none: tl.constexpr = -(1 << (BITS - 1))
    t = tl.full((), none, tl.int32)
    unit = tl.full((), 1 << (BITS - 2), tl.int32)
    # candidates from t on, and from the end of what is still open on
    at_least = V + tl.zeros((), tl.int32)
    beyond = tl.zeros((), tl.int32)
    above = target * 0
    decided = tl.full((), 0, tl.int32)
    while (unit > 0) & (decided == 0):
        t1 = t + unit
        t2 = t1 + unit
        t3 = t2 + unit
        n1 = tl.zeros([BLOCK], tl.int32)
        n2 = tl.zeros([BLOCK], tl.int32)
        n3 = tl.zeros([BLOCK], tl.int32)
        if MASS:
            m1 = tl.zeros([BLOCK], tl.float64)
            m2 = tl.zeros([BLOCK], tl.float64)
            m3 = tl.zeros([BLOCK], tl.float64)
        for start in range(0, V, BLOCK):
            _, _, c = _tile(row_ptr, suppress_ptr, start, V, BLOCK)
            x, w = _weights(c, top, inverse)
            key = tl.where(x >= _SMALLEST, _keys(c, BITS), none)
            n1 += tl.where(key >= t1, 1, 0)
            n2 += tl.where(key >= t2, 1, 0)
            n3 += tl.where(key >= t3, 1, 0)
            if MASS:
                m1 += tl.where(key >= t1, w, 0.0).to(tl.float64)
                m2 += tl.where(key >= t2, w, 0.0).to(tl.float64)
                m3 += tl.where(key >= t3, w, 0.0).to(tl.float64)
        c1, c2, c3 = tl.sum(n1, 0), tl.sum(n2, 0), tl.sum(n3, 0)
        if MASS:
            f1, f2, f3 = tl.sum(m1, 0), tl.sum(m2, 0), tl.sum(m3, 0)
        else:
            f1, f2, f3 = c1, c2, c3
        r1 = (f1 >= target) | (t1 <= floor)
        r2 = (f2 >= target) | (t2 <= floor)
        r3 = (f3 >= target) | (t3 <= floor)
        at_least = tl.where(r3, c3, tl.where(r2, c2, tl.where(r1, c1, at_least)))
        beyond = tl.where(r3, beyond, tl.where(r2, c3, tl.where(r1, c2, c1)))
        above = tl.where(r3, above, tl.where(r2, f3, tl.where(r1, f2, f1)))
        t = tl.where(r3, t3, tl.where(r2, t2, tl.where(r1, t1, t)))
        if MASS:
            decided = tl.where(at_least - beyond == 1, 1, 0)
        else:
            decided = tl.where(at_least == target, 1, 0)
        unit = unit >> 2
    return t, above, decided


@triton.jit
def _mass(
    row_ptr, suppress_ptr, top, inverse, V, t, quota, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the weight of the candidates with a key above t, plus that of up to `quota` candidates
    with key t."""
    none: tl.constexpr = -(1 << (BITS - 1))
    m = tl.zeros([BLOCK], tl.float64)
    equal = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        _, _, c = _tile(row_ptr, suppress_ptr, start, V, BLOCK)
        _, w = _weights(c, top, inverse)
        key = tl.where(w > 0.0, _keys(c, BITS), none)
        m += tl.where(key > t, w, 0.0).to(tl.float64)
        equal += tl.where((key == t) & (w > 0.0), 1, 0)
    _, w_t = _weights(_logit(t, BITS), top, inverse)
    count = tl.minimum(tl.sum(equal, 0), quota)
    return tl.sum(m, 0) + tl.where(count > 0, count.to(tl.float64) * w_t.to(tl.float64), 0.0)


@triton.jit
def _uniform(key_ptr):
    seed, request, sample, position = (
        tl.load(key_ptr),
        tl.load(key_ptr + 1),
        tl.load(key_ptr + 2),
        tl.load(key_ptr + 3),
    )
    low = 0xFFFFFFFF
    words = tl.philox(
        seed,
        (request & low).to(tl.uint32),
        ((request >> 32) & low).to(tl.uint32),
        (sample & low).to(tl.uint32),
        (position & low).to(tl.uint32),
    )
    return ((words[0] >> 5).to(tl.float64) * 67108864.0 + (words[1] >> 6).to(tl.float64)) * (
        1.0 / 9007199254740992.0
    )


@triton.jit(do_not_specialize=["T_step", "k_step", "p_step", "m_step"])
def _sample_kernel(
    logits_ptr,
    T_ptr,
    k_ptr,
    p_ptr,
    m_ptr,
    keys_ptr,
    suppress_ptr,
    ids_ptr,
    logp_ptr,
    processed_ptr,
    entropy_ptr,
    count_ptr,
    cuts_ptr,
    V,
    row_stride,
    T_step,
    k_step,
    p_step,
    m_step,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    SEARCH_BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    none: tl.constexpr = -(1 << (BITS - 1))
    n = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + n * row_stride
    hidden_ptr = suppress_ptr
    if suppress_ptr is not None:
        hidden_ptr = suppress_ptr + n * V
    T = tl.load(T_ptr + n * T_step).to(tl.float32)
    greedy = T == 0.0
    T = tl.where(greedy, 1.0, T)
    inverse = tl.minimum(1.0 / T, 3e38)  # 0 times it stays 0
    groups = tl.arange(0, GROUPS)
    span = tl.cdiv(tl.cdiv(V, BLOCK), GROUPS) * BLOCK  # tokens of a group

    # One read: the full distribution, and the sums of groups.
    top = -float("inf")
    top_c = -float("inf")
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    sums = tl.zeros([GROUPS], tl.float64)
    S = tl.zeros((), tl.float64)
    W = tl.zeros((), tl.float64)
    for start in range(0, V, BLOCK):
        v, z, c = _tile(row_ptr, hidden_ptr, start, V, BLOCK)
        higher = tl.maximum(top, tl.max(z, 0))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        shift = tl.where(top == -float("inf"), 0.0, tl.maximum((top - base) * inverse, -200.0)).to(
            tl.float64
        )
        factor = tl.exp(shift)
        d = (z - base) * inverse
        e = tl.exp(d)
        of_tile = tl.sum(e.to(tl.float64), 0)
        W = factor * (W + shift * S) + tl.sum(tl.where(e > 0.0, d, 0.0) * e, 0).to(tl.float64)
        S = factor * S + of_tile
        sums = factor * sums + tl.where(groups == start // span, of_tile, 0.0)
        top = higher
        if suppress_ptr is not None:
            top_c = tl.maximum(top_c, tl.max(c, 0))
        lowest = tl.minimum(lowest, tl.where(v < V, z, float("inf")))
    if suppress_ptr is None:
        top_c = top
    bad = (S != S) | (top_c == -float("inf"))

    # What each truncation asks of this row; all of them nothing: the sums are those of what can be
    # drawn, unless some weights count as 0.
    plain = (tl.min(lowest, 0) - top) * inverse >= _SMALLEST
    if suppress_ptr is not None:
        plain = plain & False
    k = V
    if k_ptr is not None:
        asked = tl.load(k_ptr + n * k_step)
        k = tl.where((asked > 0.0) & (asked < V) & (greedy == 0), asked.to(tl.int32), V)
        plain = plain & (k == V)
    p = tl.full((), 1.0, tl.float64)
    if p_ptr is not None:
        p = tl.where(greedy, 1.0, tl.load(p_ptr + n * p_step))
        plain = plain & (p >= 1.0)
    cut = -float("inf")
    if m_ptr is not None:
        m = tl.load(m_ptr + n * m_step)
        cut = tl.where(
            greedy | (m <= 0.0), -float("inf"), tl.log(tl.where(m > 0.0, m, 1.0)).to(tl.float32)
        )
        plain = plain & (cut == -float("inf"))

    total = S
    count = V + tl.zeros((), tl.int32)
    dropped = tl.zeros((), tl.int32)
    t = tl.full((), none, tl.int32)
    last = V + tl.zeros((), tl.int32)
    if (plain | bad) == 0:
        quota = V + tl.zeros((), tl.int32)
        if k_ptr is not None:  # noqa: SIM102  (this one is decided when it is compiled)
            if k < V:
                t, above, decided = _search(
                    row_ptr, hidden_ptr, top_c, inverse, V, k, none, False, BITS, SEARCH_BLOCK
                )
                quota = tl.where(decided == 1, V, k - above)
        if p_ptr is not None:  # noqa: SIM102
            if p < 1.0:
                target = p * _mass(
                    row_ptr, hidden_ptr, top_c, inverse, V, t, quota, BITS, SEARCH_BLOCK
                )
                t_p, above_p, decided_p = _search(
                    row_ptr, hidden_ptr, top_c, inverse, V, target, t, True, BITS, SEARCH_BLOCK
                )
                _, w_p = _weights(_logit(t_p, BITS), top_c, inverse)
                share = tl.minimum(
                    tl.ceil((target - above_p) / tl.where(w_p > 0.0, w_p, 1.0).to(tl.float64)), V
                ).to(tl.int32)
                share = tl.where(decided_p == 1, V, tl.maximum(share, 1))
                quota = tl.where(t_p > t, share, tl.minimum(share, quota))
                t = tl.maximum(t_p, t)
        # The kept weights by groups, and the kept set as one key and one id: all above, and those
        # of that key up to that id.
        sums = tl.zeros([GROUPS], tl.float64)
        kept_N = tl.zeros([SEARCH_BLOCK], tl.int32)
        dropped_N = tl.zeros([SEARCH_BLOCK], tl.int32)
        equals = tl.zeros((), tl.int32)
        highest = tl.full((), -1, tl.int32)
        low_N = tl.full([SEARCH_BLOCK], 0x7FFFFFFF, tl.int32)
        for group in range(0, tl.cdiv(V, span)):
            of_group = tl.zeros([SEARCH_BLOCK], tl.float64)
            for start in range(group * span, tl.minimum((group + 1) * span, V), SEARCH_BLOCK):
                v, z, c = _tile(row_ptr, hidden_ptr, start, V, SEARCH_BLOCK)
                x, w = _weights(c, top_c, inverse)
                w = tl.where(x < cut, 0.0, w)
                key = tl.where(w > 0.0, _keys(c, BITS), none)
                equal = tl.where((key == t) & (key > none), 1, 0)
                if quota < V:
                    rank = equals + tl.cumsum(equal, 0)
                    equals += tl.sum(equal, 0)
                    equal = tl.where(rank <= quota, equal, 0)
                    highest = tl.maximum(highest, tl.max(tl.where(equal == 1, v, -1), 0))
                keep = tl.where(key > t, 1, equal)
                of_group += tl.where(keep == 1, w, 0.0).to(tl.float64)
                kept_N += keep
                dropped_N += tl.where((z - top) * inverse < _SMALLEST, 0, 1 - keep)
                low_N = tl.minimum(low_N, tl.where(keep == 1, key, 0x7FFFFFFF))
            sums += tl.where(groups == group, tl.sum(of_group, 0), 0.0)
        low = tl.min(low_N, 0)
        # what cuts by value cuts between keys
        last = tl.where((low == t) & (quota < V), highest, V)
        t = low
        count = tl.sum(kept_N, 0)
        dropped = tl.sum(dropped_N, 0)
        total = tl.sum(sums, 0)

    # The group that the running sum exceeds u times the whole in, then its token.
    target = _uniform(keys_ptr + 4 * n) * total
    reached = (tl.cumsum(sums, 0) > target) & (sums > 0.0)
    group = tl.minimum(
        tl.min(tl.where(reached, groups, GROUPS), 0), tl.max(tl.where(sums > 0.0, groups, 0), 0)
    )  # rounding may leave none: the last
    running = tl.sum(tl.where(groups < group, sums, 0.0), 0)
    start = tl.where(greedy, 0, group * span)
    end = tl.where(bad, 0, tl.where(greedy, V, tl.minimum(start + span, V)))
    token = V + tl.zeros((), tl.int32)
    fallback = tl.zeros((), tl.int32)
    while (start < end) & (token == V):
        v, _, c = _tile(row_ptr, hidden_ptr, start, V, SEARCH_BLOCK)
        _, w = _weights(c, top_c, inverse)
        key = _keys(c, BITS)
        w = tl.where((key > t) | ((key == t) & (v <= last)), w, 0.0)
        sum_N = running + tl.cumsum(w.to(tl.float64), 0)
        drawn = tl.where(greedy, c == top_c, (sum_N > target) & (w > 0.0))
        token = tl.min(tl.where(drawn, v, V), 0)
        fallback = tl.maximum(fallback, tl.max(tl.where(w > 0.0, v, 0), 0))
        running += tl.sum(w.to(tl.float64), 0)
        start += SEARCH_BLOCK
    token = tl.where(token == V, fallback, token)

    z_y = tl.load(row_ptr + token).to(tl.float64)
    nan = float("nan")
    log_S = tl.log(S)
    logp = (z_y - top) / T.to(tl.float64) - log_S
    processed = tl.where(
        dropped == 0,
        logp,
        (z_y - top_c) / T.to(tl.float64) - tl.log(tl.where(dropped == 0, 1.0, total)),
    )
    tl.store(ids_ptr + n, tl.where(bad, -1, token).to(tl.int64))
    tl.store(logp_ptr + n, tl.where(bad, nan, logp.to(tl.float32)))
    tl.store(processed_ptr + n, tl.where(bad, nan, processed.to(tl.float32)))
    tl.store(entropy_ptr + n, tl.where(bad, nan, (log_S - W / S).to(tl.float32)))
    tl.store(count_ptr + n, tl.where(bad, 0, count).to(tl.int64))
    if cuts_ptr is not None:
        tl.store(cuts_ptr + 3 * n, t)
        tl.store(cuts_ptr + 3 * n + 1, last)
        tl.store(cuts_ptr + 3 * n + 2, tl.where(bad | (dropped == 0), 0, count))


@triton.jit(do_not_specialize=["B", "capacity"])
def _list_kernel(
    logits_ptr,
    suppress_ptr,
    cuts_ptr,
    ids_ptr,
    kept_ids_ptr,
    offsets_ptr,
    B,
    V,
    row_stride,
    capacity,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    n = tl.program_id(0)
    begin = tl.zeros((), tl.int64)  # of the rows that fit, which are the first ones
    end = tl.zeros((), tl.int64)
    ends = tl.zeros((), tl.int64)
    for first in range(0, n + 1, ROWS):
        row = first + tl.arange(0, ROWS)
        listed = tl.load(cuts_ptr + 3 * row.to(tl.int64) + 2, mask=row <= n, other=0).to(tl.int64)
        running = ends + tl.cumsum(listed, 0)
        fitting = tl.where(running <= capacity, running, 0)
        begin = tl.maximum(begin, tl.max(tl.where(row < n, fitting, 0), 0))
        end = tl.maximum(end, tl.max(tl.where(row <= n, fitting, 0), 0))
        ends += tl.sum(listed, 0)
    own = tl.load(cuts_ptr + 3 * n.to(tl.int64) + 2)
    if n == 0:
        tl.store(offsets_ptr, begin * 0)
    tl.store(offsets_ptr + n + 1, end)
    if own > 0:
        if ends > capacity:
            tl.store(ids_ptr + n, tl.full((), -1, tl.int64))
        else:
            row_ptr = logits_ptr + n.to(tl.int64) * row_stride
            hidden_ptr = suppress_ptr
            if suppress_ptr is not None:
                hidden_ptr = suppress_ptr + n.to(tl.int64) * V
            t = tl.load(cuts_ptr + 3 * n.to(tl.int64))
            last = tl.load(cuts_ptr + 3 * n.to(tl.int64) + 1)
            place = begin
            for start in range(0, V, BLOCK):
                v, _, c = _tile(row_ptr, hidden_ptr, start, V, BLOCK)
                key = _keys(c, BITS)
                keep = ((key > t) | ((key == t) & (v <= last))) & (v < V)
                rank = tl.cumsum(keep.to(tl.int32), 0)
                tl.store(kept_ids_ptr + place + rank - 1, v, mask=keep)
                place += tl.sum(keep.to(tl.int32), 0)


# ---- launchers, and the op that torch.compile sees -----------------------------------------------
@torch.library.custom_op("fusedrl::sample_triton", mutates_args=())
def sample_triton(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    keys: Tensor,
    suppress: Tensor | None,
    kept_capacity: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run sample in Triton."""
    B, V = logits.shape
    outputs = empty_outputs(logits, kept_capacity)
    *per_row, kept_ids, offsets = outputs
    if B == 0:
        offsets.zero_()
        return outputs
    logits = logits if logits.stride(1) == 1 or V == 1 else logits.contiguous()
    suppress = None if suppress is None else suppress.contiguous()
    cuts_B3 = None if kept_capacity is None else logits.new_empty((B, 3), dtype=torch.int32)
    parameters = [None if t is None else t.contiguous() for t in (temperature, top_k, top_p, min_p)]
    _sample_kernel[(B,)](
        logits,
        *parameters,
        keys.contiguous(),
        suppress,
        *per_row,
        cuts_B3,
        V,
        logits.stride(0),
        *map(step, parameters),
        BITS=_BITS[logits.dtype],
        BLOCK=_BLOCK,
        SEARCH_BLOCK=_SEARCH_BLOCK,
        GROUPS=_GROUPS,
        num_warps=_WARPS,
    )
    if kept_capacity is not None:
        _list_kernel[(B,)](
            logits,
            suppress,
            cuts_B3,
            per_row[0],
            kept_ids,
            offsets,
            B,
            V,
            logits.stride(0),
            kept_capacity,
            BITS=_BITS[logits.dtype],
            BLOCK=_SEARCH_BLOCK,
            ROWS=1024,
            num_warps=_WARPS,
        )
    return outputs


@sample_triton.register_fake
def _(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    keys: Tensor,
    suppress: Tensor | None,
    kept_capacity: int | None,
) -> Outputs:
    return empty_outputs(logits, kept_capacity)


# ---- what is compiled offline --------------------------------------------------------------------
_SIZES = {"V": "i32", "row_stride": "i64"}
_SHORT = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ASKED = {
    "k_ptr": "*fp64",
    "p_ptr": "*fp64",
    "m_ptr": "*fp64",
    "suppress_ptr": "*i1",
    "cuts_ptr": "*i32",
}
_OUT = {
    "ids_ptr": "*i64",
    "logp_ptr": "*fp32",
    "processed_ptr": "*fp32",
    "entropy_ptr": "*fp32",
    "count_ptr": "*i64",
}
OFFLINE_KERNELS = {
    f"sample_kernel_{dtype}{name}": {
        "kernel": _sample_kernel,
        "signature": {
            "logits_ptr": f"*{dtype}",
            "T_ptr": "*fp64",
            "keys_ptr": "*i64",
            **_OUT,
            **_SIZES,
            **{f"{x}_step": "i32" for x in "Tkpm"},
            **{key: _ASKED[key] for key in asked},
        },
        "constexprs": {
            "BITS": _BITS[_SHORT[dtype]],
            "BLOCK": _BLOCK,
            "SEARCH_BLOCK": _SEARCH_BLOCK,
            "GROUPS": _GROUPS,
            **{key: None for key in _ASKED if key not in asked},
        },
        "num_warps": _WARPS,
    }
    for dtype in _SHORT
    for name, asked in (("", ()), ("_all", tuple(_ASKED)))
} | {
    f"list_kernel_{dtype}": {
        "kernel": _list_kernel,
        "signature": {
            "logits_ptr": f"*{dtype}",
            "suppress_ptr": "*i1",
            "cuts_ptr": "*i32",
            "ids_ptr": "*i64",
            "kept_ids_ptr": "*i32",
            "offsets_ptr": "*i64",
            "B": "i32",
            "capacity": "i64",
            **_SIZES,
        },
        "constexprs": {"BITS": _BITS[_SHORT[dtype]], "BLOCK": _SEARCH_BLOCK, "ROWS": 1024},
        "num_warps": _WARPS,
    }
    for dtype in _SHORT
}
