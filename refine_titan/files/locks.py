"""Locks of files that a process holds until it ends, where the file system has them."""

import errno
import fcntl
from typing import IO

# What a file system without locks answers: some network and FUSE mounts.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def take_lock(file: IO) -> bool:
    """Takes the exclusive lock of an open file without waiting. The system releases it however this process ends.

    Returns:
        False if the file system has no locks.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True
