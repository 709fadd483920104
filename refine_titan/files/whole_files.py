"""Writes files so that they appear complete or not at all."""

import errno
import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from refine_titan.files.reasons import naming
from refine_titan.files.renaming import rename

TEMPORARY = ".tmp"
# Bytes that are copied at once.
COPIED_BYTES = 1 << 20


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a file to write. It appears at `path` if the block ends without an exception, after it is on disk.

    Raises:
        OSError: the file cannot be written; the error carries its path.
    """
    # The name has the process id, because a worker whose parent was killed may live for a moment beside those of the next call.
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with naming(path):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            rename(temporary, path)
    except OSError as error:
        if error.filename != str(temporary):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | Iterable[bytes]) -> None:
    """Writes a file so that its path always holds either the whole old or the whole new content. Makes its folder.

    Args:
        content: text, which is written as UTF-8, or the file's bytes in parts.

    Raises:
        OSError: the file cannot be written; the error carries its path.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        for part in [content.encode("utf-8")] if isinstance(content, str) else content:
            file.write(part)


def remove_abandoned(path: Path) -> None:
    """Removes what processes that were killed while they wrote a file have left of it. What a process that lives writes stays."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{TEMPORARY}"):
        process = re.fullmatch(r"[1-9]\d{0,8}", left.name.removeprefix(f".{path.name}.").removesuffix(TEMPORARY))
        if process and not Path("/proc", process[0]).exists():
            left.unlink(missing_ok=True)


def remove_half_written(folder: Path) -> None:
    """Removes what killed processes have left half-written in a folder in which no other process works."""
    for path in folder.glob(f".*{TEMPORARY}"):
        path.unlink()


def parts_of(path: Path, parts: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """Yields the parts (begin, end) of a file.

    Raises:
        OSError: it has become shorter.
    """
    if parts == [(0, 0)]:
        return
    with path.open("rb") as file:
        for begin, end in parts:
            file.seek(begin)
            for place in range(begin, end, COPIED_BYTES):
                nbytes = min(COPIED_BYTES, end - place)
                content = file.read(nbytes)
                if len(content) < nbytes:
                    raise OSError(errno.EIO, "it has become shorter while it was read", str(path))
                yield content
