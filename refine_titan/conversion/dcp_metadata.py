"""Reads DCP checkpoints without trusting them.

DCP's `.metadata` is a pickle, and torch 2.13.0 unpickles it: whoever wrote the file could run code here. The reader below builds
DCP's own data classes from it and refuses everything else. torch loads the tensors with `weights_only=True`.
"""

import pickle
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from refine_titan.errors import UserError

METADATA_FILE = ".metadata"
# Exceptions that reading a damaged data file raises (torch 2.13.0).
READING_ERRORS = (OSError, RuntimeError, ValueError, AssertionError, EOFError, LookupError, pickle.UnpicklingError)

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


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _ALLOWED and not is_dtype:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class MetadataReader(FileSystemReader):
    """DCP's reader of a folder, which reads the metadata once and without running code from it."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._metadata: Metadata | None = None

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
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        # Python does not document which exceptions damaged bytes raise; only code of DCP's data classes can have run.
        except Exception as error:
            raise UserError(f"{path} cannot be read as DCP metadata: {error}") from error
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise UserError(f"{path} cannot be read as DCP metadata: it holds {type(metadata).__name__}")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        return metadata


def data_file_problems(folder: Path, metadata: Metadata, names: Container[str] | None = None) -> list[str]:
    """One line for each data file that is missing or shorter than the metadata says.

    Args:
        names: entries whose data are needed; None for all entries.

    Raises:
        UserError: the metadata names a file outside the folder.
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
            problems.append(f"{file} is truncated: it has {path.stat().st_size:,} bytes, the metadata says {size:,}")
    return problems
