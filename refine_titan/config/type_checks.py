"""Types of values that come from TOML, JSON or the command line, checked against dataclass fields."""

import difflib
import types
import typing
from typing import Any


def suggest(word: str, candidates: list[str], prefix: str = "") -> str:
    """The nearest known word, or all of them, to end an error message with."""
    nearest = difflib.get_close_matches(word, candidates, n=1, cutoff=0.5)
    return f"; did you mean {prefix + nearest[0]!r}?" if nearest else f"; known: {', '.join(candidates)}"


def matches(value: Any, hint: Any) -> bool:
    """Whether a value from TOML or JSON has the type of a dataclass field."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, option) for option in typing.get_args(hint))
    if origin is list:
        return isinstance(value, list) and all(matches(item, typing.get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def describe(hint: Any) -> str:
    """The values a type allows, in words."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return ", ".join(repr(option) for option in typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in typing.get_args(hint) if option is not type(None))
    if origin is list:
        return f"a list of {describe(typing.get_args(hint)[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}.get(hint, str(hint))
