"""Operators recorded once on a GPU and run again with one launch: a CUDA graph. Written for torch 2.13.0."""

from collections.abc import Callable

import torch
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

# Before it is recorded a function runs so often: kernels are compiled and tuned, plans and workspaces made.
WARM_UPS = 2

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Runs a function, which reads and writes tensors that stay where they are, and gives one that runs its operators again."""


def record_cuda_graph(function: Callable[[], None]) -> Callable[[], None]:
    """The function must neither wait for the GPU nor read from the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Threads that write checkpoints or load data may use the GPU meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph.replay


def can_record(model: nn.Module) -> bool:
    """Whether the model is on a GPU and its weights stay where they are: FSDP2 gathers them anew for every forward."""
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return False
    return all(parameter.is_cuda and not isinstance(parameter, DTensor) for parameter in model.parameters())
