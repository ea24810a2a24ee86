import math

import mpmath
import pytest
import torch

from fusedrl.kernels.rope import RopeTable, _rope_triton, rope, rope_reference
from fusedrl.kernels.runtime import native


def tensors(device, N, Hq, Hkv, D, dtype=torch.float32):
    """q and k as slices of a fused projection's output, cos and sin, and upstream gradients of q
    and k."""
    generator = torch.Generator().manual_seed(N + Hq + D)
    qkv = torch.randn(N, Hq + 2 * Hkv, D, generator=generator).to(device).to(dtype)
    angles = 100 * torch.rand(N, D // 2, generator=generator).to(device)
    dq, dk = (torch.randn(N, h, D, generator=generator).to(device).to(dtype) for h in (Hq, Hkv))
    return qkv[:, :Hq], qkv[:, Hq : Hq + Hkv], angles.cos(), angles.sin(), dq, dk


def run(q, k, cos, sin, dq, dk, function=rope, **options):
    leaves = [q.detach().requires_grad_(), k.detach().requires_grad_()]
    out = function(*leaves, cos, sin, **options)
    return *(t.detach() for t in out), *torch.autograd.grad(out, leaves, (dq, dk))


def eager(q, k, cos, sin):
    """As transformers computes it, every product rounded to the dtype."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = (torch.cat([t, t], dim=-1).to(q.dtype) for t in (cos, sin))
    return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)


# No token, one; a head of two values; halves around a vector of 8 or 16; more heads than Triton
# takes at a time (512 pairs of 64).
@pytest.mark.each_impl("rope")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "N,Hq,Hkv,D",
    [
        (0, 2, 1, 8),
        (1, 1, 1, 2),
        (7, 3, 1, 6),
        (5, 8, 4, 8),
        (4, 5, 5, 34),
        (3, 2, 2, 80),
        (2, 20, 2, 128),
    ],
)
def test_against_float64(impl, dtype, N, Hq, Hkv, D, device):
    q, k, cos, sin, dq, dk = tensors(device, N, Hq, Hkv, D, dtype)
    exact = run(
        q.double(), k.double(), cos.double(), sin.double(), dq.double(), dk.double(), rope_reference
    )
    for ours, theirs, want in zip(
        run(q, k, cos, sin, dq, dk, impl=impl),
        run(q, k, cos, sin, dq, dk, eager),
        exact,
        strict=True,
    ):
        assert ours.dtype == dtype
        assert ours.shape == want.shape
        assert ours.is_contiguous()
        if N == 0:
            continue
        eps = torch.finfo(dtype).eps * want.abs().max()
        error, bound = (ours.double() - want).abs().max(), (theirs.double() - want).abs().max()
        assert error <= bound + eps, f"{error / eps:.2f} eps, torch {bound / eps:.2f}"


@pytest.mark.each_impl("rope")
def test_is_a_rotation(impl, device):
    q, k, cos, sin, *_ = tensors(device, 6, 3, 1, 10)
    rotated_q, rotated_k = rope(q, k, cos, sin, impl=impl)
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm(dim=-1))
    back = rope(rotated_q, rotated_k, cos, -sin, impl=impl)
    torch.testing.assert_close(back, (q.contiguous(), k.contiguous()))
    # By definition: the halves are the parts of complex numbers, turned by e^(i angle).
    turned = torch.complex(q[..., :5], q[..., 5:]) * torch.complex(cos, sin)[:, None]
    torch.testing.assert_close(rotated_q, torch.cat([turned.real, turned.imag], dim=-1))


@pytest.mark.each_impl("rope")
def test_strides_runs_and_poison(impl, device):
    q, k, cos, sin, dq, dk = tensors(device, 6, 3, 2, 10)
    got = run(q, k, cos, sin, dq, dk, impl=impl)
    again = run(
        q.contiguous(),
        k.clone(),
        torch.cat([cos, sin], -1)[:, :5],
        sin,
        dq.transpose(0, 1).contiguous().transpose(0, 1),
        dk,
        impl=impl,
    )
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    poisoned = q.clone()
    poisoned[2, 1] = torch.nan
    dirty_q, dirty_k, *_ = run(poisoned, k, cos, sin, dq, dk, impl=impl)
    clean = torch.ones(6, 3, dtype=torch.bool, device=device).index_put(
        (torch.tensor(2, device=device), torch.tensor(1, device=device)),
        torch.tensor(False, device=device),
    )
    assert torch.equal(dirty_q[clean], got[0][clean])
    assert dirty_q[~clean].isnan().all()
    assert torch.equal(dirty_k, got[1])


@pytest.mark.each_impl("rope")
def test_only_the_keys_learn(impl, device):
    q, k, cos, sin, _, dk = tensors(device, 4, 3, 2, 10)
    leaf = k.clone().requires_grad_()
    got = torch.autograd.grad(rope(q, leaf, cos, sin, impl=impl)[1], leaf, dk)[0]
    torch.testing.assert_close(got, rope(q, dk, cos, -sin, impl="torch")[1])


@pytest.mark.each_impl("rope")
def test_rounded_angles(impl, device):
    q, k, cos, sin, dq, dk = tensors(device, 5, 2, 2, 12, torch.bfloat16)
    rounded = cos.bfloat16(), sin.bfloat16()
    got = run(q, k, *rounded, dq, dk, impl=impl)
    want = run(q, k, *(t.float() for t in rounded), dq, dk, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.cpu_only("the C++ kernels")
@pytest.mark.skipif(not native.capability, reason=native.reason)
def test_threads_change_nothing(device):
    inputs = tensors(device, 1500, 4, 2, 32)
    one = run(*inputs, impl="cpp")
    try:
        torch.set_num_threads(3)
        three = run(*inputs, impl="cpp")
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_reference_gradcheck(device):
    q, k, cos, sin, *_ = (t.double() for t in tensors(device, 3, 2, 1, 6))
    assert torch.autograd.gradcheck(
        lambda q, k: rope(q, k, cos, sin), (q.requires_grad_(), k.requires_grad_())
    )


@pytest.mark.each_impl("rope", but=("torch",))
def test_opcheck_and_compile(impl, device):
    q, k, cos, sin, dq, dk = tensors(device, 3, 2, 1, 8)
    leaves = q.detach().requires_grad_(), k.detach().requires_grad_()
    if impl == "cpp":
        torch.library.opcheck(torch.ops.fusedrl.rope, (*leaves, cos, sin))
    else:
        torch.library.opcheck(_rope_triton, (*leaves, cos, sin, False))
    compiled = torch.compile(rope, fullgraph=True, backend="aot_eager")
    got, want = (run(q, k, cos, sin, dq, dk, function, impl=impl) for function in (compiled, rope))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_refuses_what_it_does_not_support(device):
    q, k, cos, sin, *_ = tensors(device, 3, 2, 1, 8)
    with pytest.raises(
        ValueError, match=r"one angle for every pair of a head, got D 8 and 8 angles"
    ):
        rope(q, k, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))
    with pytest.raises(ValueError, match="k does not fit its pattern"):
        rope(q, k[:2], cos, sin)
    with pytest.raises(TypeError, match="expected k of dtype float32"):
        rope(q, k.half(), cos, sin)
    with pytest.raises(TypeError, match="expected cos of dtype"):
        rope(q.half(), k.half(), cos.double(), sin.double())
    with pytest.raises(ValueError, match="contiguous last dimension"):
        rope(q.transpose(1, 2).contiguous().transpose(1, 2), k, cos, sin)
    with pytest.raises(RuntimeError, match="of float64: implementation 'triton' cannot run"):
        rope(q.double(), k.double(), cos, sin, impl="triton")


# ---- the table of angles -------------------------------------------------------------------------
FREQUENCIES = [
    [500_000.0 ** (-i / 32) for i in range(32)],
    [10_000.0 ** (-i / 32) / 8 for i in range(32)],
]


def test_the_table_is_cos_and_sin_rounded_once(device):
    """Half an ulp, at every position, in decimal arithmetic of 40 digits."""
    table, chosen = (
        RopeTable(FREQUENCIES, 1.25),
        [0, 1, 130, 255, 256, 1_000, 16_383, 16_384, 40_000, 65_537, 131_071],
    )
    tables = table.upto(131_072)
    assert all(x.shape == (2, 131_072, 32) and x.dtype == torch.float32 for x in tables)
    with mpmath.workdps(40):
        for t, row in enumerate(table.inv_freq.double().tolist()):
            for position in chosen:
                for got, f in zip(tables, (mpmath.cos, mpmath.sin), strict=True):
                    want = [f(mpmath.mpf(position) * w) * 1.25 for w in row]
                    for x, exact in zip(got[t, position].tolist(), want, strict=True):
                        ulp = 2.0 ** (max(math.frexp(x)[1], -125) - 24)
                        assert abs(x - exact) <= 0.500001 * ulp, (position, x, exact)
    far = slice(39_000, 40_000)  # with float32 angles, as it is often done
    angles = torch.arange(far.start, far.stop, device=device).float()[:, None] * table.inv_freq[0]
    assert float((angles.cos() * 1.25 - tables[0][0, far]).abs().max()) > 4e-4


def test_an_entry_depends_on_its_position_and_frequency_alone():
    whole = RopeTable(FREQUENCIES).upto(40_000)
    grown = RopeTable(FREQUENCIES)
    for count in (1, 256, 257, 1_000, 17_000, 40_000):
        before = grown.upto(count)
        assert before[0].shape[1] >= count
        assert all(torch.equal(x, y[:, : x.shape[1]]) for x, y in zip(before, whole, strict=True))
    assert all(a is b for a, b in zip(grown.upto(3), grown.tensors, strict=True)), (
        "what is there is kept"
    )
    for t, i in ((0, 0), (0, 31), (1, 7)):
        one = RopeTable([[FREQUENCIES[t][i]]]).upto(40_000)
        assert all(torch.equal(x[0, :, 0], y[t, :, i]) for x, y in zip(one, whole, strict=True))


def test_what_a_table_gives(device):
    table, positions = RopeTable(FREQUENCIES, 0.75), torch.tensor([0, 999, 3, 130], device=device)
    with torch.inference_mode():
        table.upto(1_000)
    x = torch.ones(4, 1, 64, requires_grad=True, device=device)
    for t, (cos, sin) in enumerate(table.at(positions, 1_000, torch.float32)):
        assert torch.equal(cos, table.tensors[0][t][positions])
        assert torch.equal(sin, table.tensors[1][t][positions])
        # a table that grew in inference mode serves autograd, too
        rope(x, x, cos, sin)[0].sum().backward()
    exact = table.at(positions, 1_000, torch.float64)
    assert all(x.dtype == torch.float64 for pair in exact for x in pair)
    torch.testing.assert_close(
        exact[1][1],
        (positions[:, None] * table.inv_freq[1].double()).sin() * 0.75,
        rtol=1e-12,
        atol=0,
    )
    assert RopeTable([[]]).upto(5)[0].shape == (1, 256, 0)
    assert RopeTable(FREQUENCIES).at(positions[:0], 0, torch.float32)[0][0].shape == (0, 32)
    assert RopeTable(FREQUENCIES, device="meta").upto(300)[1].shape == (2, 512, 32)
    torch.library.opcheck(torch.ops.fusedrl.rope_table, (table.inv_freq, 1.5, 512))
