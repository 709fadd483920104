"""A mode in which operators allocate and report what their GPU kernels would, for estimates on machines that have no GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

_is_asked_for = ContextVar("gpu_footprint", default=False)
_traffic_listeners: list[Callable[[int, int], None]] = []


@contextmanager
def gpu_footprint() -> Iterator[None]:
    """Switches the mode on inside the context: operators that have a kernel on a GPU (ours or torch's) allocate, on any device, what
    that kernel would allocate. Values mean nothing."""
    token = _is_asked_for.set(True)
    try:
        with _fused_norms():
            yield
    finally:
        _is_asked_for.reset(token)


def wants_gpu_footprint() -> bool:
    """Whether the caller is inside `gpu_footprint`."""
    return _is_asked_for.get()


def report_traffic(num_bytes: int, num_kernels: int) -> None:
    """Reports the bytes that `num_kernels` kernels would read and write; called by stand-ins that only allocate."""
    for listener in _traffic_listeners:
        listener(num_bytes, num_kernels)


@contextmanager
def listening_to_traffic(listener: Callable[[int, int], None]) -> Iterator[None]:
    """Calls `listener(num_bytes, num_kernels)` for every report made inside the context."""
    _traffic_listeners.append(listener)
    try:
        yield
    finally:
        _traffic_listeners.remove(listener)


@contextmanager
def _fused_norms() -> Iterator[None]:
    """Replaces `F.rms_norm` by a stand-in for torch's GPU kernels.

    torch 2.13.0 computes RMSNorm with one kernel in forward and one in backward on a GPU, if input and weight have the same dtype;
    in every other case it takes a dozen operators. A `TorchFunctionMode` would not reach what activation checkpointing computes again
    in backward, hence the replacement.
    """
    original = F.rms_norm

    def rms_norm(input, normalized_shape, weight=None, eps=None):
        if isinstance(input, DTensor) or weight is None or input.dtype != weight.dtype:
            return original(input, normalized_shape, weight, eps)
        return _FusedNorm.apply(input, weight)

    F.rms_norm = rms_norm
    try:
        yield
    finally:
        F.rms_norm = original


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x.neg()

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return x + grad, torch.empty_like(weight)
