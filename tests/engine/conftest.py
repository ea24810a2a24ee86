import json
from pathlib import Path

import pytest
from tests.support.tiny import CONFIG, WORDS, write_model

__all__ = ["CONFIG", "WORDS"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The directory of a tiny Llama with a tokenizer of the words w0 .. w27."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> Path:
    """The directory of a wider Llama with the tokenizer of `tiny_model` and a padded vocabulary."""
    directory = tmp_path_factory.mktemp("models") / "teacher"
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": CONFIG["vocab_size"] + 8}
    return write_model(directory, seed=7, **sizes)


@pytest.fixture
def write_jsonl(tmp_path):
    """Write rows as JSONL and return the path as a string."""

    def write(name: str, rows: list[dict]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
