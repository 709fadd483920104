"""Reads the entries of a DCP checkpoint that are not tensors (step, parameter groups, position in the data) without running code from them.

Each such entry is a pickle, which torch 2.13.0's default planner loads with `weights_only=False`. The entries of a training run hold only
numbers, texts, lists and tensors, so torch's restricted unpickler can read all of them; it refuses everything else.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from refine_titan.conversion.dcp_metadata import CheckedReader
from refine_titan.errors import UserError

# Exceptions that torch's restricted unpickler raises for foreign or damaged bytes (torch 2.13.0).
_UNREADABLE = (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError, OverflowError)


class PlainLoadPlanner(DefaultLoadPlanner):
    """DCP's planner, restricted to plain data in entries that are not tensors."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(_plain_value(value, read_item.dest_index.fqn), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def check_entries(reader: CheckedReader) -> None:
    """Checks that every entry that is not a tensor holds plain data.

    Raises:
        DamagedCheckpoint: an entry cannot be read.
        UserError: an entry does not; the message names the entry, the file and the reason.
    """
    metadata = reader.read_metadata()
    for index, stored in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            record = reader.read_record(index)
            try:
                _plain_value(io.BytesIO(record), index.fqn)
            except UserError as error:
                raise UserError(f"{Path(reader.path, stored.relative_path)}: {error}") from error


def _plain_value(stored: io.BytesIO, entry: str) -> Any:
    try:
        return torch.load(stored, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line.strip() for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0])
        raise UserError(f"{entry} cannot be read as plain data: {reason}") from error
