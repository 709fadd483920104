"""Checksums of the data in a DCP checkpoint: made while the data are written, complete before `.metadata` is, and compared while the data
are read.

Each rank that writes has a file `__RANK_checksums.json`; `.metadata` has `.metadata.xxh3`. Written for torch 2.13.0, whose writer asks a
stream for its position before and after each record: what lies between two such questions is one piece, with one checksum.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from refine_titan.errors import UserError
from refine_titan.files.limits import read_small_file
from refine_titan.files.reasons import free_bytes, naming
from refine_titan.files.renaming import rename

METADATA_FILE = ".metadata"
METADATA_CHECKSUM = ".metadata.xxh3"
SUFFIX = "_checksums.json"
ALGORITHM = "xxh3_64"
BUFFER_BYTES = 1 << 20
# Offset, length and checksum of each piece of a file.
Pieces = list[tuple[int, int, str]]


class ChecksumWriter(dcp.FileSystemWriter):
    """DCP's writer to a folder, which adds checksums. What keeps it from writing is an `OSError` with the path and the system's number.

    Raises:
        UserError: before anything is written, if the disk has too little room.
    """

    def __init__(self, path: str | os.PathLike, **settings: Any):
        super().__init__(path, **settings)
        self.fs = _HashingFileSystem()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        with naming(self.path):
            return super().prepare_local_plan(plan)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        needed, free = sum(map(_tensor_bytes, plans)), free_bytes(self.path)
        if free < needed:
            raise UserError(f"{self.path} needs {needed:,} bytes; {free:,} bytes are free")
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with naming(self.path):
            done = super().write_data(plan, planner)
            files = {path.name: pieces for path, pieces in self.fs.pieces.items()}
            self.fs.pieces.clear()
            sums = Path(self.path, f"{plan.storage_data.prefix.rstrip('_')}{SUFFIX}")
            _write(sums, json.dumps({"algorithm": ALGORITHM, "files": files}))
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        with naming(self.path), self.fs.renamed_with_checksum():
            super().finish(metadata, results)


def _tensor_bytes(plan: SavePlan) -> int:
    """Bytes of the tensors that a rank writes."""
    pieces = [item.tensor_data for item in plan.items if item.tensor_data is not None]
    return sum(piece.chunk.sizes.numel() * piece.properties.dtype.itemsize for piece in pieces)


class _HashingFileSystem(FileSystem):
    """Files of the writer, and the pieces of those that were written."""

    def __init__(self):
        self.pieces: dict[Path, Pieces] = {}
        self._adds_checksum = False

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with naming(path), super().create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            hashing = _HashingStream(stream)
            yield hashing
            self.pieces[Path(path)] = hashing.finish()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        if self._adds_checksum:
            [(_, _, checksum)] = self.pieces.pop(Path(path))
            _write(Path(f"{new_path}.xxh3"), checksum)
        with naming(new_path):
            rename(path, new_path)

    @contextmanager
    def renamed_with_checksum(self) -> Iterator[None]:
        """Writes beside each file that is renamed inside the context its checksum, before it gets its name."""
        self._adds_checksum = True
        try:
            yield
        finally:
            self._adds_checksum = False


class _HashingStream:
    """A stream that hashes what is written to it."""

    def __init__(self, stream: Any):
        self._stream, self._pieces = stream, []
        self._begin, self._position, self._hash = 0, 0, xxhash.xxh3_64()
        self._thread = ThreadPoolExecutor(1)

    def write(self, data) -> int:
        data = memoryview(data).cast("B")
        self._position += len(data)
        if len(data) < BUFFER_BYTES:
            self._hash.update(data)
            return self._stream.write(data)
        hashing = self._thread.submit(self._hash.update, data)  # beside the writing, which waits for the disk
        written = self._stream.write(data)
        hashing.result()
        return written

    def tell(self) -> int:
        self._end_piece()
        return self._stream.tell()

    def finish(self) -> Pieces:
        self._end_piece()
        self._thread.shutdown()
        return self._pieces

    def _end_piece(self) -> None:
        if self._position > self._begin:
            self._pieces.append((self._begin, self._position - self._begin, self._hash.hexdigest()))
            self._begin, self._hash = self._position, xxhash.xxh3_64()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Checksums:
    """The checksums of a folder."""

    def __init__(self, folder: Path):
        """
        Raises:
            UserError: a file of checksums is damaged.
        """
        self._of_record: dict[tuple[str, int, int], str] = {}
        for path in sorted(folder.glob(f"__*{SUFFIX}")):
            try:
                content = json.loads(read_small_file(path))
                if content["algorithm"] != ALGORITHM:
                    raise ValueError(f"its algorithm is {content['algorithm']!r}; known: {ALGORITHM!r}")
                self._of_record |= {(file, start, n): c for file, pieces in content["files"].items() for start, n, c in pieces}
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}") from error
            except UserError:
                raise
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(f"{path} cannot be read as checksums: {error}") from error

    def __bool__(self) -> bool:
        return bool(self._of_record)

    def problem(self, name: str, offset: int, length: int, file: IO[bytes]) -> str | None:
        """Reads a record from a file called `name` and says why it is not what was written; None if it is. Where the folder has no
        checksums, nothing is read."""
        if not self:
            return None
        expected = self._of_record.get((name, offset, length))
        if expected is None:
            return f"no file __*{SUFFIX} has its checksum"
        return None if expected == _hash_of(file, offset, length) else "its checksum is not that of what was written"


def _hash_of(file: IO[bytes], offset: int, length: int) -> str:
    """Hashes a part of a file through a buffer small enough for the processor's cache."""
    found, buffer = xxhash.xxh3_64(), memoryview(bytearray(BUFFER_BYTES))
    file.seek(offset)
    while length > 0 and (count := file.readinto(buffer[: min(length, BUFFER_BYTES)])):
        found.update(buffer[:count])
        length -= count
    return found.hexdigest()


def metadata_agrees(folder: Path, data: bytes) -> bool:
    """Whether the content of `.metadata` has its checksum; true where there is none."""
    path = folder / METADATA_CHECKSUM
    return not path.is_file() or read_small_file(path) == xxhash.xxh3_64_hexdigest(data).encode()


def _write(path: Path, text: str) -> None:
    with naming(path), path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
