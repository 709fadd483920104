"""Reads DCP checkpoints without trusting them.

DCP's `.metadata` is a pickle, and torch 2.13.0 unpickles it: whoever wrote the file could run code here. The reader below builds
DCP's own data classes from it and refuses everything else. torch loads the tensors with `weights_only=True`. Whatever has a checksum is
compared with it before it is used.
"""

import io
import pickle
import struct
import zipfile
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from refine_titan.conversion.dcp_checksums import METADATA_CHECKSUM, METADATA_FILE, SUFFIX, Checksums, metadata_agrees
from refine_titan.errors import UserError, printable
from refine_titan.files.git_lfs import refuse_lfs_pointer
from refine_titan.files.limits import check_small_file, read_small_file

# Threads that compare records with their checksums; more gain nothing on one disk.
CHECKING_THREADS = 4
# Exceptions that reading a damaged data file raises (torch 2.13.0).
READING_ERRORS = (OSError, RuntimeError, ValueError, AssertionError, EOFError, LookupError, pickle.UnpicklingError)

ZIP_MAGIC = b"PK\x03\x04"

_METADATA_CLASSES = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
_ALLOWED = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA_CLASSES),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
}


class DamagedCheckpoint(UserError):
    """A checkpoint whose content is not what was written."""

    def __init__(self, folder: Path, problem: str):
        super().__init__(folder, problem)
        self.folder, self.problem = folder, problem

    def __str__(self) -> str:
        return printable(f"{self.folder} is damaged: {self.problem}")


# The unpickler in Python, 2 to 3 times slower than the one in C: for one number in a file of ten bytes that one takes 16 GiB, and it lets
# no subclass decide which objects get a state.
class _MetadataUnpickler(pickle._Unpickler):
    dispatch = dict(pickle._Unpickler.dispatch)

    def load_build(self) -> None:
        """Gives an object its state. A class gets none: it would be another one for the whole process."""
        target = self.stack[-2]
        if isinstance(target, type) or not is_dataclass(target):
            raise pickle.UnpicklingError(f"it changes {target!r:.80}, which no checkpoint needs")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _ALLOWED and not is_dtype:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def _problem(metadata: Any) -> str | None:
    """What is wrong with the content of `.metadata`, whose unpickler builds objects with any attributes; None if nothing is."""
    if not isinstance(metadata, Metadata):
        return f"it holds {type(metadata).__name__}"
    entries, records = (getattr(metadata, name, None) for name in ("state_dict_metadata", "storage_data"))
    if not isinstance(entries, dict) or not isinstance(records, dict):
        return "it has no entries"
    for index, stored in records.items():
        if not isinstance(index, MetadataIndex) or not _has(index, fqn=str) or not _has(stored, relative_path=str, offset=int, length=int):
            return f"its record {index!r:.80} has no place in a file"
        if min(stored.offset, stored.length) < 0:
            return f"its record {index.fqn!r:.80} has {stored.length} bytes at {stored.offset}"
        if getattr(stored, "transform_descriptors", None):
            return f"its record {index.fqn!r:.80} is stored as {stored.transform_descriptors!r:.80}; allowed: as it is"
    for name, entry in entries.items():
        if not isinstance(name, str) or not (isinstance(entry, BytesStorageMetadata) or _is_tensor(entry)):
            return f"its entry {name!r:.80} is neither a tensor nor bytes"
        pieces = [(None, 0)]
        if isinstance(entry, TensorStorageMetadata):
            pieces = [(chunk.offsets, chunk.sizes.numel() * entry.properties.dtype.itemsize) for chunk in entry.chunks]
        for place, nbytes in pieces:
            stored = records.get(MetadataIndex(name, place))
            if stored is None or stored.length < nbytes:
                return f"its entry {name!r:.80} has {'too few bytes' if stored else 'no place'} in a file"
    return None


