"""The adapters against the definitions of the libraries whose names they bear, stated again here,
eagerly and in float64.

One file: what Liger's losses share, their problem and their definition, is most of it."""

import inspect

import pytest
import torch

from fusedrl.kernels.adapters import (
    FusedLinearForPPO,
    LigerFusedLinearGRPOLoss,
    entropy_from_logits,
    selective_log_softmax,
)

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "sapo", "cispo"]


def rand(device, *shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device).to(dtype)


def randint(device, high, *shape, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def close(got, want, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=atol)


# ---- verl ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(9,), (3, 4), (0,), (2, 0), ()], ids=str)
@pytest.mark.parametrize("chunk_size", [1, 4, 512])
def test_fused_linear_for_ppo(dtype, shape, chunk_size, device):
    hidden, weight, ids = (
        rand(device, *shape, 16, dtype=dtype),
        rand(device, 50, 16, seed=1, dtype=dtype),
        randint(device, 50, *shape),
    )
    g, h = rand(device, *shape, seed=2), rand(device, *shape, seed=3)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    log_probs, entropy = FusedLinearForPPO(chunk_size=chunk_size)(*leaves, ids, 0.7)
    assert log_probs.dtype == entropy.dtype == torch.promote_types(dtype, torch.float32)
    grads = torch.autograd.grad((log_probs * g + entropy * h).sum(), leaves)

    exact = [t.double().requires_grad_() for t in (hidden, weight)]
    logp = (exact[0] @ exact[1].T / 0.7).log_softmax(-1)
    want = logp.gather(-1, ids[..., None])[..., 0], -(logp.exp() * logp).sum(-1)
    for got, expected in zip((log_probs, entropy), want, strict=True):
        assert got.shape == ids.shape
        close(got, expected, atol=2e-5)
    rounding = {"rtol": 2.0**-8, "atol": 1e-4} if dtype == torch.bfloat16 else {"atol": 2e-5}
    for got, expected in zip(
        grads, torch.autograd.grad((want[0] * g + want[1] * h).sum(), exact), strict=True
    ):
        assert got.dtype == dtype
        close(got, expected, **rounding)


def test_fused_linear_for_ppo_is_called_as_verl_does(device):
    hidden, weight, ids = rand(device, 2, 3, 8), rand(device, 20, 8), randint(device, 20, 2, 3)
    ids[0, 1] = -100
    module = FusedLinearForPPO(impl_backend="liger")
    log_probs, entropy = module.forward(
        hidden_states=hidden, vocab_weights=weight, input_ids=ids, temperature=1.0
    )
    assert log_probs[0, 1] == entropy[0, 1] == 0
    assert (log_probs != 0).sum() == 5
    with pytest.raises(
        ValueError, match="expected impl_backend to be torch or liger, got 'triton'"
    ):
        FusedLinearForPPO(impl_backend="triton")
    with pytest.raises(ValueError, match="expected chunk_size >= 1"):
        FusedLinearForPPO(chunk_size=0)
    with pytest.raises(ValueError, match="input_ids does not fit its pattern"):
        module(hidden, weight, ids[:, :2])


# ---- Liger ---------------------------------------------------------------------------------------
def problem(device, B=6, T=7, H=5, V=40, dtype=torch.float32):
    """One sequence without a token, one with all; advantages of both signs and 0; what is masked is
    nonsense."""
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(8)).to(device) < 0.6
    mask[1], mask[2] = False, True
    p = {
        "_input": rand(device, B, T, H, dtype=dtype),
        "lin_weight": rand(device, V, H, seed=1, dtype=dtype),
        "bias": rand(device, V, seed=2, dtype=dtype),
        "selected_token_ids": randint(device, V, B, T),
        "attention_mask": mask.long(),
        "advantages": rand(device, B, seed=4),
    }
    p["advantages"][3] = 0.0
    logp = logp_of(
        *(p[name].double() for name in ("_input", "lin_weight", "bias")),
        p["selected_token_ids"],
        0.8,
    ).float()
    for seed, name in enumerate(("ref_per_token_logps", "old_per_token_logps")):
        p[name] = torch.where(mask, logp + 0.3 * rand(device, B, T, seed=5 + seed), torch.nan)
    p["_input"][~mask], p["selected_token_ids"][~mask] = torch.nan, 10**9
    return p


