"""The loops' losses come out of the head in one pass: what they are is what log-probabilities by
themselves give, and who needs those is told why."""

from dataclasses import replace

import pytest
import torch

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.config import (
    CorrectionConfig,
    GenerationConfig,
    KLConfig,
    LoRAConfig,
    LossConfig,
    PolicyConfig,
)
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.heads import ValueHead
from fusedrl.engine.policy.objectives import (
    head_loss,
    make_objective,
    minibatch_weights,
    objective_loss,
    two_steps,
)
from fusedrl.kernels.runtime.dispatch import use_impl

SIZES = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "eos_token_id": 2,
}
MODELS = {
    "untied": {"tie_word_embeddings": False},
    "tied": {"tie_word_embeddings": True},
    "capped": {
        "model_type": "gemma2",
        "tie_word_embeddings": True,
        "final_logit_softcapping": 3.0,
        "sliding_window": 9,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 20.0,
    },
}
CONFIGS = {
    "ppo_clip": {},
    "cispo": {"loss": LossConfig(objective="cispo")},
    "gspo": {"loss": LossConfig(objective="gspo")},
    "kl and entropy": {
        "kl": KLConfig(coef=0.3, placement="loss"),
        "loss": LossConfig(entropy_coef=0.05),
    },
    "kl of sequences": {
        "kl": KLConfig(coef=0.3, placement="loss", estimator="k2", level="sequence")
    },
    "correction": {"correction": CorrectionConfig(kind="truncated", high=1.5)},
}


def actor_of(device, kind="tied", dtype=torch.float32, lora=False, **options):
    actor = HybridActor(
        Decoder.random(model_config(SIZES | MODELS[kind]), 0, dtype=dtype, device=device),
        value_head=ValueHead(40, device=device),
        **options,
    )
    if lora:
        actor.add_adapter(LoRAConfig(rank=3))
        with torch.no_grad():
            for name, p in actor.named_parameters():
                if ".lora." in name:
                    p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    return actor


def batch_of(device, actor, seed=0):
    """Prompts and completions of 1 to 150 tokens, with all columns; NaN where no action is."""
    draw = torch.Generator().manual_seed(seed)
    rows = [
        (
            torch.randint(3, 61, (n,), generator=draw).tolist(),
            torch.randint(3, 61, (m,), generator=draw).tolist(),
        )
        for n, m in ((1, 150), (9, 1), (3, 17), (30, 40), (2, 2))
    ]
    batch = PackedBatch.from_sequences(rows, device=device)
    scored = actor.score(batch, temperature=0.9)

    def near(size):
        return torch.where(
            batch.action_mask,
            scored.logp + size * torch.randn(batch.num_tokens, generator=draw).to(device),
            torch.nan,
        )

    drawn = {
        name: torch.where(
            batch.action_mask, torch.randn(batch.num_tokens, generator=draw).to(device), torch.nan
        )
        for name in ("advantages", "values", "returns")
    }
    return batch.with_columns(
        old_logp=near(0.3), ref_logp=near(0.3), rollout_logp=near(0.3), **drawn
    )


def config_of(**options):
    return PolicyConfig(
        "m",
        "d",
        ("r.py:f",),
        "ppo",
        generation=GenerationConfig(max_new_tokens=200, temperature=0.9),
        **options,
    )


def both(actor, batch, config):
    """(loss, statistics, gradients) of the one pass and of the two steps."""
    objective = make_objective(config, 1.0)
    batch = batch.with_columns(weights=minibatch_weights(config, batch))
    for one in (True, False):
        for p in actor.parameters():
            p.grad = None
        hidden = actor.forward(batch)
        values = actor.values(batch, hidden)
        if one:
            loss, stats, value, logp, entropy = head_loss(
                config, objective, config.kl.coef, batch, actor, hidden, values
            )
            assert not logp.requires_grad
        else:
            logp, entropy = actor.logprobs(batch, hidden, temperature=config.generation.temperature)
            loss, stats, value = objective_loss(
                config, objective, config.kl.coef, batch, logp, entropy, values
            )
        loss.backward()
        yield (
            [
                loss.detach(),
                torch.stack([*stats]),
                torch.stack([*value]),
                logp.detach(),
                entropy.detach(),
            ],
            {name: p.grad.clone() for name, p in actor.named_parameters() if p.grad is not None},
        )


