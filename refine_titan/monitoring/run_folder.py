"""The files of a run: resolved config, versions and commit, metrics and rollouts as JSON lines, and the lock of the folder."""

import importlib.metadata
import json
import logging
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from refine_titan.errors import UserError
from refine_titan.files.appended_file import AppendedFile
from refine_titan.files.json_lines import DamagedLines, Decoder, StepNumber, complete_lines
from refine_titan.files.limits import read_small_file
from refine_titan.files.locks import take_lock
from refine_titan.files.reasons import naming, reason
from refine_titan.files.whole_files import parts_of, remove_half_written, write_atomically

# torchtitan's logger too; importing torchtitan for it takes three seconds, which a report does not have.
logger = logging.getLogger()

PACKAGES = ("torch", "torchtitan", "triton", "flash-linear-attention", "fla-core", "transformers", "tokenizers", "safetensors")


def write_run_files(folder: Path, config: dict[str, Any], extensions: Sequence[str] = ()) -> None:
    """Writes `config.json` (every setting, resolved) and `versions.json` (packages, with those of `extensions`, Python, commit)."""
    write_atomically(folder / "config.json", json.dumps(config, indent=2, default=str) + "\n")
    write_atomically(folder / "versions.json", json.dumps(versions(extensions), indent=2) + "\n")


def versions(extensions: Sequence[str] = ()) -> dict[str, Any]:
    """Versions of the packages that the run depends on, of the packages `extensions`, and the git commit of the code, with whether it
    was modified."""
    packages = {}
    for package in (*PACKAGES, *extensions):
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            packages[package] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_modified": bool(_git("status", "--porcelain")),
    }


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def check_writable(folder: Path) -> None:
    """Raises UserError if the folder cannot be made or written to; leaves nothing behind."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"job.dump_folder: {folder} cannot be written: {existing} is not a folder one can write to")


class FolderLock:
    """A lock that keeps a second process from writing to the same run folder. The system releases it however this process ends."""

    def __init__(self, folder: Path, setting: str = "job.dump_folder", doing: str = "training"):
        """Takes the lock.

        Args:
            setting: the setting that names the folder, for the error message.
            doing: what a process that holds the lock is doing, for the error message.

        Raises:
            UserError: another process holds the lock, or the folder cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / "lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{setting}: {folder} cannot be written ({reason(error, folder)})") from error
        try:
            if not take_lock(self._file):
                logger.warning(f"{folder} is on a file system without locks: nothing keeps a second process from {doing} in it")
        except BlockingIOError as error:
            self._file.seek(0)
            owner = self._file.read().strip() or "unknown"
            raise UserError(f"{setting}: process {owner} is already {doing} in {folder}") from error
        except OSError as error:
            raise UserError(f"{setting}: {folder}/lock cannot be locked ({reason(error, folder)})") from error
        with suppress(OSError):  # the number only helps whoever is refused; a full disk may have no room for it
            self._file.truncate(0)
            os.write(self._file.fileno(), str(os.getpid()).encode())
        remove_half_written(folder)

    def release(self) -> None:
        self._file.close()


class Stepped(msgspec.Struct):
    """What every line of a run's JSON lines has."""

    step: StepNumber


class JsonLines:
    """A file with one JSON object per line, each with its `step`. Lines that cannot be written wait, see `problem`.

    Attributes:
        last_step: the step of the last line that the file had when it was opened; -1 if it had none.
    """

    def __init__(self, path: Path, last_step: int):
        """Opens the file for appending after `last_step`. Lines of later steps and a half-written last line come from a run that ended
        before its next checkpoint; they are dropped. Damaged lines are named in a warning; those up to the dropped ones stay.

        Raises:
            OSError: the file cannot be written.
        """
        self.path = path
        self.last_step = -1
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            kept, size = self._kept(last_step), path.stat().st_size if path.exists() else 0
        if kept != [(0, size)]:
            write_atomically(path, parts_of(path, kept))
        self._file = AppendedFile(path)

    @property
    def problem(self) -> str | None:
        """Says why lines wait to be written, and how many; None if none do."""
        if self._file.problem is None:
            return None
        why = reason(self._file.problem, self.path)
        return f"{self.path} cannot be written: {why}; {self._file.waiting} line(s) of it are lost"

    def try_again(self) -> None:
        """Writes the lines that wait, if it can."""
        self._file.try_again()

    def _kept(self, last_step: int) -> list[tuple[int, int]]:
        """The parts (begin, end) of the file that stay, in bytes. A damaged line has no step and goes the way of the line before it."""
        parts, decode, damaged, stays = [(0, 0)], Decoder(Stepped), DamagedLines(self.path), True
        for line in complete_lines(self.path):
            try:
                step = decode(line.whole()).step
            except ValueError as error:
                if stays:
                    damaged.add(line, error)
            else:
                stays = step <= last_step
                self.last_step = max(self.last_step, step) if stays else self.last_step
            if stays:
                if line.begin == parts[-1][1]:
                    parts[-1] = (parts[-1][0], line.end)
                else:
                    parts.append((line.begin, line.end))
        damaged.warn()
        return parts

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record. Numbers that are not finite become null, because JSON cannot express them."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.append((json.dumps(finite, allow_nan=False) + "\n").encode())

    def close(self) -> None:
        self._file.close()


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run in a folder by section, or nothing if it has no `config.json`.

    Raises:
        UserError: if the file is damaged.
    """
    path = folder / "config.json"
    if not path.exists():
        return {}
    try:
        with naming(path):
            settings = json.loads(read_small_file(path).decode("utf-8"))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); remove it to go on without comparing settings") from error
    if not isinstance(settings, dict) or not all(isinstance(section, dict) for section in settings.values()):
        raise UserError(f"{path} does not hold the settings of a run; remove it to go on without comparing settings")
    return settings


def checkpoints_of(folder: Path) -> str | None:
    """Where the run that a folder describes writes checkpoints, as `checkpoint.folder` names it; None if it writes none."""
    settings = read_settings(folder).get("checkpoint", {})
    writes = settings.get("enable", False) and not settings.get("load_only", False)
    return settings.get("folder") if writes else None