def logp_of(x, weight, bias, ids, temperature):
    return ((x @ weight.T + bias) / temperature).log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def restated(
    device,
    p,
    *,
    beta=0.04,
    loss_type="dapo",
    level="token",
    low=0.2,
    high=0.2,
    delta=None,
    tau=(1.0, 1.05),
    longest=None,
    temperature=0.8,
    items=None,
    corrected=False,
):
    """(loss, metrics, gradients): a sequence at a time, its unmasked tokens only."""
    leaves = [p[name].double().requires_grad_() for name in ("_input", "lin_weight", "bias")]
    B = len(p["advantages"])
    total, kl_sum, clipped, tokens = 0.0, 0.0, 0, int(p["attention_mask"].sum())
    for b in range(B):
        live = p["attention_mask"][b] == 1
        if not live.any():
            continue
        A = p["advantages"][b].double()
        logp = logp_of(
            leaves[0][b][live], *leaves[1:], p["selected_token_ids"][b][live], temperature
        )
        old = (
            logp.detach()
            if p.get("old_per_token_logps") is None
            else p["old_per_token_logps"][b][live].double()
        )
        ratio = (
            (logp - old).exp() if level == "token" else (logp - old).mean().exp().expand(len(logp))
        )
        if loss_type == "sapo":
            t = tau[0] if A > 0 else tau[1]
            term = -A * 4 / t / (1 + (-t * (ratio - 1)).exp())
        elif loss_type == "cispo":
            term = -ratio.detach().clamp(max=high) * A * logp
            clipped += int((ratio > high).sum()) * bool(A > 0)
        else:
            bounded = ratio.clamp(1 - low, 1 + high)
            term = -torch.minimum(
                A * (ratio if delta is None else ratio.clamp(max=delta)), A * bounded
            )
            clipped += int(((ratio > 1 + high) if A > 0 else (ratio < 1 - low) & (A < 0)).sum())
        if p.get("vllm_is_ratio") is not None:
            term = term * p["vllm_is_ratio"].double().reshape(B, -1).expand(B, len(live))[b][live]
        if beta and p.get("ref_per_token_logps") is not None:
            gap = p["ref_per_token_logps"][b][live].double() - logp
            kl = (gap.exp() - gap - 1) * (ratio if corrected else 1)
            kl_sum, term = kl_sum + kl.sum().item(), term + beta * kl
        total = (
            total
            + {
                "grpo": term.mean() / B,
                "sapo": term.mean() / B,
                "bnpo": term.sum() / tokens,
                "dr_grpo": term.sum() / (B * (longest or 1)),
                "dapo": term.sum() / (tokens if items is None else items),
                "cispo": term.sum() / (tokens if items is None else items),
            }[loss_type]
        )
    metrics = ([kl_sum / tokens] if beta else []) + [clipped / tokens]
    return (
        total.detach(),
        torch.tensor(metrics, dtype=torch.float64, device=device),
        torch.autograd.grad(total, leaves),
    )


def ours(p, names=("_input", "lin_weight", "bias"), **options):
    inputs = p | {name: p[name].clone().requires_grad_() for name in names}
    loss, metrics = LigerFusedLinearGRPOLoss(temperature=0.8, **options)(**inputs)
    return (
        loss.detach(),
        torch.stack(metrics),
        torch.autograd.grad(loss, [inputs[name] for name in names]),
    )


def same(got, want, **tolerance):
    assert isinstance(got[0], torch.Tensor)
    close(got[0], want[0], **tolerance)
    close(got[1], want[1], **tolerance)
    for ours, exact in zip(got[2], want[2], strict=True):
        close(ours, exact, **tolerance)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("on_policy", [False, True])
