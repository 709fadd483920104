"""The model, device and ranks for which an engine is built."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from refine_titan.models.decoder import FastWeightDecoder


@dataclass(frozen=True)
class EngineHost:
    """The model that an engine samples from, and where it runs.

    Attributes:
        model: the trainer's model, possibly sharded.
        device: device of the model.
        precision: returns the context in which the model computes.
        replicas: ranks whose engines hold the same weights; None for a single rank.
        microbatches_per_round: most microbatches whose rollouts it samples in one round.
        tensor_parallel_mesh: ranks that share one engine, as they share the trainer's heads; None if each rank has its own engine.
    """

    model: FastWeightDecoder
    device: torch.device
    precision: Callable[[], AbstractContextManager]
    microbatches_per_round: int = 1
    replicas: dist.ProcessGroup | None = None
    tensor_parallel_mesh: DeviceMesh | None = None


class EngineMemory(NamedTuple):
    """Bytes that an engine needs on a rank: weights beside the trainer's, and states."""

    weights: int
    states: int
