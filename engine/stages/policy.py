"""PPO: roll out, score, estimate advantages, update; one weight copy throughout.

Read `train_ppo` from top to bottom. How it departs from the textbook (Schulman et al., 2017, algorithm 1), with sources in config.py:
  1. the reward is the score at the last token minus coef * k1 against a frozen reference at every token (Ziegler et al., 2019);
  2. values are read at the position before the token, from a linear head on the policy's own trunk; the value after the end is 0;
  3. advantages are whitened over the whole batch of a step, once, before any split;
  4. old log-probabilities come from the training forward, not from the sampler: before the first optimizer step of a rollout the ratio is
     exactly 1, because scoring cuts the batch into the very micro-batches that the first epoch trains on. What the sampler said is compared
     with it at every step (`sampling/logp_diff_*`).
"""
from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.config import PPOConfig
from fusedrl.engine.control import KLController, data_order, learning_rate, shuffled
from fusedrl.engine.data.readers import load_prompts
from fusedrl.engine.data.tokenize import encode_prompts
from fusedrl.engine.errors import ConfigError
from fusedrl.engine.memory import give_back
from fusedrl.engine.optim import Optimizer, make_optimizer
from fusedrl.engine.packing import PackedBatch
from fusedrl.engine.plan import cache_for
from fusedrl.engine.rewards import RewardSet, load_reward
from fusedrl.engine.rollout import Prompt, Rollout, rollout
from fusedrl.engine.run import Run
from fusedrl.kernels.faults import raise_faults
from fusedrl.kernels.gae import ShapedGAE, shaped_gae
from fusedrl.kernels.policy_loss import PolicyObjective, PolicyStats, ValueStats, policy_value_loss, token_weights

Cuts = list[list[list[int]]]  # [minibatch][micro-batch] -> sequence indices


@dataclass(frozen=True)
class PPOResult:
    """Where the trained policy is, and the last step's metrics."""

    model: str
    steps: int
    metrics: dict[str, float]


def train_ppo(config: PPOConfig) -> PPOResult:
    """Train a policy by PPO.

    The run directory receives config.json, metrics.jsonl, samples.jsonl, checkpoints and, at the end, model/ (loadable by transformers, with
    value_head.safetensors beside the weights).

    Raises:
        DataError, RewardError, ConfigError, OSError: as their messages say; nothing half-written is left behind.
        RuntimeError: five updates in a row had a non-finite gradient, or sampler and trainer disagree by more than `max_logp_diff`.
    """
    torch.manual_seed(config.run.seed)
    actor = HybridActor.from_pretrained(config.model, dtype=config.dtype, device=config.device, value_head=True, strict=config.strict,
                                        cache=cache_for(config))
    actor.decoder.checkpoint_activations = config.checkpoint_activations
    reference = HybridActor.from_pretrained(config.model, dtype=config.dtype, device=config.device)
    rewards = RewardSet([load_reward(spec, device=actor.decoder.device, tokenizer=actor.tokenizer) for spec in config.reward], config.reward_weights)
    optim = config.optim
    optimizer = make_optimizer(actor.named_parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay,
                               state=optim.state)
    kl = KLController(config.kl)

    with Run(config, config.steps) as run:
        prompts = _prompts(config, actor, run)
        run.restore(model=actor, optimizer=optimizer, kl=kl)
        for step in range(run.start, config.steps):
            with run.time("generate_and_reward"):
                chosen = [prompts[i] for i in data_order(len(prompts), config.run.seed, step * config.prompts_per_step, (step + 1) * config.prompts_per_step)]
                experience = rollout(actor, chosen, rewards, config, first_request_id=step * config.prompts_per_step)
            with run.time("score"):
                cuts = _cuts(experience.batch, config, step, epoch=0)
                batch, entropy = score(actor, reference, experience.batch, cuts, config.generation.temperature)
            with run.time("advantage"):
                shaped = shaped_gae(batch.column("old_logp"), batch.column("ref_logp"), batch.column("values"), batch.column("scores"),
                                    mask=batch.action_mask, cu_seqlens=batch.cu_seqlens, kl_coef=kl.coef, gamma=config.loss.gamma,
                                    lam=config.loss.lam, score_clip=config.score_clip, whiten=config.loss.whiten)
                batch = batch.with_columns(advantages=shaped.advantages, returns=shaped.returns)
            metrics = experience.metrics | {"entropy": entropy} | _measure(batch, shaped, kl.coef, config)
            with run.time("train"), actor.lend_cache():
                metrics |= update(actor, optimizer, batch, cuts, config, step, run)
            kl.update(metrics["kl"], batch.num_sequences)
            run.log(step, metrics)
            run.samples(step, _samples(experience))
            run.save_if_due(step, model=actor, optimizer=optimizer, kl=kl)
        return PPOResult(run.finish(actor.save_pretrained), config.steps, run.last_metrics)