def close(found, want, rtol, atol):
    for a, b in zip(found[0], want[0], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    assert found[1].keys() == want[1].keys()
    for name, grad in want[1].items():
        off = (found[1][name].double() - grad.double()).norm() / grad.double().norm().clamp(
            min=1e-9
        )
        assert off < rtol, (name, off)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_statistics_and_gradients_are_those_of_the_two_steps(name, device):
    actor, config = actor_of(device), config_of(**CONFIGS[name])
    assert two_steps(config, make_objective(config, 1.0), strict=False, scored=True) is None
    one, two = both(actor, batch_of(device, actor), config)
    close(one, two, 1e-5, 1e-5)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_of_every_head(kind, dtype, lora, device):
    """Tied to the embedding, whose gradient has two parts; capped; under an adapter, where it has
    none."""
    actor = actor_of(device, kind, dtype, lora)
    one, two = both(actor, batch_of(device, actor), config_of(**CONFIGS["kl and entropy"]))
    assert ("decoder.embedding" in one[1]) != lora
    close(
        one, two, 1e-5 if dtype == torch.float32 else 2e-2, 1e-5 if dtype == torch.float32 else 1e-3
    )


@pytest.mark.parametrize("kind", MODELS)
def test_the_rows_are_those_that_were_scored(kind, device):
    """To the bit on a CPU: before the first optimizer step every ratio is exactly 1."""
    actor = actor_of(device, kind)
    batch = batch_of(device, actor)
    scored = actor.score(batch, temperature=0.9)
    batch = batch.with_columns(old_logp=scored.logp, weights=batch.action_mask / 7)
    config = config_of()
    found = head_loss(
        config, make_objective(config, 1.0), 0.0, batch, actor, actor.forward(batch), None
    )
    assert torch.equal(found.logp, scored.logp)
    assert torch.equal(found.entropy, scored.entropy)
    assert found.policy.ratio_min == found.policy.ratio_max == 1


@pytest.mark.parametrize(
    "strict",
    [False, pytest.param(True, marks=pytest.mark.cpu_only("strict mode is the C++ kernels'"))],
)
def test_the_cross_entropy_of_the_actions(strict, device):
    """Against float64, and 0 of a batch without actions."""
    actor = actor_of(device, "capped" if not strict else "untied", strict=strict)
    batch = batch_of(device, actor)
    loss = actor.cross_entropy(batch, actor.forward(batch), 0.25)
    exact = Decoder.random(actor.decoder.config, 0, dtype=torch.float64, device=device)
    with use_impl("torch"):  # which has float64
        logp, _ = HybridActor(exact).logprobs(batch, HybridActor(exact).forward(batch))
    assert loss.item() == pytest.approx(-0.25 * logp.double().sum().item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in actor.decoder.parameters())
    nothing = replace(batch, action_mask=torch.zeros_like(batch.action_mask))
    assert actor.cross_entropy(nothing, actor.forward(nothing), 0.25).item() == 0.0


def test_who_needs_log_probabilities_by_themselves_is_told_why():
    def why(strict=False, scored=True, **options):
        config = config_of(**options)
        return two_steps(config, make_objective(config, 1.0), strict=strict, scored=scored)

    gspo, corrected = (
        {"loss": LossConfig(objective="gspo")},
        {"correction": CorrectionConfig(kind="truncated")},
    )
    assert why() is why(scored=False) is why(**gspo) is why(**corrected) is None
    assert "strict" in why(strict=True)
    assert "sequence_ratio" in why(
        loss=LossConfig(objective="sequence_ratio", advantage="monte_carlo")
    )
    assert "through_ratio" in why(kl=KLConfig(coef=0.1, placement="loss", through_ratio=True))
    assert "off_policy_delta" in why(correction=CorrectionConfig(off_policy_delta=0.1))
    assert "before" in why(scored=False, **gspo)
    assert "before" in why(scored=False, **corrected)


def test_a_strict_actor_has_no_pass_of_its_own(device):
    if device.type != "cpu":
        pytest.skip("strict mode is the C++ kernels'")
    actor = actor_of(device, "untied", strict=True)
    batch = batch_of(device, actor)
    with pytest.raises(ValueError, match="use logprobs"):
        actor.policy_loss(batch, actor.forward(batch), batch.advantages, batch.advantages)
