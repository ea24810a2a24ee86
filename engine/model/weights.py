"""Loading and saving of weights as Hugging Face directories. The Hugging Face names are views of
the fused parameters.

Loading copies one tensor at a time from the memory-mapped file into its view, so a load needs no
second copy of the model. Saving writes a temporary sibling of the directory and renames it, so the
final name never holds half a model.

One file: loading and saving use the same names.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fusedrl.engine.base.errors import check_no_pointer, of_the_machine
from fusedrl.engine.model.configuration import ModelConfig, model_config, read_json
from fusedrl.engine.model.decoder import Decoder, Layer
from fusedrl.engine.model.directories import (
    local_directory,
    no_model,
    resolve_config,
    resolve_directory,
)
from fusedrl.engine.model.lora import merging

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LONGEST_NAME = 255  # bytes of a file's name on Linux
_OURS = re.compile(
    r".*\.safetensors|.*\.safetensors\.index\.json|(config|adapter_config|generation_config|vocab|added_tokens|special_tokens_map)\.json"
    r"|tokenizer.*|merges\.txt|chat_template.*"
)
# Entries of a model's JSON files by which code would be fetched or run: classes, pipelines and
# decoding loops beside the weights, and attention from a hub.
_CODE_KEYS = (
    "auto_map",
    "custom_pipelines",
    "custom_generate",
    "trust_remote_code",
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
)
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

HEADS = ("lm_head.weight", "embed_out.weight")
_NORMS = {
    "pre": {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"},
    "post": {
        "attention_out_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    },
    "sandwich": {
        "input_norm": "input_layernorm",
        "attention_out_norm": "post_attention_layernorm",
        "post_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    },
}


# ---- names ---------------------------------------------------------------------------------------
def hf_views(decoder: Decoder) -> dict[str, Tensor]:
    """Return every parameter under its Hugging Face name, as a view of the fused storage without
    gradient. A tied head is left out.

    Some families order the rows of a parameter differently. Their views have three or four
    dimensions; `file_shape` gives the shape in a file.
    """
    c = decoder.config
    if c.model_type in _VIEWS:
        return _VIEWS[c.model_type](decoder)
    rows = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.head_dim)
    norms = _NORMS[c.norms]
    attention, mlp = (
        (("qkv",), ("gate_up",)) if c.family.fused else (("q", "k", "v"), ("gate", "up"))
    )
    views: dict[str, Tensor] = {"model.embed_tokens.weight": decoder.embedding}
    for index, layer in enumerate(cast(Iterable[Layer], decoder.layers)):
        at = f"model.layers.{index}."
        views |= {f"{at}{theirs}.weight": getattr(layer, ours) for ours, theirs in norms.items()}
        for kind, qkv, o, gate_up, down in (
            ("weight", layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj),
            ("bias", layer.qkv_bias, layer.o_bias, layer.gate_up_bias, layer.down_bias),
        ):
            if qkv is not None:
                parts = (qkv,) if c.family.fused else qkv.split(rows)
                views |= {
                    f"{at}self_attn.{n}_proj.{kind}": part
                    for n, part in zip(attention, parts, strict=True)
                }
            if gate_up is not None:
                parts = (gate_up,) if c.family.fused else gate_up.chunk(2)
                views |= {
                    f"{at}mlp.{n}_proj.{kind}": part for n, part in zip(mlp, parts, strict=True)
                }
            views |= {
                f"{at}{n}.{kind}": x
                for n, x in (("self_attn.o_proj", o), ("mlp.down_proj", down))
                if x is not None
            }
        views |= {
            f"{at}self_attn.{n}.weight": x
            for n, x in (("q_norm", layer.q_norm), ("k_norm", layer.k_norm))
            if x is not None
        }
    views["model.norm.weight"] = decoder.norm
    if decoder.head is not None:
        views["lm_head.weight"] = decoder.head
    return {name: view.detach() for name, view in views.items()}


def _gpt2_views(decoder: Decoder) -> dict[str, Tensor]:
    """Return the views for GPT-2, whose linear layers (Conv1D) are [in, out]: transposed views of
    the parameters here."""
    views = {
        "transformer.wte.weight": decoder.embedding,
        "transformer.wpe.weight": decoder.position_embedding,
    }
    for index, layer in enumerate(cast(Iterable[Layer], decoder.layers)):
        for name, weight, bias in (
            ("ln_1", layer.input_norm, layer.input_norm_bias),
            ("attn.c_attn", layer.qkv_proj, layer.qkv_bias),
            ("attn.c_proj", layer.o_proj, layer.o_bias),
            ("ln_2", layer.post_norm, layer.post_norm_bias),
            ("mlp.c_fc", layer.gate_up_proj, layer.gate_up_bias),
            ("mlp.c_proj", layer.down_proj, layer.down_bias),
        ):
            at = f"transformer.h.{index}.{name}"
            views |= {f"{at}.weight": cast(Tensor, weight).t(), f"{at}.bias": bias}
    views |= {
        "transformer.ln_f.weight": decoder.norm,
        "transformer.ln_f.bias": decoder.norm_bias,
        "lm_head.weight": decoder.head,
    }
    return {name: view.detach() for name, view in views.items() if view is not None}


def _neox_views(decoder: Decoder) -> dict[str, Tensor]:
    """Return the views for GPT-NeoX. The rows of its fused projection are q, k and v of the first
    head, then of the next, [heads, 3, D, H]; here they are [3, heads, D, H]."""
    c = decoder.config
    views: dict[str, Tensor | None] = {"gpt_neox.embed_in.weight": decoder.embedding}
    for index, layer in enumerate(cast(Iterable[Layer], decoder.layers)):
        weight, bias = (
            None if x is None else x.view(3, c.num_heads, c.head_dim, *x.shape[1:]).transpose(0, 1)
            for x in (layer.qkv_proj, layer.qkv_bias)
        )
        for name, w, b in (
            ("input_layernorm", layer.input_norm, layer.input_norm_bias),
            ("post_attention_layernorm", layer.post_norm, layer.post_norm_bias),
            ("attention.query_key_value", weight, bias),
            ("attention.dense", layer.o_proj, layer.o_bias),
            ("mlp.dense_h_to_4h", layer.gate_up_proj, layer.gate_up_bias),
            ("mlp.dense_4h_to_h", layer.down_proj, layer.down_bias),
        ):
            views |= {
                f"gpt_neox.layers.{index}.{name}.weight": w,
                f"gpt_neox.layers.{index}.{name}.bias": b,
            }
    views |= {
        "gpt_neox.final_layer_norm.weight": decoder.norm,
        "gpt_neox.final_layer_norm.bias": decoder.norm_bias,
        "embed_out.weight": decoder.head,
    }
    return {name: view.detach() for name, view in views.items() if view is not None}


_VIEWS = {"gpt2": _gpt2_views, "gpt_neox": _neox_views}


def file_shape(view: Tensor) -> list[int]:
    """Return the shape that a view of `hf_views` has in a file."""
    return list(view.shape) if view.ndim < 3 else [view.shape[:3].numel(), *view.shape[3:]]


DEVICES = ("cpu", "cuda")  # types that the kernels are made for


# ---- loading -------------------------------------------------------------------------------------
def read_model_config(model: str) -> ModelConfig:
    """Return the configuration of a model directory, of a config.json, or of a Hugging Face id
    (only its configuration is downloaded).

    Raises:
        FileNotFoundError: there is no configuration.
        ValueError: the decoder does not support the model.
    """
    path = Path(model)
    if path.is_file() and path.suffix == ".json":
        return model_config(read_json(path))
    if (directory := local_directory(model)) is not None:
        return model_config(directory)
    return model_config(read_json(resolve_config(model)))


def resolve_device(device: torch.device | str | None) -> torch.device:
    """Return the device, or for None the best one: CUDA if there is a GPU, else the CPU. Raise
    ValueError if the engine has no kernels for the device."""
    found = torch.device(
        device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    )
    if found.type not in DEVICES:
        raise ValueError(
            f"expected device cpu, cuda or cuda:N, got {str(device)!r}, which torch knows and no "
            "kernel here has been made for"
        )
    return found


def resolve_dtype(dtype: str | torch.dtype, device: torch.device | str | None) -> torch.dtype:
    """Return the dtype that `dtype` names: "auto" is float32 on CPU and bfloat16 on CUDA. Names
    such as "bfloat16" and torch dtypes are also accepted."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if resolve_device(device).type == "cuda" else torch.float32
    if dtype not in _DTYPES:
        raise ValueError(f"expected dtype auto, {', '.join(_DTYPES)}, got {dtype!r}")
    return _DTYPES[dtype]