# ---- the batch, and how it is cut --------------------------------------------------------------------------------------------
def _prompts(config: PPOConfig, actor: HybridActor, run: Run) -> list[Prompt]:
    room = actor.decoder.config.max_positions - config.generation.max_new_tokens
    if room < 1:
        raise ConfigError(f"generation.max_new_tokens = {config.generation.max_new_tokens} leaves no room for a prompt in the model's "
                          f"{actor.decoder.config.max_positions} positions; lower it")
    examples = load_prompts(config.data, skip_bad_lines=config.skip_bad_lines, rejects=run.directory / "rejects.jsonl")
    encoded, dropped = encode_prompts(actor.tokenizer, examples, min(room, config.max_prompt_length or room))
    run.message(f"prompts: {dropped}")
    return [Prompt(example.prompt, ids, example.columns) for example, ids in encoded]


def _cuts(batch: PackedBatch, config: PPOConfig, step: int, epoch: int) -> Cuts:
    """Sequences shuffled into minibatches, and each minibatch cut into micro-batches by tokens; a function of the seed, step and epoch."""
    B, M = batch.num_sequences, min(config.minibatches, batch.num_sequences)
    order = shuffled(B, config.run.seed, "minibatches", step, epoch)
    return [batch.split(config.tokens_per_microbatch, order[m * B // M:(m + 1) * B // M]) for m in range(M)]


@torch.no_grad()
def score(actor: HybridActor, reference: HybridActor, batch: PackedBatch, cuts: Cuts, temperature: float) -> tuple[PackedBatch, float]:
    """Fill old_logp, values and ref_logp from the training forward, micro-batch by micro-batch in the cuts that the first epoch trains on.
    Returns the batch and the policy's mean entropy in nats per token."""
    partition = [group for minibatch in cuts for group in minibatch]
    ours = actor.score(batch, temperature=temperature, partition=partition)
    theirs = reference.score(batch, temperature=temperature, partition=partition)
    if ours.values is None:
        raise ValueError("score: PPO needs an actor with a value head; load it with value_head=True")
    scored = batch.with_columns(old_logp=ours.logp, values=ours.values, ref_logp=theirs.logp)
    return scored, ours.entropy[batch.action_mask].double().mean().item()


# ---- the update ------------------------------------------------------------------------------------------------------------
def update(actor: HybridActor, optimizer: Optimizer, batch: PackedBatch, first_cuts: Cuts, config: PPOConfig, step: int, run: Run) -> dict[str, float]:
    """epochs x minibatches optimizer steps on one rollout. Token weights are computed over the whole minibatch, so its cut into
    micro-batches does not change the gradient."""
    loss = config.loss
    objective = PolicyObjective(kind="clip", clip_low=loss.clip_low, clip_high=loss.clip_high, dual_clip=loss.dual_clip)
    total_updates = config.steps * config.epochs * config.minibatches
    done = step * config.epochs * config.minibatches
    meter = _Meter()
    for epoch in range(config.epochs):
        for minibatch in first_cuts if epoch == 0 else _cuts(batch, config, step, epoch):
            members = [b for group in minibatch for b in group]
            part = batch.select(members)
            weights = torch.zeros(batch.num_tokens, device=batch.device)
            weights[batch.slots(members)] = token_weights(part.action_mask, loss.aggregation, cu_seqlens=part.cu_seqlens)
            weighted = batch.with_columns(weights=weights)
            optimizer.zero_grad()
            for group in minibatch:
                micro = weighted.select(group)
                hidden = actor.forward(micro)
                logp, entropy = actor.logprobs(micro, hidden, temperature=config.generation.temperature)
                value, policy_stats, value_stats = policy_value_loss(
                    logp, micro.column("old_logp"), micro.column("advantages"), micro.column("weights"),
                    actor.values(micro, hidden), micro.column("values"), micro.column("returns"), objective=objective,
                    value_clip=loss.value_clip, value_coef=loss.value_coef, entropy=entropy, entropy_coef=loss.entropy_coef)
                value.backward()
                meter.add(policy_stats, value_stats, first=epoch == 0 and minibatch is first_cuts[0])
            optimizer.lr = learning_rate(config.optim, done, total_updates)
            result = optimizer.step(max_grad_norm=config.optim.max_grad_norm or None)
            run.check_update(result)
            actor.mark_updated()
            meter.grad_norms.append(result.grad_norm)
            done += 1
    optimizer.zero_grad()
    give_back()  # the next rollout runs beside the weights, the optimizer's state and the cache alone
    return meter.metrics() | {"lr": optimizer.lr}


class _Meter:
    """Micro-batch statistics -> one number per step: means weighted by tokens, extremes by min and max. Read once, at the end."""

    def __init__(self) -> None:
        self.rows: list[tuple[PolicyStats, ValueStats, bool]] = []
        self.grad_norms: list[float] = []

    def add(self, policy: PolicyStats, value: ValueStats, *, first: bool) -> None:
        self.rows.append((policy, value, first))

    def metrics(self) -> dict[str, float]:
        policy = torch.stack([torch.stack([x.float() for x in p]) for p, _, _ in self.rows]).tolist()
        value = torch.stack([torch.stack([x.float() for x in v]) for _, v, _ in self.rows]).tolist()
        rows = [(dict(zip(PolicyStats._fields, p, strict=True)), dict(zip(ValueStats._fields, v, strict=True))) for p, v in zip(policy, value, strict=True)]
        tokens = sum(p["tokens"] for p, _ in rows)
        mean: dict[str, float] = defaultdict(float)
        for p, v in rows:
            share = p["tokens"] / max(1.0, tokens)
            for name, number in (("policy/approxkl_avg", p["approx_kl_k3"]), ("policy/clipfrac_avg", p["clip_fraction_low"] + p["clip_fraction_high"]),
                                 ("clip_ratio/low_mean", p["clip_fraction_low"]), ("clip_ratio/high_mean", p["clip_fraction_high"]),
                                 ("val/ratio", p["ratio_mean"]), ("val/clipfrac_avg", v["clip_fraction"]), ("policy/clamped_fraction", p["clamped_fraction"])):
                mean[name] += share * number
        updates = len(self.grad_norms)
        live = [p for p, _ in rows if p["tokens"]]
        first = [p for (p, _), (_, _, is_first) in zip(rows, self.rows, strict=True) if is_first and p["tokens"]]
        return dict(mean) | {
            "loss/policy_avg": sum(p["loss"] for p, _ in rows) / updates,
            "loss/value_avg": sum(v["loss"] for _, v in rows) / updates,
            "val/ratio_min": min((p["ratio_min"] for p in live), default=1.0),
            "val/ratio_max": max((p["ratio_max"] for p in live), default=1.0),
            "policy/first_ratio_min": min((p["ratio_min"] for p in first), default=1.0),
            "policy/first_ratio_max": max((p["ratio_max"] for p in first), default=1.0),
            "policy/first_approxkl": max((p["approx_kl_k3"] for p in first), default=0.0),
            "policy/first_clipfrac": max((p["clip_fraction_low"] + p["clip_fraction_high"] for p in first), default=0.0),
            "grad_norm": sum(self.grad_norms) / updates,
        }


# ---- what is reported --------------------------------------------------------------------------------------------------------
def _measure(batch: PackedBatch, shaped: ShapedGAE, kl_coef: float, config: PPOConfig) -> dict[str, float]:
    """Metrics of the rollout itself. Raises IndexError when a kernel was given ids outside the vocabulary, RuntimeError when sampler and trainer disagree."""
    raise_faults(batch.device)  # the host waits here anyway; scores of ids outside the vocabulary are NaN, which would look like disagreement
    names = ("old_logp", "ref_logp", "rollout_logp", "values", "returns")
    old, ref, rolled, values, returns = (batch.column(name)[batch.action_mask].double() for name in names)
    difference = (rolled - old).abs()
    ratio = (old - rolled).exp()
    kl = shaped.kl_per_sequence.double().mean().item()
    mean, worst = difference.mean().item(), difference.max().item()
    if not mean <= config.max_logp_diff:
        raise RuntimeError(f"sampler and trainer disagree: mean |logp difference| {mean:.3g} (max {worst:.3g}) over {difference.numel()} tokens, above "
                           f"max_logp_diff = {config.max_logp_diff}; expected about 1e-6 in float32 and 1e-3 in bfloat16. Every ratio would be wrong, so the "
                           "run stops; train in float32, or raise max_logp_diff if you mean it")
    return {
        "kl": kl,
        "kl_coef": kl_coef,
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": shaped.score_per_sequence.double().mean().item() - kl_coef * kl,
        "perplexity": math.exp(min(80.0, -old.mean().item())),
        "perplexity_ref": math.exp(min(80.0, -ref.mean().item())),
        "sampling/logp_diff_mean": mean,
        "sampling/logp_diff_max": worst,
        "sampling/ratio_outside_fraction": ((ratio < 0.9) | (ratio > 1.1)).double().mean().item(),
        "val/explained_variance": _explained_variance(values, returns),
        "num_tokens": float(batch.num_tokens),
    }


def _explained_variance(values: Tensor, returns: Tensor) -> float:
    spread = returns.var(correction=0).item()
    return 1 - (returns - values).var(correction=0).item() / spread if spread > 0 else 0.0


def _samples(experience: Rollout, count: int = 4) -> list[dict]:
    return [{"prompt": p.prompt, "completion": c.text, "finish_reason": c.finish_reason, "score": s}
            for p, c, s in zip(experience.prompts[:count], experience.completions[:count], experience.batch.column("scores")[:count].tolist(), strict=True)]
