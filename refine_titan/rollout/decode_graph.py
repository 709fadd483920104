"""CUDA graphs: operators that are recorded once on a GPU, and then run again with one launch. Written for torch 2.13.0."""

from collections.abc import Callable

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from refine_titan.models.decoder import FastWeightDecoder

# Runs of a function before it is recorded: they compile and tune kernels, and make plans and workspaces.
WARM_UPS = 2

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Runs a function whose tensors stay where they are; returns a function that runs the same operators again."""


class CudaGraphs:
    """Records graphs that share a pool of memory and a stream: no two may run at the same time, and the results of one must be taken
    before another runs."""

    def __init__(self):
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Records a function, which must neither wait for the GPU nor read from the host."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Threads that write checkpoints or load data may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            function()
        return graph.replay


def can_record(model: FastWeightDecoder) -> bool:
    """Whether the model is on a GPU, its weights stay where they are (FSDP2 gathers them anew for every forward), and its mixers'
    steps can be recorded."""
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return False
    if not all(block.mixer.step_can_be_recorded for block in model.layers.values()):
        return False
    return all(parameter.is_cuda and not isinstance(parameter, DTensor) for parameter in model.parameters())