def test_grpo(loss_type, level, beta, on_policy, device):
    if loss_type in ("sapo", "cispo") and level == "sequence":
        pytest.skip("refused, there and here")
    p, longest = problem(device), 9 if loss_type == "dr_grpo" else None
    if on_policy:
        p["old_per_token_logps"] = None
    got = ours(
        p,
        beta=beta,
        loss_type=loss_type,
        importance_sampling_level=level,
        max_completion_length=longest,
        epsilon_low=0.1,
        epsilon_high=(high := 1.1 if loss_type == "cispo" else 0.15),
    )
    want = restated(
        device, p, beta=beta, loss_type=loss_type, level=level, longest=longest, low=0.1, high=high
    )
    same(got, want)
    assert got[1].shape == ((2,) if beta else (1,))
    assert bool(got[1][-1] > 0) == (not on_policy and loss_type != "sapo")
    assert not got[2][0][p["attention_mask"] == 0].any()
    if not on_policy:  # another loss type, or level, is another loss
        for other in LOSS_TYPES[:3]:
            # (the latter two differ over micro-batches)
            if other != loss_type and (other, loss_type) != ("bnpo", "dapo"):
                assert (
                    abs(
                        restated(
                            device,
                            p,
                            beta=beta,
                            loss_type=other,
                            level=level,
                            longest=11,
                            low=0.1,
                            high=0.15,
                        )[0]
                        - got[0]
                    )
                    > 1e-3
                )


def test_grpo_counts_every_sequence(device):
    """A sequence without tokens counts in the means over sequences, as in Liger, whatever
    token_weights would make of it."""
    p = problem(device)
    without = {
        name: t if name in ("lin_weight", "bias") else t[[0, 2, 3, 4, 5]] for name, t in p.items()
    }
    close(ours(p, loss_type="grpo")[0] * 6, ours(without, loss_type="grpo")[0] * 5)


@pytest.mark.parametrize(
    "loss_type, level, delta",
    [
        ("grpo", "token", None),
        ("dapo", "sequence", 1.2),
        ("bnpo", "sequence", None),
        ("dr_grpo", "token", 1.05),
        ("sapo", "token", None),
        ("cispo", "token", None),
    ],
)
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("on_policy", [False, True])
def test_grpo_of_log_probabilities(loss_type, level, delta, corrected, on_policy, device):
    """Delta of sequences and below 1 + epsilon_high, and a KL that the ratio corrects; with and
    without the sampler's ratios."""
    p = problem(device)
    if on_policy:
        p["old_per_token_logps"] = None
    options = {"beta": 0.1, "loss_type": loss_type, "delta": delta}
    for ratio in (None, 0.5 + rand(device, 6, 7, seed=11).abs()):
        p["vllm_is_ratio"] = ratio
        got = ours(
            p,
            **options,
            importance_sampling_level=level,
            use_bias_correction_kl=corrected,
            max_completion_length=9,
            epsilon_high=0.3,
        )
        want = restated(device, p, **options, level=level, corrected=corrected, longest=9, high=0.3)
        same(got, want)
    if not on_policy:
        other = restated(
            device, p, **options, level=level, corrected=not corrected, longest=9, high=0.3
        )
        assert abs(other[0] - got[0]) > 1e-5


def test_grpo_two_sided_clip(device):
    p = problem(device)
    p["old_per_token_logps"] -= 0.5
    got = ours(p, delta=1.5, epsilon_high=0.3)
    same(got, restated(device, p, delta=1.5, high=0.3))
    assert abs(got[0] - ours(p, epsilon_high=0.3)[0]) > 1e-3
    same(ours(p, delta=1.3, epsilon_high=0.3), restated(device, p, delta=1.3, high=0.3))


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 7)])
def test_grpo_importance_ratio(shape, device):
    p = problem(device) | {"vllm_is_ratio": rand(device, *shape, seed=9).exp()}
    for loss_type, level in (("grpo", "token"), ("dapo", "sequence"), ("sapo", "token")):
        same(
            ours(p, loss_type=loss_type, importance_sampling_level=level),
            restated(device, p, loss_type=loss_type, level=level),
        )


