"""The model, optimizer and ranks that a step works with."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed import ParallelDims

from refine_kernels.packing import on_device
from refine_titan.config.batch_plan import RoundSizes
from refine_titan.config.sections import JobConfig
from refine_titan.data.dataloader import TokenBatch
from refine_titan.models.context_shard import ContextShard
from refine_titan.models.decoder import DecoderOutput, FastWeightDecoder
from refine_titan.rollout.engine_host import EngineHost
from refine_titan.rollout.logprob_gate import GapWindow


@dataclass(frozen=True)
class StepRuntime:
    """A model in training, with its optimizer and meshes. The owner of a step gives it one.

    Attributes:
        config: settings of the run.
        model: the model of this rank, possibly sharded.
        optimizers: optimizers of the model's parameters; None where nothing is trained.
        parallel_dims: meshes of the ranks.
        device: device of the model.
        precision: returns the context in which the model computes.
        before_weights_change: called before every optimizer step.
        round_sizes: how many microbatches share a round of rollouts.
        gap_window: how far engine and trainer disagreed in the last rounds of rollouts.
    """

    config: JobConfig
    model: FastWeightDecoder
    optimizers: OptimizersContainer | None
    parallel_dims: ParallelDims
    device: torch.device
    precision: Callable[[], AbstractContextManager]
    before_weights_change: Callable[[], None] = lambda: None
    round_sizes: RoundSizes = RoundSizes()
    gap_window: GapWindow = field(default_factory=GapWindow)

    def forward(self, *args, **kwargs) -> DecoderOutput:
        """Runs the model in the run's precision; takes the decoder's arguments."""
        with self.precision():
            return self.model(*args, **kwargs)

    def shard_of(self, batch: TokenBatch) -> ContextShard:
        """Returns this rank's tokens of a microbatch."""
        return ContextShard.of_rank(batch.cu_seqlens, self.context_group)

    @cached_property
    def context_group(self) -> dist.ProcessGroup | None:
        """Returns the ranks that share this rank's batch, each with a part of its tokens."""
        return self.parallel_dims.get_mesh("cp").get_group() if self.parallel_dims.cp_enabled else None

    @cached_property
    def token_group(self) -> dist.ProcessGroup | None:
        """Returns the ranks that together hold each token of all batches once."""
        return self.parallel_dims.get_mesh("loss").get_group() if self.parallel_dims.dp_cp_enabled else None

    @cached_property
    def data_group(self) -> dist.ProcessGroup | None:
        """Returns the ranks that have different batches."""
        return self.parallel_dims.get_mesh("batch").get_group() if self.parallel_dims.dp_enabled else None

    @property
    def data_rank(self) -> int:
        return 0 if self.data_group is None else dist.get_rank(self.data_group)

    @property
    def data_degree(self) -> int:
        return 1 if self.data_group is None else dist.get_world_size(self.data_group)

    def sum_over_data(self, number: int) -> float | torch.Tensor:
        """Returns the sum of a number over the ranks that have different batches, without waiting for it: where there are several, a
        float32 scalar on the device, exact up to 2^24."""
        if self.data_group is None:
            return float(number)
        total = on_device(torch.tensor(float(number)), self.device)
        dist.all_reduce(total, group=self.data_group)
        return total

    @property
    def engine_host(self) -> EngineHost:
        """Describes this model to the engines that are built for it."""
        mesh = self.parallel_dims.get_optional_mesh("tp")
        return EngineHost(self.model, self.device, self.precision, self.round_sizes.largest, self.token_group, mesh)
