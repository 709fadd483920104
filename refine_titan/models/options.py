"""Options of a run's model: fields of its args that `[model] options` overrides, each written `name=value`."""

import typing
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from refine_titan.config.type_checks import describe, matches
from refine_titan.errors import UserError


def read_options(options: Sequence[str], args_class: type) -> dict[str, Any]:
    """Fields of a family's args and the values that the options give them.

    Raises:
        UserError: if an option is not `name=value`, its name is not a field of the args or is given twice, or its value has another
            type than the field.
    """
    hints, known = typing.get_type_hints(args_class), option_names(args_class)
    values: dict[str, Any] = {}
    for option in options:
        name, equals, text = (part.strip() for part in option.partition("="))
        if not equals:
            raise UserError(f"model.options: {option!r} is not written name=value; names: {', '.join(known)}")
        if name not in known:
            raise UserError(f"model.options: this family has no option {name!r}; it has: {', '.join(known)}")
        if name in values:
            raise UserError(f"model.options: {name} is given twice")
        values[name] = _value(text)
        if not matches(values[name], hints[name]):
            none = ", or none" if matches(None, hints[name]) else ""
            raise UserError(f"model.options: {name} is {text!r}; allowed: {describe(hints[name])}{none}")
    return values


def option_names(args_class: type) -> list[str]:
    """Fields of a family's args that say what its model computes."""
    # torchtitan's args have a private field; a field may also be a fact about a checkpoint.
    return [f.name for f in fields(args_class) if not f.name.startswith("_") and f.metadata.get("is_option", True)]


def _value(text: str) -> bool | int | float | str | None:
    """The truth value, none or number that the text spells, else the text."""
    if text in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
