"""Completion of a prompt, which generation returns and PackedBatch packs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Completion:
    """One completion of one prompt. Pass it to `generate` as a prompt to continue it.

    Attributes:
        token_ids: ids of the completion, including the token that ended it.
        logprobs: log-probability of each token under the temperature-scaled full distribution (at
            temperature 0: T = 1). If `kept` was requested, under the distribution over the kept
            ids.
        weights_versions: version of the weights that drew each token.
        finish_reason: "stop" (an EOS, a stop token, a stop string), "length" (max_new_tokens) or
            "aborted".
        sample: index of this completion among those of its prompt.
        action_mask: False for tokens that the policy did not choose (`extend`), whose logprob is 0.
            None: the policy chose all tokens.
        values: value of the state before each token, if the actor has a value head; 0 for tokens
            that the policy did not choose. None: some tokens have no value.
        kept: if requested, the ids that each token was drawn from (those that top-k, top-p or min-p
            left), ascending. An empty list stands for the whole vocabulary.
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

    @property
    def actions(self) -> list[int]:
        """Ids of the tokens that the policy chose."""
        if self.action_mask is None:
            return self.token_ids
        return [t for t, chosen in zip(self.token_ids, self.action_mask, strict=True) if chosen]

    def extend(self, token_ids: Sequence[int], weights_version: int = 0) -> Completion:
        """Return this completion followed by observation tokens (a tool's answer, the user's next
        turn), which are not actions."""
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
