"""The tree of a forward pass: one packed trunk, branches that leave it, and the states at chosen places.

A forward runs over the flat stream `[trunk | branch 1 | ... | branch n]`. Everything but the sequence mixers sees plain
rows; a mixer sees the tree through `SharedPrefixLayout`. A *position* r names the place between rows r - 1 and r of the
trunk: a branch that starts at r continues row r - 1's document, and the state at r has seen that document up to row r - 1.
"""

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from refine_kernels.packing import check_packing, sequence_of_token
from refine_kernels.rows import LastRows, host_tensor, places
from refine_titan.models.context_shard import ContextShard, tied
from refine_titan.models.decoding import Decoding, DecodingClock, StateBuffers


@dataclass(frozen=True)
class SharedPrefixLayout:
    """Where documents, branches and wanted states lie. Host integers, shared by all layers.

    Attributes:
        cu_seqlens: row indices at which the trunk's documents begin and end.
        branch_starts: position of each branch, in 1..T; several may be equal.
        branch_length: tokens of each branch, k.
        state_positions: positions whose states the forward returns; a range where they are many, None for no states.
        shard: where the rows are a part of a trunk that several ranks share; `cu_seqlens` is then the shard's own packing, all
            numbers here count from its first row, and a state position may be 0: the state that has arrived from earlier ranks.
        decoding: given where the trunk is one row of every sequence, without gradient. A row goes on from the state that the call
            for the row before returned, the first one from a state of any other call or of `begin_decoding`. States that such a
            call returns are good for nothing else.
    """

    cu_seqlens: tuple[int, ...]
    branch_starts: tuple[int, ...] = ()
    branch_length: int = 0
    state_positions: tuple[int, ...] | range | None = None
    shard: ContextShard | None = None
    decoding: DecodingClock | None = None

    @classmethod
    def decoding_step(cls, num_sequences: int, clock: DecodingClock) -> "SharedPrefixLayout":
        """The next row of every sequence; whoever makes the call lets the clock `advance` after it."""
        return cls(tuple(range(num_sequences + 1)), state_positions=range(1, num_sequences + 1), decoding=clock)

    def __post_init__(self):
        inside = self.state_positions or ()
        if self.shard is not None and self.shard.seen > 0:
            inside, _ = split_arrival(inside)
        for positions in (self.branch_starts, inside):
            check_packing(self.cu_seqlens, self.cu_seqlens[-1], positions)
        if bool(self.branch_starts) != (self.branch_length > 0):
            raise ValueError(
                f"branches need a length and a length needs branches: got {len(self.branch_starts)} branches of {self.branch_length} tokens"
            )

    @property
    def num_trunk_tokens(self) -> int:
        return self.cu_seqlens[-1]

    @property
    def num_branches(self) -> int:
        return len(self.branch_starts)

    @property
    def branch_cu_seqlens(self) -> tuple[int, ...]:
        return tuple(range(0, (self.num_branches + 1) * self.branch_length, self.branch_length))

    def branch_rows(self) -> torch.Tensor:
        """Rows of the branch tokens in the flat stream, `[n, k]`."""
        rows = torch.arange(self.num_branches * self.branch_length) + self.num_trunk_tokens
        return rows.view(self.num_branches, self.branch_length)

    def predicting_rows(self) -> torch.Tensor:
        """Rows whose next-token distribution the branch tokens are drawn from, `[n, k]`: the trunk row before the
        branch, then the branch's own rows but the last."""
        before = torch.tensor(self.branch_starts, dtype=torch.long) - 1
        return torch.cat([before[:, None], self.branch_rows()[:, :-1]], dim=1)


def split_arrival(positions: tuple[int, ...] | range) -> tuple[tuple[int, ...] | range, torch.Tensor]:
    """The positions above 0, and of each position its place in `[0, *those]`."""
    if isinstance(positions, range):
        inside = positions[1:] if positions and positions[0] == 0 else positions
    else:
        inside = tuple(r for r in positions if r > 0)
    above = places(positions) > 0
    return inside, host_tensor(above.cumsum() * above)


class Entries(NamedTuple):
    """Part of a state that several sequences share, such as the fast weights of one chunk: `values[index]`, `index` `[N]` on
    the host."""

    values: tuple[torch.Tensor, ...]
    index: torch.Tensor

    def read(self) -> torch.Tensor:
        return torch.stack([self.values[i] for i in self.index.tolist()])


# The content of states of one pass is in part the same rows (the keys of overlapping windows) and weights: it is kept once.
StateTensors = dict[str, torch.Tensor | LastRows | Entries]


