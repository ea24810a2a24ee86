"""Promises of the engine, checked on a tiny model with random weights. Each promise is a function
that takes the device and returns a row of the report.

A row has "state" ("ok", "FAIL", "refused"), "error_over_bound", and "why", the list of faults. The
reference is the same engine on the CPU with every op on its torch implementation.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.completion import Completion
from fusedrl.engine.base.packing import PackedBatch
from fusedrl.engine.generation.cache import CacheConfig
from fusedrl.engine.generation.generator import Generator
from fusedrl.engine.generation.graphs import CudaCapture, StepGraphs
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.heads import ValueHead
from fusedrl.engine.optim.adamw import make_optimizer
from fusedrl.kernels.policy_loss import PolicyObjective, policy_loss, token_weights
from fusedrl.kernels.runtime.dispatch import use_impl

CONFIG = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.25,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "hidden_act": "silu",
}
ROOMY = CacheConfig(block_size=16, num_blocks=256, max_sequences=32, max_tokens_per_step=256)
# a quarter of what is asked fits; chunks, preemption
TIGHT = CacheConfig(block_size=16, num_blocks=24, max_sequences=3, max_tokens_per_step=16)
GREEDY, DRAWN = (
    SamplingParams(max_new_tokens=40, temperature=0.0),
    SamplingParams(max_new_tokens=40, seed=3),
)
CPU = torch.device("cpu")
Row = dict[str, Any]


def prompts() -> list[list[int]]:
    """Return twelve prompts of 1 to 45 tokens."""
    draw = torch.Generator().manual_seed(0)
    return [[1, *torch.randint(3, 97, (4 * i,), generator=draw).tolist()] for i in range(12)]


def make(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    cache: CacheConfig = ROOMY,
    strict: bool = False,
) -> HybridActor:
    """Make an actor; its weights are the same on every device."""
    decoder = Decoder.random(model_config(CONFIG), seed=0).to(device=device, dtype=dtype)
    return HybridActor(decoder, cache=cache, strict=strict)


def said(outs: Sequence[Sequence[Completion]]) -> list[list[int]]:
    """Return the token ids of every completion, in order."""
    return [completion.token_ids for completions in outs for completion in completions]


def row(error: float = 0.0, bound: float = 1.0, why: Sequence[str] = ()) -> Row:
    """Make a row of the report from the largest error, its bound, and a list of other faults."""
    over = error / bound if math.isfinite(error) else math.inf
    found = list(why) if over <= 1 else [*why, f"off by {error:.3g}, where {bound:.3g} is allowed"]
    return {
        "state": "FAIL" if found else "ok",
        "error_over_bound": over if over < math.inf else "inf",
        "why": found,
    }


def apart(ours: list[list[int]], theirs: list[list[int]], whose: str) -> list[str]:
    """Describe in words where two lists of completions differ; empty if they are equal."""
    if ours == theirs:
        return []
    index = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    at = next(
        (t for t, (a, b) in enumerate(zip(ours[index], theirs[index], strict=False)) if a != b),
        min(len(ours[index]), len(theirs[index])),
    )
    differ = sum(a != b for a, b in zip(ours, theirs, strict=True))
    return [
        f"{differ} of {len(ours)} completions differ from {whose}; number {index} from token "
        f"{at} on"
    ]


@functools.cache
def reference() -> list[list[int]]:
    """Generate greedy completions on the CPU with the torch implementations."""
    with use_impl("torch"):
        return said(make(CPU).generate(prompts(), GREEDY))


# ---- generation ----------------------------------------------------------------------------------
def greedy_tokens(device: torch.device) -> Row:
    """Check that greedy completions on the device equal the CPU's reference."""
    return row(
        why=apart(
            said(make(device).generate(prompts(), GREEDY)), reference(), "the CPU's reference"
        )
    )


def more_requests_than_slots(device: torch.device) -> Row:
    """Check that samples stay the same if the cache is too small for all requests, so that prompts
    are read in chunks and sequences are preempted."""
    asked = prompts() + prompts()
    roomy, tight = (
        said(make(device, cache=cache).generate(asked, DRAWN)) for cache in (ROOMY, TIGHT)
    )
    return row(why=apart(tight, roomy, "those of a roomy cache"))


