"""The update does not depend on how a step's batch is cut, ordered or accompanied, for every row of
ALGORITHMS: gradients of a table of log-probabilities against those of the whole, to 1e-12 of the
largest entry in float64 and 1e-5 in float32; and variants that would depend on it do not pass.
"""

from dataclasses import replace

import pytest
import torch

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import GenerationConfig, KLConfig, LossConfig, PolicyConfig
from fusedrl.engine.config.algorithms import ADVANTAGES, ALGORITHMS
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.heads import ValueHead
from fusedrl.engine.policy.advantages import Signals, estimate
from fusedrl.engine.policy.chosen import of_chosen_tokens
from fusedrl.engine.policy.objectives import make_objective, minibatch_weights, objective_loss
from fusedrl.kernels.runtime.dispatch import use_impl

KLS = {
    "row": None,
    "reward": KLConfig(coef=0.3, placement="reward"),
    "k3": KLConfig(coef=0.3, placement="loss", estimator="k3"),
    "sequence": KLConfig(coef=0.3, level="sequence"),
    "full": KLConfig(coef=0.3, level="future", estimator="full"),
}
LOSSES = {
    "lambdas": dict(lam_critic=1.0, lam_alpha=0.4, bootstrap_truncated=True),
    "held": dict(kl_cov_ratio=0.3, kl_cov_coef=2.0),
}
GROUPS = [7, 7, 7, 3, 3, 9, 9, 5, 5, 5, 5, 2, 2]
SPLITS = (
    [[b] for b in range(13)],
    [[9, 0, 4], [1, 2, 12], [3, 5, 6, 7, 8], [11, 10]],
    [list(reversed(range(13)))],
)
NAMES = ("old_logp", "ref_logp", "values", "logp", "entropy", "now", "full")


def problem(device, dtype, seed=0, bootstrap=False):
    """A rollout of lengths 1 to 7 with holes in the masks, NaN there, and what policy and critic
    say of its tokens now."""
    rng = torch.Generator().manual_seed(seed)
    lengths = [int(torch.randint(1, 8, (), generator=rng).item()) for _ in GROUPS]
    batch = PackedBatch.from_sequences([([1, 2], [3] * n) for n in lengths], device=device)
    mask = batch.action_mask.clone()
    for start, n in zip(batch.cu_seqlens.tolist(), lengths, strict=False):
        if n >= 5:
            mask[start + 4] = False
    raw = {
        name: torch.randn(batch.num_tokens, generator=rng, dtype=torch.float64).to(device)
        for name in NAMES
    }
    raw["ref_logp"], raw["logp"] = (
        raw["old_logp"] + 0.3 * raw["ref_logp"],
        raw["old_logp"] + 0.15 * raw["logp"],
    )
    raw["full"], raw["entropy"] = raw["full"].abs(), raw["entropy"].abs()
    columns = {name: torch.where(mask, x, torch.nan).to(dtype) for name, x in raw.items()}
    scores, greedy = (
        torch.randn(len(GROUPS), generator=rng, dtype=torch.float64).to(dtype) for _ in range(2)
    )
    groups = torch.tensor(GROUPS, device=device)
    batch = replace(batch, action_mask=mask).with_columns(
        scores=scores,
        greedy_scores=greedy[(groups[:, None] == groups).double().argmax(1)],
        cut_off=groups == 5 if bootstrap else None,
        last_values=torch.where(groups == 5, scores, 0) if bootstrap else None,
        group_ids=groups,
        **{name: columns[name] for name in NAMES[:3]},
    )
    now = {name: torch.where(mask, columns[name], 0) for name in NAMES[3:]}
    return batch, now


def config_of(algorithm, kl):
    chosen = KLS.get(kl) or KLConfig()
    return PolicyConfig(
        "m",
        "d",
        ("r.py:f",),
        algorithm,
        kl=chosen,
        loss=LossConfig(entropy_coef=0.02, **LOSSES.get(kl, {})),
        generation=GenerationConfig(max_new_tokens=8),
    )


def prepared(config, batch):
    """With advantages, returns and weights, of the whole."""
    batch = estimate(config, Signals.of(config, batch, config.kl.coef, 0.2))
    batch = of_chosen_tokens(config, batch, 0) if config.loss.chooses_tokens else batch
    weights = minibatch_weights(config, batch).to(batch.column("advantages").dtype)
    return batch.with_columns(weights=weights)


def gradient(config, batch, now, parts, change=lambda micro, whole, parts: micro):
    """[3, N] d loss / d (logp, entropy, values) of a batch cut into parts; `change` is what a
    faulty loop does with a micro-batch."""
    leaves = {name: now[name].clone().requires_grad_() for name in ("logp", "entropy", "now")}
    critic = ADVANTAGES[config.advantage] == "critic"
    objective = make_objective(config, 1.0)
    for part in parts:
        micro, slots = change(batch.select(part), batch, parts), batch.slots(part)
        full = now["full"][slots] if config.kl.estimator == "full" else None
        loss, _, _ = objective_loss(
            config,
            objective,
            config.kl.coef,
            micro,
            leaves["logp"][slots],
            leaves["entropy"][slots],
            leaves["now"][slots] if critic else None,
            full,
        )
        loss.backward()
    return torch.stack([torch.zeros_like(x) if x.grad is None else x.grad for x in leaves.values()])