def test_grpo_reference_model(device):
    p = problem(device)
    mask = p["attention_mask"] == 1
    reference = {
        "ref_input": rand(device, 6, 7, 3, seed=20),
        "ref_weight": rand(device, 40, 3, seed=21),
        "ref_bias": rand(device, 40, seed=22),
    }
    ref_logp = logp_of(
        *(t.double() for t in reference.values()),
        torch.where(mask, p["selected_token_ids"], 0),
        0.8,
    ).float()
    reference["ref_input"][~mask] = torch.nan
    scored = ours(p | reference | {"ref_per_token_logps": None}, beta=0.1)
    same(scored, restated(device, p | {"ref_per_token_logps": ref_logp}, beta=0.1))
    # the log-probabilities come first
    same(ours(p | reference, beta=0.1), restated(device, p, beta=0.1))
    without = ours(p, beta=0.1, use_ref_model=False)
    assert without[1][0] == 0
    same(without, restated(device, p | {"ref_per_token_logps": None}, beta=0.1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grpo_low_precision(dtype, device):
    p = problem(device, dtype=dtype)
    got = ours(p, beta=0.1)
    assert got[0].dtype == torch.float32
    assert [grad.dtype for grad in got[2]] == [dtype] * 3
    same(got, restated(device, p, beta=0.1), rtol=torch.finfo(dtype).eps, atol=2e-4)
    # a head of another dtype: its gradient has that dtype
    mixed = ours(p | {"lin_weight": p["lin_weight"].float()}, beta=0.1)
    assert mixed[2][1].dtype == torch.float32
    assert torch.equal(mixed[0], got[0])


def test_grpo_float64_and_upstream_gradient(device):
    p = {name: t.double() if t.is_floating_point() else t for name, t in problem(device).items()}
    same(ours(p), restated(device, p), rtol=1e-12, atol=1e-12)
    leaf = p["lin_weight"].requires_grad_()
    loss, _ = LigerFusedLinearGRPOLoss(temperature=0.8)(**p)
    (unit,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(-3 * loss, leaf)[0], -3 * unit)


@pytest.mark.parametrize("items", [50, "tensor", None])
def test_dapo_normalises_over_ranks(monkeypatch, items, device):
    p = problem(device) | {
        "num_items_in_batch": torch.tensor(50, device=device) if items == "tensor" else items
    }
    tokens = int(p["attention_mask"].sum())
    if items is not None:
        same(ours(p), restated(device, p, items=50))
    for name, fake in {
        "is_initialized": lambda: True,
        "get_world_size": lambda: 2,
        "all_reduce": lambda t: t.add_(tokens + 6),
    }.items():
        monkeypatch.setattr(torch.distributed, name, fake)
    same(ours(p), restated(device, p, items=25 if items is not None else (2 * tokens + 6) / 2))


def test_grpo_nothing_unmasked(device):
    p = problem(device)
    p["attention_mask"] = torch.zeros_like(p["attention_mask"])
    for loss_type in LOSS_TYPES:
        for old in (None, p["old_per_token_logps"]):
            loss, metrics, grads = ours(
                p | {"old_per_token_logps": old}, loss_type=loss_type, max_completion_length=3
            )
            assert loss == 0
            assert not metrics.any()
            assert not any(grad.any() for grad in grads)


def test_grpo_refuses_what_it_cannot_express(device):
    for options, message in (
        (
            {"loss_type": "luspo"},
            "expected loss_type to be one of grpo, bnpo, dr_grpo, dapo, sapo, cispo, got 'luspo'",
        ),
        ({"loss_type": "vespo"}, "got 'vespo'"),
        ({"importance_sampling_level": "word"}, "expected importance_sampling_level to be token"),
        (
            {"importance_sampling_level": "sequence", "loss_type": "sapo"},
            "a loss_type other than sapo and cispo",
        ),
        (
            {"loss_type": "dr_grpo"},
            "expected max_completion_length >= 1 with loss_type dr_grpo, got None",
        ),
        ({"epsilon_low": -0.1}, "clip_low"),
        ({"loss_type": "sapo", "sapo_temperature_neg": 0.0}, "tau_negative"),
    ):
        with pytest.raises(ValueError, match=message):
            LigerFusedLinearGRPOLoss(**options)
    p = problem(device)
    with pytest.raises(
        ValueError,
        match="expected ref_per_token_logps, or ref_input and ref_weight, with use_ref_model=True",
    ):
        LigerFusedLinearGRPOLoss()(**p | {"ref_per_token_logps": None})
    with pytest.raises(ValueError, match="advantages does not fit its pattern"):
        LigerFusedLinearGRPOLoss()(**p | {"advantages": p["advantages"][:2]})
    with pytest.raises(ValueError, match="vllm_is_ratio does not fit its pattern"):
        LigerFusedLinearGRPOLoss()(**p | {"vllm_is_ratio": torch.ones(6, 3, device=device)})


# ---- trl -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "index_shape", [(3, 4), (3, 4, 1), (3, 4, 5), (9,), (9, 3), (0,), (0, 2)], ids=str
)
@pytest.mark.parametrize("masked", [False, True])
def test_selective_log_softmax(dtype, index_shape, masked, device):
    leading = index_shape[:2] if index_shape[0] == 3 else index_shape[:1]
    V, several = 300, len(index_shape) > len(leading)
    # Rows of many likely tokens, and rows of one: what cancels at the likeliest token cancels most
    # in the first.
    logits = (
        rand(device, *leading, V) * torch.linspace(0.01, 8, V if not several else 1, device=device)
    ).to(dtype)
    index, g = randint(device, V, *index_shape), rand(device, *index_shape, seed=3)
    if several and index.numel():
        index[..., 0] = logits.argmax(-1)
        index[..., -1] = index[..., 0]
    mask = (randint(device, 3, *index_shape, seed=4) > 0).long() if masked else None
    leaf = logits.clone().requires_grad_()
    got = selective_log_softmax(leaf, index, 0.7, mask)
    (grad,) = torch.autograd.grad((got * g).sum(), leaf)

    z = logits.double().requires_grad_()
    want = (z / 0.7).log_softmax(-1).gather(-1, index if several else index[..., None])
    want = want if several else want[..., 0]
    want = want if mask is None else want * mask
    (want_grad,) = torch.autograd.grad((want * g).sum(), z)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert got.shape == index.shape
    assert (
        (got.double() - want).abs() <= 16 * torch.finfo(got.dtype).eps * want.abs().clamp(min=1)
    ).all()
    assert grad.dtype == dtype
    ulp = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    assert ((grad.double() - want_grad).abs() <= ulp * want_grad.abs() + 3e-6).all()
    with torch.no_grad():
        close(
            selective_log_softmax(logits, index.int(), 0.7, mask),
            got.detach(),
            rtol=1e-6,
            atol=1e-6,
        )


def test_selective_log_softmax_masked_rows_and_infinite_logits(device):
    logits, index = rand(device, 4, 9), randint(device, 9, 4, 3)
    logits[1], logits[2, 5] = torch.nan, -torch.inf
    index[2] = torch.tensor([5, 0, 1], device=device)
    mask = torch.ones(4, 3, device=device)
    mask[1] = 0
    for picks, keep in ((index, mask), (index[:, 0], mask[:, 0])):
        leaf = logits.clone().requires_grad_()
        got = selective_log_softmax(leaf, picks, row_mask=keep)
        assert (got[1] == 0).all()
        assert got[2].flatten()[0] == -torch.inf
        (grad,) = torch.autograd.grad(got[[0, 1, 3]].sum(), leaf)
        assert not grad.isnan().any()
        assert not grad[1].any()
        want = (
            logits[[0, 3]]
            .log_softmax(-1)
            .gather(-1, picks[[0, 3]].view(2, -1))
            .view(got[[0, 3]].shape)
        )
        close(got[[0, 3]].detach(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 4), (9,), (0,), ()], ids=str)
