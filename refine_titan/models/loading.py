"""Builds a model from a Hugging Face checkpoint folder."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from refine_titan.errors import UserError
from refine_titan.models import FAMILIES, family_of_model_type
from refine_titan.models.decoder import FastWeightDecoder


def load_hf_model(folder: str | Path, dtype: torch.dtype = torch.float32):
    """Reads `config.json` and the safetensors weights of a folder.

    Returns:
        The decoder on the CPU with parameters in `dtype`, and the family's state-dict adapter.

    Raises:
        UserError: if a file is missing or unreadable, the model type is unknown, or tensors are missing, extra or of the
            wrong shape; the message names them.
    """
    folder = Path(folder)
    config = _read_json(folder / "config.json")
    try:
        family = FAMILIES[family_of_model_type(config.get("model_type"))]
        args = family.ARGS.from_hf_config(config)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    model = FastWeightDecoder(args)
    adapter = family.STATE_DICT_ADAPTER(args, None)
    weights = _read_safetensors(folder)
    _check_tensors(folder, weights, adapter.to_hf(model.state_dict()))
    model.load_state_dict(adapter.from_hf({name: tensor.to(dtype) for name, tensor in weights.items()}))
    return model.to(dtype), adapter


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected a Hugging Face checkpoint folder")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def _read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    index = folder / "model.safetensors.index.json"
    names = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    weights = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} does not exist")
        try:
            with safe_open(path, framework="pt") as file:
                weights |= {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise UserError(f"{path} cannot be read as safetensors: {error}") from error
    return weights


def _check_tensors(folder: Path, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        raise UserError(f"{folder}: the weights lack {', '.join(missing)}")
    if extra:
        raise UserError(f"{folder}: the weights have tensors this model does not know: {', '.join(extra)}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise UserError(f"{folder}: {name} has shape {list(found[name].shape)}, config.json says {list(tensor.shape)}")
