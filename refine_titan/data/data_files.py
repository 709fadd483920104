"""Finds data files and opens them, plain or compressed."""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import pyarrow

from refine_titan.disk.reasons import one_line
from refine_titan.errors import UserError
from refine_titan.git_lfs import refuse_lfs_pointer

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BUFFER_BYTES = 1 << 20
# Exceptions that reading a file raises, plain or compressed, if its bytes are damaged.
READING_ERRORS = (OSError, pyarrow.ArrowException, UnicodeDecodeError)


def format_of(path: Path) -> str:
    """The suffix that says how a file is read, in lower case, without that of a compression: `.jsonl` for `A.JSONL.gz`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


def compression_of(path: Path) -> str | None:
    """The name of a file's compression; None for a plain file."""
    return COMPRESSIONS.get(path.suffix.lower())


@contextmanager
def reading(path: Path, setting: str = "") -> Iterator[None]:
    """Turns errors of reading a file into a UserError that names the file, and the setting that named it.

    Raises:
        UserError: the file is a Git LFS pointer, or reading fails.
    """
    where = f"{setting}: {path}" if setting else str(path)
    kind = format_of(path).removeprefix(".") or "text"
    try:
        refuse_lfs_pointer(path)
        yield
    except READING_ERRORS as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else one_line(error)
        raise UserError(f"{where} cannot be read as {kind}: {reason}") from error


def open_data(path: Path) -> BinaryIO:
    """Opens a file for reading its content, which is decompressed on the way. Use it in `reading`."""
    if compression_of(path) is None:
        return path.open("rb")
    if path.stat().st_size == 0:  # pyarrow takes it for a file that holds nothing
        raise OSError(f"it is empty, which no {compression_of(path)} file is")
    return io.BufferedReader(pyarrow.input_stream(str(path), compression=compression_of(path)), BUFFER_BYTES)


@dataclass
class FolderContent:
    """The files of a folder and of those below it.

    Attributes:
        files: the files to be read, sorted by their path.
        left_out: reason -> paths of files and folders that are not read.
    """

    files: list[Path] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, path: Path) -> None:
        self.left_out.setdefault(reason, []).append(str(path))


def list_folder(folder: Path, formats: Sequence[str]) -> FolderContent:
    """Finds the files of the given formats (suffixes in lower case) in a folder and below it.

    Links are followed. Hidden files and folders are left out, and so is a folder that was already found under another name.
    """
    found, seen = FolderContent(), set()

    def leave_out_unreadable(error: OSError) -> None:
        found.leave_out(f"cannot be read: {error.strerror}", Path(error.filename).relative_to(folder))

    for place, folders, names in os.walk(folder, onerror=leave_out_unreadable, followlinks=True):
        here = Path(place)
        relative = here.relative_to(folder)
        for name in sorted(folders):
            below = here / name
            if name.startswith("."):
                found.leave_out("hidden", relative / name)
            elif (real := below.resolve()) in seen or real == folder.resolve() or real in here.resolve().parents:
                found.leave_out("read already under another name", relative / name)
            else:
                seen.add(real)
                continue
            folders.remove(name)
        for name in names:
            path = here / name
            if name.startswith("."):
                found.leave_out("hidden", relative / name)
            elif format_of(path) not in formats:
                found.leave_out(f"ends in {path.suffix}" if path.suffix else "has no suffix", relative / name)
            elif not path.is_file():
                found.leave_out("is a broken link or no regular file", relative / name)
            else:
                found.files.append(path)
    found.files.sort()
    return found


def describe_files(files: Sequence[Path], left_out: dict[str, list[str]], num_rows: int | None = None) -> list[str]:
    """Lines that say which files are read, how large they are, and which are left out and why; `num_rows` is None if it is not known."""
    size = sum(path.stat().st_size for path in files)
    rows = "" if num_rows is None else f", {num_rows:,} row(s)"
    lines = [f"{len(files)} file(s), {size:,} bytes{rows}: {_some([path.name for path in files])}"]
    for reason, names in sorted(left_out.items()):
        lines.append(f"left out, {len(names)} ({reason}): {_some(names)}")
    return lines


def _some(names: Sequence[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
