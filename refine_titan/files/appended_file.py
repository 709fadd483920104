"""A file that grows by whole pieces, and outlives a disk that refuses some of them."""

import errno
import logging
import os
from pathlib import Path

from refine_titan.files.reasons import naming

# torchtitan's logger too; importing torchtitan for it takes three seconds.
logger = logging.getLogger()

GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


class AppendedFile:
    """A file to which pieces are appended. Each is in the file whole or not at all, as far as the disk allows.

    A piece that cannot be written is kept, and written before the next one. If somebody removes the file, or its folder, what follows goes
    into a new one.

    Attributes:
        path: the file.
        problem: why pieces wait; None if none do.
        waiting: number of pieces that wait.
    """

    def __init__(self, path: Path):
        """
        Raises:
            OSError: the file cannot be opened.
        """
        self.path = path
        self.problem: OSError | None = None
        self._pieces: list[bytes] = []
        self._open()

    @property
    def waiting(self) -> int:
        return len(self._pieces)

    def append(self, piece: bytes) -> None:
        """Appends a piece, after those that wait."""
        self._pieces.append(piece)
        self.try_again()

    def try_again(self) -> None:
        """Writes what waits, if it can."""
        try:
            if self._pieces and self._is_gone():
                logger.warning(f"{self.path} has been removed or moved while it was written: what follows goes into a new file there")
                self._file.close()
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._open()
            while self._pieces:
                self._write(self._pieces[0])
                self._pieces.pop(0)
            if self.problem is not None:
                logger.info(f"{self.path} is complete again")
            self.problem = None
        except OSError as error:
            if self.problem is None:
                logger.warning(f"{self.path} cannot be written ({os.strerror(error.errno)}): what belongs into it waits")
            self.problem = OSError(error.errno, os.strerror(error.errno), str(self.path))

    def append_to_disk(self, piece: bytes) -> None:
        """Appends a piece, and waits until it is on disk.

        Raises:
            OSError: it cannot be written, or the file is gone; the error carries the path. The file is as before.
        """
        with naming(self.path):
            if self._is_gone():
                raise FileNotFoundError(errno.ENOENT, "it has been removed while it was written", str(self.path))
            self._write(piece)
            try:
                os.fsync(self._file.fileno())
            except OSError:
                self._length -= len(piece)
                self._file.truncate(self._length)
                raise

    def _open(self) -> None:
        self._file = self.path.open("ab", buffering=0)  # a buffer would write its rest later, after other pieces
        self._length = self._file.seek(0, os.SEEK_END)

    def _is_gone(self) -> bool:
        """Whether the path is another file by now, or none."""
        try:
            return self._file.closed or not os.path.samestat(self.path.stat(), os.fstat(self._file.fileno()))
        except OSError as error:
            if error.errno in GONE:
                return True
            raise

    def _write(self, piece: bytes) -> None:
        self._file.truncate(self._length)  # what an earlier attempt left
        rest = memoryview(piece)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(self._length)
            raise
        self._length += len(piece)

    def close(self) -> None:
        self._file.close()
