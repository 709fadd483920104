"""LaCT's fast weights in plain torch: packed sequences advance together, chunk by chunk.

Legend: T tokens, N sequences, H heads, D channels of a head, L learning rates of a weight (1 or D), P positions, g sequences that
advance together, C tokens of the longest of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch

from refine_kernels.lact.batching import Factors, apart, padded, stack_weights, take, unbind
from refine_kernels.lact.elementwise import hidden
from refine_kernels.lact.plan import Piece, Plan, plan_pass
from refine_kernels.lact.state import FastWeights, FixedState, LaCTState, WritingTokens, WrittenSums
from refine_kernels.lact.update_rule import UpdateRule, Version
from refine_kernels.packing import check_packing
from refine_kernels.past_tokens import LastTokens, host_tensor, joined

# Pieces of at most this many tokens are padded and share a batch; a longer piece shares one only with pieces of equal length.
PADDED_TOKENS = 64


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
    muon_joins: bool = False,
    prenorm: bool = False,
    newton_schulz_dtype: torch.dtype = torch.bfloat16,
    past: LaCTState | None = None,
    state_positions: Sequence[int] = (),
) -> tuple[torch.Tensor | None, LaCTState]:
    """Applies to every query the fast network of its chunk, and updates the network after every full chunk that has a successor.

    Matrix products run in the keys' dtype; weights and updates are at least float32.

    Args:
        q_THD, k_THD, v_THD: queries, keys and values of T tokens in N packed sequences; without queries there are no outputs.
        lr_TH3L: learning rates of w0, w1 and w2.
        momentum_TH: momentum coefficients, averaged over a chunk; None for no momentum.
        initial: weights that every sequence starts with, `[H, ...]`.
        cu_seqlens: N + 1 token indices at which the sequences begin and end, as host integers.
        chunk_size: tokens of a chunk, counted from the start of the sequence, past included.
        muon: whether updates are orthogonalised.
        muon_joins: whether those of w0 and w2 are orthogonalised as one matrix of 2 M rows, instead of each alone.
        prenorm: whether updates are added to an un-normalised copy of the weights instead of to the rescaled ones.
        newton_schulz_dtype: bfloat16, or float32 for at least the precision of the weights.
        past: states from which the first sequences continue; the others begin. None if all begin.
        state_positions: P positions r in 1..T; the state at r is that of token r - 1's sequence after token r - 1.

    Returns:
        Outputs `[T, H, D]` and the states at the positions.

    Raises:
        ValueError: `cu_seqlens` does not cover the tokens, a position lies outside, or the chunk size is below 1.
    """
    check_packing(cu_seqlens, k_THD.shape[0], state_positions)
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; allowed: at least 1")
    with torch.autocast(k_THD.device.type, enabled=False):
        rule = UpdateRule(
            initial,
            chunk_size=chunk_size,
            compute_dtype=k_THD.dtype,
            prenorm=prenorm,
            muon=muon,
            muon_joins=muon_joins,
            newton_schulz_dtype=newton_schulz_dtype,
        )
        seen, num_summed = ((), ()) if past is None else (past.seen.tolist(), past.num_summed.tolist())
        kept = state_positions if isinstance(state_positions, range) else tuple(state_positions)
        plan = plan_pass(tuple(cu_seqlens), tuple(seen), tuple(num_summed), chunk_size, kept)
        tokens = WritingTokens(k_THD, v_THD, lr_TH3L, momentum_TH)
        pools = _pools(tokens, cu_seqlens, past, plan.past_counts, chunk_size)
        # Split once: the backward of one slice per piece would fill and add a gradient of all T tokens for every piece.
        q = None if q_THD is None else q_THD.split(plan.lengths)
        chunks = pools.map(lambda x: x.split(plan.chunk_lengths))
        sequences = _runs(rule, plan.pieces, past)
        outputs: dict[int, torch.Tensor] = {}
        for level in range(max(len(s.pieces) for s in sequences)):
            active = [s for s in sequences if len(s.pieces) > level]

            def batch_length(s: _SequenceRun, level: int = level) -> int:
                return max(s.pieces[level].length, PADDED_TOKENS)

            active.sort(key=batch_length)
            for _, group in groupby(active, key=batch_length):
                group = list(group)
                pieces = [s.pieces[level] for s in group]
                weights = rule.reading([s.version for s in group])
                if q is not None:
                    outputs |= _apply(weights, pieces, q)
                ending = [i for i, piece in enumerate(pieces) if piece.updates]
                if ending:
                    tokens = chunks.map(lambda x, pieces=pieces, ending=ending: [x[pieces[i].index] for i in ending])
                    _update(rule, [group[i] for i in ending], take(weights, ending), tokens)
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
    """Makes states of fixed size: the tokens that `states` refer to are summed up, as `lact` does at the end of a chunk."""
    with torch.autocast(initial.w0.device.type, enabled=False):
        rule = UpdateRule(initial, chunk_size=chunk_size, compute_dtype=compute_dtype, prenorm=prenorm)
        num_places = len(states.seen)
        runs = _runs(rule, [[]] * num_places, states)
        sums: list[WrittenSums] = [run.sums or rule.no_sums(states.momentum is not None) for run in runs]
        lengths = [(seen % chunk_size) - summed for seen, summed in zip(states.seen.tolist(), states.num_summed.tolist())]
        by_length = sorted((p for p in range(num_places) if lengths[p]), key=lambda p: lengths[p])
        for _, group in groupby(by_length, key=lambda p: max(lengths[p], PADDED_TOKENS)):
            group = list(group)
            ends = [int(states.token_end[p]) for p in group]
            tokens = states.tokens.map(lambda x, group=group, ends=ends: [x[end - lengths[p] : end] for p, end in zip(group, ends)])
            weights = rule.reading([runs[p].version for p in group])
            written, momentum = rule.written(weights, tokens, [runs[p].sums for p in group])
            momentum_sums = [None] * len(group) if momentum is None else momentum.unbind()
            for p, own, momentum_sum in zip(group, apart(tuple(w.to(rule.state_dtype) for w in written)), momentum_sums):
                sums[p] = WrittenSums(own, momentum_sum)
        weights = stack_weights([states.weights[v] for v in states.version.tolist()])
        momentum = None
        if states.momentum is not None:
            momentum = stack_weights([states.momentum[v] for v in states.version.tolist()])
        momentum_sums = None if states.momentum is None else torch.stack([s.momentum for s in sums])
        return FixedState(weights, momentum, stack_weights([s.weights for s in sums]), momentum_sums)


def reading_weights(
    states: LaCTState, initial: FastWeights, *, chunk_size: int, compute_dtype: torch.dtype, prenorm: bool = False
) -> FastWeights:
    """The weights that the next query of each place reads, `[P, H, ...]` in `compute_dtype`."""
    rule = UpdateRule(initial, chunk_size=chunk_size, compute_dtype=compute_dtype, prenorm=prenorm)
    versions = [run.version for run in _runs(rule, [[]] * len(states.seen), states)]
    inner, outer = (w.expand(len(versions), *w.shape[1:]) for w in rule.reading(versions))
    w0, w2 = inner.chunk(2, 2)
    return FastWeights(w0, outer, w2)


@dataclass
class _SequenceRun:
    """A sequence during the pass.

    Attributes:
        pieces: its tokens, cut at chunk borders.
        version: its current weights.
        sums: what tokens of the current chunk, read before this pass, have written; None if there are none.
        versions: its weights from the start of the pass and after every update since.
    """

    pieces: list[Piece]
    version: Version
    sums: WrittenSums | None
    versions: list[Version] = field(default_factory=list)

    def __post_init__(self):
        self.versions.append(self.version)


def _runs(rule: UpdateRule, pieces: list[list[Piece]], past: LaCTState | None) -> list[_SequenceRun]:
    """Every sequence at the start of the pass; sequences that continue from the same weights share one `Version`."""
    runs = [_SequenceRun(own, rule.initial, None) for own in pieces]
    if past is None:
        return runs
    seen, versions, num_summed, sum_of = (x.tolist() for x in (past.seen, past.version, past.num_summed, past.sum_of))
    updated = [n for n, count in enumerate(seen) if count >= rule.chunk_size]
    if updated:
        distinct = list(dict.fromkeys(versions[n] for n in updated))
        momenta = None if past.momentum is None else [past.momentum[v] for v in distinct]
        resumed = dict(zip(distinct, rule.resumed([past.weights[v] for v in distinct], momenta)))
        for n in updated:
            runs[n] = _SequenceRun(pieces[n], resumed[versions[n]], None)
    for run, summed, i in zip(runs, num_summed, sum_of):
        if summed:
            run.sums = past.sums[i]
    return runs


def _pools(
    tokens: WritingTokens, cu_seqlens: Sequence[int], past: LaCTState | None, past_counts: list[int], chunk_size: int
) -> WritingTokens:
    """All tokens, and before each sequence's own the past tokens of its current chunk."""
    if not any(past_counts):
        return tokens
    before = past.tokens.map(lambda x: LastTokens(x, past.token_end, chunk_size))
    return WritingTokens(*(None if x is None else joined(x, cu_seqlens, b, past_counts) for x, b in zip(tokens, before)))


def _apply(weights: Factors, pieces: list[Piece], q: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Outputs of each piece, by the piece's index; shorter pieces are padded to the longest."""
    inner, outer = weights
    q_gHCD = padded([q[p.index] for p in pieces])
    out = unbind((hidden(q_gHCD @ inner.mT) @ outer.mT).transpose(1, 2))
    return {p.index: own if own.shape[0] == p.length else own[: p.length] for p, own in zip(pieces, out)}


def _update(rule: UpdateRule, sequences: list[_SequenceRun], weights: Factors, tokens: WritingTokens) -> None:
    """Updates the weights of sequences whose chunk ends."""
    written = rule.written(weights, tokens, [s.sums for s in sequences])
    for sequence, version in zip(sequences, rule.updated([s.version for s in sequences], *written)):
        sequence.version, sequence.sums = version, None
        sequence.versions.append(version)


def _states(rule: UpdateRule, plan: Plan, sequences: list[_SequenceRun], past: LaCTState | None, pools: WritingTokens) -> LaCTState:
    # If no position is wanted, the state still has weights, whose shapes callers read.
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
        token_end=plan.token_end,
        tokens=pools,
    )
