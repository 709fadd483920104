"""LaCT's fast weights over a trunk that several ranks share.

The update of a chunk depends on the weights before it in a way that no other rank can prepare: a document's ranks follow
each other. They do so head by head: while a rank works on one head, the next rank works on the head before. What a chunk
has summed up to a rank's border is part of the state that is handed on.

Legend: T rows of the shard, H heads.
"""

from collections.abc import Callable

import torch

from refine_kernels.lact import FastWeights, LaCTState
from refine_titan.models.context_shard import ContextShard, receive_state, send_state, tied

Rows = tuple[torch.Tensor | None, ...]


def lact_of_shard(
    lact: Callable[..., tuple[torch.Tensor, LaCTState]],
    rows: Rows,
    initial: FastWeights,
    cu_seqlens: tuple[int, ...],
    shard: ContextShard,
    state_positions: tuple[int, ...],
) -> tuple[torch.Tensor, LaCTState]:
    """Outputs `[T, H, D]` and the states at the positions, of which 0 is the first sequence's on arrival.

    Args:
        lact: takes rows, initial weights, cu_seqlens, past, past lengths and state positions.
        rows: each `[T, H, ...]`, or None for no momentum.
    """
    T, num_sequences = cu_seqlens[-1], len(cu_seqlens) - 1
    border = cu_seqlens[1] if shard.seen and num_sequences > 1 else 0
    run = _Run(lact, shard, initial)
    # A document that begins here does not wait for the one that arrives.
    own = run(rows, (border, T), cu_seqlens, state_positions, receive=shard.seen > 0 and border == 0, send=shard.continues)
    parts = [own]
    if border:
        parts.insert(0, run(rows, (0, border), cu_seqlens, state_positions, receive=True, send=False))
    positions = [r for part in parts for r in part[0]]
    states = LaCTState.cat_positions([part[2] for part in parts])
    order = torch.tensor([positions.index(r) for r in state_positions], dtype=torch.long)
    return torch.cat([part[1] for part in parts]), states.select(order)


class _Run:
    """Runs neighbouring sequences of a shard."""

    def __init__(self, lact, shard: ContextShard, initial: FastWeights):
        self.lact, self.shard, self.initial = lact, shard, initial

    def __call__(self, rows: Rows, span, cu_seqlens, state_positions, *, receive: bool, send: bool):
        """Positions, outputs and states of the rows in `span`; the positions begin with 0 if a state has arrived."""
        begin, end = span
        positions = sorted({r for r in state_positions if begin < r <= end} | ({end} if send else set()))
        packing = tuple(r - begin for r in cu_seqlens if begin <= r <= end)
        wanted = tuple(r - begin for r in positions)
        rows = tuple(None if x is None else x[begin:end] for x in rows)
        seen = [self.shard.seen if begin == 0 else 0] + [0] * (len(packing) - 2)
        num_heads = self.initial.w0.shape[0]
        # Ranks that hand a state on do it head by head; the others need not take the heads apart.
        groups = [slice(h, h + 1) for h in range(num_heads)] if receive or send else [slice(0, num_heads)]
        outputs, states = [], []
        for heads in groups:
            group_rows = tuple(None if x is None else x[:, heads] for x in rows)
            initial = self.initial.map(lambda w, heads=heads: w[heads])
            past = self._receive(initial, has_momentum=rows[-1] is not None) if receive else None
            out, state = self.lact(group_rows, initial, packing, past, seen, wanted)
            if send:
                last = state.select(torch.tensor([len(wanted) - 1])).as_past()
                flat = torch.cat([x.flatten() for x in last.tensors()])
                out = tied(out, send_state(flat, self.shard))
            if receive:
                # What has arrived may not matter to the outputs: its first chunk may end at a later rank.
                out = tied(out, *past.tensors())
                arrived = past._replace(version=torch.zeros(1, dtype=torch.long))
                state = LaCTState.cat_positions([arrived, state])
            outputs.append(out)
            states.append(state)
        return [0] * receive + positions, torch.cat(outputs, 1), LaCTState.cat_heads(states)

    def _receive(self, initial: FastWeights, has_momentum: bool) -> LaCTState:
        wide = torch.promote_types(initial.w0.dtype, torch.float32)
        weights = initial.map(lambda w: w.to(wide)[None])
        sums = weights.w0.sum((2, 3)) if has_momentum else None
        like = LaCTState(None, weights, weights if has_momentum else None, weights, sums)
        shapes = [x.shape for x in like.tensors()]
        flat = receive_state(torch.cat([x.flatten() for x in like.tensors()]), self.shard)
        parts = flat.split([shape.numel() for shape in shapes])
        return like.with_tensors([part.view(shape) for part, shape in zip(parts, shapes)])
