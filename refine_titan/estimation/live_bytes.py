"""Counts the bytes of all live tensors, and their peak. Works on tensors without data (FakeTensorMode), too."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make while the mode is on, until they are freed or resized.

    Args:
        besides: tensors that exist already; views of them do not count as new bytes.

    Attributes:
        now: bytes that are live.
        peak: highest value of `now` since `reset_peak`.
    """

    def __init__(self, besides: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._besides = {storage._cdata: storage for storage in map(_storage, besides)}
        self._sizes: dict[int, tuple[weakref.ref, int]] = {}

    def reset_peak(self) -> None:
        self.peak = self.now

    @contextmanager
    def counting(self) -> Iterator["LiveBytes"]:
        """Switches the mode on, and also notices storages that are resized. FSDP2 frees gathered weights in this way, and torch 2.13.0
        resizes them without an operator."""
        resize = torch.UntypedStorage.resize_

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in self._sizes:
                self._count(storage)
            return result

        torch.UntypedStorage.resize_ = resize_and_count
        try:
            with self:
                yield self
        finally:
            torch.UntypedStorage.resize_ = resize

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(_storage(leaf))
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._besides:
            return
        if key in self._sizes:
            reference, before = self._sizes[key]
        else:
            reference, before = weakref.ref(storage, lambda _: self._drop(key)), 0
        self._sizes[key] = (reference, size)
        self.now += size - before
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)[1]


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
