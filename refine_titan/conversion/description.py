"""The files that lie beside the weights so that other programs can load a checkpoint: `config.json` and the tokenizer's files."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from refine_titan.conversion.carried import CARRIED_FILE, CarriedTensors
from refine_titan.files.links import refuse_link
from refine_titan.files.reasons import naming
from refine_titan.models.hf_files import ASSETS, TOKENIZER_FILE, TOKENIZER_PARTS
from refine_titan.models.model_config import CONFIG_FILE, parse_json
from refine_titan.models.stored_tensors import dtype_name


@dataclass(frozen=True)
class ModelDescription:
    """The files that lie beside the weights.

    Attributes:
        config: content of `config.json`.
        assets: files to copy.
        carried: tensors beside the model; None for none.
        made: name -> content of files of a tokenizer that is in no folder.
    """

    config: bytes
    assets: tuple[Path, ...] = ()
    carried: CarriedTensors | None = None
    made: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        carried = self.carried.nbytes if self.carried else 0
        made = sum(map(len, self.made.values()))
        return len(self.config) + made + sum(path.stat().st_size for path in self.assets) + carried

    def in_dtype(self, dtype: torch.dtype) -> "ModelDescription":
        """This description, with a `config.json` that does not contradict the dtype of the weights."""
        stated = stated_dtype(self.config)
        return self if stated in (None, dtype_name(dtype)) else replace(self, config=with_dtype(self.config, dtype))

    def write(self, folder: Path) -> None:
        """Writes the files into `folder`, which it makes if there is none, and waits until they are on disk."""
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for name, content in {CONFIG_FILE: self.config, **self.made}.items():
            with naming(folder / name):
                (folder / name).write_bytes(content)
        for path in self.assets:
            with naming(path):
                shutil.copyfile(path, folder / path.name)
        written = [CONFIG_FILE, *self.made, *(path.name for path in self.assets)]
        if self.carried is not None:
            self.carried.write(folder)
            written.append(CARRIED_FILE)
        for name in written:
            sync(folder / name)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer that `data.tokenizer.load_tokenizer` can read."""
    return (folder / TOKENIZER_FILE).is_file() or all((folder / name).is_file() for name in TOKENIZER_PARTS)


def find_assets(folder: Path) -> tuple[Path, ...]:
    """The tokenizer's files in a folder.

    Raises:
        UserError: one is a link out of the folder.
    """
    assets = tuple(folder / name for name in ASSETS if (folder / name).is_file())
    for path in assets:
        refuse_link(path)
    return assets


def stated_dtype(config: bytes) -> str | None:
    """The dtype of the weights that a `config.json` states, or None."""
    values = _with_dtype_key(json.loads(config))
    dtype = values.get("dtype") or values.get("torch_dtype")
    return dtype.removeprefix("torch.") if isinstance(dtype, str) else None


def with_dtype(config: bytes, dtype: torch.dtype) -> bytes:
    """A `config.json` that states `dtype`. If `config` does so already, the same bytes; otherwise the dtype is set under the key that
    `config` uses (`dtype`, or `torch_dtype` from transformers before version 5)."""
    if stated_dtype(config) == dtype_name(dtype):
        return config
    values = parse_json(config, Path(CONFIG_FILE))
    place = _with_dtype_key(values)
    place["torch_dtype" if "torch_dtype" in place and "dtype" not in place else "dtype"] = dtype_name(dtype)
    return json_bytes(values)


def _with_dtype_key(values: dict) -> dict:
    """The object of a `config.json` in which the dtype stands: itself, or the text model's part of a larger model."""
    text = values.get("text_config")
    is_nested = isinstance(text, dict) and text.keys() & {"dtype", "torch_dtype"} and not values.keys() & {"dtype", "torch_dtype"}
    return text if is_nested else values


def json_bytes(values: dict) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def sync(path: Path) -> None:
    """Waits until a file or folder is on disk.

    Raises:
        OSError: it does not get there; the error carries its path.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
