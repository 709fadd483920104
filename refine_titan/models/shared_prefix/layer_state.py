"""The state of one layer's mixer: named tensors of several sequences."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from refine_kernels.rows import LastRows
from refine_titan.models.context_shard import tied


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
