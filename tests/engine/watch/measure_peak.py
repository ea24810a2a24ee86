"""PPO steps of a random model in a process of its own: the peak of its resident memory beside what
`fusedrl plan` says, and that of the last step's rollout, which follows training. Used by
test_plan.py.

usage: measure_peak.py '{"sizes": {...config.json...}, "tokens": 512, "checkpointed": false}'
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fusedrl.engine import CacheConfig, HybridActor, PackedBatch, SamplingParams
from fusedrl.engine.config import GenerationConfig, OptimConfig, PolicyConfig
from fusedrl.engine.model.configuration import model_config
from fusedrl.engine.model.decoder import Decoder
from fusedrl.engine.model.heads import ValueHead
from fusedrl.engine.optim.learner import Learner
from fusedrl.engine.policy.control import Control
from fusedrl.engine.stages import policy
from fusedrl.engine.watch.plan import plan


def resident(key: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the highest so far)."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(f"{key}:")
    )
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """VmHWM starts again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def step(
    sizes: dict[str, Any], config: PolicyConfig, cache: CacheConfig, steps: int
) -> tuple[int, int]:
    """Rollout, score, update; two micro-batches a minibatch. Rewards are random, as nothing here
    depends on them. Returns two peaks: of everything, and of the last rollout."""
    torch.manual_seed(0)
    model = model_config(sizes)
    actor = HybridActor(
        Decoder.random(model, 0), value_head=ValueHead(model.hidden_size), cache=cache
    )
    actor.decoder.checkpoint_activations = config.checkpoint_activations
    reference = HybridActor(Decoder.random(model, 0))
    learner = Learner(actor, OptimConfig(lr=1e-5))
    half = config.generation.max_new_tokens
    prompts = [
        torch.randint(3, model.vocab_size, (half,)).tolist() for _ in range(config.prompts_per_step)
    ]
    peak = rollout = 0
    for number in range(steps):
        peak = max(peak, resident("VmHWM"))
        forget_peak()
        outs = actor.generate(prompts, SamplingParams(max_new_tokens=half, seed=number))
        rollout = resident("VmHWM")
        batch = PackedBatch.from_completions(prompts, outs)
        cuts = policy.cuts_of(batch, config, number, 0)
        batch = policy.score(actor, reference, batch, cuts, 1.0)
        noise = torch.randn(2, batch.num_tokens)
        batch = batch.with_columns(
            advantages=noise[0], returns=noise[1], scores=torch.zeros(batch.num_sequences)
        )
        with actor.lend_cache():
            policy.update(actor, reference, learner, batch, cuts, config, Control(config), number)
    return max(peak, resident("VmHWM")), rollout


def main() -> None:
    asked = json.loads(sys.argv[1])
    tokens, length = asked["tokens"], asked["sizes"]["max_position_embeddings"]
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(asked["sizes"]))
        config = PolicyConfig(
            directory,
            "none",
            ("none",),
            prompts_per_step=2 * tokens // length,
            epochs=1,
            tokens_per_microbatch=tokens,
            device="cpu",
            checkpoint_activations=asked["checkpointed"],
            generation=GenerationConfig(max_new_tokens=length // 2),
        )
        cache = CacheConfig(num_blocks=2 * tokens // 16)  # one rollout writes them all
        found = plan(config, cache=cache)
    tiny = asked["sizes"] | {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
    }
    step(tiny, replace(config, tokens_per_microbatch=64), cache, 1)  # libraries load, threads start
    before = resident("VmRSS")
    forget_peak()
    peak, rollout = step(asked["sizes"], config, cache, 2)
    print(
        json.dumps(
            {
                "measured": peak - before,
                "rollout": rollout - before,
                "planned": found.parts.peak,
                "before": before,
                "weights": found.parts.weights,
                "parts": vars(found.parts),
            }
        )
    )


if __name__ == "__main__":
    main()
