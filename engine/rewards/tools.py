"""Tools: functions that a policy calls in its turns, and the environment that calls them for it.

    def multiply(a: float, b: float) -> float:
        \"\"\"
        Multiply two numbers.

        Args:
            a: The first factor.
            b: The second factor.
        \"\"\"
        return a * b

The contract is that of TRL and of transformers' chat templates: the signature, its types and the
docstring become a JSON schema, which the chat template shows to the model. The model's calls are
found in the text of its turn:

    hermes    <tool_call>{"name": "multiply", "arguments": {"a": 2, "b": 3}}</tool_call>, any number
              of them (Qwen, Hermes)
    json      the whole text is one such object, or a list of them; "parameters" serves for
              "arguments" (Llama 3.1)

or by a function of a user's, file.py:NAME, which returns [{"name": ..., "arguments": {...}}, ...]
of a text. Every call gets a message of the role tool, in the order of the calls. A turn without a
call ends the trajectory. A call that cannot be read, of a tool that does not exist, with wrong
arguments, or whose function raises, gets a message that says so: the model can mend it.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusedrl.engine.base.blame import place_of, shown, told
from fusedrl.engine.base.errors import RewardError, Stopped
from fusedrl.engine.rewards.functions import import_function

PARSERS = ("hermes", "json")
LONGEST = 1 << 16  # characters of a result that the model is shown
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
Call = tuple[str, Any]  # name and arguments; "" and what is wrong, if a call cannot be read
Parser = Callable[[str], list[Call]]


class ToolEnvironment:
    """Environment whose answers are the results of the tools that the policy calls. Its own rewards
    are 0.

    Args:
        tools: functions by name.
        schemas: their JSON schemas, by name.
        parse: finds the calls in the text of a turn.
    """

    def __init__(
        self,
        tools: Mapping[str, Callable[..., Any]],
        schemas: Mapping[str, Mapping[str, Any]],
        parse: Parser,
    ) -> None:
        self._tools, self._schemas, self._parse = tools, schemas, parse

    def reset(self, row: Mapping[str, Any]) -> Any:
        """Return the prompt of the data, messages."""
        return row["prompt"]

    def step(self, completion: str) -> tuple[Any, float, bool, dict[str, float]]:
        """Call the tools that a turn asks for."""
        calls = self._parse(completion)
        results = [self._result(*call) for call in calls]
        return self._answer(calls, results)

    def _answer(
        self, calls: Sequence[Call], results: Sequence[tuple[str, bool]]
    ) -> tuple[Any, float, bool, dict[str, float]]:
        failed = sum(not fine for _, fine in results)
        counts = {"tool_calls": float(len(calls)), "tool_errors": float(failed)}
        messages = [
            {"role": "tool", "name": name or "unknown", "content": text}
            for (name, _), (text, _) in zip(calls, results, strict=True)
        ]
        return messages, 0.0, not calls, counts

    def _result(self, name: str, arguments: Any) -> tuple[str, bool]:
        """Return what a call gave, as text, and whether it is a result and no error."""
        if wrong := self._wrong(name, arguments):
            return f"error: {wrong}", False
        try:
            return _text(self._tools[name](**arguments)), True
        except (KeyboardInterrupt, Stopped):
            raise
        except BaseException as error:  # sys.exit in a tool is one
            return f"error: {name} raised {told(error)}"[:LONGEST], False

    def _wrong(self, name: str, arguments: Any) -> str:
        """Say what is wrong with a call; "" if nothing is."""
        if not name:
            return str(arguments)
        if name not in self._tools:
            return f"there is no tool {name!r}; there are {', '.join(self._tools)}"
        if not isinstance(arguments, Mapping):
            return f"expected the arguments of {name} as an object, got {shown(arguments)}"
        schema = self._schemas[name]["function"]["parameters"]
        properties = schema.get("properties", {})
        for argument, value in arguments.items():
            if argument not in properties:
                return (
                    f"{name} has no argument {argument!r}; it has {', '.join(properties) or 'none'}"
                )
            if wrong := _mistyped(value, properties[argument]):
                return f"expected the argument {argument!r} of {name} to be {wrong}"
        missing = [one for one in schema.get("required", []) if one not in arguments]
        return f"{name} needs the argument {missing[0]!r}" if missing else ""


class AsyncToolEnvironment(ToolEnvironment):
    """The same for tools of which some are `async def`."""

    async def step(self, completion: str) -> tuple[Any, float, bool, dict[str, float]]:  # type: ignore[override]
        """Call the tools that a turn asks for, one after another."""
        calls = self._parse(completion)
        results = []
        for name, arguments in calls:
            tool = self._tools.get(name)
            if not inspect.iscoroutinefunction(tool) or self._wrong(name, arguments):
                results.append(self._result(name, arguments))
                continue
            try:
                results.append((_text(await tool(**arguments)), True))
            except Exception as error:
                results.append((f"error: {name} raised {told(error)}"[:LONGEST], False))
        return self._answer(calls, results)


# ---- loading -------------------------------------------------------------------------------------
def tool_environment(
    spec: Mapping[str, Any],
) -> tuple[Callable[[], ToolEnvironment], list[Callable[..., Any]]]:
    """Return what makes the environment of {"tools": file.py:NAME of each, "schemas": their
    schemas, "parser": how calls are found}, and the functions.

    Raises:
        RewardError: a file or a function cannot be used.
    """
    functions = [load_tool(one) for one in spec["tools"]]
    schemas = {schema["function"]["name"]: schema for schema in spec["schemas"]}
    tools = dict(zip(schemas, functions, strict=True))
    parse = parser_of(spec["parser"])
    waits = any(map(inspect.iscoroutinefunction, functions))
    kind = AsyncToolEnvironment if waits else ToolEnvironment
    return (lambda: kind(tools, schemas, parse)), functions


def load_tool(spec: str) -> Callable[..., Any]:
    """Load the function at file.py:NAME. Raise RewardError if there is none."""
    path, colon, name = spec.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise RewardError(f"tool {spec!r}: expected file.py:NAME of a function")
    return import_function(Path(path), name, "tool")


def schemas_of(specs: Sequence[str]) -> list[dict[str, Any]]:
    """Return the JSON schemas of the functions at file.py:NAME, made of their signatures and
    docstrings by transformers.

    Raises:
        RewardError: a function cannot be loaded, two have one name, or transformers cannot make a
            schema: a parameter has no type, or is not described in the docstring.
    """
    from transformers.utils import get_json_schema

    schemas: list[dict[str, Any]] = []
    for spec in specs:
        function = load_tool(spec)
        try:
            schema = get_json_schema(function)
        except Exception as error:  # of the docstring's parser, too
            raise RewardError(
                f"tool {spec}, {place_of(function)}: expected a type for each parameter, and a "
                'docstring with a line for each under "Args:", of which the model is told; '
                f"{told(error)}"
            ) from error
        if any(one["function"]["name"] == schema["function"]["name"] for one in schemas):
            raise RewardError(
                f"tool {spec}: expected tools of different names, got two that are called "
                f"{schema['function']['name']!r}"
            )
        schemas.append(json.loads(json.dumps(schema, default=str)))
    return schemas


# ---- calls ---------------------------------------------------------------------------------------
def parser_of(name: str) -> Parser:
    """Return the parser of this name, or the user's at file.py:NAME. Raise RewardError if there is
    none."""
    if name in PARSERS:
        return {"hermes": hermes_calls, "json": json_calls}[name]
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise RewardError(
            f"turns.tool_parser {name!r}: expected {', '.join(PARSERS)}, or file.py:NAME of a "
            "function"
        )
    found = import_function(Path(path), function, "tool parser")

    def parse(text: str) -> list[Call]:
        return [_call(one) for one in found(text)]

    return parse


def hermes_calls(text: str) -> list[Call]:
    """Return the calls between the tags <tool_call> and </tool_call>; the last may lack its end."""
    return [_read(inside)[0] for inside in _CALL.findall(text)]


def json_calls(text: str) -> list[Call]:
    """Return the calls of a text that is a JSON object with a name, or a list of them; none of
    another text."""
    text = text.strip()
    if text[:1] not in ("{", "["):
        return []
    calls = _read(text)
    return [] if calls == [("", calls[0][1])] and '"name"' not in text else calls


def _read(text: str) -> list[Call]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        return [("", f"the call is no JSON: {error}")]
    listed = found if isinstance(found, list) and found else [found]
    return [_call(one) for one in listed]


def _call(found: Any) -> Call:
    if not isinstance(found, Mapping) or not isinstance(found.get("name"), str):
        return "", f'expected a call {{"name": ..., "arguments": {{...}}}}, got {shown(found)}'
    return found["name"], found.get("arguments", found.get("parameters", {}))


def _mistyped(value: Any, schema: Mapping[str, Any]) -> str:
    """Say what an argument should be, as far as its schema names types; "" if it is that."""
    named = schema.get("type")
    names = [named] if isinstance(named, str) else list(named or [])
    kinds = tuple(kind for name in names for kind in _TYPES.get(name, ()))
    if "enum" in schema and value not in schema["enum"]:
        return f"one of {', '.join(map(str, schema['enum']))}, got {shown(value)}"
    if not kinds or (schema.get("nullable") and value is None):
        return ""
    fits = isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)
    return "" if fits else f"of the type {' or '.join(names)}, got {shown(value)}"


def _text(result: Any) -> str:
    """Return a tool's result as the model sees it: a text as it is, anything else as JSON."""
    text = result if isinstance(result, str) else json.dumps(result, default=str)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text):,} characters)"
