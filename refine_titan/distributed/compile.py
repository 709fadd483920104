"""Compiles the token-wise parts of each block with torch.compile; the sequence operators between them stay eager."""

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
        UserError: a setting is not supported, or this machine lacks a compiler.
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
    """Compiles `project` and `finish` of every mixer and each block's MLP, for any number of tokens.

    Whole blocks, which torchtitan would compile, would be compiled again in every step: a mixer's `mix` takes host integers (where
    documents, branches and states lie) that never repeat.
    """
    for block in model.layers.values():
        for module, function in ((block.mixer, "project"), (block.mixer, "finish"), (block, "add_mlp")):
            setattr(module, function, _compiled(getattr(module, function), config.backend))
    logger.info(f"Compiling the token-wise parts of {len(model.layers)} blocks with {config.backend}")


def _compiled(function: Callable, backend: str) -> Callable:
    # On a CPU inductor's vector code computes wrong gradients where it transposes a matrix tile by tile: it keeps one row of a tile of
    # 16 (torch 2.13.0; seen with normalised silu, where LaCT's queries were 13 % off with one head). simdlen = 1 disables that code.
    is_for_cpu = backend == "inductor" and not torch.cuda.is_available()
    options = {"cpp.simdlen": 1} if is_for_cpu else None
    compiled = torch.compile(function, backend=backend, dynamic=True, options=options)

    @wraps(function)
    def call(*args):
        return compiled(*(_Arrived.apply(x) if isinstance(x, AsyncCollectiveTensor) else x for x in args))

    return call


class _Arrived(torch.autograd.Function):
    """Waits for a tensor whose collective has not finished. A compiled function that is given such a tensor loses a part of its
    gradient (torch 2.13.0: the gradient of the embeddings was 8 % off under tensor parallelism)."""

    @staticmethod
    def forward(ctx, x: AsyncCollectiveTensor) -> torch.Tensor:
        arrived = x.trigger_wait()
        return arrived.view(arrived.shape)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return grad