def load_decoder(
    path: str | Path, *, dtype: str | torch.dtype = "auto", device: torch.device | str | None = None
) -> Decoder:
    """Load a decoder from a Hugging Face directory or id.

    Args:
        dtype: dtype of the parameters; "auto" is float32 on CPU and bfloat16 on CUDA, whatever
            dtype the files have.
        device: device of the parameters; None chooses CUDA if there is a GPU, else the CPU.
    Raises:
        FileNotFoundError: there is no such directory, it has no weights (pickled ones are not
            read), or a shard is missing.
        ValueError: the model_type is unknown, a file is damaged, the weight_map leads out of the
            directory, or tensors are missing, unexpected or of another shape (the message lists
            them).
    """
    directory = resolve_directory(path)
    config = load_config(directory)
    if kind := classifier(config):
        raise ValueError(
            f"{directory} is a reward model ({kind}), and a language model is expected here; give "
            "it as --reward or --critic.model, and here what "
            "it was trained from"
        )
    decoder = Decoder(config, dtype=resolve_dtype(dtype, device), device=resolve_device(device))
    load_tensors(directory, hf_views(decoder), ignored=harmless(decoder.config))
    return decoder


def load_tokenizer(path: str | Path) -> Any:
    """Load the transformers tokenizer of a directory or id; return None if there is none. Code that
    comes with a tokenizer is never run.

    Raises:
        ValueError: transformers does not know the tokenizer, or cannot read its files.
    """
    from transformers import AutoTokenizer

    directory = resolve_directory(path)
    if not any(
        (directory / name).is_file()
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    ):
        return None
    try:
        with without_code(directory) as clean:
            tokenizer = AutoTokenizer.from_pretrained(clean, trust_remote_code=False)
    except Warning:  # that Python was told to raise
        raise
    # the library's own, the tokenizers package's, the system's: all mean that these files are no
    # tokenizer
    except Exception as error:
        if of_the_machine(error):
            raise
        raise ValueError(
            f"{directory}: expected a tokenizer that transformers itself has, got files that it "
            f"cannot load ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}). Code that comes with a model is never run; "
            "save it where you trust it as a tokenizer.json: "
            "PreTrainedTokenizerFast"
        ) from error
    tokenizer.name_or_path = str(directory)
    return tokenizer