def captured_steps(device: torch.device) -> Row:
    """Check that a CUDA graph of a decoding step gives what the step gives. On a CPU a capture
    returns the step itself, so there only the reuse of the step's state is checked."""
    step_itself = StepGraphs(lambda step, state: step)
    contestants = (
        (StepGraphs(CudaCapture(device)), step_itself)
        if device.type == "cuda"
        else (step_itself, None)
    )
    outs = []
    for graphs in contestants:
        actor = make(device)
        actor._generator = Generator(actor.decoder, None, ROOMY, graphs=graphs)
        outs.append(
            [
                ids
                for count in (12, 5)
                for params in (DRAWN, GREEDY)
                for ids in said(actor.generate(prompts()[:count], params))
            ]
        )
    return row(why=apart(outs[0], outs[1], "steps that are not captured"))


# ---- sampler and trainer -------------------------------------------------------------------------
def one_logprob(device: torch.device, dtype: torch.dtype = torch.float32) -> Row:
    """Check that trainer and sampler give a token the same log-probability, up to rounding."""
    actor = make(device, dtype)
    batch = PackedBatch.from_completions(prompts(), actor.generate(prompts(), DRAWN), device=device)
    off = (actor.score(batch).logp - batch.column("rollout_logp"))[batch.action_mask].abs()
    if dtype == torch.float32:
        return row(float(off.max()), 1e-4)
    mean, most = float(off.mean()), float(off.max())
    return row(
        max(mean / 1e-3, most / 2e-2),
        1.0,
        [f"mean {mean:.2g} (1e-3 allowed), largest {most:.2g} (2e-2)"]
        if mean > 1e-3 or most > 2e-2
        else [],
    )


def strict_numerics(device: torch.device, dtype: torch.dtype = torch.float32) -> Row:
    """Check that with strict=True trainer and sampler give bitwise the same log-probabilities."""
    try:
        actor = make(device, dtype, TIGHT, strict=True)
    except ValueError as error:
        return {"state": "refused", "error_over_bound": None, "why": [str(error)]}
    batch = PackedBatch.from_completions(prompts(), actor.generate(prompts(), DRAWN), device=device)
    differ = int((actor.score(batch).logp != batch.column("rollout_logp"))[batch.action_mask].sum())
    return row(
        why=[f"{differ} of {int(batch.action_mask.sum())} log-probabilities differ"]
        if differ
        else []
    )


# ---- an update -----------------------------------------------------------------------------------
def _batch(device: torch.device) -> PackedBatch:
    """Return a batch of the reference's completions with advantages, the same on every device."""
    batch = PackedBatch.from_sequences(zip(prompts(), reference(), strict=True))
    noise = torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(1))
    return batch.with_columns(
        advantages=noise, weights=token_weights(batch.action_mask, "token_mean")
    ).to(device)


