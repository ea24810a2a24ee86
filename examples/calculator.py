"""A calculator that a chat model may call while it solves word problems, as GSM8K's.

    fusedrl train grpo --model MODEL --data gsm8k/chat:train.jsonl \\
        --tools examples/calculator.py:calculate --reward examples/rewards/gsm8k.py:exact \\
        --turns.max_turns 6 --turns.max_length 1024 --generation.max_new_tokens 256 \\
        --optim.lr 1e-6 --run.dir runs/calculator

MODEL has a chat template that shows tools, as Qwen2.5's and Qwen3's do, and calls them as
<tool_call>{"name": "calculate", "arguments": {"expression": "48 / 2"}}</tool_call>. The answer is
read from its last turn.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

_LONGEST = 200  # characters
_LARGEST = 1e15
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(expression: str) -> str:
    """
    Work out an arithmetic expression, such as (48 + 48 / 2) * 3.

    Args:
        expression: Numbers, + - * / // % and parentheses. A comma in a number and a dollar sign
            are left out.
    """
    text = expression.replace(",", "").replace("$", "").strip()
    if len(text) > _LONGEST:
        raise ValueError(f"expected at most {_LONGEST} characters, got {len(text)}")
    value = _value(ast.parse(text, mode="eval").body)
    if not math.isfinite(value) or abs(value) > _LARGEST:
        raise ValueError(f"the result is larger than {_LARGEST:g}")
    whole = round(value)
    return str(whole) if abs(value - whole) < 1e-9 else f"{value:.10g}"


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand))
    raise ValueError("expected numbers, + - * / // % and parentheses")
