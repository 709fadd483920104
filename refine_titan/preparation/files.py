"""Writes files so that they appear complete or not at all."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp"


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a file to write. It appears at `path` if the block ends without an exception, after it is on disk.

    Raises:
        OSError: the file cannot be written; the error carries its path.
    """
    # The name has the process id, because a worker whose parent was killed may live for a moment beside those of the next call.
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # errors of writes to an open file carry no path
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
