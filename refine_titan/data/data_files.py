"""Finds data files and opens them, plain or compressed."""

import io
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import pyarrow
from torchtitan.tools.logging import logger

from refine_titan.errors import UserError
from refine_titan.files.git_lfs import refuse_lfs_pointer
from refine_titan.files.limits import MAX_EXPANSION, MAX_FILE_MIB, MAX_ROW_MIB, read_lines
from refine_titan.files.links import leads_outside
from refine_titan.files.reasons import one_line

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BUFFER_BYTES = 1 << 20
# A compressed file may hold this many bytes, however small it is.
SMALL_CONTENT = 64 << 20
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
    return io.BufferedReader(_Decompressed(path), BUFFER_BYTES)


class _Decompressed(io.RawIOBase):
    """The content of a compressed file; reading it fails where it has become more than MAX_EXPANSION allows."""

    def __init__(self, path: Path):
        super().__init__()
        self._stream = pyarrow.input_stream(str(path), compression=compression_of(path))
        self._path, self._position = path, 0
        self._end = max(SMALL_CONTENT, path.stat().st_size * MAX_EXPANSION.value)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        count = self._stream.readinto(buffer)
        self._position += count
        if self._position > self._end:
            raise UserError(
                f"{self._path} holds more than {self._end:,} bytes, {MAX_EXPANSION.value:,} times its size; allowed: "
                f"{MAX_EXPANSION.words(' times')}"
            )
        return count

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


def lines_of(path: Path) -> Iterator[bytes | None]:
    """Yields the lines of a file, plain or compressed; None in place of one above MAX_ROW_MIB, which a warning names. Use it in
    `reading`."""
    with open_data(path) as content:
        for number, line in enumerate(read_lines(content, MAX_ROW_MIB.nbytes), start=1):
            if line.content is None:
                warn_of_long_line(path, number, line.nbytes)
            yield line.content


def warn_of_long_line(path: Path, number: int, nbytes: int) -> None:
    logger.warning(f"{path}, line {number} has {nbytes:,} bytes and is skipped; allowed: {MAX_ROW_MIB.words(' MiB')}")


def count_lines(path: Path) -> int:
    """The number of lines of a file, plain or compressed. Use it in `reading`."""
    count, last = 0, b"\n"
    with open_data(path) as content:
        while block := content.read(BUFFER_BYTES):
            count, last = count + block.count(b"\n"), block[-1:]
    return count + (last != b"\n")


def line_starts(path: Path) -> array:
    """Where each line of a file that is not compressed begins, in bytes. Use it in `reading`."""
    starts, position = array("q"), 0
    with path.open("rb") as content:
        begins_line = True
        while block := content.read(BUFFER_BYTES):
            if begins_line:
                starts.append(position)
            newline = block.find(b"\n")
            while 0 <= newline < len(block) - 1:
                starts.append(position + newline + 1)
                newline = block.find(b"\n", newline + 1)
            position, begins_line = position + len(block), block[-1:] == b"\n"
    return starts


def read_text(path: Path) -> str | None:
    """The text of a file, plain or compressed, with every end of a line as \\n; None if it is not UTF-8. Use it in `reading`.

    Raises:
        UserError: it is larger than MAX_FILE_MIB.
    """
    with open_data(path) as content, io.TextIOWrapper(content, encoding="utf-8-sig") as text:
        try:
            found = text.read(MAX_FILE_MIB.nbytes + 1)
        except UnicodeDecodeError:
            return None
    refuse_large(path, len(found))
    return found


def read_whole(path: Path) -> bytes:
    """The content of a file, plain or compressed. Use it in `reading`.

    Raises:
        UserError: it is larger than MAX_FILE_MIB.
    """
    with open_data(path) as content:
        found = content.read(MAX_FILE_MIB.nbytes + 1)
    refuse_large(path, len(found))
    return found


def refuse_large(path: Path, size: int) -> None:
    """Raises UserError if a content that has to be in memory is larger than MAX_FILE_MIB."""
    if size > MAX_FILE_MIB.nbytes:
        raise UserError(f"{path} holds more than {MAX_FILE_MIB.nbytes:,} bytes; allowed: {MAX_FILE_MIB.words(' MiB')}")


@dataclass
class FolderContent:
    """The files of a folder and of those below it.

    Attributes:
        files: the files to be read, sorted by their path.
        left_out: reason -> paths of files and folders that are not read.
        outside: paths of files that are read and lie elsewhere: they, or a folder on the way to them, are links.
    """

    files: list[Path] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)

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
                if leads_outside(path, folder):
                    found.outside.append(f"{relative / name} -> {path.resolve()}")
    found.files.sort()
    found.outside.sort()
    return found


def describe_files(files: Sequence[Path], content: FolderContent, num_rows: int | None = None) -> list[str]:
    """Lines that say which files are read, how large they are, which are elsewhere, and which are left out and why; `num_rows` is None if
    it is not known."""
    size = sum(path.stat().st_size for path in files)
    rows = "" if num_rows is None else f", {num_rows:,} row(s)"
    lines = [f"{len(files)} file(s), {size:,} bytes{rows}: {some([path.name for path in files])}"]
    for reason, names in sorted(content.left_out.items()):
        lines.append(f"left out, {len(names)} ({reason}): {some(names)}")
    if content.outside:
        lines.append(f"read through links out of the folder, {len(content.outside)}: {some(content.outside)}")
    return lines


def some(names: Sequence[str], shown: int = 4) -> str:
    """All names of a short list; of a long one the first, and how many more there are."""
    if len(names) <= shown:
        return ", ".join(names)
    return f"{', '.join(names[: shown // 2])} and {len(names) - shown // 2} more"
