"""Open call: prompts are added to it while others are generated, such as the next turns of
conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusedrl.engine.base.completion import Completion
from fusedrl.engine.generation.generator import Generator, Ticket
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.generation.texts import Texts


class OpenCall:
    """Call to a generator that never ends by itself. Whoever opened it closes it, which discards
    what is unfinished."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._texts = Texts(generator.tokenizer)
        self._tickets: list[Ticket] = []
        self._numbers: dict[tuple[int, int, int], int] = {}
        self._next = 0

    def add(
        self,
        prompts: Sequence[Any],
        params: Sequence[SamplingParams],
        request_ids: Sequence[int],
    ) -> list[int]:
        """Queue prompts; arguments and errors are those of `HybridActor.generate`. Return a number
        for each completion that will come, n for a prompt, in order."""
        ticket, sequences = self._generator.prepare(prompts, params, request_ids)
        numbers = list(range(self._next, self._next + len(sequences)))
        self._next += len(sequences)
        for number, sequence in zip(numbers, sequences, strict=True):
            self._numbers[id(ticket), sequence.request.index, sequence.sample] = number
        self._generator.enqueue(ticket, sequences)
        self._tickets.append(ticket)
        return numbers

    def step(self) -> list[tuple[int, Completion]]:
        """Compute a step, and return the completions that have finished, with their numbers.

        Raises:
            RuntimeError: a step failed, here or in another call.
        """
        out = []
        for ticket, done in self._generator.advance(self._tickets):
            number = self._numbers.pop((id(ticket), done.prompt, done.sample))
            out.append((number, done.completion))
        for ticket in [one for one in self._tickets if not one.live]:
            self._leave(ticket)
        return out

    def text(self, before: list[int], token_ids: list[int]) -> str:
        """Return the text that tokens add to those before them; "" without a tokenizer."""
        return "" if self._texts.tokenizer is None else self._texts.text(before, token_ids)

    def close(self) -> None:
        """Discard what is unfinished."""
        for ticket in list(self._tickets):
            self._leave(ticket)

    def _leave(self, ticket: Ticket) -> None:
        self._tickets.remove(ticket)
        ticket.closed = True
        self._generator.abort(ticket)