def _loss(
    actor: HybridActor, batch: PackedBatch, old: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (loss, log-probabilities) of a clipped policy loss that includes the entropy."""
    logp, entropy = actor.logprobs(batch, actor.forward(batch))
    loss, _ = policy_loss(
        logp,
        logp.detach() if old is None else old,
        batch.column("advantages"),
        batch.column("weights"),
        entropy=entropy,
        entropy_coef=0.01,
        objective=PolicyObjective(kind="clip"),
    )
    return loss, logp


def _gradients(actor: HybridActor, batch: PackedBatch) -> list[Tensor]:
    actor.decoder.zero_grad()
    _loss(actor, batch)[0].backward()
    return [p.grad.clone() for p in actor.parameters() if p.grad is not None]


def ratios_are_one(device: torch.device) -> Row:
    """Check that the training forward of a batch gives bitwise the log-probabilities that scoring
    gave before the first step."""
    actor, batch = make(device), _batch(device)
    old = actor.score(batch).logp
    differ = int((_loss(actor, batch, old)[1].detach() != old).sum())
    return row(why=[f"{differ} of {batch.num_tokens} log-probabilities differ"] if differ else [])


def gradient_of_an_update(device: torch.device) -> Row:
    """Check that each parameter's gradient of an update is within 1e-4 of its norm from the
    reference's."""
    with use_impl("torch"):
        want = _gradients(make(CPU), _batch(CPU))
    got = [g.cpu() for g in _gradients(make(device), _batch(device))]
    return row(
        max(
            float((a - b).norm() / b.norm().clamp(min=1e-12))
            for a, b in zip(got, want, strict=True)
        ),
        1e-4,
    )


def lent_cache(device: torch.device) -> Row:
    """Check that training in the cache's memory gives bitwise the same gradients, and that
    generation afterwards is as before."""
    actor, batch = make(device), _batch(device)
    before, plain = said(actor.generate(prompts(), DRAWN)), _gradients(actor, batch)
    with actor.lend_cache() as arena:
        lent = _gradients(actor, batch)
    why = (
        []
        if all(torch.equal(a, b) for a, b in zip(plain, lent, strict=True))
        else ["gradients differ from those outside"]
    )
    why += [] if arena is not None else ["nothing was lent"]
    return row(
        why=why + apart(said(actor.generate(prompts(), DRAWN)), before, "those before the loan")
    )


def optimizer_step(device: torch.device) -> Row:
    """Check that after an optimizer step the actor generates the same as a new actor with these
    weights: no cached prefix and no captured step of the old weights is left."""
    actor, batch = make(device), _batch(device)
    old = said(actor.generate(prompts(), DRAWN))
    optimizer = make_optimizer(actor.named_parameters(), lr=0.02)
    _loss(actor, batch)[0].backward()
    optimizer.step(max_grad_norm=1.0)
    actor.mark_updated()
    fresh = HybridActor(copy.deepcopy(actor.decoder), cache=ROOMY)
    new = said(actor.generate(prompts(), DRAWN))
    why = apart(
        new, said(fresh.generate(prompts(), DRAWN)), "those of an actor made of the new weights"
    )
    return row(why=[*why, *(["the step changed nothing"] if new == old else [])])


def values_of_states(device: torch.device) -> Row:
    """Check that a value head gives the same values in sampling and in scoring, up to rounding."""
    actor = make(device)
    actor.value_head = ValueHead(CONFIG["hidden_size"], device=device)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in actor.value_head.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) / 8)
    batch = PackedBatch.from_completions(prompts(), actor.generate(prompts(), DRAWN), device=device)
    scored = actor.score(batch).values
    if scored is None:
        return row(why=["score returned no values"])
    return row(
        float((scored - batch.column("rollout_values"))[batch.action_mask].abs().max()), 1e-4
    )


def adapter(device: torch.device) -> Row:
    """Check that a fresh LoRA adapter changes nothing, nor does one that is switched off."""
    from fusedrl.engine.config import LoRAConfig

    actor = make(device)
    before = said(actor.generate(prompts(), GREEDY))
    actor.add_adapter(LoRAConfig(rank=4))
    fresh = apart(said(actor.generate(prompts(), GREEDY)), before, "those without an adapter")
    with torch.no_grad():
        for name, p in actor.named_parameters():
            if p.requires_grad:
                p.add_(
                    torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))).to(p)
                )
    actor.mark_updated()
    moved = said(actor.generate(prompts(), GREEDY))
    with actor.disable_adapter():
        off = apart(said(actor.generate(prompts(), GREEDY)), before, "those without an adapter")
    return row(
        why=[
            *fresh,
            *off,
            *(["an adapter of random numbers changed nothing"] if moved == before else []),
        ]
    )


PROMISES: dict[str, Callable[[torch.device], Row]] = {
    "greedy tokens = the CPU's": greedy_tokens,
    "captured steps = uncaptured": captured_steps,
    "more requests than slots": more_requests_than_slots,
    "sampler = trainer, float32": one_logprob,
    "sampler = trainer, bfloat16": functools.partial(one_logprob, dtype=torch.bfloat16),
    "strict, float32": strict_numerics,
    "strict, bfloat16": functools.partial(strict_numerics, dtype=torch.bfloat16),
    "values, sampled = scored": values_of_states,
    "ratios are 1 before a step": ratios_are_one,
    "gradient = the CPU's": gradient_of_an_update,
    "after lend_cache": lent_cache,
    "after an optimizer step": optimizer_step,
    "a LoRA adapter": adapter,
}
