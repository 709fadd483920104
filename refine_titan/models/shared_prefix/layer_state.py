"""The state of one layer's mixer: named tensors of several sequences."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from refine_kernels.packing import on_device
from refine_kernels.past_tokens import LastTokens, TokenSpans, host_tensor
from refine_titan.models.context_shard import tied


class Entries(NamedTuple):
    """Part of a state that several sequences have in common, such as the fast weights of one chunk.

    Attributes:
        values: each different one once.
        index: which of them each of the N sequences has, `[N]`, on the host.
    """

    values: tuple[torch.Tensor, ...]
    index: torch.Tensor

    def read(self) -> torch.Tensor:
        """`[N, ...]`."""
        return torch.stack([self.values[i] for i in self.index.tolist()])

    @staticmethod
    def cat(parts: "Sequence[Entries]") -> "Entries":
        """The sequences of all parts, without copying values."""
        offsets = accumulate((len(part.values) for part in parts), initial=0)
        values = tuple(value for part in parts for value in part.values)
        return Entries(values, host_tensor([offset + i for part, offset in zip(parts, offsets) for i in part.index.tolist()]))


# The states of one pass are in part the same rows (keys of overlapping windows, of prefixes) and the same weights: these are kept once.
StateTensor = torch.Tensor | LastTokens | TokenSpans | Entries
StateTensors = dict[str, StateTensor]

# The field that tells what each sequence refers to, of tensors that are referred to.
_REFERENCES = {LastTokens: "end", TokenSpans: "bounds", Entries: "index"}


class StateShape(NamedTuple):
    """Shape and dtype of one tensor of a sequence's state."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class LayerState:
    """State of one layer's mixer for several sequences: named tensors whose first dim is the sequence.

    It is deliberately not a pytree: FSDP2's mixed precision casts every floating tensor that it finds in a block's inputs (torchtitan
    0.2.2 keeps `cast_forward_inputs=True`), and states stay float32. Blocks *return* the plain dictionary, where FSDP2 must find the
    tensors: it gathers a block's weights for backward when the gradient of one of the block's outputs arrives, and a replayed prefix
    has no other output that gets one.
    """

    def __init__(self, tensors: StateTensors):
        self.tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor whose sequences are of equal size; rows of `TokenSpans` are not, which are taken from `tensors`."""
        x = self.tensors[name]
        return x if isinstance(x, torch.Tensor) else x.read()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors; what sequences have in common counts once."""
        return sum(value.nbytes for x in self.tensors.values() for value in _values(x))

    def slice(self, start: int, end: int | None) -> "LayerState":
        """The sequences from `start` to `end`."""
        return self._of_sequences(lambda x: x[start:end])

    def select(self, index: torch.Tensor) -> "LayerState":
        """The sequences at the indices; all of them in their order are not copied."""
        if len(index) == self._num_sequences and index.tolist() == list(range(len(index))):
            return self
        return self._of_sequences(lambda x: x.index_select(0, on_device(index, x.device)))

    def detach(self) -> "LayerState":
        return self._of_values(torch.Tensor.detach)

    def compact(self) -> "LayerState":
        """The sequences' values in tensors of their own, without the rest of the rows and weights that they were part of."""
        return LayerState({name: x.compact() if isinstance(x, TokenSpans) else self[name] for name, x in self.tensors.items()})

    @staticmethod
    def cat(states: Sequence["LayerState"]) -> "LayerState":
        """The sequences of several states, one after the other."""

        def joined(name: str, first: StateTensor) -> StateTensor:
            if isinstance(first, TokenSpans):
                return TokenSpans.cat([s.tensors[name] for s in states])
            if all(isinstance(s.tensors[name], Entries) for s in states):
                return Entries.cat([s.tensors[name] for s in states])
            return torch.cat([s[name] for s in states])

        if len(states) == 1:
            return states[0]
        return LayerState({name: joined(name, first) for name, first in states[0].tensors.items()})

    def select_or_empty(self, index: list[int | None]) -> "LayerState":
        """The sequences at the indices; None gives a sequence that has read nothing, whose state is zeros. Parts that sequences have in
        common may hold anything there: mixers do not read them for a sequence without a past."""

        def gather(x: torch.Tensor) -> torch.Tensor:
            if all(i is None for i in index):
                return x.new_zeros(len(index), *x.shape[1:])
            found = x.index_select(0, on_device(torch.tensor([i or 0 for i in index]), x.device))
            if None not in index:
                return found
            is_empty = on_device(torch.tensor([i is None for i in index]), x.device)
            return found.masked_fill(is_empty.view(-1, *[1] * (x.dim() - 1)), 0)

        return self._of_sequences(gather)

    def tied_to(self, other: "LayerState") -> "LayerState":
        """The same values with those of `other` in their graph: the backward of `other` runs whenever that of this state does."""
        values = [value for x in other.tensors.values() for value in _values(x) if value.is_floating_point()]

        def tie(x: torch.Tensor) -> torch.Tensor:
            return tied(x, *values) if x.is_floating_point() else x

        return self._of_values(tie)

    @property
    def _num_sequences(self) -> int:
        x = next(iter(self.tensors.values()))
        reference = _REFERENCES.get(type(x))
        return len(getattr(x, reference) if reference else x)

    def _of_sequences(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "LayerState":
        """Applies `change` to the tensors whose first dim is the sequence."""

        def changed(x: StateTensor) -> StateTensor:
            reference = _REFERENCES.get(type(x))
            return x._replace(**{reference: change(getattr(x, reference))}) if reference else change(x)

        return LayerState({name: changed(x) for name, x in self.tensors.items()})

    def _of_values(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "LayerState":
        """Applies `change` to the tensors that carry values."""

        def changed(x: StateTensor) -> StateTensor:
            if isinstance(x, LastTokens):
                return x._replace(pool=change(x.pool))
            if isinstance(x, TokenSpans):
                return x._replace(pools=tuple(map(change, x.pools)))
            return x._replace(values=tuple(map(change, x.values))) if isinstance(x, Entries) else change(x)

        return LayerState({name: changed(x) for name, x in self.tensors.items()})


def _values(x: StateTensor) -> tuple[torch.Tensor, ...]:
    """The tensors that carry values."""
    if isinstance(x, LastTokens):
        return (x.pool,)
    if isinstance(x, TokenSpans):
        return x.pools
    return x.values if isinstance(x, Entries) else (x,)
