"""sample: draw one token per row of logits, and return its log-probabilities.

    x = (z - max z) / T
    kept = top-k, then top-p of what is left, then min-p;   w = exp(x) over the kept set
    u = Philox(seed; request, sample, position) in [0, 1)
    token = the first in vocabulary order at which the running sum of w exceeds u sum w
    logp = x - ln sum exp x over all tokens
    logp_processed = ln w - ln sum w over the kept set
    entropy of softmax(x) over all tokens

Shapes    B sequences, V vocabulary.
Bytes     B V s read from memory. Later reads of a row come from the cache. Without truncation they
          are those of the block that holds the token. With truncation, on a GPU, they are the
          search for the last token in the kept set (for top-k and for top-p each at most 8 passes
          over bfloat16, 10 over float16, 16 over float32) and one sum. In CUDA C++ top-p collects
          the tokens that can be kept in shared memory, which takes two reads, and searches there;
          if they are more than 4,096 it searches the row.
Numerics  float32 terms (float64 for float64), sums in double. A token whose probability is below
          exp(-87) of the largest counts as probability 0: it is never drawn or kept. All
          implementations draw the same token, unless u sum w is within rounding error of the
          boundary between two tokens.
Ties      top-k and top-p rank tokens by logit, and equal logits by lower id, so the kept set is
          unique. top-p keeps the shortest prefix of this ranking whose probabilities sum to at
          least top_p; min-p keeps x >= ln(min_p). Greedy takes the lowest id of the largest logit.
Kept      top-k, top-p and min-p all cut off the end of the ranking, and `suppress` removes single
          tokens. So the lowest kept logit, and the highest id kept at this logit, describe the set.
          With them a second pass lists a row's kept ids without computing exponentials. A row is
          listed if some token of probability (above exp(-87)) is not kept.
Source    Salmon et al. (2011), Parallel random numbers: as easy as 1, 2, 3 (Philox 4x32-10); Fan et
          al. (2018), top-k; Holtzman et al. (2020), top-p; Nguyen et al. (2024), min-p. The
          truncations have the same order as transformers' logits processors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedrl.kernels.kept import Kept
from fusedrl.kernels.runtime import native
from fusedrl.kernels.runtime.checks import FLOATS, check, check_dtype, describe
from fusedrl.kernels.runtime.dispatch import Implementations
from fusedrl.kernels.runtime.triton import triton
from fusedrl.kernels.sampling._cuda import sample_cuda
from fusedrl.kernels.sampling._fused import empty_outputs

if triton is not None:
    from fusedrl.kernels.sampling import _triton  # noqa: F401  (registers fusedrl::sample_triton)

# top-p reads a row three times in CUDA C++, eleven times in Triton
_IMPLS = Implementations("sample", cpu=("cpp", "torch", "triton"), cuda=("cuda", "triton", "torch"))
_SMALLEST = -87.0  # exp of less is not a normal float32


class Sampled(NamedTuple):
    """Result of `sample`, with one entry per row."""

    token_ids: Tensor  # [B] int64
    # [B] float32: of the temperature-scaled full distribution (at temperature 0: of T = 1)
    logp: Tensor
    logp_processed: Tensor  # [B] float32: renormalised over the tokens that could be drawn
    entropy: Tensor  # [B] float32: of the temperature-scaled full distribution
    # the tokens that could be drawn, in the rows that excluded some token of probability; None
    # unless requested
    kept: Kept | None
    kept_count: Tensor  # [B] int64: number of tokens that could be drawn


# ---- reference -----------------------------------------------------------------------------------
def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Compute the random number generator Philox 4x32-10. counter [..., 4] and key [..., 2] are
    int64 tensors that hold 32-bit words. Returns [..., 4] words in int64."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        # int64 wraps, which keeps all 64 bits of the unsigned product
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((second >> 32) & low) ^ c1 ^ k0,
            second & low,
            ((first >> 32) & low) ^ c3 ^ k1,
            first & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack((c0, c1, c2, c3), dim=-1)


def uniform(keys_B4: Tensor) -> Tensor:
    """Return [B] float64 random numbers in [0, 1) with 53 random bits. They depend only on keys [B,
    4] int64 (seed, request id, sample index, position), of whose last two only the low 32 bits are
    used."""
    low = 0xFFFFFFFF
    seed, request, sample, position = keys_B4.unbind(-1)
    counter = torch.stack(
        (request & low, (request >> 32) & low, sample & low, position & low), dim=-1
    )
    words = philox4x32(counter, torch.stack((seed & low, (seed >> 32) & low), dim=-1))
    return ((words[..., 0] >> 5) * 2**26 + (words[..., 1] >> 6)).double() * 2.0**-53


def sample_reference(
    logits_BV: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    keys_B4: Tensor,
    suppress_BV: Tensor | None = None,
    kept_capacity: int | None = None,
) -> Sampled:
    """Compute `sample` by its definition, without a loop over rows or a device-to-host sync.
    Parameters are [B] or [1]. A row with no token to draw gets token -1."""
    z = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    B, V = z.shape
    T = temperature.to(z.dtype)[:, None]
    greedy = (T == 0)[:, 0].expand(B)
    T = torch.where(T == 0, 1.0, T)
    x = (z - z.amax(-1, keepdim=True)) / T
    log_sum = x.double().exp().sum(-1).log()
    p = (x.double() - log_sum[:, None]).exp()
    entropy = log_sum - torch.where(p > 0, p * x, 0.0).sum(-1)

    candidates = z if suppress_BV is None else torch.where(suppress_BV, -torch.inf, z)
    y = (candidates - candidates.amax(-1, keepdim=True)) / T
    w = torch.where(y >= _SMALLEST, y.exp(), 0.0).double()
    kept = w > 0
    if top_k is not None or top_p is not None:
        order = candidates.sort(dim=-1, descending=True, stable=True).indices
        ranked = w.gather(-1, order)
        in_ranking = ranked > 0
        if top_k is not None:
            in_ranking &= (torch.arange(V, device=z.device) < top_k[:, None]) | (top_k <= 0)[
                :, None
            ]
        if top_p is not None:
            ranked = torch.where(in_ranking, ranked, 0.0)
            before = torch.nn.functional.pad(ranked.cumsum(-1), (1, 0))
            in_ranking &= (before[:, :-1] < top_p[:, None] * ranked.sum(-1, keepdim=True)) | (
                top_p >= 1
            )[:, None]
        kept &= torch.zeros_like(kept).scatter(-1, order, in_ranking) | greedy[:, None]
    if min_p is not None:
        kept &= (y >= min_p.log().to(y.dtype)[:, None]) | greedy[:, None]
    w = torch.where(kept, w, 0.0)

    running = w.cumsum(-1)
    drawn = (running <= (uniform(keys_B4)[:, None] * running[:, -1:])).sum(-1)
    last = torch.where(kept, torch.arange(V, device=z.device), -1).amax(-1)
    # rounding may carry u sum w to the sum itself
    token_ids = torch.where(greedy, candidates.argmax(-1), torch.minimum(drawn, last))
    chosen = token_ids.clamp(min=0)[:, None]
    logp = x.double().gather(-1, chosen)[:, 0] - log_sum
    logp_processed = y.double().gather(-1, chosen)[:, 0] - running[:, -1].log()
    # NaN in a row makes its log_sum NaN (so does +inf); where every candidate is -inf, none is kept
    bad = log_sum.isnan() | (last < 0)
    kept = kept & ~bad[:, None]
    token_ids = torch.where(bad, -1, token_ids)
    listed = None
    if kept_capacity is not None:
        truncated = ((x >= _SMALLEST) & ~kept).any(-1)
        listed, token_ids = _list_reference(kept & truncated[:, None], token_ids, kept_capacity)
    logp, logp_processed, entropy = (
        torch.where(bad, torch.nan, column).to(z.dtype)
        for column in (logp, logp_processed, entropy)
    )
    return Sampled(token_ids, logp, logp_processed, entropy, listed, kept.sum(-1))


def _list_reference(kept_BV: Tensor, token_ids_B: Tensor, capacity: int) -> tuple[Kept, Tensor]:
    """Return the kept ids, as offsets and ids, of the rows that fit into `capacity`, and the
    tokens. From the first row that does not fit on, no row is listed, and such a row's token
    becomes -1."""
    V, count = kept_BV.shape[1], kept_BV.sum(-1)
    ends = count.cumsum(0)
    fits = ends <= capacity
    offsets = torch.nn.functional.pad(torch.where(fits, ends, 0).cummax(0).values, (1, 0))
    place = torch.where(
        kept_BV & fits[:, None], (ends - count)[:, None] + kept_BV.cumsum(-1) - 1, capacity
    )  # all other ids go into the extra last place
    ids = torch.arange(V, dtype=torch.int32, device=kept_BV.device).expand_as(place)
    buffer = ids.new_zeros(capacity + 1).scatter_(0, place.flatten(), ids.flatten())
    return Kept(buffer[:capacity], offsets), torch.where(fits | (count == 0), token_ids_B, -1)


# ---- custom op: what torch.compile sees ----------------------------------------------------------
if native.capability:

    @torch.library.register_fake("fusedrl::sample")
    def _(
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor | None,
        top_p: Tensor | None,
        min_p: Tensor | None,
        keys: Tensor,
        suppress: Tensor | None,
        kept_capacity: int | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return empty_outputs(logits, kept_capacity)


# ---- public --------------------------------------------------------------------------------------
def _parameter(
    name: str,
    value: float | Tensor,
    logits: Tensor,
    inside: Callable[..., Any],
    meaning: str,
    look: bool,
) -> Tensor:
    """Convert a number or [B] tensor to a float64 tensor [1] or [B]. The values of a tensor are
    checked only if `look`."""
    if isinstance(value, Tensor):
        if value.shape != logits.shape[:1] or value.device != logits.device:
            raise ValueError(
                f"sample: expected {name} as a number or [{logits.shape[0]}] on {logits.device}, "
                f"got {describe(value)}"
            )
        fits, tensor = not look or bool(inside(value).all()), value.double()
    else:
        fits, tensor = (
            bool(inside(value)),
            torch.full((1,), float(value), dtype=torch.float64, device=logits.device),
        )
    if not fits:
        raise ValueError(f"sample: expected {name} {meaning}, got {value}")
    return tensor


def _capacity(
    B: int,
    V: int,
    temperature: float | Tensor,
    top_k: float | Tensor,
    truncates: bool,
    suppress: Tensor | None,
) -> int:
    """Return an upper bound of the ids that B rows can hold, without reading a device tensor."""
    if not truncates and suppress is None:
        return 0
    by_k = not isinstance(top_k, Tensor) and top_k > 0
    # greedy rows list all tokens that are not suppressed, whatever top_k
    greedy_lists = suppress is not None and (isinstance(temperature, Tensor) or temperature == 0)
    return B * min(int(top_k), V) if by_k and not greedy_lists else B * V


def _check_drawn(drawn: Sampled, capacity: int | None) -> None:
    """Raise ValueError for a row that drew nothing."""
    if not bool((drawn.token_ids < 0).any()):
        return
    row, B = int((drawn.token_ids < 0).nonzero()[0]), len(drawn.token_ids)
    if not drawn.logp[row].isnan():
        raise ValueError(
            f"sample: expected the kept tokens to fit into kept_capacity {capacity}, got more, "
            f"from row {row} of {B} on; leave kept_capacity out, or make it larger"
        )
    raise ValueError(
        f"sample: row {row} of {B} holds NaN or +inf, or no token that may be drawn; look at "
        "the logits of that row and at `suppress`"
    )


@torch.no_grad()
def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    keys: Tensor,
    suppress: Tensor | None = None,
    return_kept: bool = False,
    kept_capacity: int | None = None,
    impl: str | None = None,
) -> Sampled:
    """Draw one token per row. The draw depends only on the row's logits, parameters and key: not on
    other rows, nor on any state.

    Args:
        logits: [B, V] float32, bfloat16 or float16 (torch also float64); rows may be strided.
        temperature: number or [B]. 0 takes the largest logit; logp, entropy, kept and kept_count
            are then those of T = 1 without truncation.
        top_k: number or [B]. Only the k largest logits can be drawn; 0 means all.
        top_p: number or [B] in (0, 1]. Of the remaining tokens, only the most probable ones whose
            probabilities sum to at least top_p can be drawn.
        min_p: number or [B] in [0, 1]. Of the remaining tokens, only those of at least min_p times
            the largest probability can be drawn.
        keys: [B, 4] int64 (seed, request id, sample index, position). Of sample index and position
            only the low 32 bits are used.
        suppress: [B, V] bool, True at tokens that are never drawn (an EOS before min_new_tokens).
            These tokens still count in logp and entropy, but not as kept.
        return_kept: True also lists the tokens that could be drawn, so that `logprob(...,
            kept=...)` scores exactly the distribution that was sampled. A row is listed if
            truncation or `suppress` excluded some token of probability. The other rows are empty;
            for them logp_processed equals logp.
        kept_capacity: number of ids to reserve memory for, since counting them on a GPU would
            synchronise. Default: the largest possible number, B top_k where top_k is a number, else
            B V (4 B V bytes, as much as float32 logits). Give a smaller number if the sets are
            known to be small. On a CPU the list is trimmed to its length.
        impl: "cpp", "triton", "cuda" or "torch"; by default the best one for the device.
    Returns:
        `Sampled`.
    Raises:
        ValueError: sizes, devices or parameters do not fit. On a CPU also: a row holds NaN or +inf
            or has no token to draw, or the kept tokens exceed kept_capacity. On CUDA these checks
            would synchronise: there such a row gets token -1 and an empty row of kept ids. From the
            first row beyond kept_capacity on, this applies to all rows that would be listed. [B]
            parameters are not checked on CUDA.
        TypeError: a dtype is not supported.
        RuntimeError: `impl` cannot run on this machine.
    """
    op = "sample"
    B, V = check(
        op, {"logits": (logits, "B V"), "keys": (keys, "B 4"), "suppress": (suppress, "B V")}
    )[:2]
    chosen = _IMPLS.choose(logits.device, impl)
    check_dtype(op, "logits", logits, FLOATS if chosen == "torch" else FLOATS[:3])
    check_dtype(op, "keys", keys, (torch.int64,))
    check_dtype(op, "suppress", suppress, (torch.bool,))
    if V == 0:
        raise ValueError("sample: expected a vocabulary of at least one token, got logits [B, 0]")
    on_host = logits.device.type == "cpu" and not torch.compiler.is_compiling()
    look = on_host and chosen != "cpp"  # the cpp op checks the values itself
    T = _parameter("temperature", temperature, logits, lambda x: x >= 0, "of 0 or more", look)
    k = (
        None
        if not isinstance(top_k, Tensor) and top_k == 0
        else _parameter("top_k", top_k, logits, lambda x: x >= 0, "of 0 (all) or more", look)
    )
    p = (
        None
        if not isinstance(top_p, Tensor) and top_p == 1
        else _parameter("top_p", top_p, logits, lambda x: (x > 0) & (x <= 1), "in (0, 1]", look)
    )
    m = (
        None
        if not isinstance(min_p, Tensor) and min_p == 0
        else _parameter("min_p", min_p, logits, lambda x: (x >= 0) & (x <= 1), "in [0, 1]", look)
    )
    capacity = None
    if return_kept:
        capacity = (
            _capacity(B, V, temperature, top_k, any(x is not None for x in (k, p, m)), suppress)
            if kept_capacity is None
            else kept_capacity
        )
        if capacity < 0:
            raise ValueError(f"sample: expected kept_capacity of 0 or more, got {kept_capacity}")
    arguments = (logits, T, k, p, m, keys, suppress, capacity)
    if chosen == "torch":
        drawn = sample_reference(*arguments)
    else:
        native_op = (
            sample_cuda
            if chosen == "cuda"
            else torch.ops.fusedrl.sample
            if chosen == "cpp"
            else torch.ops.fusedrl.sample_triton
        )
        ids, logp, processed, entropy, count, kept_ids, offsets = native_op(*arguments)
        drawn = Sampled(
            ids, logp, processed, entropy, Kept(kept_ids, offsets) if return_kept else None, count
        )
    if look:
        _check_drawn(drawn, capacity)
    # entries past the end were never written; the copy holds only the used part
    if on_host and drawn.kept is not None:
        ids, offsets = drawn.kept
        drawn = drawn._replace(kept=Kept(ids[: int(offsets[-1])].clone(), offsets))
    return drawn
