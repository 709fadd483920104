"""The folder of an unfinished preparation: one process at a time works in it, and only a repetition of the same call continues it."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refine_titan.errors import UserError
from refine_titan.files.locks import take_lock
from refine_titan.files.whole_files import TEMPORARY, new_file
from refine_titan.preparation.settings import flag
from refine_titan.preparation.units import has_finished_units

# Inside an output that is not complete.
WORK_FOLDER = "work"


@contextmanager
def work_folder(partial: Path) -> Iterator[Path]:
    """Yields a folder inside `partial` for work in progress and locks it. Files that a killed process left half-written are removed.

    If the block raises before any unit is finished, `partial` is removed.

    Raises:
        UserError: the folder cannot be written, or another process works in it.
    """
    work = partial / WORK_FOLDER
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("a")
    except OSError as error:
        raise UserError(f"--output cannot be written: {error.filename}: {error.strerror}") from error
    with lock:
        try:
            if not take_lock(lock):
                print(
                    f"{partial} is on a file system without locks: nothing keeps a second process from preparing data in it",
                    file=sys.stderr,
                )
        except BlockingIOError as error:
            raise UserError(f"another process is preparing data in {partial}") from error
        for path in partial.rglob(f"*{TEMPORARY}"):
            path.unlink()
        try:
            yield work
        except BaseException:
            if work.exists() and not has_finished_units(work):
                shutil.rmtree(partial)
            raise


def check_continues(work: Path, values: dict[str, Any]) -> None:
    """Raises UserError if there are finished units of a call that differs in some of `values` from what `keep` stored for it."""
    path = work / "call.json"
    if not path.exists() or not has_finished_units(work):
        return
    found = differences(json.loads(path.read_text(encoding="utf-8")), values)
    if found:
        raise UserError(
            f"the unfinished work in {work.parent} belongs to another call: {'; '.join(found)}. Repeat that call to continue it, or "
            "delete the folder to start over"
        )


def keep(work: Path, values: dict[str, Any]) -> None:
    """Stores the values on which the content of units depends."""
    with new_file(work / "call.json") as file:
        file.write(json.dumps(values).encode("utf-8"))


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The differences between the values of two calls, one message each."""
    found = []
    for name in after:
        old, new = before.get(name), after[name]
        if old == new:
            continue
        if name == "settings":
            found += [f"{flag(key)} was {old[key]!r} and is {value!r}" for key, value in new.items() if old[key] != value]
        elif name == "tokenizer":
            if old["sha256"] == new["sha256"]:
                continue  # the same tokenizer under another name
            names = [f"{item['name']} (sha256 {item['sha256'][:16]})" for item in (old, new)]
            found.append(f"--tokenizer was {names[0]} and is {names[1]}")
        elif name == "versions":
            found += [f"{name} was {old[name]} and is {version}" for name, version in new.items() if old[name] != version]
        elif name == "inputs":
            found += _changed_inputs(old, new)
        else:
            found.append(f"{flag(name)} was {old} and is {new}")
    return found


def _changed_inputs(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[str]:
    old, new = {item["name"]: item for item in before}, {item["name"]: item for item in after}
    found = [f"input {name} is gone" for name in old if name not in new]
    found += [f"input {name} is new" for name in new if name not in old]
    found += [f"input {name} has changed" for name in new if name in old and old[name] != new[name]]
    return found or ["the inputs are in another order"]
