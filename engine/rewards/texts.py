"""Reading of a reward's arguments: the text of a completion, and a column of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusedrl.engine.base.errors import RewardError

ARGUMENTS = {"prompts", "completion_ids"}  # what every reward is given besides columns


def text_of(completion: Any) -> str:
    """Return a completion's text. If the prompt is a list of messages, the completion is one, too,
    and the text is that of its last message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def column_of(
    reward: str, columns: Mapping[str, Any], name: str, usual: Sequence[str]
) -> tuple[str, Sequence[Any]]:
    """Return the name and the values of the column `name`, or of the first of the usual columns
    that the data has.

    Raises:
        RewardError: the data does not have it; the message names the columns that there are.
    """
    found = next((one for one in ([name] if name else usual) if one in columns), None)
    if found is None:
        needs = f"the column {name!r}" if name else f"one of the columns {', '.join(usual)}"
        there = ", ".join(sorted(set(columns) - ARGUMENTS)) or "none"
        raise RewardError(
            f"reward {reward!r} needs {needs} of the data, which has {there} beside the prompt; "
            f"name another by {reward}:column=NAME"
        )
    return found, columns[found]
