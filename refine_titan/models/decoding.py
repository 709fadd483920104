"""Decoding: sequences that take one token at a time, in buffers that every layer writes in place.

Because the buffers stay where they are, and because what depends on the number of tokens read is computed on the device, the operators
of a step can be recorded once and run again for other sequences (`rollout/decode_graph.py`). Legend: n sequences.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from refine_kernels.packing import on_device


class DecodingClock:
    """Counts the tokens that each of n sequences has read, for the mixers that need it. All layers share one.

    Args:
        tokens_to_come: tokens that the sequences will take after each `reset`; None if that is not known.

    Attributes:
        seen: tokens read, on the host; None until a mixer calls `start`.
    """

    def __init__(self, tokens_to_come: int | None = None):
        self.tokens_to_come = tokens_to_come
        self.seen: list[int] | None = None
        self._seen_n: torch.Tensor | None = None
        self._derived: dict[Any, Any] = {}

    @classmethod
    def at(cls, seen_n: torch.Tensor) -> "DecodingClock":
        """Returns a clock for one step of sequences that have read so many tokens, as only the device knows."""
        clock = cls()
        clock._seen_n = seen_n
        return clock

    def reset(self) -> None:
        """Forgets the counts: other sequences follow, in the same buffers."""
        self.seen = None
        self._derived.clear()

    def start(self, seen: Sequence[int], device: torch.device) -> None:
        """Takes the tokens read so far. Every layer calls it with the same counts, before the first token; only the first
        call has an effect."""
        if self.seen is not None:
            return
        self.seen = list(seen)
        counts = torch.tensor(self.seen)
        if self._seen_n is None:
            self._seen_n = on_device(counts, device)
        else:
            self._seen_n.copy_(on_device(counts, device))

    def derived(self, key: Any, make: Callable[[torch.Tensor], Any]) -> Any:
        """Returns what `make` makes of the tokens read, `[n]` on the device: made once a step, not in every layer."""
        if key not in self._derived:
            self._derived[key] = make(self._seen_n)
        return self._derived[key]

    def advance(self) -> None:
        """Counts one more token of every sequence."""
        self._derived.clear()
        if self.seen is not None:
            self.seen = [count + 1 for count in self.seen]
            self._seen_n += 1


class Decoding(ABC):
    """What n sequences carry from token to token in one layer. It stands in a `LayerState` under the name "decoding", for that layer's
    next step and nothing else."""

    @abstractmethod
    def is_uniform(self) -> bool:
        """Whether the same operators take all tokens to come, wherever the sequences stand."""

    def release(self) -> None:  # noqa: B027  most hold nothing else
        """Lets go of everything but the buffers: no token follows before other sequences are loaded."""


class StateBuffers(Decoding):
    """The tensors of a state of fixed size, contiguous, which a step writes in place."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors

    @classmethod
    def of_copies(cls, tensors: dict[str, torch.Tensor]) -> "StateBuffers":
        """Returns buffers that start with these values."""
        return cls({name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()})

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copies other sequences' states into the buffers."""
        for name, x in tensors.items():
            self.tensors[name].copy_(x)

    def is_uniform(self) -> bool:
        return True
