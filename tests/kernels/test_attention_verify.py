"""Attention that others wrote is tried before it serves: right ones are taken, wrong ones refused
with a reason. On stand-ins: no card is here."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from fusedrl.kernels import attention
from fusedrl.kernels.attention import _flash as attention_flash
from fusedrl.kernels.attention import _trial as attention_verify
from fusedrl.kernels.attention import varlen_attention, varlen_attention_reference
from fusedrl.kernels.runtime import dispatch

NAMES = ("flash_attn", "torch_varlen")
pytestmark = pytest.mark.cpu_only("stand-ins for what runs on a card")


def sdpa(
    q, k, v, cu_seqlens, max_length, causal, window, softcap, scale, *, shift=0, leak=0, repeat=None
):
    """Right: scaled_dot_product_attention a sequence at a time. The last three make it wrong."""
    outs = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        at = torch.arange(end - start)
        behind = at[:, None] - at[None]
        seen = (behind >= -leak) if causal else torch.ones_like(behind, dtype=torch.bool)
        seen = seen if window is None else seen & (behind.abs() < window + shift)
        queries, keys, values = (
            x[start:end].transpose(0, 1)
            for x in (
                q,
                *((repeat or (lambda x, n: x.repeat_interleave(n, 1)))(x, 2) for x in (k, v)),
            )
        )
        if softcap is None:
            outs.append(
                F.scaled_dot_product_attention(
                    queries, keys, values, attn_mask=seen, scale=scale
                ).transpose(0, 1)
            )
        else:
            outs.append(
                attention._attend(queries, keys, values, seen, softcap, scale).transpose(0, 1)
            )
    return torch.cat(outs)


def missing(*arguments):
    raise ImportError("libcudart.so.99: cannot open shared object file\nand a second line")


def wrong_in_the_backward_pass(q, k, v, *rest):
    o = sdpa(q, k, v, *rest)
    return o.detach() + (o - o.detach()) * 1.05


def one_wrong_row(*arguments):
    o = sdpa(*arguments)
    keep = torch.ones(len(o), 1, 1, dtype=o.dtype)
    keep[36] = 0.9  # the last token of the first sequence
    return o * keep


WRONG = {
    "ignores causality": (
        lambda q, k, v, e, m, causal, *rest: sdpa(q, k, v, e, m, False, *rest),
        "'causal': True, .* the output is off by",
    ),
    "sees one token ahead": (lambda *a: sdpa(*a, leak=1), "the output is off by"),
    "a window off by one": (lambda *a: sdpa(*a, shift=1), "'window': 9, .* the output is off by"),
    "ignores the window": (
        lambda q, k, v, e, m, causal, window, *rest: sdpa(q, k, v, e, m, causal, None, *rest),
        "'window': 9",
    ),
    "sequences run together": (
        lambda q, k, v, e, *rest: sdpa(q, k, v, e[[0, -1]], *rest),
        "the output is off by",
    ),
    "heads in the wrong groups": (
        lambda *a: sdpa(*a, repeat=lambda x, n: x.repeat(1, n, 1)),
        "the output is off by",
    ),
    "its own scale": (
        lambda q, k, v, e, m, c, w, s, scale: sdpa(q, k, v, e, m, c, w, s, None),
        "the output is off by",
    ),
    "one wrong row": (one_wrong_row, "the output is off by"),
    "gradients": (wrong_in_the_backward_pass, "the gradient of q is off by"),
    "no gradient": (lambda *a: sdpa(*a).detach(), "it raised RuntimeError: "),
    "NaN": (lambda *a: sdpa(*a) * float("nan"), "the output is off by nan"),
    "not importable": (
        missing,
        r"it raised ImportError: libcudart.so.99: cannot open shared object file$",
    ),
    "another shape": (
        lambda *a: sdpa(*a).flatten(1),
        r"it raised TypeError: expected torch.bfloat16 \[107, 4, 32\], got torch.bfloat16 \[107, "
        r"128\]",
    ),
    "another dtype": (lambda *a: sdpa(*a).float(), r"got torch.float32 \[107, 4, 32\]"),
    "a tuple": (lambda *a: (sdpa(*a), None), "got tuple"),
}


@pytest.fixture
def install(monkeypatch):
    """Stand-ins in the table, as if installed, for CPU tensors; nothing tried yet. Returns a
    function that takes them."""
    monkeypatch.setattr(attention_verify, "_found", {})
    monkeypatch.setattr(attention_flash, "_torch_knows", frozenset({"enable_gqa"}))
    monkeypatch.setattr(
        attention,
        "_IMPLS",
        dispatch.Implementations("varlen_attention", cpu=(*NAMES, "torch"), cuda=(*NAMES, "torch")),
    )

    def put(**routes):
        for name, route in routes.items():
            monkeypatch.setitem(attention.ROUTES, name, route)
            monkeypatch.setitem(dispatch._WHY_NOT, (name, "cpu"), None)

    return put


def problem():
    draw = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(9, heads, 8, generator=draw).bfloat16().requires_grad_() for heads in (4, 2, 2)
    )
    return q, k, v, torch.tensor([0, 4, 9], dtype=torch.int32)


@pytest.mark.parametrize("name", NAMES)
def test_a_right_one_is_taken_and_tried_once(name, install, monkeypatch):
    calls = []
    install(**{name: lambda *a: calls.append(len(a[0])) or sdpa(*a)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            out = varlen_attention(*problem(), max_length=5)
    tries = 4 if name == "flash_attn" else 3  # the one form with a softcap
    assert calls == [107] * tries + [9] * 3
    torch.testing.assert_close(
        out.double(),
        varlen_attention_reference(*(x.double() for x in problem()[:3]), problem()[3]),
        rtol=0,
        atol=0.03,
    )
    assert attention.fault(name, "cpu") is None


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_one_is_never_used(kind, install):
    route, reason = WRONG[kind]
    served = []
    install(flash_attn=lambda *a: served.append(len(a[0])) or route(*a), torch_varlen=sdpa)
    with pytest.warns(
        RuntimeWarning,
        match=rf"varlen_attention: flash_attn is not used on cpu: on a small problem, .*{reason}",
    ):
        out = varlen_attention(*problem(), max_length=5)
    assert torch.equal(out, varlen_attention(*problem(), max_length=5, impl="torch_varlen")), (
        "the next best serves"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        for ask in ({"impl": "flash_attn"}, {}):
            with (
                dispatch.use_impl("flash_attn"),
                pytest.raises(
                    RuntimeError,
                    match=rf"'flash_attn' cannot run on cpu: .*{reason.rstrip('$')}.*"
                    "; these can: torch, torch_varlen",
                ),
            ):
                varlen_attention(*problem(), max_length=5, **ask)
    assert set(served) == {107}
    assert "on a small problem" in attention.fault("flash_attn", "cpu")


def test_none_is_left(install):
    install(flash_attn=missing, torch_varlen=missing)
    with pytest.warns(RuntimeWarning) as warned:
        out = varlen_attention(*problem(), max_length=5)
    assert len(warned) == 2
    assert torch.equal(out, varlen_attention(*problem(), max_length=5, impl="torch"))


def test_the_installed_ones_are_absent_here():
    assert attention.tried("cpu") == [], "nothing to try"
    assert attention.fault("flash_attn", "cpu") is attention.fault("cpp", "cpu") is None


def test_devices_are_tried_apart(install, monkeypatch):
    install(flash_attn=sdpa)
    assert attention.fault("flash_attn", "cpu") is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setitem(dispatch._WHY_NOT, ("flash_attn", "cuda"), None)
    # there is none
    with pytest.warns(RuntimeWarning, match="flash_attn is not used on cuda:99: .* it raised"):
        attention.fault("flash_attn", "cuda:99")
    assert "it raised" in attention.fault("flash_attn", "cuda:99")
    assert attention.fault("flash_attn", "cpu") is None


def test_on_a_card_our_own_triton_is_tried_as_well(install, monkeypatch):
    monkeypatch.setitem(dispatch._WHY_NOT, ("triton", "cuda"), None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert attention.tried("cuda:99")[-1] == "triton"
    with pytest.warns(RuntimeWarning, match="triton is not used on cuda:99: .* it raised"):
        attention.fault("triton", "cuda:99")
    if dispatch.unavailable("triton", "cpu") is None:  # it passes, where it runs
        assert (
            attention_verify.fault(
                "triton", "cpu", attention.ROUTES["triton"], varlen_attention_reference, True
            )
            is None
        )


def test_while_a_graph_is_captured_nothing_is_tried(install, monkeypatch):
    install(flash_attn=sdpa)
    monkeypatch.setitem(dispatch._WHY_NOT, ("flash_attn", "cuda"), None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "a CUDA graph is being captured: make a call before" in attention.fault(
        "flash_attn", "cuda:0"
    )
    assert attention_verify._found == {}


def test_from_under_anything(install):
    """The first call may come from a forward pass without gradient, in inference mode, autocast, a
    checkpointed layer, or one that is being traced."""
    from torch.utils.checkpoint import checkpoint

    def call(*x):
        return varlen_attention(*x, problem()[3], max_length=5)

    def first(function):
        attention_verify._found.clear()
        out = function(*problem()[:3])
        assert attention_verify._found == {("flash_attn", "cpu"): None}
        return out

    install(flash_attn=sdpa)
    for mode in (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.float16)):

        def under(*x, mode=mode):
            with mode():
                return call(*x)

        first(under)
    out = first(lambda *x: checkpoint(call, *x, use_reentrant=False))
    out.sum().backward()
    torch._dynamo.reset()
    # the stand-in itself does not trace as one graph
    assert torch.equal(first(torch.compile(call, backend="aot_eager")), call(*problem()[:3]))
    attention_verify._found[("flash_attn", "cpu")] = "it is wrong"
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: varlen_attention(*x, max_length=5), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(
        compiled(*problem()), varlen_attention(*problem(), max_length=5, impl="torch")
    )