def apart(found, right):
    return ((found - right).abs().max() / right.abs().max()).item()


CASES = [(name, "row") for name in ALGORITHMS] + [
    (name, kl) for name in ("rloo", "ppo", "gspo") for kl in KLS if kl != "row"
]
CASES += [("ppo", "lambdas"), ("grpo", "held")]


@pytest.mark.parametrize("algorithm, kl", CASES)
def test_any_split_gives_the_same_gradient(algorithm, kl, device):
    # Pitfall 12. float64 runs the definitions, float32 the kernels.
    config = config_of(algorithm, kl)
    for dtype, impl, tolerance in ((torch.float64, "torch", 1e-12), (torch.float32, None, 1e-5)):
        with use_impl(impl) if impl else torch.enable_grad():
            batch, now = problem(device, dtype, bootstrap=kl == "lambdas")
            batch = prepared(config, batch)
            whole = gradient(config, batch, now, [list(range(len(GROUPS)))])
            assert whole.isfinite().all()
            # the gradient of distill is that of the exact KL, which goes to the logits at once
            assert whole[0].abs().max() > 1e-3 or algorithm == "distill"
            assert not whole[:, ~batch.action_mask].any()
            for parts in SPLITS:
                assert apart(gradient(config, batch, now, parts), whole) <= tolerance


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_order_and_companions_change_nothing(algorithm, device):
    """A permuted batch has the permuted gradient. Other groups beside a group change its advantages
    only through whitening and gdpo's division (and the factor of gpg, where a group is flat)."""
    config = config_of(algorithm, "row")
    with use_impl("torch"):
        raw, now = problem(device, torch.float64)
        whole = prepared(config, raw)
        right = gradient(config, whole, now, [list(range(len(GROUPS)))])
        order = torch.randperm(len(GROUPS), generator=torch.Generator().manual_seed(2)).tolist()
        slots = raw.slots(order)
        shuffled = prepared(config, raw.select(order))
        found = gradient(
            config,
            shuffled,
            {name: x[slots] for name, x in now.items()},
            [list(range(len(GROUPS)))],
        )
        assert apart(found, right[:, slots]) <= 1e-12
        some = [b for b, group in enumerate(GROUPS) if group in (7, 5)]
        alone = prepared(config, raw.select(some))
        expected = whole.column("advantages")[raw.slots(some)]
        same = torch.allclose(alone.column("advantages"), expected, rtol=1e-12, atol=1e-12)
        assert same == (not config.loss.whiten and algorithm != "gdpo")
        assert torch.equal(alone.column("advantages") == 0, expected == 0)


# ---- what would depend on it ---------------------------------------------------------------------
def mean_of_each_micro_batch(micro, whole, parts):
    """The denominators of the micro-batch alone, and a mean over micro-batches: TRL #3021,
    transformers #34191."""
    live = micro.action_mask
    return micro.with_columns(
        weights=torch.where(live, 1.0 / (live.sum().clamp(min=1) * len(parts)), 0.0)
    )


def divided_by_their_number(micro, whole, parts):
    """The whole's denominators, and once more the number of micro-batches: TRL #5619, ms-swift
    #10117."""
    return micro.with_columns(weights=micro.weights / len(parts))


def whitened_in_each_micro_batch(micro, whole, parts):
    live = micro.action_mask
    values = micro.advantages[live]
    return micro.with_columns(
        advantages=torch.where(
            live, (micro.advantages - values.mean()) / (values.std(correction=0) + 1e-4), 0.0
        )
    )


@pytest.mark.parametrize(
    "faulty", [mean_of_each_micro_batch, divided_by_their_number, whitened_in_each_micro_batch]
)
@pytest.mark.parametrize("algorithm", ["ppo", "dapo"])
def test_known_wrong_loops_depend_on_the_split(algorithm, faulty, device):
    config = config_of(algorithm, "row")
    with use_impl("torch"):
        batch, now = problem(device, torch.float64)
        batch = prepared(config, batch)
        whole = gradient(config, batch, now, [list(range(len(GROUPS)))], faulty)
        assert (
            max(apart(gradient(config, batch, now, parts, faulty), whole) for parts in SPLITS)
            > 1e-2
        )


