"""Sequences that take one row at a time: what all layers share, and what each keeps in buffers that are written in place.

Because the buffers stay where they are, and because what depends on the rows read so far is computed on the device, the operators of
a step can be recorded once and run again for other sequences (`rollout/decode_graph.py`). Legend: n sequences.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch


class DecodingClock:
    """How many rows each of n sequences has read, for mixers to whom it matters.

    Args:
        rows_to_come: rows that the sequences will take after each `reset`; None if that is not known.

    Attributes:
        seen: rows read, on the host; None before a mixer has told.
    """

    def __init__(self, rows_to_come: int | None = None):
        self.rows_to_come = rows_to_come
        self.seen: list[int] | None = None
        self._seen_n: torch.Tensor | None = None
        self._derived: dict[Any, Any] = {}

    def reset(self) -> None:
        """Other sequences follow, in the same buffers."""
        self.seen = None
        self._derived.clear()

    def start(self, seen: Sequence[int], device: torch.device) -> None:
        """Called by every layer, before the first row, alike."""
        if self.seen is not None:
            return
        self.seen = list(seen)
        counts = torch.tensor(self.seen)
        if self._seen_n is None:
            self._seen_n = counts.to(device)
        else:
            self._seen_n.copy_(counts)

    def derived(self, key: Any, make: Callable[[torch.Tensor], Any]) -> Any:
        """What follows from the rows read, `[n]` on the device; made once a step, not in every layer."""
        if key not in self._derived:
            self._derived[key] = make(self._seen_n)
        return self._derived[key]

    def advance(self) -> None:
        """Every sequence has read a row more."""
        self._derived.clear()
        if self.seen is not None:
            self.seen = [count + 1 for count in self.seen]
            self._seen_n += 1


class Decoding(ABC):
    """What n sequences carry from row to row in one layer. Stands in a `LayerState` under the name "decoding", for that layer's
    next step and nothing else."""

    @abstractmethod
    def is_uniform(self) -> bool:
        """Whether the rows to come are taken by the same operators, wherever the sequences stand."""

    def release(self) -> None:  # noqa: B027  most hold nothing else
        """Lets go of what it holds besides its buffers: no row follows before other sequences are loaded."""


class StateBuffers(Decoding):
    """The tensors of a state of fixed size."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        # Copies, since they are written.
        self.tensors = {name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes up where sequences stand."""
        for name, x in tensors.items():
            self.tensors[name].copy_(x)

    def is_uniform(self) -> bool:
        return True
