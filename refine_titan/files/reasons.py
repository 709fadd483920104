"""Why a file cannot be written or read, in words for users."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refine_titan.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
# Only what is written can meet these. Of a copy that fails, Python names the source first.
WRITING = (*FULL, errno.EROFS, errno.EFBIG)
# The system says "File exists" and "Not a directory" where a file stands in the place of a folder.
FILE_IN_PLACE_OF_FOLDER = (errno.EEXIST, errno.ENOTDIR)


def system_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind an exception; None if there is none. torch keeps it as context, Rust's libraries as text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            if error.filename2 is not None and error.errno in WRITING:
                return OSError(error.errno, os.strerror(error.errno), error.filename2)
            return error
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found:
            return OSError(int(found.group(1)), os.strerror(int(found.group(1))))
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Lets errors of the system in the block carry a path. Those of writes to an open file carry none, those of libraries no number.

    Raises:
        OSError: with number, reason and path.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = system_error(error)
        if found is None or (found is error and found.filename is not None):
            raise
        raise OSError(found.errno, os.strerror(found.errno), found.filename or str(path)) from error


def reason(error: OSError, path: str | os.PathLike) -> str:
    """The system's reason; if the disk of `path` is full, with the bytes that are free there."""
    text = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in FILE_IN_PLACE_OF_FOLDER:
        path = Path(os.path.abspath(path))
        found = next((place for place in (path, *path.parents) if place.is_file()), None)
        text = f"{found} is a file; wanted is a folder" if found is not None else text
    elif error.errno in FULL:
        text += f" ({free_bytes(path):,} bytes are free)"
    return text


def one_line(error: BaseException) -> str:
    """The message of a library's error, whose lines are joined."""
    return " ".join(str(error).split()) or type(error).__name__


def free_bytes(path: str | os.PathLike) -> int:
    """Bytes that are free on the disk of a path that need not exist yet."""
    path = Path(os.path.abspath(path))
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def is_about_a_file(error: BaseException) -> bool:
    """Whether an error is the system's, and names a file. Whoever gets it can tell a user what to mend."""
    return isinstance(error, OSError) and error.errno is not None and isinstance(error.filename, (str, bytes, os.PathLike))


def in_words(error: OSError) -> str:
    """The line for an error about a file that nothing else has explained."""
    path = os.fsdecode(error.filename)
    return f"{path}: {reason(error, path)}"
