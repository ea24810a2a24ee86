"""The CUDA routes of varlen_attention on a machine with neither a card nor flash-attn: which is
chosen, and what it is given."""

import inspect
import sys
import types
import warnings

import pytest
import torch

from fusedrl.kernels import attention
from fusedrl.kernels.attention import _flash as attention_flash
from fusedrl.kernels.attention import _trial as attention_verify
from fusedrl.kernels.attention import varlen_attention, varlen_attention_reference
from fusedrl.kernels.runtime import dispatch
from fusedrl.kernels.runtime.flash import probe

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CUDA = torch.device("cuda")
pytestmark = pytest.mark.cpu_only("what a card would be asked, on stand-ins")


def documented(q, k, v, ends, causal, window_size, softcap, scale):
    """What both functions say they compute: token i sees keys from i - left to i + right, and with
    `causal` none behind i; -1 is no limit."""
    out, (left, right) = torch.zeros_like(q), window_size
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        for i in range(start, end):
            first = start if left < 0 else max(start, i - left)
            last = i if causal else end - 1 if right < 0 else min(end - 1, i + right)
            for h in range(q.shape[1]):
                head = h // (q.shape[1] // k.shape[1])
                z = (k[first : last + 1, head] @ q[i, h]) * scale
                z = softcap * torch.tanh(z / softcap) if softcap > 0 else z
                out[i, h] = z.softmax(0) @ v[first : last + 1, head]
    return out


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """The parameters of flash-attn 2.6 and later."""
    assert (dropout_p, alibi_slopes, return_attn_probs, block_table, deterministic) == (
        0.0,
        None,
        False,
        None,
        True,
    )
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k == 9
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1
    return documented(q, k, v, cu_seqlens_q, causal, window_size, softcap, softmax_scale)


def varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    """Causal is the window (-1, 0)."""
    assert max_q == max_k == 9
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return documented(query, key, value, cu_seq_q, False, window_size, 0.0, scale)


@pytest.fixture
def routes(monkeypatch):
    """Both stand-ins, available, also on CPU tensors."""
    monkeypatch.setattr(attention_flash, "_flash_attn", flash_attn_varlen_func)
    monkeypatch.setattr(attention_flash, "_torch_varlen", varlen_attn)
    monkeypatch.setattr(
        attention_flash, "_torch_knows", frozenset(inspect.signature(varlen_attn).parameters)
    )
    monkeypatch.setattr(
        attention_verify, "_found", {(name, "cpu"): None for name in ("flash_attn", "torch_varlen")}
    )  # test_attention_verify.py is about that
    for name in ("flash_attn", "torch_varlen"):
        for device in ("cpu", "cuda"):
            monkeypatch.setitem(dispatch._WHY_NOT, (name, device), None)


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
@pytest.mark.parametrize(
    ("causal", "window"),
    [(True, None), (True, 1), (True, 3), (False, None), (False, 1), (False, 3)],
)
@pytest.mark.parametrize(
    ("impl", "softcap"), [("flash_attn", None), ("flash_attn", 0.7), ("torch_varlen", None)]
)
def test_arguments_mean_the_same(impl, softcap, causal, window, heads, routes):
    q, k, v = (
        torch.randn(14, h, 8, generator=torch.Generator().manual_seed(h)).to(BF16)
        for h in (heads[0], heads[1], heads[1])
    )
    cu_seqlens, options = (
        torch.tensor([0, 5, 5, 14], dtype=torch.int32),
        {"causal": causal, "window": window, "softcap": softcap, "scale": 0.6},
    )
    want = varlen_attention_reference(q.double(), k.double(), v.double(), cu_seqlens, **options)
    got = varlen_attention(
        q,
        k,
        v.transpose(0, 2).contiguous().transpose(0, 2),
        cu_seqlens,
        max_length=9,
        impl=impl,
        **options,
    )
    torch.testing.assert_close(got.double(), want, rtol=0, atol=0.05)
    assert varlen_attention(
        q[:0], k[:0], v[:0], torch.zeros(2, dtype=torch.int32), max_length=0, impl=impl
    ).shape == (0, heads[0], 8)


def test_the_installed_torch_takes_these_arguments(routes, monkeypatch):
    from torch.nn.attention.varlen import varlen_attn as real

    bound = []
    monkeypatch.setattr(
        attention_flash,
        "_torch_varlen",
        lambda *a, **k: bound.append(inspect.signature(real).bind(*a, **k)),
    )
    q, k = torch.randn(3, 4, 8), torch.randn(3, 2, 8)
    attention_flash.torch_varlen(
        q, k, k, torch.tensor([0, 3], dtype=torch.int32), 3, True, None, None, 0.5
    )
    assert bound[0].arguments["window_size"] == (-1, 0)  # its own word for causal
    assert bound[0].arguments["enable_gqa"] is True


