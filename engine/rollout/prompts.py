"""The prompts of a stage that samples: encoded, and short enough to leave room for a completion."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.errors import ConfigError
from fusedrl.engine.config import GenerationConfig
from fusedrl.engine.data.mixture import Mixture, mix
from fusedrl.engine.data.readers import ReadOptions, Source, load_prompts
from fusedrl.engine.data.tokenize import count_tokens, encode_prompts, without_template
from fusedrl.engine.model.configuration import ModelConfig
from fusedrl.engine.rollout.sampled import Prompt
from fusedrl.engine.runs.run import Run


class NamesPrompts(Protocol):
    """Configuration that names prompts."""

    @property
    def data(self) -> str: ...
    @property
    def generation(self) -> GenerationConfig: ...
    @property
    def max_prompt_length(self) -> int | None: ...
    @property
    def skip_bad_lines(self) -> bool: ...


def read_prompts(config: NamesPrompts, actor: HybridActor, run: Run) -> Mixture[Prompt]:
    """Read the prompts of config.data that leave room for max_new_tokens and are no longer than
    max_prompt_length. Prompts that are too long are dropped, and a message gives their number.

    Raises:
        ConfigError: max_new_tokens leaves no room for any prompt, or a stop token is outside the
            vocabulary.
        DataError, OSError: the data cannot be read; the message says why.
    """
    check_stop_tokens(
        "generation.stop_token_ids", config.generation.stop_token_ids, actor.decoder.config
    )
    room = room_for_prompts(actor.decoder.config, config.generation.max_new_tokens)

    def read(source: Source) -> list[Prompt]:
        examples = load_prompts(
            source,
            skip_bad_lines=config.skip_bad_lines,
            rejects=run.rejects(),
            options=ReadOptions(count_tokens=partial(count_tokens, actor.tokenizer)),
        )
        encoded, dropped = encode_prompts(
            actor.tokenizer, examples, min(room, config.max_prompt_length or room)
        )
        run.message(f"prompts: {dropped}")
        if told := without_template(actor.tokenizer, (example.prompt for example, _ in encoded)):
            run.message(f"prompts: {told}")
        return [Prompt(example.prompt, ids, example.columns) for example, ids in encoded]

    return mix(config.data, read)


def room_for_prompts(model: ModelConfig, max_new_tokens: int) -> int:
    """Return the largest number of tokens of a prompt that leaves room for its completion. Raise
    ConfigError if there is none."""
    if (room := model.max_positions - max_new_tokens) < 1:
        raise ConfigError(
            f"generation.max_new_tokens = {max_new_tokens} leaves no room for a prompt in the "
            f"model's {model.max_positions} positions; lower it"
        )
    return room


def longest_of(prompts: Mixture[Prompt]) -> int:
    """Return the number of tokens of the longest prompt."""
    return max(len(prompt.ids) for prompt in prompts.examples)


def check_stop_tokens(option: str, ids: Sequence[int], model: ModelConfig) -> None:
    """Raise ConfigError if a stop token id is outside the model's vocabulary. The message names the
    option."""
    if bad := [token for token in ids if not 0 <= token < model.vocab_size]:
        raise ConfigError(
            f"{option}: expected token ids below the {model.vocab_size} of the model's vocabulary, "
            f"got {bad[0]}"
        )
