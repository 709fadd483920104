"""Makes `report.html` of a training run: its curves and settings, and its rollouts to read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refine_titan.errors import UserError
from refine_titan.files.limits import read_small_file
from refine_titan.report.escaping import escape
from refine_titan.report.output import write_output
from refine_titan.report.page import definition_list, html_page
from refine_titan.report.records import flatten
from refine_titan.report.training_sections import training_sections

# Characters of a setting's value that the page shows.
SHOWN_CHARACTERS = 500


def write_run_report(folder: Path) -> Path:
    """Writes `report.html` into the folder of a training run; returns its path.

    Raises:
        UserError: if the folder's metrics are missing or damaged, or the page cannot be written.
    """
    sections = [
        *training_sections(folder),
        ("Settings", _described(folder / "config.json", _settings)),
        ("Versions", _described(folder / "versions.json", _versions)),
    ]
    path = folder / "report.html"
    write_output(path, html_page(folder.resolve().name, "training run", sections))
    return path


def _described(path: Path, describe: Callable[[dict[str, Any]], str]) -> str:
    """HTML of what a JSON file of the run holds; a warning instead if it is damaged, and nothing if there is none."""
    try:
        value = json.loads(read_small_file(path).decode("utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a JSON {type(value).__name__}, not an object")
        return describe(value)
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, RecursionError, UserError) as error:
        return f'<p class="warning">{escape(path)} cannot be read: {escape(error)}</p>'


def _settings(settings: dict[str, Any]) -> str:
    """Makes a list of each section's settings, which unfolds."""
    groups = {name: flatten(value, "") if isinstance(value, dict) else [(name, value)] for name, value in settings.items()}
    return "".join(f"<details><summary>{escape(name)}</summary>{_list(fields)}</details>" for name, fields in groups.items() if fields)


def _versions(versions: dict[str, Any]) -> str:
    return _list(flatten(versions, ""))


def _list(fields: list[tuple[str, Any]]) -> str:
    texts = [(name.removeprefix("."), value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)) for name, value in fields]
    return definition_list((name, text[:SHOWN_CHARACTERS] + "…" * (len(text) > SHOWN_CHARACTERS)) for name, text in texts)
