"""LaCT's fast weights in plain torch: packed sequences advance together, chunk by chunk.

Legend: T rows, N sequences, H heads, D channels of a head, M hidden channels of the fast network, L learning rates of a
weight (1 or D), P positions, g sequences that advance together, C chunk size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from refine_kernels.gated_silu import gated_silu
from refine_kernels.lact.elementwise import writing_factors
from refine_kernels.lact.newton_schulz import orthogonalise
from refine_kernels.lact.state import FastWeights, FixedState, LaCTState, WritingRows, WrittenSums
from refine_kernels.packing import PlannedTensor, cached_plan, check_packing
from refine_kernels.rows import LastRows, host_tensor, joined, own_rows, places, sequences_before

# Pieces of at most so many rows are padded to one batch, longer ones share a batch only with pieces of equal length.
PADDED_ROWS = 64


def lact(
    q_THD: torch.Tensor | None,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    lr_TH3L: torch.Tensor,
    momentum_TH: torch.Tensor | None,
    initial: FastWeights,
    cu_seqlens: Sequence[int],
    *,
    chunk_size: int,
    muon: bool = False,
    prenorm: bool = False,
    newton_schulz_dtype: torch.dtype = torch.bfloat16,
    past: LaCTState | None = None,
    state_positions: Sequence[int] = (),
) -> tuple[torch.Tensor | None, LaCTState]:
    """Applies the fast network of its chunk to every query, and updates it after every full chunk that has a successor.

    Matrix products run in the keys' dtype, weights and updates are at least float32.

    Args:
        q_THD, k_THD, v_THD: rows of N packed sequences; without queries there are no outputs.
        lr_TH3L: learning rates of w0, w1 and w2.
        momentum_TH: momentum coefficients, averaged over a chunk; None for no momentum.
        initial: weights that every sequence starts with, `[H, ...]`.
        cu_seqlens: N + 1 row indices at which the sequences begin and end, as host integers.
        chunk_size: rows of a chunk, counted from the start of the sequence, past included.
        muon: orthogonalise updates.
        prenorm: add updates to an un-normalised copy of the weights, instead of to the rescaled ones.
        newton_schulz_dtype: bfloat16, or float32 for at least the precision of the weights.
        past: where the first sequences stand; the others begin. None where all begin.
        state_positions: P row indices r in 1..T; the state after row r - 1 of the sequence that holds row r - 1.

    Returns:
        Outputs `[T, H, D]` and the states at the positions.

    Raises:
        ValueError: if `cu_seqlens` does not cover the rows, a position lies outside, or the chunk size is below 1.
    """
    check_packing(cu_seqlens, k_THD.shape[0], state_positions)
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; allowed: at least 1")
    with torch.autocast(k_THD.device.type, enabled=False):
        rule = _UpdateRule(initial, chunk_size, muon, prenorm, newton_schulz_dtype, k_THD.dtype)
        seen, num_summed = ((), ()) if past is None else (past.seen.tolist(), past.num_summed.tolist())
        kept = state_positions if isinstance(state_positions, range) else tuple(state_positions)
        plan = _plan(tuple(cu_seqlens), tuple(seen), tuple(num_summed), chunk_size, kept)
        rows = WritingRows(k_THD, v_THD, lr_TH3L, momentum_TH)
        pools = _pools(rows, cu_seqlens, past, plan.past_rows, chunk_size)
        # Split once: the backward of a slice a piece would fill and add all rows every time.
        q = None if q_THD is None else q_THD.split(plan.lengths)
        chunks = pools.map(lambda x: x.split(plan.chunk_lengths))
        sequences = _runs(rule, plan.pieces, past)
        outputs: dict[int, torch.Tensor] = {}
        for level in range(max(len(s.pieces) for s in sequences)):
            active = [s for s in sequences if len(s.pieces) > level]

            def batch_length(s: _SequenceRun, level: int = level) -> int:
                return max(s.pieces[level].length, PADDED_ROWS)

            active.sort(key=batch_length)
            for _, group in groupby(active, key=batch_length):
                group = list(group)
                pieces = [s.pieces[level] for s in group]
                weights = _reading(rule, [s.version for s in group])
                if q is not None:
                    outputs |= _apply(weights, pieces, q)
                ending = [i for i, piece in enumerate(pieces) if piece.updates]
                if ending:
                    rows = chunks.map(lambda x, pieces=pieces, ending=ending: [x[pieces[i].index] for i in ending])
                    _update(rule, [group[i] for i in ending], _take(weights, ending), rows)
        out = None if q is None else torch.cat([outputs[i] for i in range(len(outputs))])
        return out, _states(rule, plan, sequences, past, pools)


def fixed_states(
    states: LaCTState,
    initial: FastWeights,
    *,
    chunk_size: int,
    compute_dtype: torch.dtype,
    prenorm: bool = False,
) -> FixedState:
    """The places' states with the rows that they refer to summed up, computed as `lact` does at a chunk's end."""
    with torch.autocast(initial.w0.device.type, enabled=False):
        rule = _UpdateRule(initial, chunk_size, False, prenorm, torch.float32, compute_dtype)
        num_places = len(states.seen)
        runs = _runs(rule, [[]] * num_places, states)
        sums: list[WrittenSums] = [run.sums or rule.no_sums(states.momentum is not None) for run in runs]
        lengths = [(seen % chunk_size) - summed for seen, summed in zip(states.seen.tolist(), states.num_summed.tolist())]
        by_length = sorted((p for p in range(num_places) if lengths[p]), key=lambda p: lengths[p])
        for _, group in groupby(by_length, key=lambda p: max(lengths[p], PADDED_ROWS)):
            group = list(group)
            ends = [int(states.row_end[p]) for p in group]
            rows = states.rows.map(lambda x: [x[end - lengths[p] : end] for p, end in zip(group, ends)])
            weights = _reading(rule, [runs[p].version for p in group])
            written = _written(rule, [runs[p] for p in group], weights, rows)
            momentum_sums = [None] * len(group) if written.momentum is None else written.momentum.unbind()
            for p, weights, momentum_sum in zip(group, written.weights.unbind(), momentum_sums):
                sums[p] = WrittenSums(weights, momentum_sum)
        weights = _stack_weights([states.weights[v] for v in states.version.tolist()])
        momentum = None
        if states.momentum is not None:
            momentum = _stack_weights([states.momentum[v] for v in states.version.tolist()])
        momentum_sums = None if states.momentum is None else torch.stack([s.momentum for s in sums])
        return FixedState(weights, momentum, _stack_weights([s.weights for s in sums]), momentum_sums)


def reading_weights(
    states: LaCTState, initial: FastWeights, *, chunk_size: int, compute_dtype: torch.dtype, prenorm: bool = False
) -> FastWeights:
    """The weights that the next query of each place reads, `[P, H, ...]` in `compute_dtype`."""
    rule = _UpdateRule(initial, chunk_size, False, prenorm, torch.float32, compute_dtype)
    return _reading(rule, [run.version for run in _runs(rule, [[]] * len(states.seen), states)])


@dataclass(frozen=True)
class _Version:
    """Fast weights between two chunk borders: as the network reads them, as updates add to them, and their momentum."""

    read: FastWeights
    main: FastWeights
    momentum: FastWeights | None


@dataclass(frozen=True)
class _Piece:
    """Rows of one sequence inside one chunk.

    Attributes:
        index: its place among all pieces, in the order of rows.
        length: its rows.
        updates: whether it ends its chunk and the weights after it are needed.
    """

    index: int
    length: int
    updates: bool


class _Plan(NamedTuple):
    """Host arithmetic of a pass, the same in every layer.

    Attributes:
        pieces: of each sequence.
        lengths: rows of each piece.
        past_rows: rows before each sequence's own ones that its first piece writes with.
        chunk_lengths: rows of each piece with those before it.
        seen, num_summed, sequence, row_end: of each position, `[P]`.
        version: which of the weights that come out are a position's, `[P]`.
        versions: the sequence of those weights, and the updates before them.
    """

    pieces: list[list[_Piece]]
    lengths: list[int]
    past_rows: list[int]
    chunk_lengths: list[int]
    seen: torch.Tensor
    num_summed: torch.Tensor
    sequence: torch.Tensor
    row_end: torch.Tensor
    version: torch.Tensor
    versions: list[tuple[int, int]]


@cached_plan(maxsize=16)
def _plan(
    cu_seqlens: tuple[int, ...],
    seen: tuple[int, ...],
    num_summed: tuple[int, ...],
    chunk_size: int,
    positions: tuple[int, ...] | range,
) -> _Plan:
    C, num_sequences = chunk_size, len(cu_seqlens) - 1
    seen = (*seen, *[0] * (num_sequences - len(seen)))
    num_summed = (*num_summed, *[0] * (num_sequences - len(num_summed)))
    past_rows = [before % C - summed for before, summed in zip(seen, num_summed)]
    wanted = positions if isinstance(positions, range) else set(positions)
    pieces_of, lengths, chunk_lengths = [], [], []
    for n, (start, end) in enumerate(zip(cu_seqlens, cu_seqlens[1:])):
        pieces, row = [], start
        while row < end:
            stop = min(end, row + C - (seen[n] + row - start) % C)
            is_full = (seen[n] + stop - start) % C == 0
            pieces.append(_Piece(len(lengths), stop - row, is_full and (stop < end or stop in wanted)))
            lengths.append(stop - row)
            chunk_lengths.append(stop - row + (past_rows[n] if row == start else 0))
            row = stop
        pieces_of.append(pieces)

    r = places(positions)
    sequence = sequences_before(r, cu_seqlens)
    seen_N, start_N, own_N, summed_N = (np.array(x) for x in (seen, cu_seqlens[:-1], own_rows(cu_seqlens, past_rows), num_summed))
    total = seen_N[sequence] + r - start_N[sequence]
    updates = total // C - seen_N[sequence] // C
    pairs, version = np.unique(np.stack([sequence, updates]), axis=1, return_inverse=True)
    arrays = (
        total, np.where(updates == 0, summed_N[sequence], 0), sequence, own_N[sequence] + r - start_N[sequence], version.reshape(-1)
    )  # fmt: skip
    return _Plan(pieces_of, lengths, past_rows, chunk_lengths, *map(host_tensor, arrays), list(zip(*pairs.tolist())))


@dataclass
class _SequenceRun:
    """One sequence on its way: its pieces, current weights, and what is summed up of the current chunk."""

    pieces: list[_Piece]
    version: _Version
    sums: WrittenSums | None
    versions: list[_Version] = field(default_factory=list)

    def __post_init__(self):
        self.versions.append(self.version)


def _runs(rule: "_UpdateRule", pieces: list[list[_Piece]], past: LaCTState | None) -> list[_SequenceRun]:
    """Every sequence where it begins; those that go on from the same weights share them."""
    runs = [_SequenceRun(own, rule.initial, None) for own in pieces]
    if past is None:
        return runs
    resumed: dict[int, _Version] = {}
    fields = (past.seen, past.version, past.num_summed, past.sum_of)
    for n, (seen, version, num_summed, sum_of) in enumerate(zip(*(x.tolist() for x in fields))):
        if seen >= rule.chunk_size:
            if version not in resumed:
                momentum = None if past.momentum is None else past.momentum[version]
                resumed[version] = rule.resumed(past.weights[version], momentum)
            runs[n] = _SequenceRun(pieces[n], resumed[version], None)
        if num_summed:
            runs[n].sums = past.sums[sum_of]
    return runs


def _pools(
    rows: WritingRows, cu_seqlens: Sequence[int], past: LaCTState | None, past_rows: list[int], chunk_size: int
) -> WritingRows:
    """All rows with those of the past that are written together with them."""
    if not any(past_rows):
        return rows
    before = past.rows.map(lambda x: LastRows(x, past.row_end, chunk_size))
    return WritingRows(*(None if x is None else joined(x, cu_seqlens, b, past_rows) for x, b in zip(rows, before)))


class _UpdateRule:
    """How what is written becomes new weights."""

    def __init__(self, initial, chunk_size, muon, prenorm, newton_schulz_dtype, compute_dtype):
        self.compute_dtype = compute_dtype
        self.state_dtype = torch.promote_types(compute_dtype, torch.float32)
        self.chunk_size, self.muon, self.prenorm = chunk_size, muon, prenorm
        is_low = newton_schulz_dtype == torch.bfloat16
        self.newton_schulz_dtype = newton_schulz_dtype if is_low else self.state_dtype
        weights = initial.map(lambda w: w.to(self.state_dtype))
        self.norms = tuple(w.norm(dim=-1, keepdim=True) for w in _together([weights]))
        self.initial = _Version(weights, weights, None)
        self.zeros = weights.map(torch.zeros_like)

    def no_sums(self, has_momentum: bool) -> WrittenSums:
        return WrittenSums(self.zeros, self.zeros.w0.new_zeros(self.zeros.w0.shape[0]) if has_momentum else None)

    def rescaled(self, weights: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Rows of the weights at their initial norms."""
        return tuple(w / (w.norm(dim=-1, keepdim=True) + 1e-5) * n for w, n in zip(weights, self.norms))

    def resumed(self, main: FastWeights, momentum: FastWeights | None) -> _Version:
        [read] = _apart(self.rescaled(_together([main]))) if self.prenorm else [main]
        return _Version(read, main, momentum)

    def updated(self, versions: list[_Version], written: WrittenSums) -> list[_Version]:
        """The versions after a full chunk."""
        change = _together(written.weights.unbind())
        has_momentum = written.momentum is not None
        if has_momentum and any(v.momentum is not None for v in versions):
            kept = (written.momentum / self.chunk_size)[..., None, None]
            change = tuple(c + kept * m for c, m in zip(change, _together([v.momentum or self.zeros for v in versions])))
        momenta = _apart(change) if has_momentum else [None] * len(versions)
        if self.muon:
            change = self._orthogonalised(change)
        main = tuple(w + c for w, c in zip(_together([v.main for v in versions]), change))
        read = self.rescaled(main)
        reads = _apart(read)
        return list(map(_Version, reads, _apart(main) if self.prenorm else reads, momenta))

    def _orthogonalised(self, change: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """All three in one batch: their shapes are equal if M = D, else with w1 transposed."""
        if len(change) == 1:
            return (orthogonalise(change[0], self.newton_schulz_dtype).to(self.state_dtype),)
        w0, w1, w2 = change
        stacked = orthogonalise(torch.cat([w0, w1.mT, w2]), self.newton_schulz_dtype)
        w0, w1, w2 = stacked.to(self.state_dtype).split(1)
        return w0, w1.mT, w2


def _apply(weights: FastWeights, pieces: list[_Piece], q: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Outputs of each piece; shorter ones are padded."""
    w0, w1, w2 = weights
    q_gHCD = _padded([q[p.index] for p in pieces])
    out = gated_silu(q_gHCD @ w0.mT, q_gHCD @ w2.mT) @ w1.mT
    return {p.index: rows[: p.length] for p, rows in zip(pieces, out.transpose(1, 2).unbind(0))}


def _update(rule: "_UpdateRule", sequences: list[_SequenceRun], weights: FastWeights, rows: WritingRows) -> None:
    """Gives new weights to sequences whose chunk ends."""
    written = _written(rule, sequences, weights, rows)
    for sequence, version in zip(sequences, rule.updated([s.version for s in sequences], written)):
        sequence.version, sequence.sums = version, None
        sequence.versions.append(version)


def _written(rule: "_UpdateRule", sequences: list[_SequenceRun], weights: FastWeights, rows: WritingRows) -> WrittenSums:
    """What sequences have written in their chunks, `[g, H, ...]`: the gradient of `<f(k), v>`, each row times its learning rate.

    Args:
        weights: that they read, `[g, H, ...]`.
        rows: lists of one tensor a sequence; shorter ones are padded with rows of zeros, which write nothing.
    """
    w0, w1, w2 = weights
    k, v, lr = (_padded(x) for x in rows[:3])
    gate, up, d_hidden = k @ w0.mT, k @ w2.mT, v @ w1
    if lr.shape[-1] == 1:
        left0, right1, left2 = writing_factors(gate, up, d_hidden, lr.squeeze(-1))
        factors = ((left0, k), (v, right1), (left2, k))
    else:
        left0, right1, left2 = writing_factors(gate, up, d_hidden, torch.ones_like(lr[..., 0]))
        lr0, lr1, lr2 = lr.unbind(3)
        rights = (x.to(rule.compute_dtype) for x in (k * lr0, right1 * lr1, k * lr2))
        factors = tuple(zip((left0, v, left2), rights))
    weights = FastWeights(*((left.mT @ right).to(rule.state_dtype) for left, right in factors))
    momentum = None if rows.momentum is None else _padded(rows.momentum).to(rule.state_dtype).sum(-1)
    if any(s.sums is not None for s in sequences):
        before = [s.sums or rule.no_sums(momentum is not None) for s in sequences]
        weights = FastWeights(*(w + b for w, b in zip(weights, _stack_weights([b.weights for b in before]))))
        momentum = None if momentum is None else momentum + torch.stack([b.momentum for b in before])
    return WrittenSums(weights, momentum)


def _states(rule, plan: _Plan, sequences: list[_SequenceRun], past: LaCTState | None, pools: WritingRows) -> LaCTState:
    # A state of no positions has shapes too: those of the initial weights.
    versions = [sequences[n].versions[updates] for n, updates in plan.versions] or [rule.initial]
    sums = () if past is None else past.sums
    first = ([] if past is None else past.sum_of.tolist()) + [0] * len(sequences)
    sum_of = host_tensor([first[n] for n in plan.sequence.tolist()])
    return LaCTState(
        seen=plan.seen,
        version=plan.version,
        weights=tuple(v.main for v in versions),
        momentum=tuple(v.momentum or rule.zeros for v in versions) if pools.momentum is not None else None,
        num_summed=plan.num_summed,
        sum_of=sum_of,
        sums=sums,
        row_end=plan.row_end,
        rows=pools,
    )


def _padded(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of several sequences as `[g, H, rows, ...]`, with rows of zeros after shorter ones."""
    longest = max(r.shape[0] for r in rows)
    padded = [r if r.shape[0] == longest else F.pad(r, (*[0, 0] * (r.dim() - 1), 0, longest - r.shape[0])) for r in rows]
    return _stack(padded).transpose(1, 2)


def _reading(rule: _UpdateRule, versions: list[_Version]) -> FastWeights:
    """The weights that queries and keys are multiplied with, `[g, H, ...]`: those that several sequences share are cast once."""
    distinct = list({id(v): v for v in versions}.values())
    if len(distinct) == 1:
        [weights] = _apart(tuple(w.to(rule.compute_dtype) for w in _together([distinct[0].read])))
        weights = weights.map(lambda w: w[None])
    else:
        weights = _stack_weights([v.read for v in distinct]).map(lambda w: w.to(rule.compute_dtype))
    if len(distinct) == len(versions):
        return weights
    place = {id(v): i for i, v in enumerate(distinct)}
    return _take(weights, [place[id(v)] for v in versions])


def _take(weights: FastWeights, chosen: list[int]) -> FastWeights:
    """Weights by index into the first dim."""
    if chosen == list(range(weights.w0.shape[0])):
        return weights
    index = _index(tuple(chosen)).on(weights.w0.device)
    return weights.map(lambda w: w.index_select(0, index))


@cached_plan(maxsize=16)
def _index(chosen: tuple[int, ...]) -> PlannedTensor:
    return PlannedTensor(torch.tensor(chosen))


def _together(weights: Sequence[FastWeights]) -> tuple[torch.Tensor, ...]:
    """The weights of g sequences as one tensor `[3, g, H, ...]`, so that each step of an update is one operator; as three
    `[1, g, H, ...]` where w1's shape is another."""
    if any(w.shape != weights[0].w0.shape for w in weights[0]):
        return tuple(_stack(same)[None] for same in zip(*weights))
    return (_stack([w for same in zip(*weights) for w in same]).unflatten(0, (3, len(weights))),)


def _apart(together: tuple[torch.Tensor, ...]) -> list[FastWeights]:
    """The weights of each sequence."""
    num_sequences = together[0].shape[1]
    views = [view for part in together for view in part.flatten(0, 1).unbind()]
    return [FastWeights(*views[i::num_sequences]) for i in range(num_sequences)]


def _stack_weights(weights: list[FastWeights]) -> FastWeights:
    return FastWeights(*(_stack(same) for same in zip(*weights)))


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.stack`, without a copy of a single one or of what are all rows of one tensor already."""
    if len(tensors) == 1:
        return tensors[0][None]
    first, whole = tensors[0], tensors[0]._base
    size = first.numel()
    if (
        whole is not None
        and whole.numel() == len(tensors) * size
        and whole.is_contiguous()
        and all(
            x._base is whole and x.is_contiguous() and x.storage_offset() == whole.storage_offset() + i * size
            for i, x in enumerate(tensors)
        )
    ):
        return whole.view(len(tensors), *first.shape)
    return torch.stack(tensors)