def load_config(directory: Path) -> ModelConfig:
    """Return `model_config` of a directory, without the entries that name code to run.

    Raises:
        ValueError: it describes a larger model than the directory's weights can be, so that memory
            would be taken for nothing.
    """
    config = model_config(directory)
    _check_weights_suffice(directory, config)
    clean, clean_generation = _stripped(config.raw), _stripped(config.raw_generation)
    for name, raw in (
        ("config.json", config.raw),
        ("generation_config.json", config.raw_generation),
    ):
        _warn_of_code(directory / name, _named_code(raw))
    return replace(config, raw=clean, raw_generation=clean_generation)


def _check_weights_suffice(directory: Path, config: ModelConfig) -> None:
    files = sorted(directory.glob("*.safetensors"))
    there = sum(path.stat().st_size for path in files)
    if there and (least := config.least_parameters) > there:  # of a byte each, at least
        for path in files:
            with opened(path):  # a damaged one is told as such
                pass
        raise ValueError(
            f"{directory / 'config.json'}: describes a model of at least {least:,} parameters, and "
            f"the weights beside it have {there:,} bytes; one of the two is of another model or "
            "was changed: copy or download both again"
        )


def classifier(config: ModelConfig) -> str | None:
    """Return the name of a model's `...ForSequenceClassification` architecture, which scores texts;
    None for a language model."""
    names = config.raw.get("architectures")
    return next(
        (
            str(name)
            for name in (names if isinstance(names, list) else ())
            if "ForSequenceClassification" in str(name)
        ),
        None,
    )


