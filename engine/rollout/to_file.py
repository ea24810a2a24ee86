"""Completions of many prompts, written to a file as JSON lines.

While it is written, FILE.part holds the completions of every finished prompt, below a line that
says how they were made. A later call with the same settings goes on from there; draws depend on the
seed and the number of the prompt, so the file is the same as without the interruption (on a CPU to
the bit). FILE appears at the end, whole and in the order of the prompts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from fusedrl.engine.actor import HybridActor
from fusedrl.engine.base.completion import Completion
from fusedrl.engine.base.errors import ConfigError, DataError, SetupError
from fusedrl.engine.data.records import PromptExample
from fusedrl.engine.data.tokenize import encode_prompt
from fusedrl.engine.generation.sampler import SamplingParams


@dataclass(frozen=True)
class Written:
    """Size of what a call has written.

    Attributes:
        prompts, completions: in the file.
        resumed: prompts that an earlier call had finished.
        tokens: tokens that this call has drawn.
        seconds: of this call.
    """

    prompts: int
    completions: int
    resumed: int
    tokens: int
    seconds: float


def encode_all(
    actor: HybridActor, examples: Sequence[PromptExample], limit: int
) -> tuple[dict[int, list[int]], int]:
    """Return {number of the prompt: token ids} of the prompts of at most `limit` tokens, and how
    many are longer.

    Raises:
        DataError: a prompt cannot be encoded (messages without a chat template, or that it
            refuses); the message gives its number, from 1. All prompts are longer.
    """
    found: dict[int, list[int]] = {}
    for number, example in enumerate(examples):
        try:
            found[number] = encode_prompt(
                actor.tokenizer, example.prompt, example.columns.get("tools")
            )
        except DataError as error:
            raise DataError(f"prompt {number + 1}: {error}") from error
    kept = {number: ids for number, ids in found.items() if len(ids) <= limit}
    if not kept:
        raise DataError(
            f"all {len(found)} prompts are longer than {limit} tokens (the shortest has "
            f"{min(map(len, found.values()))}), which with --max_new_tokens fill the model's "
            "positions; shorten them, or lower it"
        )
    return kept, len(found) - len(kept)


def generate_to_file(
    actor: HybridActor,
    examples: Sequence[PromptExample],
    prompt_ids: Mapping[int, list[int]],
    params: SamplingParams,
    file: str | Path,
    settings: Mapping[str, Any],
    *,
    logprobs: bool = False,
    told: Callable[[int, int], None] = lambda prompts, tokens: None,
) -> Written:
    """Complete prompts and write a file of JSON lines, one for each completion: the row's columns,
    prompt, completion, index (of the prompt, from 0), sample, finish_reason, prompt_tokens and
    completion_tokens.

    Args:
        prompt_ids: {index of the example: token ids} of the prompts to complete.
        settings: JSON values that say how completions are made. A file that other settings have
            begun is not gone on with.
        logprobs: write completion_ids and logprobs as well, one for each token, in nats.
        told: is called after every prompt with the numbers of new prompts and new tokens so far.
    Raises:
        ConfigError: the file exists, or other settings have begun it.
        SetupError: another process writes it.
    """
    path, began = Path(file), time.monotonic()
    if path.exists():
        raise ConfigError(f"{path} exists; name another file, or remove it first")
    part, count = path.with_name(path.name + ".part"), params.n
    with _begun(part, settings) as out:
        places = _finished(out, count)
        places = {index: place for index, place in places.items() if index in prompt_ids}
        resumed, tokens = len(places), 0
        left = [index for index in sorted(prompt_ids) if index not in places]
        waiting: dict[int, list[Completion]] = {}
        stream = actor.stream([prompt_ids[index] for index in left], params, left) if left else ()
        for number, _, completion in stream:
            index = left[number]
            waiting.setdefault(index, []).append(completion)
            tokens += len(completion.token_ids)
            if len(waiting[index]) == count:
                group = sorted(waiting.pop(index), key=lambda one: one.sample)
                lines = [_line(examples[index], index, one, logprobs) for one in group]
                places[index] = _append(out, "".join(lines).encode())
                told(len(places) - resumed, tokens)
        _in_order(out, places, path)
    part.unlink()
    return Written(len(places), len(places) * count, resumed, tokens, time.monotonic() - began)


def _line(example: PromptExample, index: int, completion: Completion, logprobs: bool) -> str:
    row: dict[str, Any] = example.columns | {
        "prompt": example.prompt,
        "completion": completion.text
        if isinstance(example.prompt, str)
        else [{"role": "assistant", "content": completion.text}],
        "index": index,
        "sample": completion.sample,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(completion.prompt_ids),
        "completion_tokens": len(completion.token_ids),
    }
    if logprobs:
        row |= {"completion_ids": completion.token_ids, "logprobs": completion.logprobs}
    return json.dumps(row, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _begun(part: Path, settings: Mapping[str, Any]) -> Iterator[BinaryIO]:
    """Open the unfinished file, alone, behind its first line."""
    with open(part, "a+b") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SetupError(f"another process is writing {part}; let it come to an end") from error
        out.seek(0)
        first = out.readline()
        if not first.endswith(b"\n"):  # new, or cut off within its first line
            out.truncate(0)
            _append(out, json.dumps({"settings": settings}).encode() + b"\n")
            first = json.dumps({"settings": settings}).encode()
        try:
            before = json.loads(first)["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{part} is in the way, and was not written by this command; move it"
            ) from error
        now = json.loads(json.dumps(settings))
        for name in {**now, **before}:
            if now.get(name) != before.get(name):
                raise ConfigError(
                    f"{part} was begun with {name} = {before.get(name)!r}, and it is "
                    f"{now.get(name)!r} now; go on with the same options, or remove that file"
                )
        out.seek(len(first.rstrip(b"\n")) + 1)
        yield out


def _finished(out: BinaryIO, count: int) -> dict[int, tuple[int, int]]:
    """Return {index of a prompt: (offset, bytes) of its lines} of the prompts whose completions are
    all there, and cut off what is behind the last of them: a write that was interrupted."""
    places: dict[int, tuple[int, int]] = {}
    start = good = out.tell()
    rows: list[int] = []
    for line in iter(out.readline, b""):
        try:
            rows.append(json.loads(line)["index"] if line.endswith(b"\n") else -1)
        except (ValueError, KeyError, TypeError):
            break
        if len(set(rows)) > 1 or rows[0] < 0:
            break
        if len(rows) == count:
            places[rows[0]] = (start, out.tell() - start)
            start = good = out.tell()
            rows = []
    out.truncate(good)
    return places


def _append(out: BinaryIO, data: bytes) -> tuple[int, int]:
    out.seek(0, os.SEEK_END)
    place = out.tell()
    out.write(data)
    out.flush()
    return place, len(data)


def _in_order(out: BinaryIO, places: Mapping[int, tuple[int, int]], path: Path) -> None:
    """Write the file in the order of the prompts, and put it in its place once it is whole."""
    whole = path.with_name(path.name + ".whole")
    with open(whole, "wb") as target:
        for index in sorted(places):
            offset, size = places[index]
            out.seek(offset)
            target.write(out.read(size))
        target.flush()
        os.fsync(target.fileno())
    os.replace(whole, path)


def weights_of(directory: Path) -> list[list[Any]]:
    """Return name, size and time of a model's files of weights, by which other weights under the
    same name are told apart."""
    return [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(directory.glob("*.safetensors"))
    ]


def sampling_settings(params: SamplingParams) -> dict[str, Any]:
    """Return the sampling parameters as JSON values."""
    return json.loads(json.dumps(vars(replace(params, logit_bias=()))))
