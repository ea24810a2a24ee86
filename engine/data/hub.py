"""Data sets of the Hugging Face hub, and directories that `datasets` reads.

    hf:ORGANISATION/NAME     downloaded once, then read from the cache (HF_HOME), without a network
                             as well
    hf:DIRECTORY             what `save_to_disk` wrote, or a directory of Parquet, CSV or JSON files

A data set's script is never run: `datasets` 4 and later cannot, and older versions are refused.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusedrl.engine.base.errors import DataError, SetupError, chain_of, unreachable
from fusedrl.engine.data.lines import RowRead
from fusedrl.engine.data.sources import HUB, Source
from fusedrl.engine.data.tables import BATCH, INSTALL, rows_of

_PATIENCE = 10.0  # seconds in which the hub answers


def read_hub(source: Source, *, streaming: bool = False) -> Iterator[RowRead]:
    """Yield the rows of a data set, numbered from 1.

    Args:
        streaming: fetch the rows as they are read, and not the whole data set first.
    Raises:
        SetupError: `datasets` is not installed or too old, or the hub cannot be reached and the
            data set is not in the cache.
        DataError: there is no such data set, configuration or split, or it needs a script.
    """
    without = [ours for ours, theirs in source.columns.items() if not theirs]
    number = 0
    try:
        for table in _load(source, streaming).with_format("arrow").iter(BATCH):
            yield from rows_of(table, number, without, source.name)
            number += table.num_rows
    except (DataError, SetupError):
        raise
    except Exception as error:  # of datasets, pyarrow, the hub's client, its HTTP library
        raise _told(source, error) from error


def digest(source: Source) -> str:
    """Return the SHA-256 of a data set's rows, hexadecimal. It depends neither on where the data
    set lies nor on the files that it is kept in. Errors are those of `read_hub`."""
    found = hashlib.sha256()
    for one in read_hub(source):
        found.update(json.dumps([one.row, one.fault], ensure_ascii=True).encode() + b"\n")
    return found.hexdigest()


def _load(source: Source, streaming: bool) -> Any:
    """Return a split of a data set."""
    try:
        import datasets
    except ImportError as error:
        raise SetupError(
            f"{source.name}: reading it needs the package datasets, which is not installed; "
            f"{INSTALL}"
        ) from error
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise SetupError(
            f"{source.name}: expected datasets 4 or later, which run no script of a data set, got "
            f"{datasets.__version__}; {INSTALL}"
        )
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # what is read is nobody else's business
    name, split = source.path.removeprefix(HUB), source.split or "train"
    directory = Path(name)
    if (directory / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(name)
        if split not in splits:
            raise _no_split(source, split, list(splits))
        return splits[split]
    if (directory / "state.json").is_file():
        if source.split is not None:
            raise DataError(
                f"{source.name}: {name} holds one split without a name; leave :{source.split} out"
            )
        return datasets.load_from_disk(name)
    if name.startswith((".", "/")) and not directory.is_dir():
        raise DataError(f"{source.name}: expected a directory behind {HUB}, and there is none")
    with _asked_once(directory, name):
        return datasets.load_dataset(
            name,
            source.config,
            split=split,
            revision=source.revision,
            streaming=streaming,
            trust_remote_code=False,
        )


@contextmanager
def _asked_once(directory: Path, name: str) -> Iterator[None]:
    """Within the block, take a data set from the cache alone if the hub cannot be reached. Its
    client would ask for half a minute, and print every attempt."""
    import datasets
    from huggingface_hub import HfApi, constants

    away = False
    if not directory.is_dir() and not constants.HF_HUB_OFFLINE:
        try:
            HfApi().dataset_info(name, timeout=_PATIENCE)
        except Exception as error:  # all others are told by `datasets`
            away = unreachable(error)
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if away:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _no_split(source: Source, split: str, known: list[str]) -> DataError:
    near = difflib.get_close_matches(split, known, 1, 0.3) or known[:1] or ["SPLIT"]
    return DataError(
        f"{source.name}: expected one of the splits {', '.join(known)}, got {split!r}; write "
        f"{source.path}:{near[0]}"
    )


def _told(source: Source, error: Exception) -> Exception:
    """Return the error to raise for one of `datasets` or of the libraries below it."""
    text = " ".join(str(error).split())
    names = [type(one).__name__ for one in chain_of(error)]
    if "scripts are no longer supported" in text:
        return DataError(
            f"{source.name}: the data set is a script, and scripts of others are never run; the "
            f"hub's own copy as Parquet may do: {source.path}:revision=refs/convert/parquet"
        )
    if known := re.search(r"[Uu]nknown split \"?(\S+?)\"?\. Should be one of \[(.*?)\]", text):
        return _no_split(source, known[1], re.findall(r"'([^']+)'", known[2]))
    if "Bad split" in text and (known := re.search(r"Available splits: \[(.*?)\]", text)):
        return _no_split(source, source.split or "train", re.findall(r"'([^']+)'", known[1]))
    if "Config name is missing" in text or "BuilderConfig" in text:
        known = re.search(r"(?:configs|Available): \[(.*?)\]", text)
        configs = re.findall(r"'([^']+)'", known[1]) if known else []
        got = "none" if source.config is None else repr(source.config)
        return DataError(
            f"{source.name}: expected one of the configurations {', '.join(configs)[:500]}, got "
            f"{got}; add :config={configs[0] if configs else 'NAME'}"
        )
    if "gated" in text:
        return DataError(
            f"{source.name}: the data set is gated: accept its terms on its page, then log in with "
            "`hf auth login`"
        )
    if unreachable(error):
        return SetupError(
            f"{source.name}: the hub cannot be reached, and the data set is not in the cache; "
            f"run it once with a network, set HF_HOME to a cache that "
            f"has it, or name a directory: {HUB}./DIRECTORY. HF_HUB_OFFLINE=1 asks the cache alone"
        )
    if "DatasetNotFoundError" in names:
        return DataError(
            f"{source.name}: the hub has no such data set, or it is private ({text[:200]}); check "
            "the name, or log in with `hf auth login`"
        )
    if {"EmptyDatasetError", "DataFilesNotFoundError"} & set(names):
        return DataError(
            f"{source.name}: no Parquet, CSV, JSON or Arrow files are there ({text[:200]}); name "
            "the directory that holds them"
        )
    return DataError(
        f"{source.name}: datasets cannot read it ({names[0]}: {text[:300]}); if the data set is "
        "damaged, delete it from the cache and try again"
    )
