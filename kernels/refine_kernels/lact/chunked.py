"""LaCT's fast weights in plain torch: packed sequences advance together, chunk by chunk.

Legend: T rows, N sequences, H heads, D channels of a head, M hidden channels of the fast network, L learning rates of a
weight (1 or D), P positions, U versions of the fast weights, g sequences that advance together, C chunk size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F

from refine_kernels.lact.newton_schulz import orthogonalise
from refine_kernels.lact.state import FastWeights, LaCTState
from refine_kernels.packing import check_packing, sequence_of_token


# Pieces of at most so many rows are padded to one batch, longer ones share a batch only with pieces of equal length.
PADDED_ROWS = 64


def lact(
    q_THD: torch.Tensor,
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
    past_lengths: Sequence[int] | None = None,
    state_positions: Sequence[int] = (),
) -> tuple[torch.Tensor, LaCTState]:
    """Applies the fast network of its chunk to every query, and updates it after every full chunk that has a successor.

    Matrix products run in q's dtype, weights and updates are at least float32.

    Args:
        q_THD, k_THD, v_THD: rows of N packed sequences.
        lr_TH3L: learning rates of w0, w1 and w2.
        momentum_TH: momentum coefficients, averaged over a chunk; None for no momentum.
        initial: weights that every sequence starts with, `[H, ...]`.
        cu_seqlens: N + 1 row indices at which the sequences begin and end, as host integers.
        chunk_size: rows of a chunk, counted from the start of the sequence, past included.
        muon: orthogonalise updates.
        prenorm: add updates to an un-normalised copy of the weights, instead of to the rescaled ones.
        newton_schulz_dtype: bfloat16, or float32 for at least the precision of the weights.
        past: state of each sequence; None where none has a past.
        past_lengths: rows that each sequence has had before.
        state_positions: P row indices r in 1..T; the state after row r - 1 of the sequence that holds row r - 1.

    Returns:
        Outputs `[T, H, D]` and the states at the positions.

    Raises:
        ValueError: if `cu_seqlens` does not cover the rows, a position lies outside, or the chunk size is below 1.
    """
    check_packing(cu_seqlens, q_THD.shape[0], state_positions)
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; allowed: at least 1")
    with torch.autocast(q_THD.device.type, enabled=False):
        rule = _UpdateRule(initial, chunk_size, muon, prenorm, newton_schulz_dtype, q_THD.dtype)
        sequences = _sequences(rule, cu_seqlens, past, past_lengths, state_positions)
        # Split once: the backward of a slice a piece would fill and add all rows every time.
        lengths = [piece.length for s in sequences for piece in s.pieces]
        q, k, v, lr = (x.split(lengths) for x in (q_THD, k_THD, v_THD, lr_TH3L))
        momentum = None if momentum_TH is None else momentum_TH.split(lengths)
        outputs: dict[int, torch.Tensor] = {}
        snapshots: dict[int, _Snapshot] = {}
        for level in range(max(len(s.pieces) for s in sequences)):
            active = [s for s in sequences if len(s.pieces) > level]

            def batch_length(s: _SequenceRun, level: int = level) -> int:
                return max(s.pieces[level].length, PADDED_ROWS)

            active.sort(key=batch_length)
            for _, group in groupby(active, key=batch_length):
                piece = _GroupPiece(rule, list(group), level)
                outputs |= piece.apply(q)
                snapshots |= piece.write(k, v, lr, momentum)
        states = _collect(rule, [snapshots[r] for r in state_positions], momentum_TH is not None)
        return torch.cat([outputs[i] for i in range(len(lengths))]), states


@dataclass(frozen=True)
class _Version:
    """Fast weights between two chunk borders: as the network reads them, as updates add to them, and their momentum."""

    read: FastWeights
    main: FastWeights
    momentum: FastWeights | None


class _Snapshot(NamedTuple):
    version: _Version
    pending: FastWeights
    pending_momentum: torch.Tensor | None


@dataclass(frozen=True)
class _Piece:
    """Rows of one sequence inside one chunk.

    Attributes:
        index: its place among all pieces, in the order of rows.
        start, length: its rows.
        cuts: row counts after which a state is wanted.
        updates: whether it ends its chunk and the weights after it are needed.
    """

    index: int
    start: int
    length: int
    cuts: tuple[int, ...]
    updates: bool


@dataclass
class _SequenceRun:
    """One sequence on its way: its pieces, current weights, and what is pending in the current chunk."""

    pieces: list[_Piece]
    version: _Version
    pending: FastWeights | None = None
    pending_momentum: torch.Tensor | None = None


class _UpdateRule:
    """How pending updates become new weights."""

    def __init__(self, initial, chunk_size, muon, prenorm, newton_schulz_dtype, compute_dtype):
        self.compute_dtype = compute_dtype
        self.state_dtype = torch.promote_types(compute_dtype, torch.float32)
        self.chunk_size, self.muon, self.prenorm = chunk_size, muon, prenorm
        is_low = newton_schulz_dtype == torch.bfloat16
        self.newton_schulz_dtype = newton_schulz_dtype if is_low else self.state_dtype
        weights = initial.map(lambda w: w.to(self.state_dtype))
        self.norms = weights.map(lambda w: w.norm(dim=-1, keepdim=True))
        self.initial = _Version(weights, weights, None)
        self.zeros = weights.map(torch.zeros_like)

    def rescaled(self, weights: FastWeights) -> FastWeights:
        """Rows of the weights at their initial norms."""
        return FastWeights(*(w / (w.norm(dim=-1, keepdim=True) + 1e-5) * n for w, n in zip(weights, self.norms)))

    def resumed(self, main: FastWeights, momentum: FastWeights | None) -> _Version:
        return _Version(self.rescaled(main) if self.prenorm else main, main, momentum)

    def update(
        self, main: FastWeights, momentum: FastWeights | None, pending: FastWeights, pending_momentum: torch.Tensor | None
    ) -> tuple[FastWeights, FastWeights, FastWeights | None]:
        """Weights to read, main weights and momentum after a full chunk, all `[g, H, ...]`."""
        change = pending
        if pending_momentum is not None and momentum is not None:
            kept = (pending_momentum / self.chunk_size)[..., None, None]
            change = FastWeights(*(p + kept * m for p, m in zip(pending, momentum)))
        momentum = change if pending_momentum is not None else None
        if self.muon:
            change = self._orthogonalised(change)
        main = FastWeights(*(w + c for w, c in zip(main, change)))
        read = self.rescaled(main)
        return read, main if self.prenorm else read, momentum

    def _orthogonalised(self, change: FastWeights) -> FastWeights:
        """All three in one batch: their shapes are equal if M = D, else with w1 transposed."""
        is_square = change.w0.shape == change.w1.shape
        w1 = change.w1 if is_square else change.w1.mT
        stacked = orthogonalise(torch.stack([change.w0, w1, change.w2]), self.newton_schulz_dtype)
        w0, w1, w2 = stacked.to(self.state_dtype)
        return FastWeights(w0, w1 if is_square else w1.mT, w2)


def _sequences(rule, cu_seqlens, past, past_lengths, state_positions) -> list[_SequenceRun]:
    C = rule.chunk_size
    cuts_of = [set() for _ in cu_seqlens[1:]]
    for r in state_positions:
        cuts_of[sequence_of_token(cu_seqlens, r - 1)].add(r)
    sequences, num_pieces = [], 0
    for n, (start, end) in enumerate(zip(cu_seqlens, cu_seqlens[1:])):
        seen = 0 if past is None else past_lengths[n]
        pieces, row = [], start
        while row < end:
            stop = min(end, row + C - (seen + row - start) % C)
            cuts = tuple(sorted(r - row for r in cuts_of[n] if row < r <= stop))
            is_full = (seen + stop - start) % C == 0
            updates = is_full and (stop < end or stop in cuts_of[n])
            pieces.append(_Piece(num_pieces, row, stop - row, cuts, updates))
            num_pieces += 1
            row = stop
        run = _SequenceRun(pieces, rule.initial)
        if seen >= C:
            momentum = None if past.momentum is None else past.momentum.map(lambda w: w[n])
            run.version = rule.resumed(past.weights.map(lambda w: w[n]), momentum)
        if seen % C:
            run.pending = past.pending.map(lambda w: w[n])
            run.pending_momentum = None if past.pending_momentum is None else past.pending_momentum[n]
        sequences.append(run)
    return sequences


class _GroupPiece:
    """Pieces of several sequences, run as one batch; shorter ones are padded with rows of zeros, which write nothing."""

    def __init__(self, rule: _UpdateRule, sequences: list[_SequenceRun], level: int):
        self.rule, self.sequences = rule, sequences
        self.pieces = [s.pieces[level] for s in sequences]
        self.length = max(p.length for p in self.pieces)
        read = _stack_weights([s.version.read for s in sequences])
        self.weights = read.map(lambda w: w.to(rule.compute_dtype))

    def gather(self, x: Sequence[torch.Tensor], num_rows: int) -> torch.Tensor:
        """The pieces' first rows as `[g, H, rows, ...]`, from all pieces."""
        rows = [x[p.index][:num_rows] for p in self.pieces]
        padded = [r if r.shape[0] == num_rows else F.pad(r, (*[0, 0] * (r.dim() - 1), 0, num_rows - r.shape[0])) for r in rows]
        return _stack(padded).transpose(1, 2)

    def apply(self, q: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        """Outputs of each piece."""
        q = self.gather(q, self.length)
        w0, w1, w2 = self.weights
        out = (F.silu(q @ w0.mT) * (q @ w2.mT)) @ w1.mT
        return {p.index: rows[: p.length] for p, rows in zip(self.pieces, out.transpose(1, 2).unbind(0))}

    def write(self, k, v, lr, momentum) -> dict[int, _Snapshot]:
        """Adds what the rows write to the sequences' pending updates, updates the weights at chunk borders, and returns
        the states at wanted positions. The rows' parts are summed from cut to cut: a state costs no row twice."""
        updates = any(p.updates for p in self.pieces)
        # A piece is complete only at the end of the batch: what pads it adds nothing.
        wanted = [{cut if cut < p.length else self.length: cut for cut in p.cuts} for p in self.pieces]
        num_rows = self.length if updates else max((bound for cuts in wanted for bound in cuts), default=0)
        if num_rows == 0:
            return {}
        factors = self._factors(*(self.gather(x, num_rows) for x in (k, v, lr)))
        bounds = sorted({bound for cuts in wanted for bound in cuts} | {num_rows})
        before, momentum_before = self._pending_so_far(momentum is not None)
        pending = [_products_up_to(bounds, *pair, self.rule.state_dtype) for pair in factors]
        if before is not None:
            pending = [sums + earlier for sums, earlier in zip(pending, before)]
        momentum_sums = None
        if momentum is not None:
            coefficients = self.gather(momentum, num_rows).to(self.rule.state_dtype)
            momentum_sums = _sums_up_to(bounds, coefficients) + momentum_before

        snapshots = {}
        # One operator for the views of all bounds and sequences.
        views = [sums.flatten(0, 1).unbind() for sums in pending]
        momentum_views = None if momentum_sums is None else momentum_sums.flatten(0, 1).unbind()
        for i, end in enumerate(bounds):
            for g, (sequence, piece) in enumerate(zip(self.sequences, self.pieces)):
                cut = wanted[g].get(end)
                if cut is not None and not (piece.updates and cut == piece.length):
                    at = i * len(self.pieces) + g
                    sums = FastWeights(*(v[at] for v in views))
                    momentum_sum = None if momentum_views is None else momentum_views[at]
                    snapshots[piece.start + cut] = _Snapshot(sequence.version, sums, momentum_sum)
        if updates:
            all_rows = FastWeights(*(sums[-1] for sums in pending))
            snapshots |= self._update(all_rows, None if momentum_sums is None else momentum_sums[-1])
        return snapshots

    def _factors(self, k, v, lr) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Left and right factors `[g, H, rows, ...]` whose products over rows are the updates of w0, w1 and w2: the
        gradient of `<f(k), v>`, each row times its learning rate."""
        w0, w1, w2 = self.weights
        dtype = self.rule.compute_dtype
        gate, up = k @ w0.mT, k @ w2.mT
        sigma = gate.sigmoid()
        silu = gate * sigma
        d_hidden = v @ w1
        d_gate = d_hidden * up * (sigma * (1 + gate * (1 - sigma)))
        lr0, lr1, lr2 = lr.unbind(3)
        return [
            (d_gate, (k * lr0).to(dtype)),
            (v, (silu * up * lr1).to(dtype)),
            (d_hidden * silu, (k * lr2).to(dtype)),
        ]

    def _pending_so_far(self, has_momentum: bool) -> tuple[FastWeights | None, torch.Tensor | float]:
        """What rows before these pieces have written in the current chunks, and the sums of their momentum coefficients."""
        sequences = self.sequences
        if all(s.pending is None for s in sequences):
            return None, 0.0
        before = _stack_weights([s.pending or self.rule.zeros for s in sequences])
        if not has_momentum:
            return before, 0.0
        none = self.rule.zeros.w0.new_zeros(self.rule.zeros.w0.shape[0])
        return before, torch.stack([none if s.pending_momentum is None else s.pending_momentum for s in sequences])

    def _update(self, pending: FastWeights, pending_momentum: torch.Tensor | None) -> dict[int, _Snapshot]:
        rule = self.rule
        chosen = [g for g, piece in enumerate(self.pieces) if piece.updates]
        if len(chosen) < len(self.pieces):
            index = torch.tensor(chosen, device=pending.w0.device)
            pending = pending.map(lambda w: w.index_select(0, index))
            pending_momentum = None if pending_momentum is None else pending_momentum.index_select(0, index)
        sequences = [self.sequences[g] for g in chosen]
        main = _stack_weights([s.version.main for s in sequences])
        momentum = None
        if any(s.version.momentum is not None for s in sequences):
            momentum = _stack_weights([s.version.momentum or rule.zeros for s in sequences])
        read, main, momentum = rule.update(main, momentum, pending, pending_momentum)

        snapshots = {}
        for i, (sequence, g) in enumerate(zip(sequences, chosen)):
            own_momentum = None if momentum is None else momentum.map(lambda w: w[i])
            sequence.version = _Version(read.map(lambda w: w[i]), main.map(lambda w: w[i]), own_momentum)
            sequence.pending = sequence.pending_momentum = None
            piece = self.pieces[g]
            if piece.length in piece.cuts:
                none = None if pending_momentum is None else torch.zeros_like(pending_momentum[i])
                snapshots[piece.start + piece.length] = _Snapshot(sequence.version, rule.zeros, none)
        return snapshots


def _collect(rule: _UpdateRule, snapshots: list[_Snapshot], has_momentum: bool) -> LaCTState:
    # A state of no positions has shapes too: those of the initial weights.
    versions = list({id(s.version): s.version for s in snapshots}.values()) or [rule.initial]
    place = {id(version): i for i, version in enumerate(versions)}
    no_sums = rule.zeros.w0.new_zeros(0, rule.zeros.w0.shape[0])

    def stack(weights: list[FastWeights]) -> FastWeights:
        return _stack_weights(weights) if weights else rule.zeros.map(lambda w: w.new_zeros(0, *w.shape))

    momentum_sums = torch.stack([s.pending_momentum for s in snapshots]) if has_momentum and snapshots else no_sums
    return LaCTState(
        version=torch.tensor([place[id(s.version)] for s in snapshots], dtype=torch.long),
        weights=stack([v.main for v in versions]),
        momentum=stack([v.momentum or rule.zeros for v in versions]) if has_momentum else None,
        pending=stack([s.pending for s in snapshots]),
        pending_momentum=momentum_sums if has_momentum else None,
    )


def _products_up_to(bounds: list[int], left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`left[:bound].T @ right[:bound]` of `[g, H, rows, ...]` for every bound, the last one being all rows: `[bounds, g, H, ...]`.

    The rows from one bound to the next are multiplied once. Where they are equally many, or fewer only at the ends, as between
    snapshots, they are one batch.
    """
    written = [a.mT @ b for a, b in zip(_segments(bounds, left), _segments(bounds, right))]
    return _cumulative(torch.cat(written, 2).to(dtype) if len(written) > 1 else written[0].to(dtype), 2)


def _sums_up_to(bounds: list[int], x: torch.Tensor) -> torch.Tensor:
    """`x[:bound].sum()` of `[g, H, rows]` for every bound: `[bounds, g, H]`."""
    sums = [part.sum(-1) for part in _segments(bounds, x)]
    return _cumulative(torch.cat(sums, 2) if len(sums) > 1 else sums[0], 2)


def _segments(bounds: list[int], x: torch.Tensor) -> list[torch.Tensor]:
    """Rows of `[g, H, rows, ...]` cut at the bounds, as batches `[g, H, segments, rows of one, ...]`."""
    lengths = [end - begin for begin, end in zip([0, *bounds], bounds)]
    longest = max(lengths)
    if any(length < longest for length in lengths[1:-1]):
        return [part.unsqueeze(2) for part in x.split(lengths, 2)]
    padding = (longest - lengths[0], longest - lengths[-1] if len(lengths) > 1 else 0)
    if any(padding):
        x = F.pad(x, (*[0, 0] * (x.dim() - 3), *padding))
    return [x.unflatten(2, (len(lengths), longest))]


def _cumulative(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Sums along `dim`, which comes first."""
    return (x.cumsum(dim) if x.shape[dim] > 1 else x).movedim(dim, 0)


def _stack_weights(weights: list[FastWeights]) -> FastWeights:
    return FastWeights(*(_stack(same) for same in zip(*weights)))


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.stack`, without a copy of a single one or of what are all rows of one tensor already.

    Sequences that decode together keep their weights in one tensor from token to token: it is not copied at each.
    """
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
