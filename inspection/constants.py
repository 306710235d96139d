"""The value of a constant expression in a chat template, computed only where it stays small.

Jinja2 could compute it (`as_const`), but nothing would bound what 'a' * 10**10 or a row of replacements makes.
"""

import re
from typing import Any

from jinja2 import nodes

MOST = 4096  # characters or members
LARGEST = 10**12
TEXT_FILTERS = {
    "lower": str.lower,
    "upper": str.upper,
    "trim": str.strip,
    "strip": str.strip,
    "capitalize": str.capitalize,
    "title": str.title,
    "reverse": lambda text: text[::-1],
    "string": str,
}
NUMBERS = {
    nodes.Add: lambda a, b: a + b,
    nodes.Sub: lambda a, b: a - b,
    nodes.Mul: lambda a, b: a * b,
    nodes.FloorDiv: lambda a, b: a // b if b else None,
    nodes.Mod: lambda a, b: a % b if b else None,
    nodes.Pow: lambda a, b: a**b if 0 <= b <= 64 and abs(a) <= 1000 else None,
}


def value_of(node: Any) -> Any:
    """A text, number or list; None for what is not constant, or too large."""
    value = _value(node)
    if isinstance(value, str | list) and len(value) > MOST:
        return value if isinstance(node, nodes.Const) else None
    if isinstance(value, int | float) and not abs(value) <= LARGEST and not isinstance(node, nodes.Const):
        return None
    return value


def _value(node: Any) -> Any:
    if isinstance(node, nodes.Const):
        return node.value
    if isinstance(node, nodes.List | nodes.Tuple):
        values = [value_of(item) for item in node.items[: MOST + 1]]
        return None if None in values else values
    if isinstance(node, nodes.Neg):
        value = value_of(node.node)
        return -value if isinstance(value, int | float) else None
    if isinstance(node, nodes.Concat):
        values = [value_of(part) for part in node.nodes]
        return None if None in values else _joined("", values)
    if type(node) in NUMBERS:
        return _arithmetic(type(node), value_of(node.left), value_of(node.right))
    if isinstance(node, nodes.Filter) and node.node is not None:
        return _applied(node.name, value_of(node.node), [value_of(argument) for argument in node.args])
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
        value, arguments = value_of(node.node.node), [value_of(argument) for argument in node.args]
        if node.node.attr == "join":
            return _applied("join", *arguments[:1], [value]) if arguments else None
        return _applied(node.node.attr, value, arguments) if isinstance(value, str) else None
    if isinstance(node, nodes.Getitem):
        return _item(value_of(node.node), node.arg)
    return None


def _arithmetic(kind: type, left: Any, right: Any) -> Any:
    if isinstance(left, int | float) and isinstance(right, int | float):
        return NUMBERS[kind](left, right)
    if kind is nodes.Add and type(left) is type(right) and isinstance(left, str | list):
        return left + right
    if kind is nodes.Mul and isinstance(left, str | list) and isinstance(right, int) and len(left) * right <= MOST:
        return left * right
    return _applied("format", left, right if isinstance(right, list) else [right]) if kind is nodes.Mod else None


def _applied(name: str, value: Any, arguments: list[Any]) -> Any:
    """What a filter or method makes of a value."""
    if name == "join" and isinstance(value, list):
        separator = arguments[0] if arguments else ""
        return _joined(separator, value) if isinstance(separator, str) else None
    if not isinstance(value, str) or None in arguments:
        return None
    if name == "replace" and len(arguments) == 2 and all(isinstance(text, str) for text in arguments):
        return value.replace(*arguments) if len(value) * (1 + len(arguments[1])) <= MOST else None
    if name == "format":  # %s and {} alone: others state a width
        parts = re.split(r"%s|\{\}", value)
        if len(parts) != len(arguments) + 1 or "%" in "".join(parts):
            return None
        return _joined("", [part for pair in zip(parts, [*arguments, ""], strict=True) for part in pair])
    return TEXT_FILTERS[name](value) if name in TEXT_FILTERS and not arguments else None


def _joined(separator: str, values: list[Any]) -> str | None:
    texts = [str(value) for value in values]
    return separator.join(texts) if sum(map(len, texts)) + len(texts) * len(separator) <= MOST else None


def _item(value: Any, argument: Any) -> Any:
    if not isinstance(value, str | list):
        return None
    if isinstance(argument, nodes.Slice):
        edges = [part and value_of(part) for part in (argument.start, argument.stop, argument.step)]
        if all(edge is None or type(edge) is int for edge in edges) and edges[2] != 0:
            return value[slice(*edges)]
        return None
    place = value_of(argument)
    return value[place] if type(place) is int and -len(value) <= place < len(value) else None