def _is_tensor(entry: Any) -> bool:
    """Whether an entry is a tensor, and its chunks are all of it: what none of them holds would be read as whatever was in memory."""
    if not isinstance(entry, TensorStorageMetadata) or not _has(entry, size=torch.Size, properties=TensorProperties, chunks=list):
        return False
    if min(entry.size, default=0) < 0 or not _has(entry.properties, dtype=torch.dtype):
        return False
    return all(_is_within(chunk, entry.size) for chunk in entry.chunks) and entry.size.numel() == sum(
        chunk.sizes.numel() for chunk in entry.chunks
    )


def _is_within(chunk: Any, size: torch.Size) -> bool:
    if not isinstance(chunk, ChunkStorageMetadata) or not _has(chunk, offsets=torch.Size, sizes=torch.Size):
        return False
    parts = list(zip(chunk.offsets, chunk.sizes))
    return len(chunk.offsets) == len(chunk.sizes) == len(size) and all(
        0 <= begin and 0 <= count and begin + count <= whole for (begin, count), whole in zip(parts, size)
    )


def _has(found: Any, **attributes: type) -> bool:
    return all(isinstance(getattr(found, name, None), kind) for name, kind in attributes.items())


class CheckedReader(FileSystemReader):
    """DCP's reader of a folder, which reads the metadata once and without running code from it, and compares records with their
    checksums. What is damaged is a `DamagedCheckpoint`, which names folder, file and entry."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._metadata: Metadata | None = None
        self._last_read: _StorageInfo | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Reads `.metadata`.

        Raises:
            UserError: the file is missing, damaged, or holds anything but a checkpoint's metadata.
        """
        if self._metadata is None:
            self._metadata = self._read()
        return self._metadata

    def _read(self) -> Metadata:
        path = Path(self.path, METADATA_FILE)
        if not path.is_file():
            raise UserError(f"{path} does not exist; expected a complete DCP checkpoint")
        try:
            check_small_file(path)
            refuse_lfs_pointer(path)
            content = read_small_file(path)
            if not metadata_agrees(path.parent, content):
                raise DamagedCheckpoint(path.parent, f"{METADATA_FILE} does not have the checksum of what was written")
            metadata = _MetadataUnpickler(io.BytesIO(content)).load()
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        # Python does not document which exceptions damaged bytes raise; only code of DCP's data classes can have run.
        except Exception as error:
            raise UserError(f"{path} cannot be read as DCP metadata: {error}") from error
        problem = _problem(metadata)
        if problem is not None:
            raise UserError(f"{path} cannot be read as DCP metadata: {problem}")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        return metadata

    @cached_property
    def has_checksums(self) -> bool:
        """Whether the folder has checksums of its records."""
        return bool(self._checksums)

    @cached_property
    def _checksums(self) -> Checksums:
        found = Checksums(Path(self.path))
        if not found and Path(self.path, METADATA_CHECKSUM).exists():
            raise DamagedCheckpoint(Path(self.path), f"it has {METADATA_CHECKSUM}, but no file __0{SUFFIX} with the checksums of its data")
        return found

    @cached_property
    def _entries(self) -> dict[tuple[str, int], str]:
        """The name of each record's entry, by file and offset."""
        return {(stored.relative_path, stored.offset): index.fqn for index, stored in self.read_metadata().storage_data.items()}

    def check_record(self, index: MetadataIndex) -> None:
        """Compares one record with its checksum.

        Raises:
            DamagedCheckpoint: it has another, or its file cannot be read.
        """
        with self._opened(index) as (file, stored):
            self._check(file, stored)

    def read_record(self, index: MetadataIndex) -> bytes:
        """Reads one record.

        Raises:
            DamagedCheckpoint: its checksum is another, or its file cannot be read.
        """
        with self._opened(index) as (file, stored):
            self._check(file, stored)
            file.seek(stored.offset)
            content = file.read(stored.length)
        try:
            _refuse_compressed(io.BytesIO(content), stored.length)
        except ValueError as error:
            raise self._damaged(stored, error) from error
        return content

    @contextmanager
    def _opened(self, index: MetadataIndex) -> Iterator[tuple[IO[bytes], _StorageInfo]]:
        stored = self.read_metadata().storage_data[index]
        try:
            with Path(self.path, stored.relative_path).open("rb") as file:
                yield file, stored
        except OSError as error:
            raise self._damaged(stored, error) from error

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads what a plan asks for, while threads compare it with its checksums; fails if any is damaged.

        Raises:
            DamagedCheckpoint: naming the entry and its file.
        """
        needed = {item.storage_index for item in plan.items} if self.has_checksums else set()
        with ThreadPoolExecutor(CHECKING_THREADS) as pool:
            checks = [pool.submit(self.check_record, index) for index in needed]
            try:
                done, failure = super().read_data(plan, planner), None
            except READING_ERRORS as error:
                done, failure = None, error
        for check in checks:
            check.result()
        if failure is None:
            return done
        if isinstance(failure, UserError) or self._last_read is None:
            raise failure
        raise self._damaged(self._last_read, failure) from failure

    def _slice_file(self, file: IO[bytes], sinfo: _StorageInfo) -> IO[bytes]:
        self._last_read = sinfo
        _refuse_compressed(_Record(file, sinfo.offset, sinfo.length), sinfo.length)
        return super()._slice_file(file, sinfo)

    def _check(self, file: IO[bytes], stored: _StorageInfo) -> None:
        problem = self._checksums.problem(stored.relative_path, stored.offset, stored.length, file)
        if problem is not None:
            raise self._damaged(stored, problem)

    def _damaged(self, stored: _StorageInfo, problem: Exception | str) -> DamagedCheckpoint:
        reason = getattr(problem, "strerror", None) or str(problem).partition("\n")[0] or type(problem).__name__
        entry = self._entries[stored.relative_path, stored.offset]
        return DamagedCheckpoint(self.path, f"{entry} cannot be read from {stored.relative_path}: {reason}")


class _Record(io.RawIOBase):
    """A part of a file, as a file. torch's own view of it (2.13.0) seeks wrongly from the end."""

    def __init__(self, file: IO[bytes], begin: int, nbytes: int):
        super().__init__()
        self._file, self._begin, self._nbytes, self._position = file, begin, nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._nbytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        self._file.seek(self._begin + self._position)
        content = self._file.read(max(0, min(len(buffer), self._nbytes - self._position)))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