def test_entropy_from_logits(dtype, shape, device):
    logits, h = (3 * rand(device, *shape, 70)).to(dtype), rand(device, *shape, seed=1)
    leaf, z = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got, logp = entropy_from_logits(leaf, chunk_size=2), z.log_softmax(-1)
    want = -(logp.exp() * logp).sum(-1)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert got.shape == shape
    close(got, want, rtol=0, atol=1e-5)
    (grad,), (want_grad,) = (
        torch.autograd.grad((x * h).sum(), of) for x, of in ((got, leaf), (want, z))
    )
    close(grad, want_grad, rtol=2.0**-8 if dtype == torch.bfloat16 else 1e-5, atol=5e-6)
    if shape:
        missing = logits.clone()
        missing[..., 0] = -torch.inf
        rest = logits.double()[..., 1:].log_softmax(-1)
        close(entropy_from_logits(missing), -(rest.exp() * rest).sum(-1), rtol=0, atol=1e-5)


@pytest.mark.cpu_only("values are read on the host, or an implementation is named, on a CPU alone")
def test_trl_refusals(device):
    with pytest.raises(ValueError, match="index does not fit its pattern"):
        selective_log_softmax(rand(device, 3, 9), randint(device, 9, 4))
    with pytest.raises(ValueError, match="row_mask does not fit its pattern"):
        selective_log_softmax(
            rand(device, 3, 9), randint(device, 9, 3, 2), row_mask=torch.ones(3, device=device)
        )
    with pytest.raises(ValueError, match="temperature above 0"):
        selective_log_softmax(rand(device, 3, 9), randint(device, 9, 3, 2), 0.0)
    with pytest.raises(IndexError, match="expected token ids"):
        selective_log_softmax(rand(device, 3, 9), randint(device, 9, 3) + 9)


