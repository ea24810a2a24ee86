"""Rejection-sampling fine-tuning: sample many, keep the best, imitate them, again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fusedrl.engine.config.base import (
    GenerationConfig,
    LoRAConfig,
    OptimConfig,
    RunConfig,
    check_values,
    require,
)


@dataclass(frozen=True)
class RejectionConfig:
    """Rejection-sampling fine-tuning (RAFT, Dong et al., 2023; Llama 2, Touvron et al., 2023,
    section 3.2.3; RFT, Yuan et al., 2023): each step samples completions, keeps the best of each
    prompt, and trains on them as SFT does. The only KL is implicit: the best of n samples are at
    most log n - (n - 1) / n nats from what they were drawn from.

    Args:
        model: directory or id of the policy to train.
        data: JSONL file (.gz too) with a "prompt" column, or preference pairs, whose common prefix
            is the prompt.
        reward: rewards, each file.py:function, or a directory of a reward model.
        reward_weights: one weight per reward; None weighs each 1.
        steps: rounds of sampling, each followed by epochs x minibatches optimizer steps.
        prompts_per_step: prompts of one round.
        samples_per_prompt: completions of each prompt, from which the best are kept.
        keep: completions of a prompt that are kept at most, best first; of equal scores the earlier
            one.
        min_score: completions of a lower score are not kept; with keep = samples_per_prompt all
            others are. None keeps by rank alone.
        epochs: passes over what was kept.
        minibatches: optimizer steps of one pass.
        tokens_per_microbatch: tokens of one forward and backward.
        checkpoint_activations: keep layers' inputs alone and compute the rest again in the backward
            pass: less memory, one more forward.
        max_prompt_length: longer prompts are dropped before the first step and counted; None is
            what fits the model with max_new_tokens.
        missing_eos_penalty: subtracted from the score of a completion that did not end by itself.
        max_invalid_fraction: of a round's rewards (raised, NaN, wrong type); above it the run
            stops, below it those samples are left out.
        skip_bad_lines: write malformed lines to <run>/rejects.jsonl and go on, instead of stopping
            with all of them listed.
        dtype: of the parameters: auto is float32 on CPU and bfloat16 on CUDA.
        device: cpu, cuda, or None for the best there is.
        lora: train adapters on the frozen model; lora.rank, lora.alpha, lora.targets or lora.rslora
            turns it on. <run>/model then holds them merged, <run>/adapter by themselves.
        generation: how completions are drawn; top_k, top_p and min_p are as good here as none. What
            is trained is the model at temperature 1.
    """

    model: str
    data: str
    reward: tuple[str, ...]
    reward_weights: tuple[float, ...] | None = None
    steps: int = 20
    prompts_per_step: int = 64
    samples_per_prompt: int = 8
    keep: int = 1
    min_score: float | None = None
    epochs: int = 1
    minibatches: int = 1
    tokens_per_microbatch: int = 8192
    checkpoint_activations: bool = False
    max_prompt_length: int | None = None
    missing_eos_penalty: float = 0.0
    max_invalid_fraction: float = 0.1
    skip_bad_lines: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str | None = None
    lora: LoRAConfig | None = None
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check_values(self)
        for name in (
            "steps",
            "prompts_per_step",
            "samples_per_prompt",
            "keep",
            "epochs",
            "minibatches",
            "tokens_per_microbatch",
        ):
            require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        require(
            len(self.reward) >= 1,
            "reward",
            "at least one file.py:function or reward-model directory",
            self.reward,
        )
        require(
            self.reward_weights is None or len(self.reward_weights) == len(self.reward),
            "reward_weights",
            f"{len(self.reward)} numbers, one per reward",
            self.reward_weights,
        )
        require(
            self.keep <= self.samples_per_prompt,
            "keep",
            f"<= samples_per_prompt = {self.samples_per_prompt}",
            self.keep,
        )
        require(
            self.keep < self.samples_per_prompt or self.min_score is not None,
            "keep",
            f"< samples_per_prompt = {self.samples_per_prompt}, or a min_score "
            "beside it (otherwise everything is kept, and nothing is learnt from the rewards)",
            self.keep,
        )
        require(
            self.minibatches <= self.prompts_per_step * self.keep,
            "minibatches",
            f"<= prompts_per_step x keep = {self.prompts_per_step * self.keep}",
            self.minibatches,
        )
        require(
            self.generation.temperature > 0,
            "generation.temperature",
            "> 0 (greedy completions of one prompt are all the same)",
            self.generation.temperature,
        )

    @property
    def title(self) -> str:
        """What the run is called on the terminal."""
        return "rejection"

    # What `rollout` asks for beside the fields: no length shaping, and no other prompts in the
    # place of those whose scores are all equal.
    @property
    def overlong_buffer(self) -> int:
        return 0

    @property
    def overlong_penalty(self) -> float:
        return 0.0

    @property
    def refill_tries(self) -> int:
        return 0
