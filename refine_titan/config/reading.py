"""Reads a TOML file and the command line into a JobConfig, and refuses what no setting can be."""

import tomllib
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torchtitan.config import ConfigManager

from refine_titan.config.bounds import check_bounds
from refine_titan.config.command_line import checked_words
from refine_titan.config.sections import JobConfig
from refine_titan.config.type_checks import describe, did_you_mean, in_toml, matches
from refine_titan.config.user_paths import user_path
from refine_titan.errors import UserError

# Before a folder in `data.source`: the library `datasets` reads it.
DATASET_PREFIX = "datasets:"
# Settings that name a file or folder, in which `~` is the home folder.
PATHS = (
    ("job", "dump_folder"),
    ("model", "flavor"),
    ("model", "hf_assets_path"),
    ("checkpoint", "initial_load_path"),
    ("data", "source"),
    ("evaluation", "data_folder"),
    ("evaluation", "essay_folder"),
    ("evaluation", "perplexity_source"),
    ("evaluation", "dump_folder"),
)


def read_config(args: list[str], values: dict[str, Any] | None = None) -> JobConfig:
    """Reads the settings of a command line (`CONFIG.toml --section.key value`) over those of its config file over the defaults.

    Args:
        values: settings by section that stand in place of a config file; `check_settings` has checked them.

    Raises:
        UsageError: naming the word of the command line that is wrong.
        UserError: naming the file, key or value that is wrong: a key that does not exist, a wrong type, a value out of bounds.
    """
    args = checked_words(args)
    manager = _Manager(JobConfig)
    manager.given_values = values
    config = manager.parse_args(args)
    _choose_length(config, args, manager.file_values)
    for section, name in PATHS:
        value = getattr(getattr(config, section), name)
        prefix = DATASET_PREFIX if value and value.startswith(DATASET_PREFIX) else ""
        if value and value.removeprefix(prefix).startswith("~"):
            setattr(getattr(config, section), name, prefix + str(user_path(value.removeprefix(prefix))))
    return config


def _choose_length(config: JobConfig, args: list[str], file_values: dict[str, Any]) -> None:
    """Lets `training.steps` or `training.epochs` of the command line replace the other one of the file.

    Raises:
        UserError: one of the two sets both.
    """
    in_file = file_values.get("training", {})
    for where, given in (
        ("the command line", {name: any(arg.partition("=")[0] == f"--training.{name}" for arg in args) for name in ("steps", "epochs")}),
        (config.job.config_file, {name: name in in_file for name in ("steps", "epochs")}),
    ):
        if given["steps"] and given["epochs"] and config.training.epochs:
            epochs, steps = config.training.epochs, config.training.steps
            raise UserError(f"training.epochs is {epochs} and training.steps is {steps}, both in {where}; allowed: one of them")
        if given["steps"] or given["epochs"]:
            if given["steps"]:
                config.training.epochs = 0
            return


# Largest file of settings in bytes. tomllib's time grows with the square of what a hostile file has.
LARGEST_FILE = 1 << 16


class _Manager(ConfigManager):
    """torchtitan's reader of settings with error messages that name the setting and what it may be.

    Attributes:
        file_values: what the file says.
        given_values: settings in place of a file.
    """

    file_values: dict[str, Any] = {}
    given_values: dict[str, Any] | None = None

    def _maybe_load_toml(self, args: list[str]) -> dict[str, Any] | None:
        path = _config_file(args)
        if path is None:
            values = self.given_values
        else:
            values = read_toml(user_path(path), "--job.config_file: ")
            check_settings(values, where=str(user_path(path)))
        self.file_values = values or {}
        return values

    def _maybe_add_custom_config(self, args: list[str], toml_values: dict[str, Any] | None) -> type:
        """Imports nothing: torchtitan would import the module that `job.custom_config_module` names, before any check."""
        return self.config_cls

    def _validate_config(self) -> None:
        """Replaces torchtitan's checks of the tokenizer's path, which is optional here."""
        check_bounds(self.config)


def read_toml(path: Path, setting: str = "") -> dict[str, Any]:
    """Reads a TOML file.

    Args:
        setting: what names the file, for the error message.

    Raises:
        UserError: there is no such file, or it is too large, cannot be read, or is no TOML.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise UserError(f"{setting}{path} has more than {LARGEST_FILE:,} bytes, too many for a file of settings")
        return tomllib.loads(content.decode("utf-8").replace("\r\n", "\n"))
    except UserError:
        raise
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{setting}{path} is not a file") from error
    except OSError as error:
        raise UserError(f"{setting}{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8, of numbers of thousands of digits, of nesting
        raise UserError(f"{path} is not valid TOML: {error}") from error


def check_settings(values: dict[str, Any], where: str, section: type = JobConfig, prefix: str = "") -> None:
    """Checks that settings by section exist and have their types; bounds are checked when they are read.

    Args:
        where: what holds the settings, for the error message.

    Raises:
        UserError: at the first key that a section's class does not have, or whose value has another type.
    """
    hints = typing.get_type_hints(section)
    names = [f.name for f in fields(section)]
    for key, value in values.items():
        if key not in names:
            hint = did_you_mean(key, names, prefix) or f"; known: {', '.join(names)}"
            raise UserError(f"{where}: unknown key {prefix + key!r}{hint}")
        hint = hints[key]
        if is_dataclass(hint):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {prefix + key} is {in_toml(value)}, but it is a section: [{prefix + key}]")
            check_settings(value, where, hint, f"{prefix}{key}.")
        elif not matches(value, hint):
            raise UserError(f"{where}: {prefix + key} is {in_toml(value)}; allowed: {describe(hint)}")


def _config_file(args: list[str]) -> str | None:
    """The last config file on the command line: run_train.sh names a default before the caller's arguments."""
    path = None
    for i, arg in enumerate(args):
        key, equals, value = arg.partition("=")
        if key in ("--job.config_file", "--job.config-file"):
            path = value if equals else "".join(args[i + 1 : i + 2])
            if not path:
                raise UserError(f"{key} is empty; allowed: the path of a TOML file")
    return path
