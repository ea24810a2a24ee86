"""A completion of a prompt, as generation hands it out and packing takes it in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Completion:
    """One completion of one prompt. Given to `generate` as a prompt, it is continued.

    Attributes:
        token_ids: with the token that ended it.
        logprobs: of the temperature-scaled full distribution (at temperature 0: of T = 1); where
            `kept` was asked for, of the distribution over the kept ids.
        weights_versions: of the weights that drew each token.
        finish_reason: "stop" (an EOS, a stop token, a stop string), "length" (max_new_tokens) or
            "aborted".
        sample: its index among the completions of its prompt.
        action_mask: False for tokens that the policy did not choose (`extend`), with logprob 0;
            None: it chose all.
        values: of the state that drew each token, by an actor with a value head; 0 where the policy
            did not choose. None: some tokens have none.
        kept: where it was asked for, the ids that each token was drawn from, ascending; an empty
            list stands for the whole vocabulary.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str
    weights_versions: list[int]
    sample: int = 0
    action_mask: list[bool] | None = None
    values: list[float] | None = None
    kept: list[Sequence[int]] | None = None

    def extend(self, token_ids: Sequence[int], weights_version: int = 0) -> Completion:
        """The same with observation tokens behind it: a tool's answer, the user's next turn. They
        are no actions."""
        added = [int(token) for token in token_ids]
        mask = self.action_mask if self.action_mask is not None else [True] * len(self.token_ids)
        return replace(
            self,
            token_ids=[*self.token_ids, *added],
            logprobs=[*self.logprobs, *([0.0] * len(added))],
            text="",
            weights_versions=[*self.weights_versions, *([weights_version] * len(added))],
            action_mask=[*mask, *([False] * len(added))],
            values=None if self.values is None else [*self.values, *([0.0] * len(added))],
            kept=None if self.kept is None else [*self.kept, *([()] * len(added))],
        )
