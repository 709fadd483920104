"""LaCT's fast weights over a trunk that several ranks share.

The update of a chunk depends on the weights before it, and no other rank can prepare it: the ranks of a document work one after the
other. They do so head by head: while a rank works on one head, the next rank works on the head before. What a chunk has summed up
before a rank's border is part of the state that is handed on.

Legend: T tokens of the shard, H heads, D channels of a head.
"""

from collections.abc import Callable

import torch

from refine_kernels.lact import FastWeights, FixedState, LaCTState, WritingTokens, fixed_states
from refine_kernels.past_tokens import host_tensor
from refine_titan.models.context_shard import ContextShard, receive_state, send_state, tied

Rows = tuple[torch.Tensor | None, ...]
Positions = tuple[int, ...] | range


def lact_of_shard(
    lact: Callable[..., tuple[torch.Tensor, LaCTState]],
    rows: Rows,
    initial: FastWeights,
    cu_seqlens: tuple[int, ...],
    shard: ContextShard,
    state_positions: Positions,
    *,
    chunk_size: int,
    prenorm: bool,
) -> tuple[torch.Tensor, LaCTState]:
    """Runs the fast networks over the shard's tokens, with the state that arrives from the previous rank.

    Args:
        lact: takes rows, initial weights, cu_seqlens, past and state positions.
        rows: queries, keys, values and learning rates, each `[T, H, ...]`, and momentum or None.
        initial: the weights that every sequence starts with.
        state_positions: position 0 is the state of the first sequence on arrival.

    Returns:
        Outputs `[T, H, D]`, and the states at the positions.
    """
    T, num_sequences = cu_seqlens[-1], len(cu_seqlens) - 1
    border = cu_seqlens[1] if shard.seen and num_sequences > 1 else 0
    run = _Run(lact, shard, initial, chunk_size, prenorm)
    # A document that begins here does not wait for the one that arrives.
    own = run(rows, (border, T), cu_seqlens, state_positions, receive=shard.seen > 0 and border == 0, send=shard.continues)
    parts = [own]
    if border:
        parts.insert(0, run(rows, (0, border), cu_seqlens, state_positions, receive=True, send=False))
    place = {r: i for i, r in enumerate(r for part in parts for r in part[0])}
    order = host_tensor([place[r] for r in state_positions])
    return torch.cat([part[1] for part in parts]), LaCTState.cat([part[2] for part in parts]).select(order)


class _Run:
    """Runs neighbouring sequences of a shard, head by head where a state arrives or goes on."""

    def __init__(self, lact, shard: ContextShard, initial: FastWeights, chunk_size: int, prenorm: bool):
        self.lact, self.shard, self.initial, self.chunk_size, self.prenorm = lact, shard, initial, chunk_size, prenorm

    def __call__(self, rows: Rows, span, cu_seqlens, state_positions: Positions, *, receive: bool, send: bool):
        """Returns positions, outputs and states of the tokens in `span`; the positions begin with 0 if a state has arrived."""
        begin, end = span
        packing = tuple(r - begin for r in cu_seqlens if begin <= r <= end)
        wanted = _inside(state_positions, begin, end, with_end=send)
        own_tokens = tuple(None if x is None else x[begin:end] for x in rows)
        num_heads = self.initial.w0.shape[0]
        # Ranks that hand a state on do it head by head; the others need not take the heads apart.
        groups = [slice(h, h + 1) for h in range(num_heads)] if receive or send else [slice(0, num_heads)]
        outputs, states = [], []
        for heads in groups:
            group_rows = tuple(None if x is None else x[:, heads] for x in own_tokens)
            initial = self.initial.map(lambda w, heads=heads: w[heads])
            past = arrived = None
            if receive:
                arrived = self._receive(initial, has_momentum=rows[-1] is not None)
                past = LaCTState.of_fixed([self.shard.seen], arrived, self.chunk_size)
            out, state = self.lact(group_rows, initial, packing, past, wanted)
            if send:
                last = fixed_states(
                    state.select(host_tensor([len(wanted) - 1])),
                    initial,
                    chunk_size=self.chunk_size,
                    compute_dtype=rows[1].dtype,
                    prenorm=self.prenorm,
                )
                flat = torch.cat([x.flatten() for x in last.tensors()])
                out = tied(out, send_state(flat, self.shard))
            if receive:
                # What has arrived may not matter to the outputs: its first chunk may end at a later rank.
                out = tied(out, *arrived.tensors())
                state = LaCTState.cat([past, state])
            outputs.append(out)
            states.append(state)
        # The rows that states refer to are the shard's, with those of all heads.
        joined = LaCTState.cat_heads(states, WritingTokens(*rows[1:]))
        positions = [r + begin for r in wanted]
        return [0] * receive + positions, torch.cat(outputs, 1), joined._replace(token_end=joined.token_end + begin)

    def _receive(self, initial: FastWeights, has_momentum: bool) -> FixedState:
        """The state that the previous rank hands on."""
        wide = torch.promote_types(initial.w0.dtype, torch.float32)
        weights = initial.map(lambda w: w.to(wide)[None])
        sums = weights.w0.sum((2, 3)) if has_momentum else None
        like = FixedState(weights, weights if has_momentum else None, weights, sums)
        shapes = [x.shape for x in like.tensors()]
        flat = receive_state(torch.cat([x.flatten() for x in like.tensors()]), self.shard)
        parts = flat.split([shape.numel() for shape in shapes])
        return like.with_tensors([part.view(shape) for part, shape in zip(parts, shapes)])


def _inside(positions: Positions, begin: int, end: int, *, with_end: bool) -> Positions:
    """The positions after `begin` and up to `end`, ascending and counted from `begin`, with `end` itself if asked for. Of a range all up
    to there are taken: they cost nothing."""
    if isinstance(positions, range):
        stop = end + 1 if with_end else min(positions.stop, end + 1)
        return range(min(max(positions.start, begin + 1), stop - 1 if with_end else stop) - begin, stop - begin)
    inside = {r - begin for r in positions if begin < r <= end}
    return tuple(sorted(inside | {end - begin} if with_end else inside))
