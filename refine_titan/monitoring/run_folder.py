"""The files of a run: resolved config, versions and commit, metrics and rollouts as JSON lines, and the lock of the folder."""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchtitan.tools.logging import logger

from refine_titan.errors import UserError
from refine_titan.file_locks import take_lock

PACKAGES = ("torch", "torchtitan", "triton", "flash-linear-attention", "fla-core", "transformers", "tokenizers", "safetensors")


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that its path always holds either the whole old or the whole new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


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
            raise UserError(f"{setting}: {folder} cannot be written ({error.strerror})") from error
        try:
            if not take_lock(self._file):
                logger.warning(f"{folder} is on a file system without locks: nothing keeps a second process from {doing} in it")
        except BlockingIOError as error:
            self._file.seek(0)
            owner = self._file.read().strip() or "unknown"
            raise UserError(f"{setting}: process {owner} is already {doing} in {folder}") from error
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        self._file.close()


class JsonLines:
    """A file with one JSON object per line, each with its `step`; every line is flushed."""

    def __init__(self, path: Path, last_step: int):
        """Opens the file for appending after `last_step`. Lines of later steps and a half-written last line come from a run that ended
        before its next checkpoint; they are dropped."""
        self.path = path
        lines = zip(_complete_lines(path), read_json_lines(path))
        write_atomically(path, "".join(line for line, record in lines if record["step"] <= last_step))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record. Numbers that are not finite become null, because JSON cannot express them."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads all complete lines of a file.

    Raises:
        UserError: a line is not JSON.
    """
    records = []
    for number, line in enumerate(_complete_lines(path), start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}, is not JSON ({error}); remove the line or the file") from error
    return records


def _complete_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run in a folder by section, or nothing if it has no `config.json`.

    Raises:
        UserError: if the file is damaged.
    """
    path = folder / "config.json"
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); remove it to go on without comparing settings") from error


def was_checkpointed(folder: Path) -> bool:
    """Whether the run that the folder describes writes checkpoints."""
    return read_settings(folder).get("checkpoint", {}).get("enable", False)
