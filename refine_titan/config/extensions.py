"""Functions of installed packages, which name them in their metadata as an entry point of one of this project's groups.

Only the package of a name that is asked for is imported.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from traceback import extract_tb
from typing import Any

from refine_titan.config.type_checks import did_you_mean
from refine_titan.errors import ExtensionError, UserError


@dataclass(frozen=True)
class Extension:
    """A function of an installed package.

    Attributes:
        label: the setting, the name, and the package with its version, for errors.
        function: the function.
    """

    label: str
    function: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        try:
            return self.function(*arguments)
        except Exception as error:  # the package's code may raise anything
            error = _begun_in_package(error)
            raise ExtensionError(f"{self.label} failed{_place(error)} with {_in_one_line(error)}") from error


def find_extension(setting: str, name: str, built_in: Mapping[str, Any], group: str) -> Extension | None:
    """The function of an installed package that a setting names, imported; None for a built-in name.

    Raises:
        UserError: if nothing has the name, or more than one thing has it.
        ExtensionError: if the package cannot be imported.
    """
    installed = entry_points(group=group)
    found = [entry for entry in installed if entry.name == name]
    if len(found) + (name in built_in) > 1:
        givers = ["refine_titan itself"] * (name in built_in) + [f"package {_package(entry)}" for entry in found]
        raise UserError(f"{setting} is {name!r}, a name that is given by {' and by '.join(givers)}; uninstall or rename all but one")
    if name in built_in:
        return None
    if not found:
        known = [*built_in, *(entry.name for entry in installed)]
        packages = ", ".join(f"{entry.name!r} (package {_package(entry)})" for entry in installed)
        raise UserError(
            f"{setting} is {name!r}; allowed: {', '.join(map(repr, built_in))} (built in), and what installed packages give "
            f"as {group}: {packages or 'nothing'}{did_you_mean(name, known)}"
        )
    label = f"{setting} = {name!r} of package {_package(found[0])}"
    try:
        function = found[0].load()
    except Exception as error:  # importing the package runs its code, which may raise anything
        message = f"{label} cannot be imported from {found[0].value!r}: {_in_one_line(error)}"
        raise ExtensionError(message) from _begun_in_package(error)
    if not callable(function):
        raise ExtensionError(f"{label} is an object of type {type(function).__name__} ({found[0].value!r}); wanted is a function")
    return Extension(label, function)


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}"


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _place(error: Exception) -> str:
    """The last line of the function's own file that was reached, for ranks whose traceback is not shown; empty if none was."""
    frames = extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == frames[0].filename]
    return f" in line {lines[-1]} of {frames[0].filename}" if lines else ""


def _begun_in_package(error: Exception) -> Exception:
    """The error with a traceback that leaves out how this file, through Python's import system, came to the package's code."""
    traceback = error.__traceback__
    ours = (__name__, "importlib", "_frozen_importlib")
    while traceback is not None and traceback.tb_frame.f_globals.get("__name__", "").startswith(ours):
        traceback = traceback.tb_next
    return error.with_traceback(traceback)
