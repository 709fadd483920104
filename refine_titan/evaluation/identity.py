"""What identifies an evaluation: `run.json`, written when it starts, and compared when it goes on."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor

from refine_titan.errors import UserError
from refine_titan.models.model_config import read_json
from refine_titan.models.stored_tensors import dtype_name
from refine_titan.monitoring.run_folder import write_atomically

RUN_FILE = "run.json"
FORMAT = 1
# What may differ when an evaluation goes on: where things lie, and what only describes.
FREE = ("name", "checkpoint", "versions", "config")


def weights_sha256(model: nn.Module) -> str:
    """Over name, dtype, shape and bytes of every tensor of the state dict, by name: the weights that answer, wherever they
    were loaded from. One tensor at a time is copied from a device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        digest.update(f"{name} {dtype_name(whole.dtype)} {list(whole.shape)}\n".encode())
        digest.update(whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def begin_run(folder: Path, run: dict[str, Any]) -> None:
    """Writes `run.json`, or compares it with the one of the evaluation that goes on.

    Raises:
        UserError: if the folder holds another evaluation, naming what differs, or something else.
    """
    path = folder / RUN_FILE
    run = json.loads(json.dumps({"format": FORMAT, **run}, default=str))
    if path.is_file():
        different = _differences(read_json(path), run)
        if different:
            raise UserError(
                f"{folder} holds another evaluation, which this one cannot go on with: {'; '.join(different)}; give another "
                "--output, or remove the folder"
            )
        return
    strangers = [entry.name for entry in folder.iterdir() if entry.name != "lock"]
    if strangers:
        raise UserError(f"{folder} holds {sorted(strangers)[0]!r} but no {RUN_FILE}; give another --output")
    write_atomically(path, json.dumps(run, indent=1, ensure_ascii=False) + "\n")


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for name in (*new, *(name for name in old if name not in new)):
        before, now = old.get(name), new.get(name)
        if not prefix and name in FREE:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            lines += _differences(before, now, f"{prefix}{name}.")
        elif before != now:
            lines.append(f"{prefix}{name} was {_short(before)}, is {_short(now)}")
    return lines


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."
