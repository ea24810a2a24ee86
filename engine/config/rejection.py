"""Options of rejection-sampling fine-tuning: sample many completions, keep the best, train on them,
repeat."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from fusedrl.engine.config.base import SamplingConfig, StageConfig, check
from fusedrl.engine.config.turns import TurnsConfig


@dataclass(frozen=True)
class RejectionConfig(StageConfig, SamplingConfig):
    """Rejection-sampling fine-tuning: sample completions, keep the best, train on them as SFT does.

    RAFT (Dong et al., 2023); Llama 2 (Touvron et al., 2023, section 3.2.3); RFT (Yuan et al.,
    2023). The only bound on the KL is implicit: the distribution of the best of n samples is at
    most log n - (n - 1) / n nats from the one that they were drawn from.

    Args:
        model: directory or id of the policy to train.
        data: a file or hf:ID (docs/guide.md) with a "prompt" field in each row, or preference
            pairs, whose common prefix is the prompt.
        steps: rounds of sampling, each followed by epochs x minibatches optimizer steps.
        samples_per_prompt: completions of each prompt, from which the best are kept.
        keep: largest number of completions of a prompt that are kept, best first; of equal scores
            the earlier one is kept.
        min_score: completions with a lower score are not kept. With keep = samples_per_prompt, all
            with this score or a higher one are kept. None keeps by rank alone.
        epochs: passes over the kept completions.
        minibatches: optimizer steps of one pass.
        max_invalid_fraction: largest share of a round's samples whose reward may be invalid (it
            raised, is NaN or of a wrong type). Above this share the run stops; up to it the invalid
            samples are left out.
        generation: how completions are drawn; top_k, top_p and min_p may be used without harm. The
            model is trained at temperature 1.
    """

    model: str
    data: str
    reward: tuple[str, ...]
    _: KW_ONLY
    steps: int = 20
    prompts_per_step: int = 64
    samples_per_prompt: int = 8
    epochs: int = 1
    minibatches: int = 1
    keep: int = 1
    min_score: float | None = None

    def __post_init__(self) -> None:
        self.check_stage()
        self.check_sampling()
        check(
            self,
            "",
            ("keep", self.keep >= 1, ">= 1"),
            (
                "keep",
                self.keep <= self.samples_per_prompt,
                f"<= samples_per_prompt = {self.samples_per_prompt}",
            ),
            (
                "keep",
                self.keep < self.samples_per_prompt or self.min_score is not None,
                f"< samples_per_prompt = {self.samples_per_prompt}, or a min_score beside it "
                "(otherwise everything is kept, and nothing is learnt from the rewards)",
            ),
            (
                "minibatches",
                self.minibatches <= self.prompts_per_step * self.keep,
                f"<= prompts_per_step x keep = {self.prompts_per_step * self.keep}",
            ),
            (
                "generation.temperature",
                self.generation.temperature > 0,
                "> 0 (greedy completions of one prompt are all the same)",
            ),
        )

    @property
    def title(self) -> str:
        """Name of the run on the terminal."""
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

    @property
    def turns(self) -> TurnsConfig:
        """Usual options: completions are of one turn here."""
        return TurnsConfig()
