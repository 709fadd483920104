"""The update rule: how the tokens of a chunk give new fast weights. README.md has the maths.

Legend: g sequences that advance together, H heads, D channels of a head, M hidden channels of the fast network.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from refine_kernels.lact.batching import apart, padded, stack_weights, take, together
from refine_kernels.lact.elementwise import writing_factors
from refine_kernels.lact.newton_schulz import orthogonalise
from refine_kernels.lact.state import FastWeights, WritingTokens, WrittenSums


@dataclass(frozen=True)
class Version:
    """Fast weights between two chunk borders.

    Attributes:
        read: weights that queries and keys are multiplied with.
        main: weights that the next update is added to.
        momentum: the last update before orthogonalisation, if there is momentum and there was an update.
    """

    read: FastWeights
    main: FastWeights
    momentum: FastWeights | None


class UpdateRule:
    """The update rule with the settings of a pass. Matrix products run in `compute_dtype`; weights and updates are at least float32.

    Attributes:
        initial: the version that every sequence begins with.
        zeros: zeros in the shapes of the weights.
    """

    def __init__(
        self,
        initial: FastWeights,
        *,
        chunk_size: int,
        compute_dtype: torch.dtype,
        prenorm: bool,
        muon: bool = False,
        newton_schulz_dtype: torch.dtype = torch.bfloat16,
    ):
        self.compute_dtype = compute_dtype
        self.state_dtype = torch.promote_types(compute_dtype, torch.float32)
        self.chunk_size, self.muon, self.prenorm = chunk_size, muon, prenorm
        is_low = newton_schulz_dtype == torch.bfloat16
        self.newton_schulz_dtype = newton_schulz_dtype if is_low else self.state_dtype
        weights = initial.map(lambda w: w.to(self.state_dtype))
        self.norms = tuple(w.norm(dim=-1, keepdim=True) for w in together([weights]))
        self.initial = Version(weights, weights, None)
        self.zeros = weights.map(torch.zeros_like)

    def no_sums(self, has_momentum: bool) -> WrittenSums:
        """The sums before any token."""
        return WrittenSums(self.zeros, self.zeros.w0.new_zeros(self.zeros.w0.shape[0]) if has_momentum else None)

    def resumed(self, main: FastWeights, momentum: FastWeights | None) -> Version:
        """The version of a sequence that continues from a state with these weights and this momentum."""
        [read] = apart(self._rescaled(together([main]))) if self.prenorm else [main]
        return Version(read, main, momentum)

    def reading(self, versions: Sequence[Version]) -> FastWeights:
        """The weights that queries and keys are multiplied with, `[g, H, ...]`; a version that several sequences share is cast once."""
        distinct = list({id(v): v for v in versions}.values())
        if len(distinct) == 1:
            [weights] = apart(tuple(w.to(self.compute_dtype) for w in together([distinct[0].read])))
            weights = weights.map(lambda w: w[None])
        else:
            weights = stack_weights([v.read for v in distinct]).map(lambda w: w.to(self.compute_dtype))
        if len(distinct) == len(versions):
            return weights
        place = {id(v): i for i, v in enumerate(distinct)}
        return take(weights, [place[id(v)] for v in versions])

    def written(self, weights: FastWeights, tokens: WritingTokens, sums: Sequence[WrittenSums | None]) -> WrittenSums:
        """The sums of what the tokens of each sequence's chunk write, `[g, H, ...]`: the gradient of `<f(k), v>`, each token's part
        times its learning rate.

        Args:
            weights: the weights that the sequences read, `[g, H, ...]`.
            tokens: for each field a list of one tensor per sequence; shorter ones are padded with zeros, which write nothing.
            sums: what each sequence's chunk has written before these tokens; None for nothing.
        """
        w0, w1, w2 = weights
        k, v, lr = (padded(x) for x in tokens[:3])
        gate, up, d_hidden = k @ w0.mT, k @ w2.mT, v @ w1
        if lr.shape[-1] == 1:
            left0, right1, left2 = writing_factors(gate, up, d_hidden, lr.squeeze(-1))
            factors = ((left0, k), (v, right1), (left2, k))
        else:
            left0, right1, left2 = writing_factors(gate, up, d_hidden, torch.ones_like(lr[..., 0]))
            lr0, lr1, lr2 = lr.unbind(3)
            rights = (x.to(self.compute_dtype) for x in (k * lr0, right1 * lr1, k * lr2))
            factors = tuple(zip((left0, v, left2), rights))
        found = FastWeights(*((left.mT @ right).to(self.state_dtype) for left, right in factors))
        momentum = None if tokens.momentum is None else padded(tokens.momentum).to(self.state_dtype).sum(-1)
        if any(s is not None for s in sums):
            before = [s or self.no_sums(momentum is not None) for s in sums]
            found = FastWeights(*(w + b for w, b in zip(found, stack_weights([b.weights for b in before]))))
            momentum = None if momentum is None else momentum + torch.stack([b.momentum for b in before])
        return WrittenSums(found, momentum)

    def updated(self, versions: Sequence[Version], written: WrittenSums) -> list[Version]:
        """The versions after a full chunk that has written `written`."""
        change = together(written.weights.unbind())
        has_momentum = written.momentum is not None
        if has_momentum and any(v.momentum is not None for v in versions):
            kept = (written.momentum / self.chunk_size)[..., None, None]
            change = tuple(c + kept * m for c, m in zip(change, together([v.momentum or self.zeros for v in versions])))
        momenta = apart(change) if has_momentum else [None] * len(versions)
        if self.muon:
            change = self._orthogonalised(change)
        main = tuple(w + c for w, c in zip(together([v.main for v in versions]), change))
        read = self._rescaled(main)
        reads = apart(read)
        return list(map(Version, reads, apart(main) if self.prenorm else reads, momenta))

    def _rescaled(self, weights: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The weights, each row scaled to its initial norm."""
        return tuple(w / (w.norm(dim=-1, keepdim=True) + 1e-5) * n for w, n in zip(weights, self.norms))

    def _orthogonalised(self, change: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Orthogonalises the three updates in one batch: their shapes are equal if M = D; otherwise w1's is transposed."""
        if len(change) == 1:
            return (orthogonalise(change[0], self.newton_schulz_dtype).to(self.state_dtype),)
        w0, w1, w2 = change
        stacked = orthogonalise(torch.cat([w0, w1.mT, w2]), self.newton_schulz_dtype)
        w0, w1, w2 = stacked.to(self.state_dtype).split(1)
        return w0, w1.mT, w2