def _refuse_compressed(record: IO[bytes], nbytes: int) -> None:
    """Raises ValueError if a record would become larger when it is read: torch writes a zip file without compression, and reads any."""
    if record.read(len(ZIP_MAGIC)) == ZIP_MAGIC:
        try:
            with zipfile.ZipFile(record) as content:
                found = sum(item.file_size for item in content.infolist())
        except (zipfile.BadZipFile, NotImplementedError, struct.error) as error:
            raise ValueError(f"it is no zip file ({error})") from error
        if found > nbytes:
            raise ValueError(f"its {nbytes:,} bytes hold {found:,}; allowed: records without compression")


def data_file_problems(folder: Path, metadata: Metadata, names: Container[str] | None = None) -> list[str]:
    """One line for each data file that is missing or shorter than the metadata says.

    Args:
        names: entries whose data are needed; None for all entries.

    Raises:
        UserError: the metadata names a file outside the folder, or a file is a Git LFS pointer.
    """
    needed: dict[str, int] = {}
    for index, stored in metadata.storage_data.items():
        if Path(stored.relative_path).name != stored.relative_path:
            raise UserError(f"{folder}: {index.fqn} is said to be in {stored.relative_path!r}, outside this folder")
        if names is None or index.fqn in names:
            needed[stored.relative_path] = max(needed.get(stored.relative_path, 0), stored.offset + stored.length)
    problems = []
    for file, size in needed.items():
        path = folder / file
        if not path.is_file():
            problems.append(f"{file} does not exist")
        elif path.stat().st_size < size:
            refuse_lfs_pointer(path)
            problems.append(f"{file} is truncated: it has {path.stat().st_size:,} bytes, the metadata says {size:,}")
    return problems
