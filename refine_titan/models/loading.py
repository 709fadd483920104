"""Builds a model from a Hugging Face checkpoint folder."""

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
    names = adapter.to_hf(config.tensors)
    model.load_state_dict(adapter.from_hf({name: weights.read(name) for name in names}))
    return model, adapter
