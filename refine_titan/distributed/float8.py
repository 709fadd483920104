"""Float8 linear layers by torchtitan's converter, with a list of layers that it must not convert.

Written for torchtitan 0.2.2 and torchao 0.18.0. The converter below replaces torchtitan's in torchtitan's private registry. Parameters
stay in high precision: a float8 layer casts them, and its inputs, for its matrix products.
"""

import dataclasses
import importlib.util
import math

import torch.nn as nn
from torch.distributed.tensor import DTensor
from torchtitan.components.quantization.float8 import AUTO_FILTER_SMALL_KN_FLAG, Float8LinearConverter
from torchtitan.protocols import model_converter
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import has_cuda_capability

from refine_titan.config.sections import JobConfig
from refine_titan.errors import UserError
from refine_titan.models.decoder import FastWeightDecoder

CONVERTER = "quantize.linear.float8"
# The matrix product of a weight's gradient sums over tokens, and float8 tensor cores sum over whole multiples of this number.
TOKEN_MULTIPLE = 16


def validate_converters(config: JobConfig) -> None:
    """Checks `model.converters` and the settings of float8.

    Raises:
        UserError: a setting is not supported, contradicts another one, or needs hardware that this machine lacks.
    """
    for name in config.model.converters:
        if name == "quantize.linear.mx":
            raise UserError(
                "model.converters has 'quantize.linear.mx', which is not supported: torchtitan 0.2.2 takes it from an interface "
                f"that torchao 0.18.0 does not have; allowed: {CONVERTER!r}"
            )
        if name != CONVERTER:
            raise UserError(f"model.converters has {name!r}; allowed: {CONVERTER!r}")
    settings, at = config.quantize.linear.float8, "quantize.linear.float8."
    if not config.model.converters:
        changed = [f.name for f in dataclasses.fields(settings) if getattr(settings, f.name) != getattr(type(settings)(), f.name)]
        if changed:
            logger.warning(f"{at}{changed[0]} has no effect without model.converters = [{CONVERTER!r}]")
        return
    if importlib.util.find_spec("torchao") is None:
        raise UserError(f"model.converters has {CONVERTER!r}, which needs torchao: install this project's extra 'float8'")
    if not (settings.emulate or has_cuda_capability(8, 9)):
        raise UserError(
            f"{at}emulate is false, but this machine has no GPU with float8 tensor cores (NVIDIA, compute capability 8.9 or "
            "later); true computes the same casts with ordinary matrix products"
        )
    if settings.emulate and config.compile.enable:
        raise UserError(f"{at}emulate is true, which cannot be compiled; set compile.enable = false")
    if settings.recipe_name is not None and settings.enable_fsdp_float8_all_gather:
        raise UserError(
            f"{at}enable_fsdp_float8_all_gather is true, but {at}recipe_name is {settings.recipe_name!r}; leave the recipe out: "
            "scales of whole tensors are what is used then"
        )
    if settings.precompute_float8_dynamic_scale_for_fsdp and not settings.enable_fsdp_float8_all_gather:
        raise UserError(f"{at}precompute_float8_dynamic_scale_for_fsdp is true, which needs {at}enable_fsdp_float8_all_gather = true")
    if settings.recipe_name == "rowwise_with_gw_hp" and AUTO_FILTER_SMALL_KN_FLAG in settings.filter_fqns:
        raise UserError(
            f"{at}filter_fqns has {AUTO_FILTER_SMALL_KN_FLAG!r}, for which torchao has no table for the recipe "
            "'rowwise_with_gw_hp'; name the layers to leave out"
        )


def register_float8() -> None:
    """Replaces torchtitan's float8 converter by the one below."""
    model_converter._registry_model_converter_cls[CONVERTER] = DecoderFloat8Converter


class DecoderFloat8Converter(Float8LinearConverter):
    """Converts a decoder's large linear layers. The head, and the layers that the family's mixer names, keep their precision."""

    def __init__(self, job_config: JobConfig, parallel_dims):
        super().__init__(job_config, parallel_dims)
        settings = job_config.quantize.linear.float8
        # torchtitan drops the setting if a recipe is named.
        self.config = dataclasses.replace(self.config, emulate=settings.emulate)
        if settings.enable_fsdp_float8_all_gather and not self.config.enable_fsdp_float8_all_gather:
            logger.warning("quantize.linear.float8.enable_fsdp_float8_all_gather has no effect: nothing is sharded")

    def convert(self, model: FastWeightDecoder) -> None:
        keeps, is_wanted = high_precision_names(model), self.filter_fn
        linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self.filter_fn = lambda module, name: is_wanted(module, name) and not any(kept in name for kept in keeps)
        super().convert(model)
        converted = [name for name, module in model.named_modules() if name in linears and hasattr(module, "linear_mm_config")]
        if not converted:
            raise UserError(
                f"model.converters has {CONVERTER!r}, but no linear layer of this model can be converted: widths must be multiples "
                "of 16, and quantize.linear.float8.filter_fqns must leave some"
            )
        for name in converted:
            model.get_submodule(name).register_state_dict_post_hook(_put_plain_weight)
        model.stream_multiple = math.lcm(model.stream_multiple, TOKEN_MULTIPLE)
        kept = sorted({name.rpartition("layers.")[2].partition(".")[2] or name for name in linears.difference(converted)})
        logger.info(f"{len(converted)} of {len(linears)} linear layers compute in float8; not {', '.join(kept)}")


def high_precision_names(model: FastWeightDecoder) -> tuple[str, ...]:
    """Name parts that mark linear layers as not to be converted, whatever their size."""
    names = {f"mixer.{name}" for block in model.layers.values() for name in block.mixer.high_precision_projections}
    return ("output", *sorted(names))


def _put_plain_weight(module: nn.Module, state_dict: dict, prefix: str, _) -> None:
    """Puts the plain weight into the state dict where torchao has wrapped it for a float8 all-gather, so that checkpoints and engines do
    not need torchao. The storage is shared."""
    weight = state_dict.get(f"{prefix}weight")
    local = weight._local_tensor if isinstance(weight, DTensor) else weight
    inner = getattr(local, "_tensor", None)
    if inner is None:
        return
    if isinstance(weight, DTensor):
        inner = DTensor.from_local(
            inner, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride(), run_check=False
        )
    state_dict[f"{prefix}weight"] = inner
