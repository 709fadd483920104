"""Types of values that come from TOML, JSON or the command line, checked against the fields of a dataclass."""

import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any


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
    """The values that a type allows, in words."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return ", ".join(repr(option) for option in typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in typing.get_args(hint) if option is not type(None))
    if origin is list:
        item = typing.get_args(hint)[0]
        plurals = {int: "whole numbers", float: "numbers", str: "strings"}
        return f"a list of {plurals[item]}" if item in plurals else f"a list, each {describe(item)}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}.get(hint, str(hint))


def in_toml(value: Any) -> str:
    """A value as a TOML file says it; `None`, for which TOML has no word, is "not set"."""
    if isinstance(value, list):
        return f"[{', '.join(in_toml(item) for item in value)}]"
    return "not set" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def did_you_mean(word: str, candidates: Iterable[str], prefix: str = "") -> str:
    """The end of an error message about an unknown word: the known word that is nearest to it; empty if none is near."""
    nearest = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {prefix + nearest[0]!r}?" if nearest else ""
