"""torch.compile of what a block computes row by row; the sequence operators between stay eager."""

import os
import shutil
from collections.abc import Callable
from functools import wraps

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torchtitan.tools.logging import logger

from refine_titan.config.sections import JobConfig
from refine_titan.config.titan_sections import Compile
from refine_titan.errors import UserError
from refine_titan.models.decoder import FastWeightDecoder

CPU_COMPILERS = ("g++", "clang++")


def validate_compile(config: JobConfig) -> None:
    """Checks `[compile]`.

    Raises:
        UserError: naming the setting that is not supported, or what this machine lacks.
    """
    compiles, checkpointing = config.compile, config.activation_checkpoint
    if not compiles.enable:
        return
    if compiles.components != ["model"]:
        raise UserError(
            f"compile.components is {compiles.components!r}; allowed: ['model'] (the head forms loss and gradient block by block, "
            "in one pass of its own, which leaves no loss function to compile)"
        )
    backends = torch.compiler.list_backends(exclude_tags=())
    if compiles.backend not in backends:
        raise UserError(f"compile.backend is {compiles.backend!r}; allowed: {', '.join(backends)}")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, CPU_COMPILERS), "")
    if compiles.backend == "inductor" and not torch.cuda.is_available() and not shutil.which(compiler):
        raise UserError(
            f"compile.backend is 'inductor', which on a CPU needs a C++ compiler ({' or '.join(CPU_COMPILERS)} in PATH, or CXX)"
        )
    if checkpointing.mode == "selective" and checkpointing.selective_ac_option == "op":
        raise UserError(
            "activation_checkpoint.selective_ac_option is 'op', which cannot see the operators that compile.enable = true compiles "
            "into one and would compute them all again; allowed with compile: a number of layers, or activation_checkpoint.mode "
            "= 'full' or 'none'"
        )


def apply_compile(model: FastWeightDecoder, config: Compile) -> None:
    """Compiles `project` and `finish` of every mixer and the MLP around them, for any number of rows.

    Blocks as wholes, as torchtitan compiles them, would be compiled anew in every step: a mixer's `mix` runs on host integers
    (where documents, branches and states lie) that never repeat.
    """
    for block in model.layers.values():
        for module, function in ((block.mixer, "project"), (block.mixer, "finish"), (block, "add_mlp")):
            setattr(module, function, _compiled(getattr(module, function), config.backend))
    logger.info(f"Compiling the row-wise parts of {len(model.layers)} blocks with {config.backend}")


def _compiled(function: Callable, backend: str) -> Callable:
    # On a CPU inductor's vector code gives wrong gradients where rows are transposed tile by tile: it keeps one row of a tile of
    # 16 (torch 2.13.0, a normalised row of silu; LaCT's queries were 13 % off with one head).
    is_for_cpu = backend == "inductor" and not torch.cuda.is_available()
    options = {"cpp.simdlen": 1} if is_for_cpu else None
    compiled = torch.compile(function, backend=backend, dynamic=True, options=options)

    @wraps(function)
    def call(*args):
        return compiled(*(_Arrived.apply(x) if isinstance(x, AsyncCollectiveTensor) else x for x in args))

    return call


class _Arrived(torch.autograd.Function):
    """A tensor whose collective is still under way, waited for. Handed to a compiled function as it is, it loses a part of its
    gradient (torch 2.13.0: that of the embeddings was 8 % off under tensor parallelism)."""

    @staticmethod
    def forward(ctx, x: AsyncCollectiveTensor) -> torch.Tensor:
        arrived = x.trigger_wait()
        return arrived.view(arrived.shape)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return grad
