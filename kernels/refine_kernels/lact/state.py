"""Fast weights, and the states from which sequences continue.

Legend: P places (positions at which there is a state), U versions of the fast weights, H heads, D channels of a head, M hidden
channels of the fast network, L learning rates of a weight (1 or D), R tokens of a pool.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from refine_kernels.past_tokens import host_tensor


class FastWeights(NamedTuple):
    """Weights of `f(x) = w1 (silu(w0 x) * (w2 x))`: `w0`, `w2` `[..., H, M, D]` and `w1` `[..., H, D, M]`. Their momenta and the
    sums that tokens write to them have the same type."""

    w0: torch.Tensor
    w1: torch.Tensor
    w2: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "FastWeights":
        return FastWeights(*map(function, self))

    def unbind(self) -> tuple["FastWeights", ...]:
        """The weights at every index of the first dim."""
        return tuple(FastWeights(*same) for same in zip(*(w.unbind() for w in self)))

    @staticmethod
    def cat(parts: Sequence["FastWeights"], dim: int) -> "FastWeights":
        return FastWeights(*(torch.cat(same, dim) for same in zip(*parts)))


class WritingTokens(NamedTuple):
    """The inputs from which a token's terms in the update are computed: keys and values `[R, H, D]`, learning rates of w0, w1 and w2
    `[R, H, 3, L]`, and momentum coefficients `[R, H]` or None."""

    k: torch.Tensor
    v: torch.Tensor
    lr: torch.Tensor
    momentum: torch.Tensor | None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "WritingTokens":
        return WritingTokens(*(None if x is None else function(x) for x in self))


class WrittenSums(NamedTuple):
    """Sum of what tokens of one chunk write, and the sum of their momentum coefficients `[H]` (None without momentum)."""

    weights: FastWeights
    momentum: torch.Tensor | None


class FixedState(NamedTuple):
    """P states whose size does not depend on the number of tokens read, for an engine's memory pages and for messages.

    Attributes:
        weights: fast weights after the last chunk border, before their rescaling in the pre-norm variant, `[P, H, ...]`.
        momentum: last update before orthogonalisation; None without momentum.
        sums: sums of what the tokens since the border write, `[P, H, ...]`.
        momentum_sums: sums of those tokens' momentum coefficients, `[P, H]`; None without momentum.
    """

    weights: FastWeights
    momentum: FastWeights | None
    sums: FastWeights
    momentum_sums: torch.Tensor | None

    def tensors(self) -> list[torch.Tensor]:
        """All tensors, in a fixed order."""
        groups = [self.weights, self.momentum or (), self.sums]
        return [w for group in groups for w in group] + ([] if self.momentum_sums is None else [self.momentum_sums])

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> "FixedState":
        """A state with the given tensors, in the order of `tensors()`, and the same fields None."""
        values = iter(tensors)

        def fill(weights: FastWeights | None) -> FastWeights | None:
            return None if weights is None else weights.map(lambda _: next(values))

        weights, momentum, sums = fill(self.weights), fill(self.momentum), fill(self.sums)
        return FixedState(weights, momentum, sums, None if self.momentum_sums is None else next(values))


class LaCTState(NamedTuple):
    """The states at P places, by reference: each place refers to the weights of its chunk and to the tokens read since that chunk began.

    All positions of a pass have such a state at no cost; what the tokens write is summed only when a chunk ends. A sequence inside
    its first chunk uses the initial weights and no momentum, whatever `version` refers to. Index tensors are on the host.

    Attributes:
        seen: number of tokens that the sequence has read, `[P]`.
        version: index into `weights` and `momentum`, `[P]`.
        weights: U fast weights after chunk borders, before their rescaling in the pre-norm variant.
        momentum: U last updates before orthogonalisation; None without momentum.
        num_summed: how many of the tokens since the border are in a sum, `[P]`; 0 for none.
        sum_of: index into `sums`, `[P]`; arbitrary where `num_summed` is 0.
        sums: sums of what tokens have written that are not kept themselves.
        token_end: index into the pools right after the place's last token, `[P]`; it matters for the tokens that are in no sum.
        tokens: pools in which each place's tokens since the border are consecutive; None if all of them are in sums.
    """

    seen: torch.Tensor
    version: torch.Tensor
    weights: tuple[FastWeights, ...]
    momentum: tuple[FastWeights, ...] | None
    num_summed: torch.Tensor
    sum_of: torch.Tensor
    sums: tuple[WrittenSums, ...]
    token_end: torch.Tensor
    tokens: WritingTokens | None

    @classmethod
    def of_fixed(cls, seen: Sequence[int], fixed: FixedState, chunk_size: int) -> "LaCTState":
        """The states of sequences that have read `seen` tokens, all of which are in sums."""
        each = host_tensor(range(len(seen)))
        num_summed = host_tensor([count % chunk_size for count in seen])
        weights = fixed.weights.unbind()
        momentum = None if fixed.momentum is None else fixed.momentum.unbind()
        momentum_sums = [None] * len(seen) if fixed.momentum_sums is None else fixed.momentum_sums.unbind()
        sums = tuple(map(WrittenSums, fixed.sums.unbind(), momentum_sums))
        return cls(host_tensor(seen), each, weights, momentum, num_summed, each, sums, torch.zeros_like(each), None)

    def select(self, index: torch.Tensor) -> "LaCTState":
        """Selects places by index."""
        return self._replace(
            seen=self.seen[index],
            version=self.version[index],
            num_summed=self.num_summed[index],
            sum_of=self.sum_of[index],
            token_end=self.token_end[index],
        )

    @staticmethod
    def cat(parts: Sequence["LaCTState"]) -> "LaCTState":
        """Concatenates the places of several states; those that refer to tokens must share their pools."""
        first = parts[0]
        versions, sums = ([sum(len(getattr(p, name)) for p in parts[:i]) for i in range(len(parts))] for name in ("weights", "sums"))
        return LaCTState(
            torch.cat([p.seen for p in parts]),
            torch.cat([p.version + before for p, before in zip(parts, versions)]),
            sum((p.weights for p in parts), ()),
            None if first.momentum is None else sum((p.momentum for p in parts), ()),
            torch.cat([p.num_summed for p in parts]),
            torch.cat([p.sum_of + before for p, before in zip(parts, sums)]),
            sum((p.sums for p in parts), ()),
            torch.cat([p.token_end for p in parts]),
            next((p.tokens for p in parts if p.tokens is not None), None),
        )

    @staticmethod
    def cat_heads(parts: Sequence["LaCTState"], tokens: WritingTokens) -> "LaCTState":
        """Concatenates states of the same places along heads; `tokens` are the tokens with all heads."""
        first = parts[0]
        if len(parts) == 1:
            return first._replace(tokens=tokens)
        sums = tuple(
            WrittenSums(
                FastWeights.cat([s.weights for s in same], 0),
                None if same[0].momentum is None else torch.cat([s.momentum for s in same]),
            )
            for same in zip(*(p.sums for p in parts))
        )
        weights = tuple(FastWeights.cat(same, 0) for same in zip(*(p.weights for p in parts)))
        momentum = None if first.momentum is None else tuple(FastWeights.cat(same, 0) for same in zip(*(p.momentum for p in parts)))
        return first._replace(weights=weights, momentum=momentum, sums=sums, tokens=tokens)
