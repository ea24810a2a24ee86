"""Record types that data is read into, one for each use. A `Prompt` is a text, or a list of
messages that the chat template renders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# {"role", "content"} each; an assistant's may call tools instead ("tool_calls"), and a tool answers
# as role "tool"
Messages = list[dict[str, Any]]
Prompt = str | Messages
Tools = list[Any]  # JSON schemas, objects each, for the chat template


@dataclass(frozen=True)
class PromptExample:
    """A prompt and the other columns of its row, which are passed to the rewards ("tools" also to
    the chat template)."""

    prompt: Prompt
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Demonstration:
    """A prompt ("" for plain text) and the completion that should follow it."""

    prompt: Prompt
    completion: str
    tools: Tools | None = None


@dataclass(frozen=True)
class Dialogue:
    """A whole conversation; every turn of the assistant is to be learned."""

    messages: Messages
    tools: Tools | None = None


@dataclass(frozen=True)
class PairExample:
    """A prompt with a preferred and a rejected answer.

    Attributes:
        margin: by how much the preferred answer should score higher (Llama 2).
        label: the probability that `chosen` is the better one: 1, or 0.5 for a tie.
        weight: weight of the pair in a mean.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float = 0.0
    label: float = 1.0
    weight: float = 1.0
    tools: Tools | None = None


@dataclass(frozen=True)
class RankedExample:
    """A prompt with K >= 2 answers in an order: rank 1 is best, equal ranks are ties. Pass `ranks`
    to kwise_ranking_loss."""

    prompt: Prompt
    completions: tuple[str, ...]
    ranks: tuple[int, ...]
    tools: Tools | None = None

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Return (better, worse) for all pairs that are not ties."""
        order = range(len(self.ranks))
        return ((i, j) for i in order for j in order if self.ranks[i] < self.ranks[j])


@dataclass(frozen=True)
class UnpairedExample:
    """A prompt with one answer, wanted or not."""

    prompt: Prompt
    completion: str
    label: bool
    tools: Tools | None = None


@dataclass(frozen=True)
class StepExample:
    """A prompt with the steps of one answer, each right or wrong."""

    prompt: Prompt
    steps: tuple[str, ...]
    labels: tuple[bool, ...]


@dataclass(frozen=True)
class ScoredExample:
    """A prompt with one answer and the scores that people gave the answer on each scale."""

    prompt: Prompt
    completion: str
    scores: dict[str, float]


@dataclass(frozen=True)
class AnsweredExample:
    """A prompt with answers to look at, and the other columns of its row.

    Attributes:
        ranks: rank of each answer, 1 is best; empty if the data does not compare them.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    ranks: tuple[int, ...] = ()
    columns: dict[str, Any] = field(default_factory=dict)
