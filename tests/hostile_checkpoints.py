"""Checkpoints that would run code, if whoever reads them trusted them."""

import io
import os
import pickle
from pathlib import Path

import torch

from refine_titan.conversion.dcp_checksums import METADATA_CHECKSUM, METADATA_FILE, SUFFIX
from refine_titan.conversion.dcp_metadata import CheckedReader


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def remove_checksums(checkpoint: Path) -> None:
    """Leaves a checkpoint as other programs write it."""
    for path in [*checkpoint.glob(f"__*{SUFFIX}"), checkpoint / METADATA_CHECKSUM]:
        path.unlink(missing_ok=True)


def poison_entry(checkpoint: Path, entry: str, marker: Path) -> None:
    """Replaces an entry of a checkpoint by a payload, as a stranger would: its file and `.metadata` agree, and there are no checksums."""
    remove_checksums(checkpoint)
    metadata = CheckedReader(checkpoint).read_metadata()
    [index] = [index for index in metadata.storage_data if index.fqn == entry]
    stored, payload = metadata.storage_data[index], io.BytesIO()
    torch.save(Payload(marker), payload)
    with (checkpoint / stored.relative_path).open("ab") as file:
        stored.offset, stored.length = file.tell(), len(payload.getvalue())
        file.write(payload.getvalue())
    (checkpoint / METADATA_FILE).write_bytes(pickle.dumps(metadata))


def poison_metadata(checkpoint: Path, marker: Path) -> None:
    """Puts a payload into `.metadata`, and removes the checksums."""
    remove_checksums(checkpoint)
    metadata = CheckedReader(checkpoint).read_metadata()
    metadata.planner_data = Payload(marker)
    (checkpoint / METADATA_FILE).write_bytes(pickle.dumps(metadata))
