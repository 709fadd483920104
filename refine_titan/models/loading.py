"""Builds a model, or reads its parameters, from a Hugging Face checkpoint folder."""

from collections.abc import Iterator
from pathlib import Path

import torch

from refine_titan.models import build_decoder
from refine_titan.models.decoder import FastWeightDecoder
from refine_titan.models.hf_weights import HFWeights
from refine_titan.models.model_config import ModelConfig
from refine_titan.models.state_dict_adapter import DecoderStateDictAdapter


def load_hf_model(folder: str | Path, dtype: torch.dtype = torch.float32) -> tuple[FastWeightDecoder, DecoderStateDictAdapter]:
    """Reads `config.json` and the safetensors weights of a folder.

    Returns:
        The decoder on the CPU with parameters in `dtype` (at least float32 those that need it), and the adapter of its state dict.

    Raises:
        UserError: if a file is missing or unreadable, the model type is unknown, or tensors are missing, extra or of the
            wrong shape; the message names the first.
    """
    config = ModelConfig.read(Path(folder, "config.json"))
    weights = HFWeights(folder)
    weights.check(config)
    model, adapter = build_decoder(config.args).to(dtype), config.adapter
    for module in model.modules():
        if getattr(module, "keeps_float32", False):
            module.to(torch.promote_types(dtype, torch.float32))
    model.load_state_dict(dict(read_parameters(weights, config)))
    return model, adapter


def read_parameters(weights: HFWeights, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Reads the model's parameters from the weights of a folder, under our names and one published tensor at a time; tensors beside the
    model, such as a vision tower, are left out."""
    adapter = config.adapter
    for name in adapter.to_hf(config.tensors):
        yield from adapter.from_hf({name: weights.read(name)}).items()
