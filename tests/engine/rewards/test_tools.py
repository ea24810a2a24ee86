"""Tools: how a policy's calls are read, what a wrong one is answered, and what the model is told of
the functions."""

import json

import pytest

from fusedrl.engine.base.errors import RewardError
from fusedrl.engine.rewards.environments import Environments
from fusedrl.engine.rewards.hosted import Host, at_once
from fusedrl.engine.rewards.tools import hermes_calls, json_calls, parser_of, schemas_of

pytestmark = pytest.mark.cpu_only("tools are Python")
TOOLS = '''
from typing import Literal, Optional

def add(a: float, b: float, note: Optional[str] = None) -> float:
    """
    Add two numbers.

    Args:
        a: The first number.
        b: The second number.
        note: What for.
    """
    return a + b

def pick(name: str, size: Literal["small", "large"] = "small", deep: bool = False) -> dict:
    """
    Pick a thing.

    Args:
        name: Its name.
        size: Its size.
        deep: Whether to look below.
    """
    if name == "broken":
        raise KeyError(name)
    if name == "leaves":
        raise SystemExit(1)
    return {"name": name, "size": size}

async def wait(count: int) -> str:
    """
    Wait.

    Args:
        count: How long.
    """
    if count < 0:
        raise ValueError("no time")
    return f"waited {count}"

def untyped(a):
    """
    Say.

    Args:
        a: What.
    """
    return a

def undocumented(a: int) -> int:
    return a

def calls_of(text):
    return [{"name": "add", "arguments": {"a": 1, "b": len(text)}}] if text else []
'''


@pytest.fixture
def tools(tmp_path):
    (tmp_path / "tools.py").write_text(TOOLS, encoding="utf-8")
    return lambda *names: [f"{tmp_path / 'tools.py'}:{name}" for name in names]


def host_of(specs, parser="hermes"):
    return Host({"tools": specs, "schemas": schemas_of(specs), "parser": parser})


def ask(host, *texts):
    request = {"trajectory": "1/0", "row": {"prompt": "w1"}, "texts": [], "answers": []}
    request["seeds"] = [0] * (len(texts) + 1)
    found = None
    for count in range(len(texts) + 1):
        request["texts"] = list(texts[:count])
        found = at_once(host.answer(request, lambda seed: None))
        request["answers"].append(found["digest"])
    return found


def call(name, /, **arguments):
    said = json.dumps({"name": name, "arguments": arguments})
    return f"I call it. <tool_call>\n{said}\n</tool_call>"


def test_calls_are_answered_in_their_order_and_a_turn_without_one_ends(tools):
    host = host_of(tools("add", "pick"))
    two = ask(host, call("add", a=2, b=3.5) + call("pick", name="x"))
    assert [one["content"] for one in two["observation"]] == [
        "5.5",
        '{"name": "x", "size": "small"}',
    ]
    assert [one["name"] for one in two["observation"]] == ["add", "pick"]
    assert {one["role"] for one in two["observation"]} == {"tool"}
    assert (two["done"], two["reward"]) == (False, 0.0)
    assert two["info"] == {"tool_calls": 2.0, "tool_errors": 0.0}
    ended = ask(host_of(tools("add")), call("add", a=1, b=2), "The answer is 3")
    assert ended["done"]
    assert ended["info"]["tool_calls"] == 0


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (call("sub", a=1), "error: there is no tool 'sub'; there are add, pick"),
        (call("add", a=1), "error: add needs the argument 'b'"),
        (call("add", a=1, b=2, c=3), "error: add has no argument 'c'; it has a, b, note"),
        (call("add", a="1", b=2), "error: expected the argument 'a' of add to be of the type"),
        (call("add", a=True, b=2), "error: expected the argument 'a' of add to be of the type"),
        (call("pick", name="x", size="huge"), "one of small, large, got 'huge'"),
        (call("pick", name="broken"), "error: pick raised KeyError: 'broken'"),
        (call("pick", name="leaves"), "error: pick raised SystemExit: 1"),
        ("<tool_call>{not json}</tool_call>", "error: the call is no JSON"),
        ("<tool_call>3</tool_call>", "error: expected a call"),
        ('<tool_call>{"name": "add", "arguments": 3}</tool_call>', "arguments of add as an object"),
    ],
)
def test_a_wrong_call_gets_a_message_that_the_model_sees(said, answer, tools):
    found = ask(host_of(tools("add", "pick")), said)
    assert answer in found["observation"][0]["content"]
    assert found["info"] == {"tool_calls": 1.0, "tool_errors": 1.0}
    assert not found["done"]