@contextmanager
def without_code(directory: Path) -> Iterator[Path]:
    """Yield the directory itself if its files name no code to run. Otherwise yield a temporary
    directory without those entries and without Python files; the other files are links."""
    stripped: dict[str, Any] = {}
    for path in directory.glob("*.json"):
        if path.name.endswith("config.json") or path.name == "special_tokens_map.json":
            # who reads the file as what it is says what is wrong with it
            with suppress(OSError, ValueError):
                raw = json.loads(path.read_bytes())
                if found := _named_code(raw):
                    stripped[path.name] = _stripped(raw)
                    _warn_of_code(path, found)
    if not stripped:
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="fusedrl_") as temporary:
        for path in directory.iterdir():
            if path.name in stripped:
                (Path(temporary) / path.name).write_text(
                    json.dumps(stripped[path.name]), encoding="utf-8"
                )
            elif path.suffix != ".py" and (
                path.is_file() or path.name == "additional_chat_templates"
            ):
                (Path(temporary) / path.name).symlink_to(path.resolve())
        yield Path(temporary)


def _stripped(raw: Any) -> Any:
    """Return a JSON value without the entries that name code, at any depth."""
    if isinstance(raw, dict):
        return {key: _stripped(value) for key, value in raw.items() if key not in _CODE_KEYS}
    return [_stripped(value) for value in raw] if isinstance(raw, list) else raw


def _named_code(raw: Any) -> tuple[str, ...]:
    """Return the keys of the entries that `_stripped` leaves out."""
    parts = raw.values() if isinstance(raw, dict) else raw if isinstance(raw, list) else ()
    own = {key for key in raw if key in _CODE_KEYS} if isinstance(raw, dict) else set()
    return tuple(sorted(own.union(*map(_named_code, parts))))


@cache
def _warn_of_code(path: Path, keys: tuple[str, ...]) -> None:
    """Warn of entries that name code, once per file, because several functions read the same
    directory."""
    if keys:
        warnings.warn(
            f"{path}: {', '.join(keys)} is ignored; code that comes with a model, or from a hub, "
            "is never run",
            stacklevel=4,
        )


