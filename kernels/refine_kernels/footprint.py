"""Whether operators stand in for a GPU's kernels, for estimates of memory and traffic on machines that have no GPU."""

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
    """Inside, operators that have kernels of their own on a GPU, ours and torch's, allocate on any device what they would there."""
    token = _is_asked_for.set(True)
    try:
        with _fused_norms():
            yield
    finally:
        _is_asked_for.reset(token)


def wants_gpu_footprint() -> bool:
    return _is_asked_for.get()


def report_traffic(num_bytes: int, num_kernels: int) -> None:
    """What kernels read and write whose stand-ins only allocate."""
    for listener in _traffic_listeners:
        listener(num_bytes, num_kernels)


@contextmanager
def listening_to_traffic(listener: Callable[[int, int], None]) -> Iterator[None]:
    """Inside, `listener` is called with the bytes and the number of kernels of every report."""
    _traffic_listeners.append(listener)
    try:
        yield
    finally:
        _traffic_listeners.remove(listener)


@contextmanager
def _fused_norms() -> Iterator[None]:
    """torch 2.13.0 has one kernel each way for RMSNorm, on a GPU only; elsewhere, and where the dtypes of rows and weight differ, it
    takes a dozen operators. A function mode would not reach what activation checkpointing computes again in backward."""
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
