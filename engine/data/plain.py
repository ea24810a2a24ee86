"""Values of tables as the plain Python values that JSON has.

text, numbers, true, false, null    as they are; NaN is null, as pandas writes it
list, struct, map                   list, dict, dict; a struct's null members are left out,
                                    since a table gives every row the members of all rows
date, time, timestamp               text in ISO form
duration                            seconds
decimal                             a whole number if it is one, else a float
bytes                               text if they are UTF-8; else the row is refused
"""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Mapping
from typing import Any

from fusedrl.engine.data.lines import BadRow

_TIMES = (datetime.date, datetime.time)  # a datetime is a date


def plain(value: Any, where: str) -> Any:
    """Return a value as JSON would hold it.

    Args:
        where: name of the value's column, and of the member within it.
    Raises:
        BadRow: there is no such value; the message names the column.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return _finite(value, where)
    if isinstance(value, Mapping):
        return {
            name: plain(member, f"{where}.{name}")
            for name, member in value.items()
            if member is not None or name == "content"  # of a message that calls a tool
        }
    if isinstance(value, list | tuple):
        if value and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
            return _of_map(value, where)
        return [plain(one, f"{where}[{index}]") for index, one in enumerate(value)]
    if isinstance(value, bytes | bytearray | memoryview):
        return _text(bytes(value), where)
    if isinstance(value, _TIMES):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if hasattr(value, "tolist"):  # of numpy: an array or a number
        return plain(value.tolist(), where)
    raise BadRow(
        f'column "{where}" holds a value of type {type(value).__name__}, which has no counterpart '
        f"in JSON; {_leave_out(where)}"
    )


def _finite(value: float, where: str) -> float | None:
    if math.isinf(value):
        raise BadRow(f'column "{where}" is infinite; expected a number')
    return None if math.isnan(value) else value


def _text(value: bytes, where: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(
            f'column "{where}" holds {len(value)} bytes that are not UTF-8 text (a picture, '
            f"perhaps); {_leave_out(where)}"
        ) from error


def _of_map(pairs: list[tuple[Any, Any]] | tuple[Any, ...], where: str) -> dict[str, Any]:
    if not all(isinstance(key, str) for key, _ in pairs):
        raise BadRow(f'column "{where}" is a map whose keys are not texts; {_leave_out(where)}')
    if len(dict(pairs)) < len(pairs):
        raise BadRow(f'column "{where}" is a map with a key twice')
    return {key: plain(value, f"{where}.{key}") for key, value in pairs}


def _leave_out(where: str) -> str:
    name = where.partition(".")[0].partition("[")[0]
    return f"leave the column out with FILE:{name}="
