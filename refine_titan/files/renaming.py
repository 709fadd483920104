"""Renames files and folders, also on network file systems, which may lose the answer to a request that was carried out."""

import errno
import os
import time
from contextlib import suppress
from pathlib import Path

# Errors of a network file system that may be gone a moment later.
PASSING = (errno.ESTALE, errno.EIO, errno.EBUSY, errno.EAGAIN, errno.ETIMEDOUT)
# Seconds to wait before each further attempt.
WAITS = (0.1, 0.3, 1.0)


def rename(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Gives a file or folder another name; a file that had this name is replaced.

    NFS repeats a request whose answer was lost, and the repeated one fails because the first has been carried out: the source is gone, and
    the target is what it was. That is a success. Errors that may pass are waited for.

    Raises:
        OSError: the last attempt failed.
    """
    before = os.lstat(source)
    for wait in (*WAITS, None):
        try:
            os.replace(source, target)
            return
        except OSError as error:
            if not os.path.lexists(source) and _is(target, before):
                return
            if wait is None or error.errno not in PASSING:
                raise
        time.sleep(wait)


def _is(path: str | os.PathLike, stat: os.stat_result) -> bool:
    with suppress(OSError):
        return os.path.samestat(Path(path).lstat(), stat)
    return False
