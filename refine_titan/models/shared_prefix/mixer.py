"""The base of every sequence mixer. It handles the tree; a family says what happens to packed sequences."""

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
    """Base of every sequence mixer.

    A family says how hidden states become the inner operator's inputs (`project`), how that operator runs over packed sequences from
    given states (`mix`), and how its outputs become hidden states (`finish`). `rows` are those inputs, a tuple of tensors `[T, ...]`.
    """

    tensor_parallel_plan: ClassVar[dict[str, str]] = {}
    """How tensor parallelism shards the mixer's modules and parameters over heads, by name. `columns` and `rows` are linear layers split
    by output or input channels, `first_dim` are parameters split along their first dim, `heads` is a norm that every head has, `whole`
    is computed by every rank. Empty where the mixer cannot be sharded."""

    step_can_be_recorded: ClassVar[bool] = False
    """Whether a CUDA graph can repeat `step`: it must read nothing on the host, and only tensors that stay where they are. The cached
    plans of `mix` do not: they may be freed in between."""

    is_one_kernel: ClassVar[bool] = False
    """Whether the inner operator is a kernel of its own, whose products torch does not see: whoever counts operations takes the args'
    `mixer_flops_per_token`."""

    high_precision_projections: ClassVar[tuple[str, ...]] = ()
    """Linear layers that never compute in float8: those of learning rates, decays and gates, to which the memory is sensitive, and those
    too narrow to gain from it."""

    @abstractmethod
    def state_shapes(self, compute_dtype: torch.dtype) -> dict[str, "StateShape"]:
        """Tensors of one sequence's state of fixed size, by name, in a model that computes in `compute_dtype`: all that an engine with
        memory pages has to keep, besides the number of tokens read (`seen`)."""

    def bytes_read_per_token(self, compute_dtype: torch.dtype, seen: int) -> int:
        """Bytes of a sequence's state that its next token reads, after `seen` tokens."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.state_shapes(compute_dtype).values())

    def fixed_size(self, state: LayerState) -> LayerState:
        """The same state with, at least, the tensors of `state_shapes`, for an engine with memory pages."""
        return state

    @abstractmethod
    def project(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The inner operator's inputs, each `[T, ...]`, each row from its own token only."""

    @abstractmethod
    def mix(
        self,
        rows: tuple[torch.Tensor, ...],
        cu_seqlens: tuple[int, ...],
        initial_state: LayerState | None,
        state_positions: tuple[int, ...] | range,
    ) -> tuple[tuple[torch.Tensor, ...], LayerState]:
        """Runs the inner operator over packed sequences.

        Args:
            rows: what `project` gave.
            initial_state: where the first sequences go on from; the others, or all if None, have read nothing.
            state_positions: positions whose states are wanted.

        Returns:
            The outputs, each `[T, ...]`, and the states at the positions.
        """

    def begin_decoding(self, state: LayerState, clock: DecodingClock, into: Decoding | None = None) -> Decoding:
        """Copies the states of sequences into the buffers in which `step` decodes them.

        Args:
            clock: counts the tokens read; all layers share it.
            into: what an earlier call for as many sequences returned, whose buffers are used again; None for new ones.
        """
        tensors = {name: state[name] for name in state.tensors}
        if into is None:
            return StateBuffers.of_copies(tensors)
        into.load(tensors)
        return into

    def step(self, rows: tuple[torch.Tensor, ...], decoding: Decoding, clock: DecodingClock) -> tuple[torch.Tensor, ...]:
        """`mix` for the next token of every sequence. Changes the states in place."""
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
        """`mix` for one rank's part of a trunk that several ranks share.

        If `shard.seen`, the first sequence goes on from the previous rank's last one. The next rank is given what it needs of this rank's
        last one. Position 0 is the state of the first sequence on arrival. Every rank makes the call, and its backward.
        """

    @abstractmethod
    def finish(self, mixed: tuple[torch.Tensor, ...], x_TD: torch.Tensor) -> torch.Tensor:
        """The layer's output `[T, D]` from the inner operator's outputs, each row from its own token only."""

    def forward(
        self, x_TD: torch.Tensor, layout: SharedPrefixLayout, initial_state: LayerState | None = None
    ) -> tuple[torch.Tensor, StateTensors]:
        """Runs the trunk from its initial states, and every branch from the trunk's state at the branch's start.

        Returns:
            The layer's output `[T, D]`, and the states at the layout's `state_positions`.
        """
        rows = self.project(x_TD)
        T, n, num_tokens = layout.num_trunk_tokens, layout.num_branches, layout.num_tokens
        wanted = layout.state_positions or ()
        positions = layout.branch_starts + tuple(wanted) if n else wanted
        # The decoder pads the stream to a multiple. Split and not sliced: the backward of a slice fills and adds all rows.
        parts = (T, num_tokens - T, x_TD.shape[0] - num_tokens)
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
            states = LayerState({})  # even a state of no positions refers to all rows
        elif n:
            states = states.slice(n, None)
        return self.finish(mixed, x_TD), states.tensors