def harmless(config: ModelConfig) -> Callable[[str], bool]:
    """Return a function that tells whether a tensor's name can be ignored: other programs save
    rotary frequencies, causal masks, or a second copy of a tied head."""
    masks = (
        (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
        if config.model_type in _VIEWS
        else ()
    )
    return lambda name: (
        name.endswith(("rotary_emb.inv_freq", *masks)) or (config.tie_embeddings and name in HEADS)
    )


# dtypes of weights, as safetensors names them
_FLOATS = ("F64", "F32", "F16", "BF16")


def load_tensors(
    directory: Path,
    views: Mapping[str, Tensor],
    *,
    ignored: Callable[[str], bool] = lambda name: False,
) -> None:
    """Copy every tensor of a directory's safetensors files into the view with its name, one at a
    time."""
    files = _files(directory)
    # The first GPT-2 files hold the model without a head, whose names lack the prefix; transformers
    # 5 calls GPT-NeoX's head as everyone's.
    others = {
        name: "lm_head.weight" if name == "embed_out.weight" else name.removeprefix("transformer.")
        for name in views
        if name not in files
    }
    views = {
        other if (other := others.get(name, name)) in files else name: view
        for name, view in views.items()
    }
    problems = [f"missing: {name}" for name in views if name not in files] + [
        f"unexpected: {n}" for n in files if n not in views and not ignored(n)
    ]
    for path in dict.fromkeys(files.values()):
        with opened(path) as file:
            for name in (n for n, where in files.items() if where == path and n in views):
                part = file.get_slice(name)
                shape, dtype = part.get_shape(), part.get_dtype()
                if dtype not in _FLOATS:
                    problems.append(
                        f"numbers of {name}: expected {', '.join(_FLOATS)}, got {dtype} (quantised "
                        "weights are not read)"
                    )
                elif shape != (expected := file_shape(views[name])):
                    problems.append(f"shape of {name}: expected {expected}, got {shape}")
                elif not problems:
                    views[name].copy_(file.get_tensor(name).view(views[name].shape))
    if problems:
        shown = "\n  ".join(problems[:20]) + (
            f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        )
        raise ValueError(
            f"{directory}: the tensors do not fit its config.json, which is of another model or "
            f"was changed; copy or download both again:\n  {shown}"
        )


def _files(directory: Path) -> dict[str, Path]:
    """Return a map from tensor name to file."""
    if not (directory / _INDEX).is_file():
        path = directory / _SINGLE
        if not path.is_file():
            raise FileNotFoundError(no_model(directory))
        with opened(path) as file:
            return dict.fromkeys(file.keys(), path)
    weight_map = read_json(directory / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise ValueError(
            f"{directory / _INDEX}: expected a weight_map of tensor names to file names"
        )
    present: dict[str, Collection[str]] = {}
    for shard in dict.fromkeys(weight_map.values()):
        path = _inside(directory, shard)
        with opened(path) as file:
            present[shard] = set(file.keys())
    if absent := [name for name, shard in weight_map.items() if name not in present[shard]]:
        raise ValueError(
            f"{directory / _INDEX}: tensors that their file does not hold: {', '.join(absent[:10])}"
        )
    return {name: directory / shard for name, shard in weight_map.items()}


def _inside(directory: Path, shard: str) -> Path:
    path = directory / shard
    if (
        Path(shard).name != shard
        or shard in ("", ".", "..")
        or len(shard.encode(errors="replace")) > _LONGEST_NAME
    ):
        raise ValueError(
            f"{directory / _INDEX}: expected the name of a file in this directory, got "
            f"{shard[:200]!r} in weight_map"
        )
    real = path.resolve()
    # The hub's cache links snapshots/<revision>/<file> to blobs/<hash>; any other link out of the
    # directory is refused.
    if not path.exists():
        raise FileNotFoundError(
            f"{directory / _INDEX} names {shard}, which is not there; the download or copy is "
            "incomplete"
        )
    if not path.is_file() or (
        path.is_symlink()
        and real.parent not in (directory.resolve(), directory.resolve().parents[1] / "blobs")
    ):
        raise ValueError(
            f"{path}: expected a regular file, got a link out of the directory or a special file"
        )
    return path


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file for reading; raise ValueError if it is damaged."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        check_no_pointer(path)
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); it is truncated or damaged: copy or "
            "download it again"
        ) from error


