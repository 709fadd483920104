"""Tensors of a published checkpoint beside the model, such as a vision tower: carried through every conversion, bit for bit, and left
alone by training. A DCP checkpoint has them in a file of their own."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from refine_titan.files.links import refuse_link
from refine_titan.models.hf_weights import HFWeights, read_header
from refine_titan.models.model_config import CONFIG_FILE, ModelConfig
from refine_titan.models.stored_tensors import StoredTensor

CARRIED_FILE = "carried.safetensors"


@dataclass(frozen=True)
class CarriedTensors:
    """Where the tensors lie, under Hugging Face's names.

    Attributes:
        tensors: name, dtype and shape of each.
        source: the file of a DCP checkpoint that holds exactly these, or the weights of a Hugging Face folder.
    """

    tensors: dict[str, StoredTensor]
    source: Path | HFWeights

    @classmethod
    def of_hf(cls, weights: HFWeights, config: ModelConfig) -> "CarriedTensors | None":
        """Those of a Hugging Face folder; None if it has none."""
        tensors = weights.carried(config)
        return cls(tensors, weights) if tensors else None

    @classmethod
    def of_dcp(cls, folder: Path) -> "CarriedTensors | None":
        """Those of a DCP checkpoint; None if it has none.

        Raises:
            UserError: if their file cannot be read, or is a link out of the folder.
        """
        path = folder / CARRIED_FILE
        if not path.is_file():
            return None
        refuse_link(path)
        return cls(read_header(path), path)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        if isinstance(self.source, HFWeights):
            return self.source.read(name)
        with safe_open(self._file(), framework="pt") as file:
            return file.get_tensor(name).clone()

    def write(self, folder: Path) -> None:
        """Writes the file of a DCP checkpoint beside its `config.json`; as another name of the source where the file system has such."""
        path = folder / CARRIED_FILE
        if isinstance(self.source, HFWeights):
            save_file({name: self.read(name) for name in self.tensors}, path, metadata={"format": "pt"})
            shutil.copymode(folder / CONFIG_FILE, path)  # safetensors 0.8.0 makes files only the owner reads
            return
        try:
            os.link(self._file(), path)
        except OSError:  # another file system, or one without links
            shutil.copyfile(self._file(), path)

    def _file(self) -> Path:
        """The file of a DCP checkpoint. A run removes its old checkpoints, but the newer ones hold the same tensors."""
        if self.source.is_file():
            return self.source
        newest = max(self.source.parent.parent.glob(f"*/{CARRIED_FILE}"), key=lambda path: path.stat().st_mtime)
        refuse_link(newest)
        return newest

    def __str__(self) -> str:
        groups = sorted({".".join(name.split(".")[: 2 if name.startswith("model.") else 1]) for name in self.tensors})
        return (
            f"{len(self.tensors)} tensors of {', '.join(groups)} ({self.nbytes / 2**20:.1f} MiB) are carried along as they are, not trained"
        )
