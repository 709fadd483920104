"""Writes train_configs/schema.json from the sections in refine_titan/config: editors complete and check a run's TOML file by it.

    python tools/generate_config_schema.py

A file names it in its first line, `#:schema PATH`, which Taplo and the extension Even Better TOML of VS Code read.
"""

import argparse
import inspect
import json
import re
import types
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from refine_titan.config.bounds import Bound, Unsupported, bounds_of, in_words
from refine_titan.config.meanings import meanings
from refine_titan.config.sections import JobConfig

TARGET = Path(__file__).parents[1] / "train_configs" / "schema.json"
TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}
# Bounds that JSON schema has words for; the others are in the description only.
LIMITS = {"at least": "minimum", "above": "exclusiveMinimum", "at most": "maximum", "below": "exclusiveMaximum"}


def schema() -> dict[str, Any]:
    """The schema of a run's file."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A run of refine_titan",
        "description": "Written by tools/generate_config_schema.py; docs/configuration.md has the same settings as tables.",
        **_of_section(JobConfig),
    }


def _of_section(section: type) -> dict[str, Any]:
    default, hints, properties = section(), typing.get_type_hints(section, include_extras=True), {}
    # A section may extend torchtitan's: both have docstrings of their own fields.
    found: dict[str, str] = {}
    for part in reversed([part for part in section.__mro__ if is_dataclass(part)]):
        found |= meanings(part)
    for field in fields(section):
        name, hint = field.name, typing.get_type_hints(section)[field.name]
        if is_dataclass(hint):
            properties[name] = {"description": inspect.getdoc(hint) or "", **_of_section(hint)}
        else:
            properties[name] = _of_setting(hint, bounds_of(hints[name]), getattr(default, name), found.get(name, ""))
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _of_setting(hint: Any, bounds: list[Bound], default: Any, meaning: str) -> dict[str, Any]:
    result = _of_type(hint)
    words = in_words(bounds)
    description = [meaning, f"Allowed: {words}." if words else ""]
    for bound in bounds:
        found = re.fullmatch(r"(at least|above|at most|below) (-?[\d.e-]+)", bound.words)
        if isinstance(bound, Unsupported):
            description.append(f"Only the default: {bound.reason}.")
        elif found and result.get("type") in ("integer", "number"):
            result[LIMITS[found[1]]] = float(found[2]) if "." in found[2] or "e" in found[2] else int(found[2])
    if default is not None:
        result["default"] = default
    return result | {"description": " ".join(filter(None, description))}


def _of_type(hint: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        options = [_of_type(option) for option in arguments if option is not type(None)]
        return options[0] if len(options) == 1 else {"anyOf": options}
    if origin is list:
        return {"type": "array", "items": _of_type(arguments[0])}
    return {"type": TYPES[hint]} if hint in TYPES else {}


def render() -> str:
    """The text of the file."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    TARGET.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
