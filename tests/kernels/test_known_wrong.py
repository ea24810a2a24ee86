"""Variants that are wrong in ways that have been shipped, put through the checkers of the grid:
each must be refused, by the output that it spoils.

A checker that lets one of these pass would not notice if an implementation became it.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from fusedrl.engine.tools.verify.catalogue import CATALOGUE
from fusedrl.engine.tools.verify.grid import judge, oracle, run
from fusedrl.kernels import full_kl, logprob, policy_loss, ranking_loss

pytestmark = pytest.mark.cpu_only("the checkers are tried, not an implementation")


# ---- logprob -------------------------------------------------------------------------------------
def softmax_row(
    z, ids, T, shift_first=True, shifted_entropy=True, phantom=0, narrow=None, double=False
):
    """log p of the ids and the entropy, in float32, with the steps that a fused kernel takes. Every
    argument but z, ids and T is a mistake."""
    z = z.float()
    top = z.detach().amax(-1, keepdim=True)
    if phantom:  # columns beyond V, read as 0
        z = F.pad(z, (0, phantom))
        top = torch.maximum(top, torch.zeros_like(top))
    d = (z - top) / T if shift_first else z / T - top / T
    e = d.exp()
    S = e.sum(-1)
    if shifted_entropy:
        entropy = S.log() - (e * d.masked_fill(e == 0, 0.0)).sum(-1) / S
    else:
        entropy = S.log() + top[:, 0] / T - (e * (z / T).masked_fill(e == 0, 0.0)).sum(-1) / S
    logp = d.gather(-1, ids[:, None])[:, 0] - S.log()
    return {
        "logp": logp if narrow is None else logp.to(narrow).float(),
        "entropy": entropy if narrow is None else entropy.to(narrow).float(),
    }


def row(**mistake):
    return lambda x, s, impl: softmax_row(x["logits"], x["token_ids"], s["temperature"], **mistake)


def log_of_softmax(x, s, impl):
    p = (x["logits"].float() / s["temperature"]).softmax(-1)
    return {
        "logp": p.gather(-1, x["token_ids"][:, None])[:, 0].log(),
        "entropy": -(p * p.clamp(min=1e-9).log()).sum(-1),
    }


def biased_gradient(x, s, impl):
    """The label's logit is left out of the softmax's gradient."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z, ids):
            ctx.save_for_backward(z, ids)
            return logprob.logprob_reference(z, ids)

        @staticmethod
        def backward(ctx, g, h):
            z, ids = ctx.saved_tensors
            one = F.one_hot(ids, z.shape[-1])
            return g[:, None] * (one - (1 - one) * z.softmax(-1)), None

    return dict(zip(("logp", "entropy"), Wrong.apply(x["logits"], x["token_ids"]), strict=True))


def multiplied_mask(x, s, impl):
    """An ignored row times 0."""
    live = (x["token_ids"] != -100).float()
    logp, entropy = logprob.logprob_reference(
        x["logits"], x["token_ids"].clamp(min=0), s["temperature"]
    )
    return {"logp": logp * live, "entropy": entropy * live}


