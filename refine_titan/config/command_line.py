"""Settings on the command line: `CONFIG.toml --section.key value ...`, checked word by word before torchtitan's reader sees them."""

import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from refine_titan.config.sections import JobConfig
from refine_titan.config.type_checks import describe, did_you_mean, matches
from refine_titan.errors import UsageError

CONFIG_FILE = "--job.config_file"
# Words that people type for a setting that is true or false.
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
HELP = ("-h", "--help")


def settings_by_name(section: type = JobConfig, prefix: str = "") -> dict[str, Any]:
    """Every setting by its name `section.key`, with its type."""
    found = {}
    for name, hint in typing.get_type_hints(section).items():
        if name not in {field.name for field in fields(section)}:
            continue
        if is_dataclass(hint):
            found |= settings_by_name(hint, f"{prefix}{name}.")
        else:
            found[prefix + name] = hint
    return found


def checked_words(words: list[str]) -> list[str]:
    """The words of a command line as torchtitan's reader takes them.

    The config file may stand first without its option, and settings that are true or false may have a value, as in a TOML file.

    Raises:
        UsageError: naming the word that is wrong: no setting has this name, a value is missing, superfluous, or of another type.
    """
    if any(word in HELP for word in words):
        return words
    settings, taken = settings_by_name(), []
    rest = iter_words(words)
    if words and not words[0].startswith("-"):
        taken += [CONFIG_FILE, next(rest)[1][0]]
    for option, values in rest:
        if option is None:
            raise UsageError(f"{values[0]!r} belongs to no option; a config file stands first, a setting is --section.key value")
        name, is_negated = _setting(option, settings)
        hint = settings[name]
        if hint is bool:
            taken.append(_flag(option, name, is_negated, values))
        else:
            taken += [f"--{name}", *_values(option, hint, values)]
    return taken


def iter_words(words: list[str]) -> Iterator[tuple[str | None, list[str]]]:
    """Options with the values that follow them; words before the first option come one by one, with None for the option."""
    option, values = None, []
    for word in words:
        if not word.startswith("--"):
            if option is None:
                yield None, [word]
            else:
                values.append(word)
            continue
        if option is not None:
            yield option, values
        option, equals, value = word.partition("=")
        values = [value] if equals else []
    if option is not None:
        yield option, values


def _setting(option: str, settings: dict[str, Any]) -> tuple[str, bool]:
    """The setting that an option names, and whether it is negated, as in `--checkpoint.no-enable`."""
    section, dot, key = option.removeprefix("--").replace("-", "_").rpartition(".")
    name = f"{section}{dot}{key}"
    if name in settings:
        return name, False
    positive = f"{section}{dot}{key.removeprefix('no_')}"
    if key.startswith("no_") and settings.get(positive) is bool:
        return positive, True
    nearest = did_you_mean(name, settings, "--") or " (docs/configuration.md lists them)"
    raise UsageError(f"there is no setting {option}{nearest}")


def _flag(option: str, name: str, is_negated: bool, values: list[str]) -> str:
    word = values[0].lower() if values else "true"
    if len(values) > 1 or word not in (*TRUE, *FALSE):
        raise UsageError(f"{option} is {' '.join(values)!r}; allowed: true or false, or nothing for true")
    section, _, key = name.rpartition(".")
    return f"--{name}" if (word in TRUE) is not is_negated else f"--{section}.no-{key}"


def _values(option: str, hint: Any, values: list[str]) -> list[str]:
    """The values of a setting, after checking how many there are and of what type."""
    lists = [part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is list]
    is_list = bool(lists)
    if not values and not is_list:
        raise UsageError(f"{option} has no value; allowed: {describe(hint)}")
    if len(values) > 1 and (not is_list or hint == list[str]):
        more = "values are separated by commas" if is_list else f"it has one value: {describe(hint)}"
        raise UsageError(f"{option} is followed by {' '.join(values)!r}, but {more}")
    item = typing.get_args(lists[0])[0] if is_list else hint
    for value in values:
        if not any(matches(read, item) or matches(read, hint) for read in _readings(value, hint)):
            raise UsageError(f"{option} is {value!r}; allowed: {describe(hint)}")
    return values


def _readings(word: str, hint: Any) -> Iterator[Any]:
    """What a word may mean: itself, a number, or None."""
    yield word
    for number in (int, float):
        try:
            yield number(word)
        except ValueError:
            continue
    if word == "None" and type(None) in typing.get_args(hint):
        yield None
