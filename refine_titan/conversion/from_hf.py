"""Converts a Hugging Face folder to a DCP checkpoint from which a run can start."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem

from refine_titan.conversion.carried import CarriedTensors
from refine_titan.conversion.dcp_checksums import ChecksumWriter
from refine_titan.conversion.dcp_weights import call_dcp
from refine_titan.conversion.description import ModelDescription, find_assets
from refine_titan.conversion.output_folder import new_folder
from refine_titan.files.links import refuse_link
from refine_titan.models.hf_weights import HFWeights
from refine_titan.models.model_config import ModelConfig
from refine_titan.progress import Progress

# An upper estimate of what DCP adds to a tensor's file.
BYTES_PER_ENTRY = 8192


def from_hf(hf_folder: str | Path, out: str | Path) -> list[str]:
    """Writes the weights in their stored dtype under our names, with `config.json` and the tokenizer's files beside them.

    If a model ties its head to its embeddings, both are written, as in the checkpoints of a run. Tensors beside the model, such as those
    of a vision tower, are carried along.

    Returns:
        Notes for the user.

    Raises:
        UserError: the folder is not a complete checkpoint of a known model, or `out` cannot be written.
    """
    config = ModelConfig.read(Path(hf_folder, "config.json"))
    refuse_link(config.path)
    weights = HFWeights(hf_folder)
    weights.check(config)
    adapter = config.adapter
    entries, sources = {}, {}
    for name in adapter.to_hf(config.tensors):
        stored = torch.empty(weights.tensors[name].shape, dtype=weights.tensors[name].dtype, device="meta")
        for ours, tensor in adapter.from_hf({name: stored}).items():
            entries[ours], sources[ours] = tensor, name

    def read(ours: str) -> torch.Tensor:
        return adapter.from_hf({sources[ours]: weights.read(sources[ours])})[ours]

    carried = CarriedTensors.of_hf(weights, config)
    description = ModelDescription(config.raw, find_assets(Path(hf_folder)), carried)
    nbytes = sum(tensor.nbytes for tensor in entries.values())
    with new_folder(Path(out), nbytes + BYTES_PER_ENTRY * len(entries) + description.nbytes, Path(hf_folder)) as folder:
        description.write(folder)
        with Progress("from-hf", nbytes, "bytes") as progress:
            # One file per tensor: the writer keeps all tensors of a file in memory (torch 2.13.0). Nothing is copied ahead: with a
            # GPU the writer would otherwise read tensors before it writes them.
            writer = ChecksumWriter(folder, single_file_per_rank=False, sync_files=False, per_thread_copy_ahead=0)
            call_dcp(dcp.save, entries, storage_writer=writer, planner=_ReadingPlanner(read, progress.advance))
    return [*weights.notes(config), *([str(carried)] if carried else [])]


class _ReadingPlanner(DefaultSavePlanner):
    """Plans with tensors without data and reads each tensor when it is written."""

    def __init__(self, read: Callable[[str], torch.Tensor], advance: Callable[[int], None]):
        super().__init__()
        self._read = read
        self._advance = advance

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        tensor = self._read(write_item.index.fqn)
        self._advance(tensor.nbytes)
        return tensor
