"""The update rule: how the tokens of a chunk give new fast weights. README.md has the maths.

Legend: g sequences that advance together, H heads, D channels of a head, M hidden channels of the fast network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from refine_kernels.lact.batching import Factors, Joined, apart, factors, from_factors, padded, stack, take, together, unbind
from refine_kernels.lact.elementwise import added_and_rescaled, rescaled, writing_factors
from refine_kernels.lact.newton_schulz import orthogonalise
from refine_kernels.lact.state import FastWeights, WritingTokens, WrittenSums


class Rows:
    """Weights of g sequences, together and one by one; made from either, the other when it is asked for."""

    def __init__(self, joined: Joined | None = None, weights: list[FastWeights] | None = None):
        self._joined, self._weights = joined, weights

    @cached_property
    def joined(self) -> Joined:
        return together(self._weights) if self._joined is None else self._joined

    @cached_property
    def weights(self) -> list[FastWeights]:
        return apart(self._joined) if self._weights is None else self._weights

    @cached_property
    def each(self) -> list[Joined]:
        return list(zip(*map(unbind, self.joined)))


@dataclass(frozen=True, eq=False)
class Versions:
    """Fast weights between two chunk borders, of sequences that have advanced together.

    Attributes:
        read: weights that queries and keys are multiplied with, in the dtype of the products or in that of `main`.
        main: weights that the next update is added to.
        momentum: the last updates before orthogonalisation, if there is momentum and there was an update.
    """

    read: Rows
    main: Rows
    momentum: Rows | None


class Version(NamedTuple):
    """One sequence's entry of `Versions`."""

    group: Versions
    index: int

    @property
    def main(self) -> FastWeights:
        return self.group.main.weights[self.index]

    @property
    def momentum(self) -> FastWeights | None:
        return None if self.group.momentum is None else self.group.momentum.weights[self.index]


