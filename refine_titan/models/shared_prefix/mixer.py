"""The base of every sequence mixer: it handles the tree, a family what happens to a packed sequence."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F

from refine_titan.models.context_shard import ContextShard
from refine_titan.models.decoding import Decoding, DecodingClock, StateBuffers
from refine_titan.models.shared_prefix.layer_state import LayerState, StateShape, StateTensors
from refine_titan.models.shared_prefix.layout import SharedPrefixLayout


class SharedPrefixMixer(nn.Module, ABC):
    """Base of every sequence mixer: a family says how rows become inner inputs (`project`), how the inner operator runs
    over packed sequences from given states (`mix`), and how its outputs become rows (`finish`). The tree is handled here.
    """

    tensor_parallel_plan: ClassVar[dict[str, str]] = {}
    """How the mixer's modules and parameters are sharded over heads, by name: `columns` and `rows` are linear layers split by
    output or input channels, `first_dim` are parameters split along their first dim, `heads` is a norm of every head, `whole`
    is computed by every rank. Empty where the mixer cannot be sharded."""

    step_can_be_recorded: ClassVar[bool] = False
    """Whether `step` reads nothing on the host and only tensors that stay where they are, so that a CUDA graph can repeat it. Plans of
    `mix` may be forgotten and freed meanwhile."""

    is_one_kernel: ClassVar[bool] = False
    """Whether the inner operator is a kernel of its own, whose products torch does not see: whoever counts operations takes the args'
    `mixer_flops_per_token`."""

    high_precision_projections: ClassVar[tuple[str, ...]] = ()
    """Linear layers that never compute in float8: those of learning rates, decays and gates, to which a memory is sensitive, and
    those too narrow to gain."""

    @abstractmethod
    def state_shapes(self, compute_dtype: torch.dtype) -> dict[str, "StateShape"]:
        """What one sequence's state of fixed size is made of, by name, for a model that computes in `compute_dtype`: all that an
        engine with memory pages of its own has to keep, besides the number of rows read (`seen`)."""

    def bytes_read_by_a_row(self, compute_dtype: torch.dtype) -> int:
        """Of one sequence's state, by its next row."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.state_shapes(compute_dtype).values())

    def fixed_size(self, state: LayerState) -> LayerState:
        """The state with (at least) the tensors of `state_shapes`, for an engine with memory pages."""
        return state

    @abstractmethod
    def project(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Row-wise inputs of `mix`, each `[T, ...]`."""

    @abstractmethod
    def mix(
        self,
        rows: tuple[torch.Tensor, ...],
        cu_seqlens: tuple[int, ...],
        initial_state: LayerState | None,
        state_positions: tuple[int, ...] | range,
    ) -> tuple[tuple[torch.Tensor, ...], LayerState]:
        """Runs packed sequences from their initial states; returns outputs, each `[T, ...]`, and the states at positions."""

    def begin_decoding(self, state: LayerState, clock: DecodingClock, into: Decoding | None = None) -> Decoding:
        """Buffers in which sequences are decoded, from copies of their states.

        Args:
            clock: of this and all other layers.
            into: what an earlier call for as many sequences returned, whose buffers are taken; None for new ones.
        """
        tensors = {name: state[name] for name in state.tensors}
        if into is None:
            return StateBuffers(tensors)
        into.load(tensors)
        return into

    def step(self, rows: tuple[torch.Tensor, ...], decoding: Decoding, clock: DecodingClock) -> tuple[torch.Tensor, ...]:
        """`mix` for the next row of every sequence, whose state is changed in place."""
        num_sequences = rows[0].shape[0]
        state, ends = LayerState(decoding.tensors), tuple(range(1, num_sequences + 1))
        mixed, after = self.mix(rows, (0, *ends), state, ends)
        decoding.load(after.tensors)
        return mixed

    @abstractmethod
    def mix_shard(
        self,
        rows: tuple[torch.Tensor, ...],
        cu_seqlens: tuple[int, ...],
        shard: ContextShard,
        state_positions: tuple[int, ...] | range,
    ) -> tuple[tuple[torch.Tensor, ...], LayerState]:
        """`mix` for a trunk that several ranks share: the first sequence goes on from the previous rank's last one if
        `shard.seen`, and the next rank is given what it needs of this rank's last one. Position 0 is the state of the first
        sequence on arrival. Every rank calls it, forward and backward."""

    @abstractmethod
    def finish(self, mixed: tuple[torch.Tensor, ...], x_TD: torch.Tensor) -> torch.Tensor:
        """Row-wise: the inner operator's outputs to `[T, D]`."""

    def forward(
        self, x_TD: torch.Tensor, layout: SharedPrefixLayout, initial_state: LayerState | None = None
    ) -> tuple[torch.Tensor, StateTensors]:
        rows = self.project(x_TD)
        T, n = layout.num_trunk_tokens, layout.num_branches
        num_rows = T + n * layout.branch_length
        wanted = layout.state_positions or ()
        positions = layout.branch_starts + tuple(wanted) if n else wanted
        # The decoder pads the stream to a multiple. Split and not sliced: the backward of a slice fills and adds all rows.
        parts = (T, num_rows - T, x_TD.shape[0] - num_rows)
        split = [r.split(parts) if r.shape[0] > T else (r, None) for r in rows]
        trunk_rows = tuple(r[0] for r in split)
        if layout.decoding is not None:
            decoding = initial_state.tensors.get("decoding") or self.begin_decoding(initial_state, layout.decoding)
            mixed, states = self.step(trunk_rows, decoding, layout.decoding), LayerState({"decoding": decoding})
        elif layout.shard is None or layout.shard.group is None:
            mixed, states = self.mix(trunk_rows, layout.cu_seqlens, initial_state, positions)
        else:
            mixed, states = self.mix_shard(trunk_rows, layout.cu_seqlens, layout.shard, positions)
        if n:
            branch_rows = tuple(r[1] for r in split)
            branch_mixed, _ = self.mix(branch_rows, layout.branch_cu_seqlens, states.slice(0, n), ())
            mixed = tuple(torch.cat(pair) for pair in zip(mixed, branch_mixed))
        if parts[2]:
            mixed = tuple(F.pad(m, [0, 0] * (m.dim() - 1) + [0, parts[2]]) for m in mixed)
        if layout.state_positions is None:
            states = LayerState({})  # also one of no positions refers to all rows
        elif n:
            states = states.slice(n, None)
        return self.finish(mixed, x_TD), states.tensors
