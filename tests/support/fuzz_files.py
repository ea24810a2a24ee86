"""Fuzzers of everything that is read from a file somebody else wrote: weights, their index,
config.json, tokenizers, GGUF, adapters, data, manifests of checkpoints.

    python -m tests.support.fuzz_files corpus                      # write tests/corpus again
    python -m tests.support.fuzz_files run config --minutes 10     # with atheris, where installed
    python -m tests.support.fuzz_files run config --minutes 1 --own --seed 3

A reader may refuse a file with one of the errors that it promises, and nothing else: no other
exception, no crash, no gigabytes. `run` guides itself by the lines of fusedrl that an input reaches
where the package atheris is installed (`pip install atheris`); otherwise, and in the suite, inputs
of the corpus are changed at random. What was found stays in the corpus.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

CORPUS = Path(__file__).resolve().parents[1] / "corpus"
SIZES = {"hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1, "head_dim": 4}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}
GIB = 1 << 30
MOST_GIB = 3  # of address space beyond what the process has at its start
LONGEST = 1 << 14
# What is put into inputs: what parsers stumble over.
WORDS = (b"null", b"true", b"NaN", b"1e999", b"-1", b"0", b"9" * 30, b'""', b"[]", b"{}", b"[[[[")
WORDS += (b'"\\ud800"', b"\xff\xfe", b"\0", b"\n", b"../", b'"a":', b",", b"}", b"]")
WORDS += ((2**63).to_bytes(8, "little"),)


# ---- what is read --------------------------------------------------------------------------------
def _config(directory: Path) -> None:
    from fusedrl.engine.model.weights import load_config

    load_config(directory)


def _weights(directory: Path) -> None:
    from fusedrl.engine.model.weights import load_decoder

    load_decoder(directory, device="cpu")


def _tokenizer(directory: Path) -> None:
    from fusedrl.engine.model.weights import load_tokenizer

    load_tokenizer(directory)


def _gguf(directory: Path) -> None:
    (directory / "config.json").unlink(missing_ok=True)
    (directory / "model.safetensors").unlink(missing_ok=True)
    _weights(directory)
    raise AssertionError("a GGUF file was taken for a model")


def _adapter(directory: Path) -> None:
    from fusedrl.engine.model.lora_files import load_adapter
    from fusedrl.engine.model.weights import load_decoder

    load_adapter(load_decoder(directory, device="cpu"), directory / "adapter")


def _lines(directory: Path) -> None:
    from fusedrl.engine.data import readers

    path = directory / "data.jsonl"
    for load in (readers.load_prompts, readers.load_demonstrations, readers.load_pairs):
        with contextlib.suppress(ValueError):
            load(path)
    readers.load_dialogues(path)


def _manifest(directory: Path) -> None:
    from fusedrl.engine.runs.checkpoint import latest_checkpoint

    latest_checkpoint(directory / "run")


# name -> (file that the input is written to, what reads it)
TARGETS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "config": ("config.json", _config),
    "safetensors": ("model.safetensors", _weights),
    "index": ("model.safetensors.index.json", _weights),
    "tokenizer": ("tokenizer.json", _tokenizer),
    "gguf": ("model.gguf", _gguf),
    "adapter": ("adapter/adapter_config.json", _adapter),
    "lines": ("data.jsonl", _lines),
    "manifest": ("run/checkpoints/step_00000001/MANIFEST.json", _manifest),
}
ALLOWED = (ValueError, FileNotFoundError)  # with UserError, DataError and CheckpointError


@contextlib.contextmanager
def room(target: str) -> Iterator[Callable[[bytes], bool]]:
    """Yield a function of an input: True if it was read, False if it was refused as promised.
    Every other exception goes through. The files around it are made once."""
    from tests.support.tiny import write_model

    name, read = TARGETS[target]
    with tempfile.TemporaryDirectory(prefix="fusedrl-fuzz-") as made:
        directory = Path(made)
        write_model(directory, **SIZES)
        _beside(directory, target)
        path = directory / name
        whole = {found: found.read_bytes() for found in directory.rglob("*") if found.is_file()}

        def attempt(data: bytes) -> bool:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.parent.name.startswith("step_"):
                for found, content in whole.items():
                    if found.parent == path.parent:
                        found.write_bytes(content)
            path.write_bytes(data)
            try:
                read(directory)
            except ALLOWED:
                return False
            return True

        yield attempt


def _beside(directory: Path, target: str) -> None:
    """Write what stands beside a target's file."""
    import torch

    from fusedrl.engine.runs.checkpoint import save_checkpoint

    if target == "manifest":
        save_checkpoint(directory / "run", 1, {"model": {"a": torch.ones(3)}}, {"step": 1})
    if target == "adapter":
        _save_adapter(directory)


def _save_adapter(directory: Path) -> None:
    from fusedrl.engine.config import LoRAConfig
    from fusedrl.engine.model.lora import add_adapter
    from fusedrl.engine.model.lora_files import save_adapter
    from fusedrl.engine.model.weights import load_decoder

    decoder = load_decoder(directory, device="cpu")
    add_adapter(decoder, LoRAConfig(rank=1, targets=("q_proj", "down_proj")))
    save_adapter(decoder, directory / "adapter", base_model="m")