def test_the_mean_over_the_step_is_zero_where_advantages_are_white(device):
    """First-epoch invariant: at ratio 1 the policy loss of the whole step is - mean A = 0; that of
    a micro-batch is not, and must not be (TRL #3021)."""
    config = PolicyConfig(
        "m",
        "d",
        ("r.py:f",),
        "reinforce_pp",
        kl=KLConfig(coef=0.0),
        generation=GenerationConfig(max_new_tokens=8),
    )
    batch, _ = problem(device, torch.float32)
    batch = prepared(config, batch)
    objective, old = make_objective(config, 1.0), torch.where(batch.action_mask, batch.old_logp, 0)

    def loss(part):
        micro = batch.select(part)
        return objective_loss(config, objective, 0.0, micro, old[batch.slots(part)], None, None)

    total, stats, _ = loss(list(range(len(GROUPS))))
    assert abs(total.item()) < 1e-6
    assert (
        stats.ratio_min,
        stats.ratio_max,
        stats.approx_kl_k3,
        stats.clip_fraction_low + stats.clip_fraction_high,
    ) == (1.0, 1.0, 0.0, 0.0)
    parts = [loss(part)[0].item() for part in SPLITS[1]]
    assert sum(parts) == pytest.approx(total.item(), abs=1e-6)
    assert max(map(abs, parts)) > 1e-2


def test_inputs_are_left_as_they_were(device):
    """Pitfall 28: nothing writes into what it was given (DeepSpeed-Chat zeroes old values in place,
    verl's GRPO overwrote scores)."""
    for algorithm in ALGORITHMS:
        config = config_of(algorithm, "row")
        raw, now = problem(device, torch.float32)
        kept, _ = problem(device, torch.float32)
        batch = prepared(config, raw)
        whole = [list(range(len(GROUPS)))]
        first = gradient(config, batch, now, whole)
        assert torch.equal(gradient(config, batch, now, whole), first), algorithm
        for name in (
            "scores",
            "old_logp",
            "ref_logp",
            "values",
            "greedy_scores",
            "group_ids",
            "action_mask",
            "token_ids",
        ):
            assert torch.equal(
                getattr(raw, name).nan_to_num(77.0), getattr(kept, name).nan_to_num(77.0)
            ), (algorithm, name)


def test_a_loss_that_zeroes_the_old_values_is_caught(device):
    """The faulty variant of pitfall 28: the same check, on a function that masks in place."""
    raw, _ = problem(device, torch.float32)
    kept, _ = problem(device, torch.float32)
    raw.values.masked_fill_(~raw.action_mask, 0.0)
    assert not torch.equal(raw.values.nan_to_num(77.0), kept.values.nan_to_num(77.0))


# ---- through a model -----------------------------------------------------------------------------
SMALL = {
    "model_type": "qwen3",
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}


def gradients(actor, config, batch, parts):
    """Every parameter's, flat, of a step cut into these parts."""
    objective = make_objective(config, 1.0)
    for p in actor.parameters():
        p.grad = None
    for part in parts:
        micro = batch.select(part)
        hidden = actor.forward(micro)
        logp, entropy = actor.logprobs(micro, hidden)
        values = actor.values(micro, hidden) if ADVANTAGES[config.advantage] == "critic" else None
        objective_loss(config, objective, config.kl.coef, micro, logp, entropy, values)[
            0
        ].backward()
    return torch.cat([p.grad.flatten() for p in actor.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "dtype, impl, tolerance", [(torch.float64, "torch", 1e-12), (torch.float32, None, 1e-5)]
)
@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "gspo", "dr_grpo"])
def test_the_gradient_of_a_model_does_not_depend_on_the_cut(
    algorithm, dtype, impl, tolerance, device
):
    """Parameters of a decoder and its value head, whose forward packs other sequences together in
    every cut."""
    with use_impl(impl) if impl else torch.enable_grad():
        head = ValueHead(SMALL["hidden_size"])
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
        actor = HybridActor(
            Decoder.random(model_config(SMALL), 0, dtype=dtype, device=device),
            value_head=head.to(device, dtype),
        )
        rng = torch.Generator().manual_seed(0)
        lengths = [int(torch.randint(1, 9, (), generator=rng).item()) for _ in GROUPS]
        batch = PackedBatch.from_sequences(
            [([1, 3], torch.randint(3, 29, (n,), generator=rng).tolist()) for n in lengths],
            device=device,
        )
        with torch.no_grad():
            hidden = actor.forward(batch)
            (logp, _), values = actor.logprobs(batch, hidden), actor.values(batch, hidden)
        noise = 0.1 * torch.randn(batch.num_tokens, generator=rng, dtype=torch.float64).to(dtype)
        old = torch.where(batch.action_mask, logp + noise, 0.0)
        batch = batch.with_columns(
            old_logp=old,
            ref_logp=old - 0.2,
            values=values,
            scores=noise[: len(GROUPS)] * 10,
            group_ids=torch.tensor(GROUPS, device=device),
        )
        config = config_of(algorithm, "row")
        batch = prepared(config, batch)
        whole = gradients(actor, config, batch, [list(range(len(GROUPS)))])
        assert whole.dtype == dtype
        assert whole.abs().max() > 1e-3
        for parts in SPLITS:
            assert apart(gradients(actor, config, batch, parts), whole) <= tolerance
