"""Generation by several ranks: prompts are divided among the ranks, and every rank gets all
completions, in the order of the prompts.

Request ids travel with their prompts, so a rank draws the same completions as a single process
would. Ranks exchange tensors of numbers, and texts as JSON.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusedrl.engine.base.completion import Completion
from fusedrl.engine.generation.generator import Finished
from fusedrl.engine.generation.sampler import SamplingParams
from fusedrl.engine.parallel.lanes import deal
from fusedrl.engine.parallel.ranks import Ranks

Params = SamplingParams | Sequence[SamplingParams] | None
Hear = Callable[[Finished], None] | None
Generate = Callable[[Sequence[Any], Params, Sequence[int] | None, Hear], list[list[Completion]]]


def divided(
    ranks: Ranks,
    generate: Generate,
    prompts: Sequence[Any],
    params: Params,
    request_ids: Sequence[int] | None,
    finished: Hear = None,
) -> list[list[Completion]]:
    """Complete prompts as `HybridActor.generate` does, each prompt on one rank.

    The longest prompts are assigned first, each to the rank with the least work so far. No rank
    gets more than its share of prompts, so a cache for that many suffices. Errors are those of
    `generate` and of `Ranks.meet`.
    """
    ids = list(range(len(prompts))) if request_ids is None else list(request_ids)
    one = params if isinstance(params, SamplingParams) else SamplingParams()
    each = list(params) if isinstance(params, Sequence) else [one] * len(prompts)
    if not len(ids) == len(each) == len(prompts):
        return generate(
            prompts, params, request_ids, None
        )  # raises the error that says what is wrong
    costs = [
        (p.max_new_tokens + len(prompt)) * p.n for prompt, p in zip(prompts, each, strict=True)
    ]
    dealt = deal(costs, ranks.size, -(-len(prompts) // ranks.size))
    mine = dealt[ranks.rank]

    def hear(one: Finished) -> None:
        if finished is not None:
            finished(one._replace(prompt=mine[one.prompt]))

    outs = generate(
        [prompts[i] for i in mine], [each[i] for i in mine], [ids[i] for i in mine], hear
    )
    found: list[list[Completion]] = [[] for _ in prompts]
    for rank, (indices, groups) in enumerate(zip(dealt, gathered(ranks, outs), strict=True)):
        for index, group in zip(indices, groups, strict=True):
            found[index] = group
            ranks.drawn[rank] += sum(len(completion.token_ids) for completion in group)
    return found


def gathered(ranks: Ranks, outs: Sequence[Sequence[Completion]]) -> list[list[list[Completion]]]:
    """Return the completions of all ranks, in the order of the ranks. Errors are those of
    `Ranks.meet`."""
    flat = [completion for group in outs for completion in group]
    told = {
        "groups": [len(group) for group in outs],
        "completions": [
            [
                c.text,
                c.finish_reason,
                c.sample,
                len(c.prompt_ids),
                len(c.token_ids),
                c.action_mask is not None,
                c.values is not None,
                None if c.kept is None else [len(row) for row in c.kept],
            ]
            for c in flat
        ],
    }
    integers, numbers = array("q"), array("d")  # torch.tensor of a list takes ten times as long
    for c in flat:
        columns = (c.prompt_ids, c.token_ids, c.weights_versions, c.action_mask or ())
        for column in (*columns, *(c.kept or ())):
            integers.extend(column)
        numbers.extend(c.logprobs)
        numbers.extend(c.values or ())
    whole, real = _tensor(integers, torch.int64), _tensor(numbers, torch.float64)
    headers = ranks.gather("completions", json.dumps(told))
    wholes, reals = ranks.rows("token ids", whole), ranks.rows("log-probabilities", real)
    return [
        _unpacked(json.loads(header), one, other)
        for header, one, other in zip(headers, wholes, reals, strict=True)
    ]


def _tensor(numbers: array[Any], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype)


def _unpacked(told: dict[str, Any], whole: Tensor, real: Tensor) -> list[list[Completion]]:
    integers, numbers, at = whole.tolist(), real.tolist(), {"integers": 0, "numbers": 0}

    def take(name: str, count: int) -> list[Any]:
        start = at[name]
        at[name] += count
        return (integers if name == "integers" else numbers)[start : start + count]

    flat = []
    for text, reason, sample, prompt, new, masked, valued, kept in told["completions"]:
        c = Completion(
            take("integers", prompt),
            take("integers", new),
            take("numbers", new),
            text,
            reason,
            take("integers", new),
            sample,
        )
        mask = [bool(flag) for flag in take("integers", new)] if masked else None
        rows: list[Sequence[int]] | None = None
        if kept is not None:
            rows = [take("integers", count) for count in kept]
        values = take("numbers", new) if valued else None
        flat.append(replace(c, action_mask=mask, kept=rows, values=values))
    each = iter(flat)
    return [[next(each) for _ in range(count)] for count in told["groups"]]