def test_results_in_the_dtype_of_the_inputs(device):
    logits, index = rand(device, 3, 9, dtype=torch.bfloat16), randint(device, 9, 3)
    hidden, weight = (rand(device, n, 16, dtype=torch.bfloat16) for n in (3, 9))
    for plain, rounded in (
        (
            selective_log_softmax(logits, index),
            selective_log_softmax(logits, index, like_inputs=True),
        ),
        (
            selective_log_softmax(logits, index[:, None]),
            selective_log_softmax(logits, index[:, None], like_inputs=True),
        ),
        (entropy_from_logits(logits), entropy_from_logits(logits, like_inputs=True)),
        (
            FusedLinearForPPO()(hidden, weight, index)[0],
            FusedLinearForPPO(like_inputs=True)(hidden, weight, index)[0],
        ),
    ):
        assert (plain.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(plain.to(torch.bfloat16), rounded)


# ---- all -----------------------------------------------------------------------------------------
def test_signatures():
    """As of verl 0.9, liger-kernel 0.8 and trl 1.16."""
    assert {
        f.__qualname__: [name for name in inspect.signature(f).parameters if name != "self"]
        for f in (
            FusedLinearForPPO.__init__,
            FusedLinearForPPO.forward,
            LigerFusedLinearGRPOLoss.__init__,
            LigerFusedLinearGRPOLoss.forward,
            selective_log_softmax,
            entropy_from_logits,
        )
    } == {
        "FusedLinearForPPO.__init__": ["chunk_size", "impl_backend", "like_inputs"],
        "FusedLinearForPPO.forward": ["hidden_states", "vocab_weights", "input_ids", "temperature"],
        "LigerFusedLinearGRPOLoss.__init__": [
            "beta",
            "compiled",
            "use_ref_model",
            "chunk_size",
            "epsilon_low",
            "epsilon_high",
            "loss_type",
            "max_completion_length",
            "importance_sampling_level",
            "sapo_temperature_pos",
            "sapo_temperature_neg",
            "temperature",
            "delta",
            "use_bias_correction_kl",
            "vespo_k_pos",
            "vespo_lambda_pos",
            "vespo_k_neg",
            "vespo_lambda_neg",
        ],
        "LigerFusedLinearGRPOLoss.forward": [
            "_input",
            "lin_weight",
            "selected_token_ids",
            "attention_mask",
            "advantages",
            "bias",
            "ref_per_token_logps",
            "old_per_token_logps",
            "ref_input",
            "ref_weight",
            "ref_bias",
            "vllm_is_ratio",
            "num_items_in_batch",
        ],
        "selective_log_softmax": ["logits", "index", "temperature", "row_mask", "like_inputs"],
        "entropy_from_logits": ["logits", "chunk_size", "like_inputs"],
    }


@pytest.mark.parametrize("name", ["ppo", "grpo", "selective", "several"])
def test_compiles_as_one_graph(name, device):
    p, logits, index = problem(device), rand(device, 3, 9), randint(device, 9, 3)
    grpo = LigerFusedLinearGRPOLoss(beta=0.1)
    function, leaf = {
        "ppo": (
            lambda w: FusedLinearForPPO()(p["_input"][2], w, p["selected_token_ids"][2])[0].sum(),
            p["lin_weight"],
        ),
        "grpo": (lambda w: grpo(**p | {"lin_weight": w})[0], p["lin_weight"]),
        "selective": (
            lambda z: selective_log_softmax(z, index).sum() + entropy_from_logits(z).sum(),
            logits,
        ),
        "several": (lambda z: selective_log_softmax(z, index[:, None]).sum(), logits),
    }[name]
    outcomes = []
    for each in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        x = leaf.clone().requires_grad_()
        value = each(x)
        outcomes.append((value.detach(), *torch.autograd.grad(value, x)))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
