"""Fast weights, and the state of sequences that LaCT has read a part of."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class FastWeights(NamedTuple):
    """Weights of `f(x) = w1 (silu(w0 x) * (w2 x))`, `w0`, `w2` `[..., H, M, D]` and `w1` `[..., H, D, M]`; also their
    momenta and pending updates."""

    w0: torch.Tensor
    w1: torch.Tensor
    w2: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "FastWeights":
        return FastWeights(*map(function, self))

    @staticmethod
    def cat(parts: Sequence["FastWeights"], dim: int) -> "FastWeights":
        return FastWeights(*(torch.cat(same, dim) for same in zip(*parts)))


class LaCTState(NamedTuple):
    """What a sequence carries on: N sequences of an input, or P positions of an output.

    Sequences inside their first chunk read the initial weights and no momentum, whatever stands here.

    Attributes:
        version: `[P]`, which of the U entries of `weights` and `momentum` are a position's (those of one chunk are shared);
            None in an input, whose entries are one a sequence.
        weights: fast weights after the last chunk border, before their rescaling in the pre-norm variant.
        momentum: last update before orthogonalisation; None without momentum.
        pending: what the rows since the last chunk border will have written, `[P, ...]`.
        pending_momentum: sum of those rows' momentum coefficients, `[P, H]`; None without momentum.
    """

    version: torch.Tensor | None
    weights: FastWeights
    momentum: FastWeights | None
    pending: FastWeights
    pending_momentum: torch.Tensor | None

    @staticmethod
    def cat_heads(parts: Sequence["LaCTState"]) -> "LaCTState":
        """States of the same positions, each of some of the heads."""
        return LaCTState._joined([part._replace(version=None) for part in parts], 1, parts[0].version)

    @staticmethod
    def cat_positions(parts: Sequence["LaCTState"]) -> "LaCTState":
        """States of several positions' lists, one list after the other."""
        versions, before = [], 0
        for part in parts:
            versions.append(part.version + before)
            before += part.weights.w0.shape[0]
        return LaCTState._joined(parts, 0, torch.cat(versions))

    @staticmethod
    def _joined(parts: Sequence["LaCTState"], dim: int, version: torch.Tensor | None) -> "LaCTState":
        def join(field: str) -> FastWeights | None:
            values = [getattr(part, field) for part in parts]
            return None if values[0] is None else FastWeights.cat(values, dim)

        sums = [part.pending_momentum for part in parts]
        pending_momentum = None if sums[0] is None else torch.cat(sums, dim)
        return LaCTState(version, join("weights"), join("momentum"), join("pending"), pending_momentum)

    def select(self, index: torch.Tensor) -> "LaCTState":
        """Positions by index."""
        index = index.to(self.pending.w0.device)
        sums = None if self.pending_momentum is None else self.pending_momentum.index_select(0, index)
        pending = self.pending.map(lambda w: w.index_select(0, index))
        return self._replace(version=self.version[index.cpu()], pending=pending, pending_momentum=sums)

    def as_past(self) -> "LaCTState":
        """The positions' states as what sequences start from, one entry a position."""

        def take(weights: FastWeights) -> FastWeights:
            index = self.version.to(weights.w0.device)
            return weights.map(lambda w: w.index_select(0, index))

        momentum = None if self.momentum is None else take(self.momentum)
        return self._replace(version=None, weights=take(self.weights), momentum=momentum)

    def tensors(self) -> list[torch.Tensor]:
        """All that carries values, in a fixed order."""
        groups = [self.weights, self.momentum or (), self.pending]
        return [w for group in groups for w in group] + ([] if self.pending_momentum is None else [self.pending_momentum])

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> "LaCTState":
        """The same fields with the values of `tensors`, in the order of `tensors()`."""
        values = iter(tensors)

        def fill(weights: FastWeights | None) -> FastWeights | None:
            return None if weights is None else weights.map(lambda _: next(values))

        weights, momentum, pending = fill(self.weights), fill(self.momentum), fill(self.pending)
        sums = None if self.pending_momentum is None else next(values)
        return LaCTState(self.version, weights, momentum, pending, sums)