# ---- the corpus ----------------------------------------------------------------------------------
def seeds() -> dict[str, list[bytes]]:
    """Return whole inputs for each target, small ones."""
    from tests.support.tiny import CONFIG, write_model

    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        write_model(directory, **SIZES)
        for name in TARGETS:
            _beside(directory, name)
        found = {
            name: [(directory / file).read_bytes()]
            for name, (file, _) in TARGETS.items()
            if (directory / file).is_file()
        }
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    families = [{"model_type": "gemma3_text", "sliding_window_pattern": 2}, {"rope_scaling": rope}]
    families += [{"model_type": "gpt2", "n_embd": 8}]
    families += [{"model_type": name} for name in ("phi3", "smollm3")]
    found["config"] += [json.dumps(CONFIG | SIZES | one).encode() for one in families]
    header = found["safetensors"][0][8 : 8 + int.from_bytes(found["safetensors"][0][:8], "little")]
    index = {"metadata": {}, "weight_map": dict.fromkeys(json.loads(header), "model.safetensors")}
    index["weight_map"].pop("__metadata__", None)
    found["index"] = [json.dumps(index).encode(), b'{"weight_map": {"a": "../x"}}']
    found["gguf"] = [b"GGUF\x03\0\0\0" + b"\0" * 16, b"GGUF" + b"\xff" * 60]
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": [{"role": "user", "content": "a"}]}]
    rows += [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"question": "q", "answer": "#### 1"}]
    turns = (("user", "a"), ("assistant", "b"))
    rows += [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    found["lines"] = [json.dumps(row).encode() + b"\n" for row in rows]
    found["lines"].append(b"\xef\xbb\xbf" + b"".join(found["lines"]))
    return found


def write_corpus() -> None:
    """Write the seeds; what a fuzzer found (names that begin with found) stays."""
    for target, inputs in seeds().items():
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(inputs):
            (CORPUS / target / f"seed{number}").write_bytes(data)


def corpus(target: str) -> list[bytes]:
    """Return the inputs of a target, in the order of their names."""
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]


def changed(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """Return an input with one to four changes."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at, way = chance.randrange(len(found) + 1), chance.randrange(7)
        if way == 0 and found:
            found[at % len(found)] ^= 1 << chance.randrange(8)
        elif way == 1:
            found[at:at] = chance.choice(WORDS)
        elif way == 2:
            word = chance.choice(WORDS)
            found[at : at + len(word)] = word
        elif way == 3:
            del found[at : at + chance.choice((1, 2, 8, 64))]
        elif way == 4:
            del found[at:]
        elif way == 5:
            other = chance.choice(others)
            begin = chance.randrange(len(other) + 1)
            found[at:at] = other[begin : begin + chance.choice((4, 16, 64))]
        else:
            found[at:at] = found[at : at + 16] * chance.choice((1, 2, 50))
    return bytes(found[:LONGEST])


# ---- running -------------------------------------------------------------------------------------
def own(target: str, seed: int, inputs: int, minutes: float) -> tuple[int, int]:
    """Read the corpus, and then changed inputs, until `inputs` were read or the time is up. Return
    how many were tried, and how many were read without a complaint."""
    chance, known = random.Random(f"{target} {seed}"), corpus(target)
    tried, fine, began = 0, 0, time.monotonic()
    with room(target) as attempt:
        while tried < inputs and time.monotonic() - began < 60 * minutes:
            data = chance.choice(known) if tried >= len(known) else known[tried]
            data = changed(data, known, chance) if tried >= len(known) else data
            tried += 1
            try:
                fine += attempt(data)
            except BaseException:
                Path("crash").write_bytes(data)
                raise
    return tried, fine


def guided(target: str, minutes: float) -> None:
    """Let atheris make the inputs; libFuzzer ends the process when the time is up."""
    import atheris

    with atheris.instrument_imports(include=["fusedrl"]), room(target) as attempt:
        attempt(b"")  # imports what it reads with
        with tempfile.TemporaryDirectory() as new:
            shutil.copytree(CORPUS / target, new, dirs_exist_ok=True)
            limits = [f"-max_total_time={60 * minutes:.0f}", f"-rss_limit_mb={MOST_GIB * 1024}"]
            limits += ["-timeout=20", f"-max_len={LONGEST}", "-print_final_stats=1"]
            atheris.Setup([sys.argv[0], *limits, new], lambda data: attempt(data) and None)
            atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("corpus", "run"))
    parser.add_argument("target", nargs="?", choices=sorted(TARGETS))
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--own", action="store_true", help="without atheris")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    if options.what == "corpus":
        write_corpus()
    elif options.own:
        import torch  # noqa: F401 (its own memory is no input's)

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MOST_GIB * GIB,) * 2)
        print(*own(options.target, options.seed, 10**9, options.minutes))
    else:
        guided(options.target, options.minutes)


if __name__ == "__main__":
    main()
