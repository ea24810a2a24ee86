"""Completions of prompts, or trajectories where an environment answers: what rollouts and
evaluations draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.completion import Completion
from fusedrl.engine.config.turns import TurnsConfig
from fusedrl.engine.generation.drafts import Drafts
from fusedrl.engine.generation.generator import Finished
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.rewards.environments import Environments
from fusedrl.engine.rollout.turns import Episode, Played, play


@dataclass(frozen=True)
class Prompt:
    """Prompt ready to generate from: its text or messages as in the data, its token ids, and the
    other columns of its data row, which are passed to the rewards."""

    prompt: Any
    ids: list[int]
    columns: dict[str, Any]


@dataclass(frozen=True)
class Sampled:
    """Completions of some prompts, n of each next to one another, in order; of trajectories with
    the prompts that they began with."""

    prompts: list[Prompt]
    completions: list[Completion]
    episodes: list[Episode | None]
    played: Played | None = None


def sample_prompts(
    actor: HybridActor,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    request_ids: Sequence[int],
    environments: Environments | None = None,
    turns: TurnsConfig | None = None,
    finished: Callable[[int, int, Prompt, Completion, Episode | None], None] | None = None,
    drafts: Drafts | None = None,
) -> Sampled:
    """Sample `params.n` completions of each prompt, or trajectories with an environment.

    Args:
        finished: called with the index of the prompt, the number of the sample, the prompt, the
            completion and the trajectory of each that has finished.
        drafts: what next tokens of completions are guessed from; not those of trajectories.
    """
    if environments is None:

        def hear(done: Finished) -> None:
            if finished is not None:
                one = prompts[done.prompt]
                finished(done.prompt, done.sample, one, done.completion, None)

        ids = [p.ids for p in prompts]
        heard = hear if finished else None
        outs = actor.generate(ids, params, request_ids, finished=heard, drafts=drafts)
        each = [prompt for prompt, group in zip(prompts, outs, strict=True) for _ in group]
        flat = [completion for group in outs for completion in group]
        return Sampled(each, flat, [None] * len(flat))

    def began(index: int, one: Episode) -> Prompt:
        return Prompt(one.prompt, one.completion.prompt_ids, prompts[index].columns)

    def ended(index: int, number: int, one: Episode) -> None:
        if finished is not None and not one.invalid:
            finished(index, number, began(index, one), one.completion, one)

    rows = [{"prompt": p.prompt} | p.columns for p in prompts]
    played = play(actor, rows, environments, turns or TurnsConfig(), params, request_ids, ended)
    return Sampled(
        [began(index, one) for index, group in enumerate(played.groups) for one in group],
        [one.completion for group in played.groups for one in group],
        [one for group in played.groups for one in group],
        played,
    )