class UpdateRule:
    """The update rule with the settings of a pass. Matrix products run in `compute_dtype`; weights and updates are at least float32.

    Attributes:
        initial: the version that every sequence begins with.
    """

    def __init__(
        self,
        initial: FastWeights,
        *,
        chunk_size: int,
        compute_dtype: torch.dtype,
        prenorm: bool,
        muon: bool = False,
        muon_joins: bool = False,
        newton_schulz_dtype: torch.dtype = torch.bfloat16,
    ):
        self.compute_dtype = compute_dtype
        self.state_dtype = torch.promote_types(compute_dtype, torch.float32)
        self.chunk_size, self.muon, self.muon_joins, self.prenorm = chunk_size, muon, muon_joins, prenorm
        is_low = newton_schulz_dtype == torch.bfloat16
        self.newton_schulz_dtype = newton_schulz_dtype if is_low else self.state_dtype
        weights = Rows(together([initial.map(lambda w: w.to(self.state_dtype))]))
        self.initial = Version(Versions(weights, weights, None), 0)

    @cached_property
    def norms(self) -> Joined:
        """The initial length of every row."""
        return tuple(w.norm(dim=-1, keepdim=True) for w in self.initial.group.main.joined)

    @cached_property
    def zeros(self) -> FastWeights:
        """Zeros in the shapes of the weights."""
        return apart(tuple(map(torch.zeros_like, self.initial.group.main.joined)))[0]

    def no_sums(self, has_momentum: bool) -> WrittenSums:
        """The sums before any token."""
        return WrittenSums(self.zeros, self.zeros.w0.new_zeros(self.zeros.w0.shape[0]) if has_momentum else None)

    def resumed(self, main: list[FastWeights], momenta: list[FastWeights] | None) -> list[Version]:
        """The versions of sequences that continue from states with these weights and momenta."""
        weights = Rows(weights=main)
        read = Rows(tuple(map(rescaled, weights.joined, self.norms))) if self.prenorm else weights
        group = Versions(read, weights, None if momenta is None else Rows(weights=momenta))
        return [Version(group, i) for i in range(len(main))]

    def reading(self, versions: Sequence[Version]) -> Factors:
        """The weights that queries and keys are multiplied with, in the dtype of the products, of g sequences, or of one if all have the
        same; a version that several sequences share is cast once."""
        distinct = list(dict.fromkeys(versions))
        read = _gathered([(v.group.read, v.index) for v in distinct])
        weights = factors(tuple(w.to(self.compute_dtype) for w in read))
        place = {version: i for i, version in enumerate(distinct)}
        return take(weights, [place[v] for v in versions])

    def written(self, weights: Factors, tokens: WritingTokens, sums: Sequence[WrittenSums | None]) -> tuple[Joined, torch.Tensor | None]:
        """The sums of what the tokens of each sequence's chunk write: the gradient of `<f(k), v>`, each token's part times its learning
        rate; and the sums of their momentum coefficients, `[g, H]`. The first are in the dtype of the products, or wider.

        Args:
            weights: the weights that the sequences read.
            tokens: for each field a list of one tensor per sequence; shorter ones are padded with zeros, which write nothing.
            sums: what each sequence's chunk has written before these tokens; None for nothing.
        """
        inner, outer = weights
        k, v, lr = (padded(x) for x in tokens[:3])
        gate_up, d_hidden = k @ inner.mT, v @ outer
        if lr.shape[-1] == 1:
            left, right = writing_factors(gate_up, d_hidden, lr.squeeze(-1))
            # Not `left.mT @ k`, whose backward would give a transposed gradient of the left factors.
            found = from_factors((k.mT @ left).mT, v.mT @ right)
        else:
            left, right = writing_factors(gate_up, d_hidden, torch.ones_like(lr[..., 0]))
            lr0, lr1, lr2 = lr.unbind(3)
            key0, right, key2 = (x.to(self.compute_dtype) for x in (k * lr0, right * lr1, k * lr2))
            left0, left2 = left.chunk(2, -1)
            found = from_factors(torch.cat((left0.mT @ key0, left2.mT @ key2), 2), v.mT @ right)
        momentum = None if tokens.momentum is None else padded(tokens.momentum).sum(-1, dtype=self.state_dtype)
        if any(s is not None for s in sums):
            before = [s or self.no_sums(momentum is not None) for s in sums]
            found = tuple(w + b for w, b in zip(found, together([b.weights for b in before])))
            momentum = None if momentum is None else momentum + torch.stack([b.momentum for b in before])
        return found, momentum

    def updated(self, versions: Sequence[Version], change: Joined, momentum_sums: torch.Tensor | None) -> list[Version]:
        """The versions after a full chunk that has written `change`."""
        has_momentum = momentum_sums is not None
        if has_momentum and any(v.group.momentum is not None for v in versions):
            kept = (momentum_sums / self.chunk_size)[..., None, None, None]
            change = tuple(c + kept * m for c, m in zip(change, self._last_momentum(versions)))
        momentum = None
        if has_momentum:
            change = tuple(c.to(self.state_dtype) for c in change)
            momentum = Rows(change)
        if self.muon:
            change = self._orthogonalised(change)
        main = _gathered([(v.group.main, v.index) for v in versions])
        keep = "sum" if self.prenorm else "rescaled"
        found = [added_and_rescaled(w, c, norms, keep, self.compute_dtype) for w, c, norms in zip(main, change, self.norms)]
        main, read = (Rows(parts) for parts in zip(*found))
        group = Versions(read, main, momentum)
        return [Version(group, i) for i in range(len(versions))]

    def _last_momentum(self, versions: Sequence[Version]) -> Joined:
        if all(v.group.momentum is not None for v in versions):
            return _gathered([(v.group.momentum, v.index) for v in versions])
        return together([v.momentum or self.zeros for v in versions])

    def _orthogonalised(self, change: Joined) -> Joined:
        """Orthogonalises the three updates in one batch: their shapes are equal if M = D; otherwise w1's is transposed. If those of w0 and
        w2 are joined, w1's has another shape."""
        if self.muon_joins:
            return from_factors(*(orthogonalise(c, self.newton_schulz_dtype) for c in factors(change)))
        if len(change) == 1:
            return (orthogonalise(change[0], self.newton_schulz_dtype),)
        stacked = orthogonalise(torch.cat((change[0], change[1].mT), 2), self.newton_schulz_dtype)
        inner, outer = stacked.split((2, 1), 2)
        return inner, outer.mT


def _gathered(entries: Sequence[tuple[Rows, int]]) -> Joined:
    """The weights of several sequences; those of one if all have the same, which what follows broadcasts."""
    distinct = list(dict.fromkeys(entries))
    rows = distinct[0][0]
    if len(distinct) == 1 or len(distinct) == len(entries):
        if distinct == [(rows, i) for i in range(rows.joined[0].shape[0])]:
            return rows.joined
        entries = distinct
    return tuple(map(stack, zip(*(rows.each[i] for rows, i in entries))))
