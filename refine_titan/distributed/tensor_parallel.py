"""Tensor parallelism over heads, with sequence-parallel norms and a vocabulary-parallel head.

Between mixers and MLPs each rank holds a part of the stream's tokens. For a mixer or MLP all tokens are gathered, each rank computes its
heads or channels, and a reduce-scatter sums the ranks' results and distributes the tokens again. Parameters become DTensors.
"""

import math

import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from refine_titan.errors import UserError
from refine_titan.models.decoder import DecoderArgs, FastWeightDecoder


def validate_tensor_parallel(args: DecoderArgs, family: str, degree: int) -> None:
    """Checks that a model can be sharded over `degree` ranks.

    Raises:
        UserError: the family cannot be sharded, or the degree does not divide its sizes, which the message names.
    """
    if not args.tensor_parallel_sizes():
        raise UserError(f"parallelism.tensor_parallel_degree is {degree}; {family} supports 1 only")
    sizes = args.tensor_parallel_sizes() | {"vocab_size": args.vocab_size, "MLP channels": args.mlp_dim}
    common = math.gcd(*sizes.values())
    if common % degree:
        found = ", ".join(f"{name} = {size}" for name, size in sizes.items() if size % degree)
        allowed = ", ".join(str(d) for d in range(1, common + 1) if common % d == 0)
        raise UserError(f"parallelism.tensor_parallel_degree is {degree}, but {family} has {found}; allowed: {allowed}")


def apply_tensor_parallel(model: FastWeightDecoder, mesh: DeviceMesh) -> None:
    """Shards a decoder over `mesh`, in place."""
    model.stream_multiple = math.lcm(model.stream_multiple, mesh.size())
    plan: dict[str, ParallelStyle] = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
        "norm": SequenceParallel(sequence_dim=0),
        "output": _FirstDim(),
    }
    for name, block in model.layers.items():
        at = f"layers.{name}"
        # What a norm after mixer or MLP gives is added to a plain tensor; a norm before them hands its rows to a module that gathers them.
        norm = SequenceParallel(sequence_dim=0, use_local_output=block.norms_follow)
        plan |= {
            f"{at}.mixer_norm": norm,
            f"{at}.mixer": PrepareModuleInput(input_layouts=(Shard(0), None, None), desired_input_layouts=(Replicate(), None, None)),
            f"{at}.mlp_norm": norm,
            f"{at}.mlp": PrepareModuleInput(input_layouts=Shard(0), desired_input_layouts=Replicate()),
            f"{at}.mlp.gate_proj": ColwiseParallel(),
            f"{at}.mlp.up_proj": ColwiseParallel(),
            f"{at}.mlp.down_proj": RowwiseParallel(output_layouts=Shard(0)),
        }
        for part, style in block.mixer.tensor_parallel_plan.items():
            if isinstance(getattr(block.mixer, part, None), nn.Parameter):
                _shard_parameter(block.mixer, part, mesh)
            elif style and _has_module(block.mixer, part):
                plan[f"{at}.mixer.{part}"] = _STYLES[style]()
    parallelize_module(model, mesh, plan)
    model.tie()  # sharding has split a shared parameter into two
    replicated = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    assert not replicated, f"{replicated[0]} is in no tensor-parallel plan"


def split_dims(model: FastWeightDecoder) -> dict[str, int | None]:
    """The dim along which `apply_tensor_parallel` splits each parameter, by name; None if every rank holds the whole parameter."""
    dims: dict[str, int | None] = {"tok_embeddings.weight": 0, "norm.weight": None, "output.weight": 0}
    for name, block in model.layers.items():
        at = f"layers.{name}"
        dims |= {f"{at}.mixer_norm.weight": None, f"{at}.mlp_norm.weight": None, f"{at}.mlp.down_proj.weight": 1}
        dims |= {f"{at}.mlp.gate_proj.weight": 0, f"{at}.mlp.up_proj.weight": 0}
        for part, _ in block.mixer.named_parameters():
            plan = block.mixer.tensor_parallel_plan
            # An empty style says that the parts of a module have their own.
            style = next(style for prefix, style in plan.items() if style and (part == prefix or part.startswith(f"{prefix}.")))
            is_row_bias = style == "rows" and part.endswith(".bias")
            dims[f"{at}.mixer.{part}"] = None if is_row_bias else _SPLIT_DIMS[style]
    return dims


class _FirstDim(ParallelStyle):
    """Splits parameters along their first dim; the module computes with this rank's part."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        def shard(_: str, part: nn.Module, mesh: DeviceMesh) -> None:
            for name in dict(part.named_parameters(recurse=False)):
                _shard_parameter(part, name, mesh)

        return distribute_module(module, mesh, shard)


class _Whole(ParallelStyle):
    """Keeps whole parameters on every rank, each of which computes the same; inputs are replicated DTensors."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, mesh)


_STYLES = {
    "columns": ColwiseParallel,
    "rows": lambda: RowwiseParallel(output_layouts=Shard(0)),
    "first_dim": _FirstDim,
    "heads": lambda: SequenceParallel(sequence_dim=1, use_local_output=True),
    "whole": _Whole,
}

_SPLIT_DIMS = {"columns": 0, "rows": 1, "first_dim": 0, "heads": None, "whole": None}


def _shard_parameter(module: nn.Module, name: str, mesh: DeviceMesh) -> None:
    parameter = getattr(module, name)
    sharded = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
    module.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))


def _has_module(module: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in module.named_modules())