class StateShape(NamedTuple):
    """One tensor of a sequence's state."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class LayerState:
    """State of one mixer for several sequences: named tensors, first dim the sequence.

    Deliberately not a pytree: FSDP2's mixed precision casts every floating tensor that it finds in a block's inputs
    (torchtitan 0.2.2 keeps `cast_forward_inputs=True`), and states stay float32. Blocks *return* the plain dictionary,
    so that FSDP2 does find the tensors there: it gathers a block's weights for backward when the gradient of one of its
    outputs arrives, and a replayed prefix has no other output that gets one.
    """

    def __init__(self, tensors: StateTensors):
        self.tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        x = self.tensors[name]
        return x if isinstance(x, torch.Tensor) else x.read()

    @property
    def nbytes(self) -> int:
        """Of the tensors, with shared ones counted once."""
        return sum(value.nbytes for x in self.tensors.values() for value in _values(x))

    def slice(self, start: int, end: int | None) -> "LayerState":
        return self._of_sequences(lambda x: x[start:end])

    def select(self, index: torch.Tensor) -> "LayerState":
        return self._of_sequences(lambda x: x.index_select(0, index.to(x.device)))

    def detach(self) -> "LayerState":
        return self._of_values(torch.Tensor.detach)

    def compact(self) -> "LayerState":
        """The sequences' own values only, without the rest of the rows that they were part of."""
        return LayerState({name: self[name] for name in self.tensors})

    @staticmethod
    def cat(states: Sequence["LayerState"]) -> "LayerState":
        return LayerState({name: torch.cat([s[name] for s in states]) for name in states[0].tensors})

    def select_or_empty(self, index: list[int | None]) -> "LayerState":
        """Sequences by index; None gives the state of a sequence that has read nothing: zeros. What is shared is anything
        there; mixers do not read it for a sequence without past."""

        def gather(x: torch.Tensor) -> torch.Tensor:
            if all(i is None for i in index):
                return x.new_zeros(len(index), *x.shape[1:])
            found = x.index_select(0, torch.tensor([i or 0 for i in index], device=x.device))
            is_empty = torch.tensor([i is None for i in index], device=x.device)
            return found.masked_fill(is_empty.view(-1, *[1] * (x.dim() - 1)), 0)

        return self._of_sequences(gather)

    def tied_to(self, other: "LayerState") -> "LayerState":
        """The same values, with those of `other` in their graph: its backward runs whenever that of these does."""
        values = [value for x in other.tensors.values() for value in _values(x) if value.is_floating_point()]

        def tie(x: torch.Tensor) -> torch.Tensor:
            return tied(x, *values) if x.is_floating_point() else x

        return self._of_values(tie)

    def _of_sequences(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "LayerState":
        """Applies `change` to the tensors whose first dim is the sequence."""

        def changed(x: torch.Tensor | LastRows | Entries):
            if isinstance(x, LastRows):
                return x._replace(end=change(x.end))
            return x._replace(index=change(x.index)) if isinstance(x, Entries) else change(x)

        return LayerState({name: changed(x) for name, x in self.tensors.items()})

    def _of_values(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "LayerState":
        """Applies `change` to the tensors that carry values."""

        def changed(x: torch.Tensor | LastRows | Entries):
            if isinstance(x, LastRows):
                return x._replace(pool=change(x.pool))
            return x._replace(values=tuple(map(change, x.values))) if isinstance(x, Entries) else change(x)

        return LayerState({name: changed(x) for name, x in self.tensors.items()})


def _values(x: torch.Tensor | LastRows | Entries) -> tuple[torch.Tensor, ...]:
    if isinstance(x, LastRows):
        return (x.pool,)
    return x.values if isinstance(x, Entries) else (x,)


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


@dataclass(frozen=True)
class SnapshotBank:
    """States of every layer at regular boundaries of the rows of a trunk that one rank holds, from one scoring pass.

    Attributes:
        shard: the trunk's documents and the rank's rows.
        stride: distance of the boundaries inside a document, in tokens.
        positions: the boundaries in the whole trunk, ascending; at a document's own start nothing has been read yet.
        layers: one `LayerState` per layer over the boundaries.
    """

    shard: ContextShard
    stride: int
    positions: tuple[int, ...] | range
    layers: list[LayerState]

    @staticmethod
    def boundaries(shard: ContextShard, stride: int) -> tuple[int, ...] | range:
        """Positions at every `stride` tokens of each document, without its start and end, that lie between the shard's
        borders; and its first row where a document has begun before. With a stride of 1 the ends of documents too."""
        cu_seqlens, begin, end = shard.cu_seqlens, shard.first_row, shard.end_row
        if stride == 1:
            return range(begin if shard.seen else begin + 1, end)
        arrival = (begin,) if shard.seen else ()
        regular = (
            r
            for start, stop in zip(cu_seqlens, cu_seqlens[1:])
            if start < end and stop > begin
            for r in range(start + max((begin - start) // stride + 1, 1) * stride, min(stop, end), stride)
        )
        return (*arrival, *regular)

    @classmethod
    def from_forward(cls, shard: ContextShard, stride: int, layers: list[LayerState]) -> "SnapshotBank":
        """Wraps the states that a forward returned at `boundaries(shard, stride)`."""
        return cls(shard, stride, cls.boundaries(shard, stride), layers)

    def boundary_before(self, start: int) -> tuple[int, int | None]:
        """Where the prefix of a branch at `start`, which the shard owns, is taken up: a boundary of its document and its index
        in `layers`, or the document's start and None.

        It is the last one that does not lie behind the branch's last prefix token.
        """
        cu_seqlens = self.shard.cu_seqlens
        document_start = cu_seqlens[sequence_of_token(cu_seqlens, start - 1)]
        boundary = document_start + (start - 1 - document_start) // self.stride * self.stride
        boundary = max(boundary, self.shard.first_row)
        if boundary == document_start:
            return document_start, None
        return boundary, bisect.bisect_left(self.positions, boundary)
