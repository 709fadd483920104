"""Bounds of settings, declared beside the field that they bound.

    num_chunks: Annotated[int, at_least(1)] = 8

Several bounds of one field all hold. The check and `docs/configuration.md` read the same objects, so that an error message says what
the page says.
"""

import math
import re
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any

from refine_titan.config.type_checks import in_toml
from refine_titan.errors import UserError


@dataclass(frozen=True)
class Bound:
    """A condition on the value of one setting.

    Attributes:
        words: the values that are allowed, for people.
        allows: whether a value of the field's type is one of them; not asked about a setting that is not set (`None`).
    """

    words: str
    allows: Callable[[Any], bool]


@dataclass(frozen=True)
class Unsupported(Bound):
    """The condition that a setting keeps its default, set or not set.

    Attributes:
        reason: why no other value is supported, or what to set instead.
    """

    reason: str


def at_least(lowest: float) -> Bound:
    """Numbers from `lowest` on."""
    return Bound(f"at least {lowest}", lambda value: value >= lowest)


def above(limit: float) -> Bound:
    """Numbers greater than `limit`."""
    return Bound(f"above {limit}", lambda value: value > limit)


def at_most(highest: float) -> Bound:
    """Numbers up to `highest`."""
    return Bound(f"at most {highest}", lambda value: value <= highest)


def below(limit: float) -> Bound:
    """Numbers less than `limit`."""
    return Bound(f"below {limit}", lambda value: value < limit)


def either(special: Any, bound: Bound) -> Bound:
    """One value outside a bound, or any value within it: `either(0, at_least(2))` allows "0 or at least 2"."""
    return Bound(f"{in_toml(special)} or {bound.words}", lambda value: value == special or bound.allows(value))


def each(bound: Bound) -> Bound:
    """Lists whose entries are all within a bound."""
    return Bound(f"each {bound.words}", lambda values: all(bound.allows(value) for value in values))


def not_empty(words: str) -> Bound:
    """Texts and lists that hold something; `words` say what."""
    return Bound(words, lambda value: len(value) > 0)


def one_of(*values: str) -> Bound:
    """The named values. A setting that is no list declares them as `typing.Literal`."""
    return Bound(f"{', '.join(map(repr, values[:-1]))} or {values[-1]!r}", lambda value: value in values)


def matching(pattern: str, words: str) -> Bound:
    """Texts that a regular expression matches as a whole; `words` say which."""
    return Bound(words, lambda value: re.fullmatch(pattern, value) is not None)


def unsupported(reason: str, *names: str) -> Callable[[type], type]:
    """Decorates a section's dataclass: the inherited settings `names`, without names all of them, keep their defaults."""

    def decorate(section: type) -> type:
        hints, declared = typing.get_type_hints(section, include_extras=True), {f.name: f for f in fields(section)}
        for name in names or declared:
            default = declared[name].default
            if default is MISSING:
                default = declared[name].default_factory()
            kept = Unsupported(f"{in_toml(default)} ({reason})", lambda value, default=default: value == default, reason)
            section.__annotations__[name] = Annotated[hints[name], kept]
        return section

    return decorate


def bounds_of(hint: Any) -> list[Bound]:
    """The bounds in the type hint of a field."""
    return [part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Bound)]


def in_words(bounds: list[Bound]) -> str:
    """The values that are within all of the bounds."""
    return " and ".join(bound.words for bound in bounds)


def check_bounds(section: Any, prefix: str = "") -> None:
    """Checks every setting of a section and of the sections inside it.

    Raises:
        UserError: at the first one that is out of bounds, or not a finite number.
    """
    hints = typing.get_type_hints(type(section), include_extras=True)
    for f in fields(section):
        name, value = prefix + f.name, getattr(section, f.name)
        if is_dataclass(value):
            check_bounds(value, f"{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} is {value}; allowed: a finite number")
        else:
            bounds = bounds_of(hints[f.name])
            if not all(bound.allows(value) for bound in bounds if value is not None or isinstance(bound, Unsupported)):
                raise UserError(f"{name} is {in_toml(value)}; allowed: {in_words(bounds)}")