# ---- saving --------------------------------------------------------------------------------------
def save_pretrained(
    decoder: Decoder,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a directory that `AutoModelForCausalLM.from_pretrained` loads: config, generation
    config, weights in their dtype, and the tokenizer with its chat template if one is given. A tied
    head is written once; an adapter that is on is merged into the weights. If the directory holds
    an earlier save, it is replaced as a whole.

    Raises:
        FileExistsError: `directory` exists and holds something that is not part of a saved model.
    """
    architecture = decoder.config.family.language_model.format(decoder.config.family.name)
    with replacing(directory) as temporary:
        write_model(
            temporary,
            decoder.config,
            hf_views(decoder),
            {"architectures": [architecture]},
            tokenizer,
            max_shard_bytes,
            merging(decoder),
        )


def write_model(
    directory: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    changes: Mapping[str, Any],
    tokenizer: Any,
    max_shard_bytes: int,
    merge: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> None:
    """Write config.json (as it was read, with `changes` and the dtype), generation_config.json,
    shards and tokenizer into an existing directory. `merge` changes each tensor just before it is
    written, so that at most one shard of changed tensors is in memory."""
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    raw = (
        {key: value for key, value in config.raw.items() if key != "torch_dtype"}
        | {"dtype": dtype}
        | dict(changes)
    )
    write_json(directory / "config.json", raw)
    if config.raw_generation is not None:
        write_json(directory / "generation_config.json", config.raw_generation)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    names = (
        [_SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for shard, file in zip(shards, names, strict=True):
        save_file(
            _apart(
                {
                    name: merge(name, tensor).reshape(file_shape(tensor)).contiguous()
                    for name, tensor in shard.items()
                }
            ),
            directory / file,
            metadata={"format": "pt"},
        )
    if len(shards) > 1:
        weight_map = {
            name: file for shard, file in zip(shards, names, strict=True) for name in shard
        }
        write_json(
            directory / _INDEX,
            {
                "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
                "weight_map": weight_map,
            },
        )


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, with a copy of each one that lies in another's memory, such as layers
    that share parameters. A file stores each name separately."""
    out, end = {}, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        out[name] = tensor.clone() if tensor.data_ptr() < end else tensor
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    return {name: out[name] for name in tensors}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write indented JSON with a newline at its end."""
    path.write_text(
        json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


@contextmanager
def replacing(directory: str | Path) -> Iterator[Path]:
    """Yield a new directory next to `directory` to write into. If the block succeeds, the new
    directory replaces `directory`; if it fails, the new directory is deleted."""
    final = Path(directory).absolute()
    check_replaceable(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    clear_remains(final)
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    with disk_faults(final), _made(temporary):
        try:
            yield temporary
            for path in [*temporary.iterdir(), temporary]:
                _sync(path)
            # a directory cannot be replaced in one step: for a moment the name is absent, never
            # half-written
            if final.exists():
                old = temporary.with_suffix(".old")
                final.rename(old)
                temporary.rename(final)
                shutil.rmtree(old)
            else:
                temporary.rename(final)
            _sync(final.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(directory: Path) -> None:
    """Raise FileExistsError if a directory holds what no saved model holds, since saving replaces
    it as a whole."""
    if directory.is_dir():
        strange = [
            path.name
            for path in sorted(directory.iterdir())
            if not path.is_file() or not _OURS.fullmatch(path.name)
        ]
    elif directory.exists() or directory.is_symlink():
        strange = ["it is a file"]
    else:
        return
    if strange:
        raise FileExistsError(
            f"{directory} exists and holds what no saved model holds ({', '.join(strange[:5])}); "
            "saving replaces the whole directory, so move that elsewhere, or choose another or an "
            "empty one"
        )


@contextmanager
def _made(directory: Path) -> Iterator[None]:
    """Make a directory, and hold a lock on it that the system releases when the process dies."""
    directory.mkdir()
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def clear_remains(directory: Path) -> None:
    """Delete what a process that was killed while it saved a model to `directory` left beside it.
    If it died between the two renames, the model that it was replacing gets its name back."""
    name = re.compile(rf"\.{re.escape(directory.name)}\.[0-9a-f]{{8}}\.(tmp|old)")
    beside = directory.parent.iterdir() if directory.parent.is_dir() else ()
    remains = [path for path in beside if name.fullmatch(path.name)]
    for path in sorted(remains):  # .old before .tmp of the same save
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else it is being written
                if path.suffix == ".old" and not directory.exists():
                    path.rename(directory)
                else:
                    shutil.rmtree(path)
            finally:
                os.close(descriptor)


@contextmanager
def disk_faults(target: Path) -> Iterator[None]:
    """Turn a failure to write `target` into an OSError that names `target` and says what to do.
    This includes exceptions of safetensors and tokenizers, which only have the system's error
    number in their text."""
    try:
        yield
    except Exception as error:
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else told and int(told[1])
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(target.parent).free
            raise OSError(
                number,
                f"{os.strerror(number)}: {free:,} bytes are free; free some space, then save again "
                "(a run: resume it)",
                str(target),
            ) from error
        if number is not None and not isinstance(error, OSError):
            raise OSError(number, os.strerror(number), str(target)) from error
        raise


def _sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