@pytest.mark.parametrize(
    ("dtype", "head_dim", "softcap", "want"),
    [
        (BF16, 128, None, "flash_attn torch_varlen triton torch"),
        (F16, 256, None, "flash_attn torch_varlen triton torch"),
        (BF16, 128, 50.0, "flash_attn triton torch"),
        (F32, 128, None, "torch"),
        (F64, 128, None, "torch"),
        (BF16, 264, None, "torch"),
        (BF16, 36, 50.0, "triton torch"),
    ],
)
def test_the_first_route_that_serves_the_call(dtype, head_dim, softcap, want, routes, monkeypatch):
    monkeypatch.setitem(dispatch._WHY_NOT, ("triton", "cuda"), None)
    refused = attention._refused(CUDA, dtype, head_dim, softcap)
    assert attention._IMPLS.choose(CUDA, None, refused) == want.split()[0]
    for name in ("flash_attn", "torch_varlen"):
        if name in want:
            assert attention._IMPLS.choose(CUDA, name, refused) == name
        else:
            with pytest.raises(
                RuntimeError, match=f"'{name}' cannot run on cuda: it .*; these can: torch"
            ):
                attention._IMPLS.choose(CUDA, name, refused)
        monkeypatch.setitem(dispatch._WHY_NOT, (name, "cuda"), "it is not installed")
        left = [n for n in want.split() if dispatch.unavailable(n, "cuda") is None]
        assert attention._IMPLS.choose(CUDA, None, refused) == left[0]
    # FUSEDRL_IMPL is a preference: where it does not serve, the default does
    monkeypatch.setattr(dispatch, "_preferred", "flash_attn")
    assert attention._IMPLS.choose(CUDA, None, refused) == left[0]


def test_a_torch_without_the_flag_for_grouped_heads(routes, monkeypatch):
    """torch 2.11 passes grouped heads on without a flag, which it does not have: that is tried, and
    used where it is right."""

    def older(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return documented(q, k, v, cu_q, False, window_size, 0.0, scale)

    def ignores_the_group(q, k, v, cu_q, *rest, **options):
        heads = torch.arange(q.shape[1]) % k.shape[1]  # every other head, not neighbours
        return older(q, k[:, heads], v[:, heads], cu_q, *rest, **options)

    knows = frozenset(inspect.signature(older).parameters)
    monkeypatch.setattr(attention_flash, "_torch_knows", knows)
    monkeypatch.setitem(dispatch._WHY_NOT, ("flash_attn", "cpu"), "it is not installed")
    q, k, v = torch.randn(3, 14, 4, 8, generator=torch.Generator().manual_seed(0)).to(BF16)
    arguments = (q, k[:, :2], v[:, :2], torch.tensor([0, 5, 14], dtype=torch.int32))
    monkeypatch.setattr(
        attention, "_IMPLS", dispatch.Implementations("x", cpu=("torch_varlen", "torch"), cuda=())
    )
    for function, served in ((older, "torch_varlen"), (ignores_the_group, "torch")):
        monkeypatch.setattr(attention_flash, "_torch_varlen", function)
        monkeypatch.setattr(attention_verify, "_found", {})
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            got = varlen_attention(*arguments, max_length=9)
            assert torch.equal(got, varlen_attention(*arguments, max_length=9, impl=served))
        assert ["is off by" in str(each.message) for each in said] == [True] * (served == "torch")


def test_probes(monkeypatch):
    assert dispatch.unavailable("flash_attn", "cpu") == "FlashAttention serves CUDA tensors only"
    if torch.version.cuda is None and torch.version.hip is None:
        assert (
            dispatch.unavailable("flash_attn", "cuda")
            == dispatch.unavailable("torch_varlen", "cuda")
            == "this torch was built without CUDA"
        )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert (
        "flash_attn.flash_attn_varlen_func is not importable"
        in probe("flash_attn", "flash_attn_varlen_func", set())[2]
    )
    package = types.ModuleType("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    assert "has no attribute" in probe("flash_attn", "flash_attn_varlen_func", set())[2]
    package.flash_attn_varlen_func = lambda q, k, window_size: None
    assert (
        "does not take deterministic, softcap"
        in probe(
            "flash_attn", "flash_attn_varlen_func", {"window_size", "softcap", "deterministic"}
        )[2]
    )
    package.flash_attn_varlen_func = flash_attn_varlen_func
    found, known, why_not = probe(
        "flash_attn", "flash_attn_varlen_func", {"window_size", "softcap"}
    )
    assert (found, why_not) == (flash_attn_varlen_func, None)
    assert "deterministic" in known
    found, known, why_not = probe(
        "torch.nn.attention.varlen", "varlen_attn", {"window_size", "scale"}
    )
    assert (why_not, callable(found)) == (None, True)
