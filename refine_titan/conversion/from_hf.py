"""A Hugging Face folder to a DCP checkpoint that a run starts from."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem

from refine_titan.conversion.dcp_weights import call_dcp
from refine_titan.conversion.description import ModelDescription, find_assets
from refine_titan.conversion.output_folder import new_folder
from refine_titan.conversion.progress import progress_bar
from refine_titan.models.hf_weights import HFWeights
from refine_titan.models.model_config import ModelConfig

# DCP's own share of a tensor's file, with room to spare.
BYTES_PER_ENTRY = 8192


def from_hf(hf_folder: str | Path, out: str | Path) -> None:
    """Writes the weights in their stored dtype under our names, with `config.json` and the tokenizer's files beside them.

    A tied model's head is written besides its embeddings, as a run's own checkpoints have it.

    Raises:
        UserError: if the folder is not a complete checkpoint of a known model, or `out` cannot be written.
    """
    config = ModelConfig.read(Path(hf_folder, "config.json"))
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

    description = ModelDescription(config.raw, find_assets(Path(hf_folder)))
    nbytes = sum(tensor.nbytes for tensor in entries.values())
    with new_folder(Path(out), nbytes + BYTES_PER_ENTRY * len(entries) + description.nbytes, Path(hf_folder)) as folder:
        description.write(folder)
        with progress_bar("from-hf", nbytes) as advance:
            # One file a tensor: within a file the writer keeps every tensor in memory (torch 2.13.0). No copying ahead, or
            # it reads tensors before their turn where there is a GPU.
            writer = FileSystemWriter(folder, single_file_per_rank=False, sync_files=False, per_thread_copy_ahead=0)
            call_dcp(dcp.save, entries, storage_writer=writer, planner=_ReadingPlanner(read, advance))


class _ReadingPlanner(DefaultSavePlanner):
    """Plans from tensors without data and reads each one at the moment it is written."""

    def __init__(self, read: Callable[[str], torch.Tensor], advance: Callable[[int], None]):
        super().__init__()
        self._read = read
        self._advance = advance

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        tensor = self._read(write_item.index.fqn)
        self._advance(tensor.nbytes)
        return tensor
