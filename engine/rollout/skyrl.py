"""A generator for SkyRL: episodes in SkyRL-Gym's environments, drawn by a HybridActor.

    class Experiment(BasePPOExp):
        def get_generator(self, cfg, tokenizer, inference_engine_client):
            actor = HybridActor.from_pretrained(cfg.trainer.policy.model.path)
            turns = cfg.generator.max_turns
            return SkyRLGenerator(actor, cfg.environment.skyrl_gym, max_turns=turns)

Where the trained module lies in this process, `HybridActor.from_module` shares its weights and
nothing is copied. SkyRL's own trainer keeps the policy in other processes: then the actor has a
copy, which `update_weights` or `load` overwrites after every step; `copied` counts the bytes.

Source    SkyRL 0.3 and 0.4 (skyrl.train.generators: base, skyrl_gym_generator) and SkyRL-Gym 0.4,
          which is imported where it is used.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.completion import Completion
from fusedrl.engine.model.directories import resolve_directory
from fusedrl.engine.model.weights import opened
from fusedrl.engine.rollout.peers import ReceivedWeights, request_number, sampling_of


@dataclass(eq=False)
class _Episode:
    """One row of the input, on its way through its environment."""

    env: Any
    prompt: list[int]
    number: int  # its request id
    completion: Completion | None = None
    # (index of the last token of a turn, its reward)
    rewards: list[tuple[int, float]] = field(default_factory=list)
    stop_reason: str = "stop"
    done: bool = False


class SkyRLGenerator:
    """SkyRL's GeneratorInterface over an actor: it plays all episodes of a batch turn by turn,
    each turn in one batch, while what was said stays in the KV cache.

    Tokens are drawn and handed out as they are, and nothing is tokenised twice. The loss mask is 1
    for tokens that the model drew and 0 for observations; a turn's reward is at its last token.
    Draws depend on seed, step, phase and trajectory, so a resumed run draws the same.

    Args:
        actor: actor that generates. It needs a tokenizer with a chat template.
        environments: configurations of environments, by class as keys or as attributes, which
            `skyrl_gym.make` is given.
        max_turns: turns of an episode at most.
        max_tokens: tokens of a turn, where the sampling options do not say; None: what the model
            has room for.
        template: keywords for the chat template.
        seed: seed of the draws.
    Raises:
        ValueError: the actor has no tokenizer with a chat template.
    """

    def __init__(
        self,
        actor: HybridActor,
        environments: Any = None,
        *,
        max_turns: int = 1,
        max_tokens: int | None = None,
        template: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        if getattr(actor.tokenizer, "chat_template", None) is None:
            raise ValueError(
                "SkyRLGenerator: expected an actor whose tokenizer has a chat template, in which "
                "SkyRL's prompts are written; give it one: tokenizer.chat_template = ..."
            )
        given = environments or {}
        self.actor = actor
        self._environments = given if isinstance(given, Mapping) else vars(given)
        self._max_turns, self._max_tokens, self._seed = max_turns, max_tokens, seed
        self._template = dict(template or {})
        self._received = ReceivedWeights(actor)
        self._calls = 0

    # ---- weights ---------------------------------------------------------------------------------
    @property
    def copied(self) -> int:
        """Bytes of weights that were copied into the actor; 0 where it shares them."""
        return self._received.bytes

    def update_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Overwrite the actor's weights by whole tensors under Hugging Face's names. Raise
        ValueError if they are not those of the model; the actor then waits for an update that
        is."""
        self._received.restart()
        self._received.take(named)
        self._received.end()

    def load(self, directory: str | Path) -> None:
        """Overwrite the actor's weights by those of a directory in safetensors, such as SkyRL's
        `save_hf_model` writes. Errors are those of `update_weights`."""

        def tensors() -> Iterable[tuple[str, Tensor]]:
            for path in sorted(resolve_directory(directory).glob("*.safetensors")):
                with opened(path) as file:
                    for name in file.keys():  # noqa: SIM118 (a file, not a mapping)
                        yield name, file.get_tensor(name)

        self.update_weights(tensors())

    # ---- episodes --------------------------------------------------------------------------------
    async def generate(self, input_batch: Mapping[str, Any], **_: Any) -> dict[str, Any]:
        """Return SkyRL's GeneratorOutput for its GeneratorInput: a row an episode, in order.

        Raises:
            ValueError: sampling options that cannot be followed, an environment that rewrites
                what the model said, or a prompt that leaves no room for an answer.
            RuntimeError: the last update of the weights is not whole.
        """
        self._received.require()
        params = sampling_of(
            {"seed": self._seed, **(input_batch.get("sampling_params") or {})},
            self._max_tokens or self.actor.decoder.config.max_positions,
        )
        episodes = await self._begin(input_batch)
        try:
            for _turn in range(self._max_turns):
                if not (live := [episode for episode in episodes if not episode.done]):
                    break
                limits = [self._limited(episode, params) for episode in live]
                outs = await asyncio.to_thread(
                    self.actor.generate,
                    [e.prompt if e.completion is None else e.completion for e in live],
                    limits,
                    [episode.number for episode in live],
                )
                await asyncio.gather(
                    *[
                        self._answer(episode, completion)
                        for episode, (completion,) in zip(live, outs, strict=True)
                    ]
                )
            return self._output(episodes)
        finally:
            for episode in episodes:
                await asyncio.to_thread(episode.env.close)

    async def _begin(self, batch: Mapping[str, Any]) -> list[_Episode]:
        import skyrl_gym

        count = len(batch["prompts"])
        meta, self._calls = batch.get("batch_metadata"), self._calls + 1
        where = ("call", self._calls) if meta is None else (meta.training_phase, meta.global_step)
        trajectories = batch.get("trajectory_ids") or [None] * count
        extras = batch.get("env_extras") or [{}] * count
        episodes = []
        for row in range(count):
            kind, one = batch["env_classes"][row], trajectories[row]
            env = skyrl_gym.make(
                kind,
                env_config=self._environments.get(kind, {}),
                extras={**extras[row], "max_turns": self._max_turns},
            )
            messages, _ = await asyncio.to_thread(env.init, batch["prompts"][row])
            which = (row,) if one is None else (one.instance_id, one.repetition_id)
            prompt = self._ids(messages, add_generation_prompt=True)
            episodes.append(_Episode(env, prompt, request_number(*where, *which)))
        return episodes

    def _limited(self, episode: _Episode, params: Any) -> Any:
        """Return the options of an episode's next turn: what its tokens leave room for."""
        said = episode.completion
        used = len(episode.prompt) + (0 if said is None else len(said.token_ids))
        room = self.actor.decoder.config.max_positions - used
        if room < 1:
            raise ValueError(
                f"SkyRLGenerator: a prompt of {used} tokens leaves no room in the model's "
                f"{self.actor.decoder.config.max_positions} positions; shorten the prompts"
            )
        changed = {"max_new_tokens": min(params.max_new_tokens, room)}
        changed["min_new_tokens"] = min(params.min_new_tokens, changed["max_new_tokens"])
        return type(params)(**{**vars(params), **changed})

    async def _answer(self, episode: _Episode, completion: Completion) -> None:
        """Give the environment a turn, and take its reward and its observations."""
        said = 0 if episode.completion is None else len(episode.completion.token_ids)
        episode.completion = completion
        text = self.actor.tokenizer.decode(completion.token_ids[said:], skip_special_tokens=True)
        step = await asyncio.to_thread(episode.env.step, text)
        if step.get("postprocessed_action") is not None:
            raise ValueError(
                f"SkyRLGenerator: the environment {type(episode.env).__name__} rewrites what the "
                "model said, so the tokens that were drawn would not be those that are trained; "
                "use stop strings instead"
            )
        reward = float(step["reward"] or 0.0)
        if not math.isfinite(reward):
            raise ValueError(
                f"SkyRLGenerator: the environment {type(episode.env).__name__} gave the reward "
                f"{reward}; expected a finite number"
            )
        episode.rewards.append((len(completion.token_ids) - 1, reward))
        episode.stop_reason = "length" if completion.finish_reason == "length" else "stop"
        episode.done = bool(step["done"]) or episode.stop_reason == "length"
        if episode.done:
            return
        ended = completion.token_ids[-1] == self.actor.tokenizer.eos_token_id
        observed = self._observed(step["observations"], ended)
        total = len(episode.prompt) + len(completion.token_ids) + len(observed)
        if total >= self.actor.decoder.config.max_positions:
            episode.done, episode.stop_reason = True, "length"
        else:
            episode.completion = self.actor.extend(completion, observed)

    def _ids(self, messages: Any, **options: Any) -> list[int]:
        encoded = self.actor.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, **options, **self._template
        )
        return list(encoded["input_ids"])

    def _observed(self, messages: Any, ended: bool) -> list[int]:
        """Return the tokens from the end of a turn of the model up to where its next one begins.
        They are those that the template puts there in any conversation. `ended`: whether the model
        drew the EOS of its turn; a stop string has none."""
        before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        start = self._ids(before)
        whole = self._ids([*before, *messages], add_generation_prompt=True)
        eos = self.actor.tokenizer.eos_token_id
        # what follows the EOS that ends a turn, such as a line break, was not drawn
        while start and eos in start and start[-1] != eos:
            start.pop()
        if not ended and start and start[-1] == eos:
            start.pop()
        if whole[: len(start)] != start:
            raise ValueError(
                "SkyRLGenerator: the chat template writes a conversation differently once it goes "
                "on, so that observations cannot follow the tokens that were drawn; play episodes "
                "of one turn, or change the template"
            )
        return whole[len(start) :]

    def _output(self, episodes: list[_Episode]) -> dict[str, Any]:
        found = []
        for episode in episodes:
            if (completion := episode.completion) is None:
                raise ValueError(f"SkyRLGenerator: expected max_turns >= 1, got {self._max_turns}")
            # observations after the last turn belong to no answer
            length = episode.rewards[-1][0] + 1
            mask = completion.action_mask or [True] * len(completion.token_ids)
            rewards = [0.0] * length
            for at, reward in episode.rewards:
                rewards[at] += reward
            found.append(
                {
                    "prompt_token_ids": episode.prompt,
                    "response_ids": list(completion.token_ids[:length]),
                    "rewards": rewards,
                    "loss_masks": [int(chosen) for chosen in mask[:length]],
                    "stop_reasons": episode.stop_reason,
                    "rollout_logprobs": list(completion.logprobs[:length]),
                    "env_metrics": episode.env.get_metrics(),
                }
            )
        totals = [sum(row["rewards"]) for row in found]
        output: dict[str, Any] = {key: [row[key] for row in found] for key in found[0]}
        return output | {
            "rollout_metrics": {
                "generate/avg_num_tokens": sum(len(r["response_ids"]) for r in found) / len(found),
                "generate/avg_score": sum(totals) / len(found),
            },
            **dict.fromkeys(
                (
                    "trajectory_ids",
                    "trajectory_generation_times",
                    "trajectory_time_splits",
                    "rollout_expert_indices",
                    "rollout_sample_support",
                    "is_last_step",
                    "pixel_values",
                    "image_grid_thw",
                )
            ),
        }