def test_an_argument_that_may_be_left_out_may_be_null(tools):
    assert ask(host_of(tools("add")), call("add", a=1, b=2, note=None))["info"]["tool_errors"] == 0


def test_asynchronous_tools_are_waited_for(tools):
    import concurrent.futures

    environments = Environments(None, tools("wait", "add"), "hermes")
    request = {"trajectory": "1/0", "row": {"prompt": "w1"}, "texts": [], "answers": []}
    request |= {"seeds": [0, 0]}
    first = environments.ask(request).result(20)["value"]
    said = call("wait", count=3) + call("add", a=1, b=1) + call("wait", count=-1)
    request |= {"texts": [said + call("wait", count="x")], "answers": [first["digest"]]}
    future = environments.ask(request)
    assert isinstance(future, concurrent.futures.Future)
    found = [one["content"] for one in future.result(20)["value"]["observation"]]
    assert found[:2] == ["waited 3", "2"]
    assert found[2] == "error: wait raised ValueError: no time"
    assert "type integer" in found[3]


def test_calls_are_found_in_the_common_forms():
    one = '{"name": "f", "arguments": {"x": 1}}'
    assert hermes_calls(f"a <tool_call>{one}</tool_call> b") == [("f", {"x": 1})]
    assert hermes_calls(f"<tool_call>\n{one}\n</tool_call>" * 2) == [("f", {"x": 1})] * 2
    assert hermes_calls(f"<tool_call>{one}") == [("f", {"x": 1})]  # cut off after the call
    assert hermes_calls(one) == [] == hermes_calls("")
    assert json_calls(one) == [("f", {"x": 1})]
    assert json_calls('[{"name": "f", "parameters": {"x": 1}}, {"name": "g"}]') == [
        ("f", {"x": 1}),
        ("g", {}),
    ]
    assert json_calls("The answer is 3") == [] == json_calls('{"answer": 3}') == json_calls("[1]")
    assert json_calls('{"name": "f", ')[0][0] == ""


def test_a_parser_of_ones_own_is_used_and_a_wrong_one_refused(tools):
    (own,) = tools("calls_of")
    assert parser_of(own)("abc") == [("add", {"a": 1, "b": 3})]
    assert ask(host_of(tools("add"), own), "abc")["observation"][0]["content"] == "4"
    with pytest.raises(RewardError, match=r"expected hermes, json, or file\.py:NAME"):
        parser_of("xml")


def test_the_model_is_told_of_names_types_and_descriptions(tools):
    (schema,) = schemas_of(tools("add"))
    told = schema["function"]
    assert (told["name"], told["description"]) == ("add", "Add two numbers.")
    assert told["parameters"]["required"] == ["a", "b"]
    assert told["parameters"]["properties"]["a"] == {
        "type": "number",
        "description": "The first number.",
    }


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("untyped",), "expected a type for each parameter"),
        (("undocumented",), "expected a type for each parameter, and a docstring"),
        (("add", "add"), "expected tools of different names"),
        (("missing",), "the file has no 'missing'"),
    ],
)
def test_a_function_that_is_no_tool_is_refused(names, message, tools):
    with pytest.raises(RewardError, match=message):
        schemas_of(tools(*names))