def one_ulp_less(x, s, impl):
    """The gradient truncated to bfloat16 twice over: two ulp."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * (1 + 2.0**-6)

    return CATALOGUE["logprob"].forward(x | {"logits": Wrong.apply(x["logits"])}, s, "torch")


# ---- losses --------------------------------------------------------------------------------------
def policy(change):
    """The policy loss in torch with one thing changed: `change` takes (x, settings) and gives
    others."""
    return lambda x, s, impl: CATALOGUE["policy_loss"].forward(*change(dict(x), dict(s)), "torch")


def no_dual_clip(x, s):
    return x, s | {"objective": policy_loss.PolicyObjective(clip_low=0.2, clip_high=0.28)}


def k3_gradient_of_the_other_sign(x, s):
    return x | {"ref_logp": (2 * x["logp"] - x["ref_logp"]).detach()}, s


def clip_by_the_advantage_of_the_batch(x, s):
    live = x["weights"] != 0
    return x | {
        "advantages": torch.where(live, x["advantages"] - x["advantages"][live].mean(), math.nan)
    }, s


def narrow_log_ratio(x, s):
    return x | {
        "logp": x["logp"]
        + ((x["logp"] - x["old_logp"]).bfloat16().float() - (x["logp"] - x["old_logp"])).detach()
    }, s


def masked_by_multiplication(x, s, impl):
    """Weights of 0 and nothing else."""
    ratio = (x["logp"] - x["old_logp"]).exp()
    loss = (
        x["weights"]
        * torch.maximum(-x["advantages"] * ratio, -x["advantages"] * ratio.clamp(0.8, 1.2))
    ).sum()
    return CATALOGUE["policy_loss"].forward(x, s, "torch") | {"loss": loss}


def clip_on_the_optimistic_side(x, s, impl):
    live = x["weights"] != 0
    logp, old, A = (torch.where(live, x[name], 0) for name in ("logp", "old_logp", "advantages"))
    ratio = (logp - old).exp()
    got = CATALOGUE["policy_loss"].forward(x, s, "torch")
    return got | {
        "loss": (x["weights"] * torch.minimum(-A * ratio, -A * ratio.clamp(0.8, 1.2))).sum()
    }


def value_clip_takes_the_smaller(x, s, impl):
    live = x["weights"] != 0
    v, old, R = (torch.where(live, x[name], 0) for name in ("values", "old_values", "returns"))
    clipped = old + (v - old).clamp(-s["clip"], s["clip"])
    got = CATALOGUE["value_loss"].forward(x, s, "torch")
    return got | {
        "loss": (x["weights"] * torch.minimum((v - R) ** 2, (clipped - R) ** 2)).sum() / 2
    }


def naive_explained_variance(x, s, impl):
    live = x["weights"] != 0
    v, R = x["values"].detach()[live], x["returns"][live]
    variance = lambda t: (t * t).mean() - t.mean() ** 2  # noqa: E731
    return CATALOGUE["value_loss"].forward(x, s, "torch") | {
        "0.explained_variance": 1 - variance(R - v) / variance(R)
    }


# ---- advantages ----------------------------------------------------------------------------------
def shifted_bootstrap(x, s, impl):
    """The value behind the last token is taken for the one before it: a loop that starts at T -
    2."""
    x = dict(x, rewards=x["rewards"].clone())
    for b, end in enumerate(x["cu_seqlens"][1:].tolist()):
        start = int(x["cu_seqlens"][b])
        if end > start:
            x["rewards"][end - 1] -= s["gamma"] * x["last_values"][b]
    return CATALOGUE["gae"].forward(x, s, "torch")


def gap_breaks_the_recurrence(x, s, impl):
    """A masked token ends the episode."""
    starts = torch.cat(
        [
            torch.zeros(1, dtype=torch.int64),
            (~x["mask"]).nonzero()[:, 0] + 1,
            x["cu_seqlens"].long(),
        ]
    ).unique()
    last = torch.zeros(len(starts) - 1)
    last[torch.searchsorted(starts[1:], x["cu_seqlens"][1:].long())] = x["last_values"]
    return CATALOGUE["gae"].forward(
        x | {"cu_seqlens": starts.int(), "last_values": last}, s, "torch"
    )


def sequences_run_together(x, s, impl):
    return CATALOGUE["gae"].forward(
        x | {"cu_seqlens": x["cu_seqlens"][[0, -1]], "last_values": x["last_values"][-1:]},
        s,
        "torch",
    )


def lambda_for_gamma(x, s, impl):
    return CATALOGUE["gae"].forward(x, s | {"gamma": s["lam"], "lam": s["gamma"]}, "torch")


def returns_after_whitening(x, s, impl):
    got = CATALOGUE["shaped_gae"].forward(x, s, "torch")
    return got | {"returns": torch.where(x["mask"], got["advantages"] + x["values"].float(), 0)}


def score_at_the_last_slot(x, s, impl):
    """Of the sequence, masked or not."""
    rewards = torch.where(x["mask"], -0.2 * (x["logp"] - x["ref_logp"]), 0)
    rewards[x["cu_seqlens"][1:].long() - 1] += x["scores"]
    return CATALOGUE["shaped_gae"].forward(x, s, "torch") | {
        "rewards": torch.where(x["mask"], rewards, 0)
    }


def squares_minus_square(x, s, impl):
    live = x["mask"]
    values = x["x"][live].float()
    variance = (values * values).mean() - values.mean() ** 2
    return {
        "whitened": torch.where(live, (x["x"] - values.mean()) * torch.rsqrt(variance + 1e-8), 0)
    }


def mean_of_all_slots(x, s, impl):
    values = torch.where(x["mask"], x["x"], 0)
    return {
        "whitened": torch.where(
            x["mask"], (values - values.mean()) * torch.rsqrt(values.var(correction=0) + 1e-8), 0
        )
    }


def eps_outside_the_root(x, s, impl):
    values = x["x"][x["mask"]]
    return {
        "whitened": torch.where(
            x["mask"], (x["x"] - values.mean()) / (values.std(correction=0) + 1e-4), 0
        )
    }


def rloo_with_itself(x, s, impl):
    return CATALOGUE["group_normalize"].forward(x, s | {"method": "dr_grpo"}, "torch")


# ---- KL, ranking, sampling, layers ---------------------------------------------------------------
def naive_k3(x, s, impl):
    d = x["ref_logp"] - x["logp"]
    return {"kl": d.exp() - 1 - d}


def kl_the_other_way(x, s, impl):
    return {
        "kl": full_kl.full_kl(
            x["logits"],
            x["ref_logits"],
            direction="forward",
            temperature=s["temperature"],
            impl="torch",
        )
    }


def unshifted_kl(x, s, impl):
    p, z, r = x["logits"].softmax(-1), x["logits"], x["ref_logits"]
    return {"kl": (p * (z - r)).sum(-1) - (z.logsumexp(-1) - r.logsumexp(-1))}


def narrow_head(x, s, impl):
    x = x | {"hidden": x["hidden"].bfloat16().float(), "weight": x["weight"].bfloat16().float()}
    return CATALOGUE["linear_logprob"].forward(x, s, "torch")


def softcap_after_temperature(x, s, impl):
    hidden = x["hidden"].masked_fill((x["token_ids"] == -100)[:, None], 0.0)
    z = s["softcap"] * torch.tanh(hidden @ x["weight"].t() / s["temperature"] / s["softcap"])
    return dict(zip(("logp", "entropy"), logprob.logprob_reference(z, x["token_ids"]), strict=True))


def ties_form_pairs(x, s, impl):
    ranks = x["ranks"].double() + torch.arange(len(x["ranks"])) * 1e-6
    return {"loss": ranking_loss.kwise_ranking_loss_reference(x["scores"], ranks, x["cu_groups"])}


def pairs_weighted_alike(x, s, impl):
    group = torch.searchsorted(x["cu_groups"][1:], torch.arange(len(x["scores"])), right=True)
    pair = (group[:, None] == group) & (x["ranks"][:, None] < x["ranks"])
    return {"loss": F.softplus(-(x["scores"][:, None] - x["scores"]))[pair].mean()}


def naive_log_sigmoid(x, s, impl):
    return {"loss": -torch.sigmoid(x["chosen"] - x["rejected"] - x["margin"]).log().mean()}


def logp_of_the_kept(x, s, impl):
    drawn = CATALOGUE["sample"].forward(x, s, "torch")
    return drawn | {"logp": drawn["logp_processed"]}


def no_top_k(x, s, impl):
    return CATALOGUE["sample"].forward(
        x, {name: value for name, value in s.items() if name != "top_k"}, "torch"
    )


def variance_for_mean_square(x, s, impl):
    return {
        "y": x["weight"]
        * x["x"]
        * torch.rsqrt(x["x"].var(-1, correction=0, keepdim=True) + s["eps"])
    }


# (op, the case that shows it, the variant, what must be refused)
DUAL = {
    "N": 127,
    "objective": "dual",
    "apart": 40.0,
    "mask": "random",
    "kl": {},
    "correction": None,
    "entropy_coef": 0.0,
}
CLIP = DUAL | {"objective": "clip", "apart": 0.5}
KL3 = CLIP | {"kl": {"kl_coef": 0.1}}
LIVE = {"shape": ("packed", (5, 0, 17, 11)), "mask": "all"}
WRONG = {
    "unshifted entropy": ("logprob", {"logits": "+1e4"}, row(shifted_entropy=False), {"entropy"}),
    "divide before subtract": (
        "logprob",
        {"logits": "+1e4", "temperature": 0.7},
        row(shift_first=False),
        {"logp"},
    ),
    "phantom columns": (
        "logprob",
        {"logits": "about -200", "V": 31},
        row(phantom=1),
        {"logp", "entropy"},
    ),
    "bf16-rounded output": ("logprob", {}, row(narrow=torch.bfloat16), {"logp", "entropy"}),
    "log of a softmax": ("logprob", {"logits": "sd 100"}, log_of_softmax, {"logp"}),
    "masked NaN leaking": ("logprob", {"labels": "-100"}, multiplied_mask, {"logp", "entropy"}),
    "gradient without the label": ("logprob", {}, biased_gradient, {"d logits"}),
    "gradient off by two ulp": ("logprob", {"dtype": torch.bfloat16}, one_ulp_less, {"d logits"}),
    "dual clip ignored": ("policy_loss", DUAL, policy(no_dual_clip), {"loss", "d logp"}),
    "masked NaN leaking into a loss": ("policy_loss", CLIP, masked_by_multiplication, {"loss"}),
    "k3's gradient of the other sign": (
        "policy_loss",
        KL3,
        policy(k3_gradient_of_the_other_sign),
        {"loss", "d logp"},
    ),
    "advantages centred again": (
        "policy_loss",
        CLIP,
        policy(clip_by_the_advantage_of_the_batch),
        {"loss", "d logp"},
    ),
    "a log ratio in bf16": ("policy_loss", CLIP, policy(narrow_log_ratio), {"0.ratio_mean"}),
    "clip on the optimistic side": ("policy_loss", CLIP, clip_on_the_optimistic_side, {"loss"}),
    "value clip takes the smaller error": (
        "value_loss",
        {"N": 127, "clip": 0.2},
        value_clip_takes_the_smaller,
        {"loss"},
    ),
    "explained variance by E[x^2] - E[x]^2": (
        "value_loss",
        {"N": 127, "offset": 1e3},
        naive_explained_variance,
        {"0.explained_variance"},
    ),
    "bootstrap off by one": ("gae", LIVE, shifted_bootstrap, {"advantages", "returns"}),
    "a gap ends the episode": (
        "gae",
        LIVE | {"mask": "random"},
        gap_breaks_the_recurrence,
        {"advantages"},
    ),
    "sequences run together": ("gae", LIVE, sequences_run_together, {"advantages"}),
    "gamma and lambda exchanged": ("gae", LIVE, lambda_for_gamma, {"advantages"}),
    "returns of whitened advantages": ("shaped_gae", LIVE, returns_after_whitening, {"returns"}),
    "score at the last slot, masked or not": (
        "shaped_gae",
        {"shape": ("packed", (5, 17, 11)), "mask": "first"},
        score_at_the_last_slot,
        {"rewards"},
    ),
    "whitening by E[x^2] - E[x]^2": (
        "masked_whiten",
        {"N": 4096, "offset": 1e4, "mask": "random"},
        squares_minus_square,
        {"whitened"},
    ),
    "mean over masked slots": ("masked_whiten", {"offset": 1e4}, mean_of_all_slots, {"whitened"}),
    "eps outside the root": ("masked_whiten", {}, eps_outside_the_root, {"whitened"}),
    "leave-one-out with itself": (
        "group_normalize",
        {"groups": 4, "method": "rloo"},
        rloo_with_itself,
        {"advantages"},
    ),
    "k3 without the clamp": ("token_kl", {"N": 4096, "apart": 40.0}, naive_k3, {"kl"}),
    "KL the other way": ("full_kl", {}, kl_the_other_way, {"kl", "d logits"}),
    "KL of unshifted logits": ("full_kl", {"logits": "+1e4", "V": 1025}, unshifted_kl, {"kl"}),
    "bf16 products": ("linear_logprob", {"H": 300, "V": 1023}, narrow_head, {"logp"}),
    "softcap after the temperature": (
        "linear_logprob",
        {"softcap": 3.0, "temperature": 0.7},
        softcap_after_temperature,
        {"logp", "entropy"},
    ),
    "ties form pairs": ("kwise_ranking_loss", {"ranks": "ties"}, ties_form_pairs, {"loss"}),
    "pairs weighted alike": ("kwise_ranking_loss", {}, pairs_weighted_alike, {"loss"}),
    "log of a sigmoid": ("pairwise_ranking_loss", {"size": 1e4}, naive_log_sigmoid, {"loss"}),
    "logp of the kept set": (
        "sample",
        {"setting": {"temperature": 0.7, "top_k": 5}},
        logp_of_the_kept,
        {"logp"},
    ),
    "top-k left out": (
        "sample",
        {"V": 1023, "setting": {"temperature": 0.9, "top_k": 40, "top_p": 0.9}},
        no_top_k,
        {"kept_count"},
    ),
    "variance for the mean square": (
        "rms_norm",
        {"offset": 100.0, "residual": False},
        variance_for_mean_square,
        {"y"},
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_is_refused(name):
    op, case, variant, spoilt = WRONG[name]
    entry = CATALOGUE[op]
    problem = entry.problem(entry.plain(**case))
    want = oracle(entry, problem)
    right = judge(entry, problem, run(entry, problem, "torch"), want, exact=False)
    assert all(value <= 1 for value in right.values()), f"the right one is refused too: {right}"
    got = run(entry, problem, None, variant)
    worst = judge(
        entry,
        problem,
        {name: got.get(name, expected) for name, expected in run(entry, problem, "torch").items()},
        want,
        exact=False,
    )
    assert spoilt <= {output for output, value in worst.items() if not value <= 1}, worst
