"""The delta rule on a GPU. `chunk_kernels.py` does chunks of 64 tokens; flash-linear-attention's public operators (0.6.0) do short
sequences and decays per channel.

The scan over the chunks returns the state after any chunk. A position inside a chunk cuts its sequence in two; with a decay per
channel every position does. Each piece then starts from the final state of the piece before it: the first pieces of all sequences
run together, then the second ones, and so on.
"""

import bisect
import functools
import warnings
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from fla.ops.delta_rule import fused_recurrent_delta_rule
from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule
from fla.ops.kda import chunk_kda

from refine_kernels.delta_rule.chunk_kernels import CHUNK, chunked_with_states
from refine_kernels.packing import PlannedTensor, cached_plan, check_packing, sequence_of_token

# A piece of at most this many tokens goes through the recurrent kernel, as in flash-linear-attention's own layer.
RECURRENT_MAX_TOKENS = 64


def segmented_delta_rule(
    q_THK: torch.Tensor,
    k_THK: torch.Tensor,
    v_THV: torch.Tensor,
    beta_TH: torch.Tensor,
    cu_seqlens: Sequence[int],
    *,
    log_decay: torch.Tensor | None = None,
    initial_state_NHKV: torch.Tensor | None = None,
    state_positions: Sequence[int] = (),
    run: Callable | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same contract as `refine_kernels.delta_rule.delta_rule`. `run` replaces the kernels: `footprint.py` passes its stand-in."""
    run = run or _run
    T, _, K = q_THK.shape
    H, V = v_THV.shape[1:]
    check_packing(cu_seqlens, T, state_positions)
    has_channel_decay = log_decay is not None and log_decay.dim() == 3
    cuts_of_sequence = _cuts(cu_seqlens, state_positions, 0 if has_channel_decay else CHUNK)
    positions = sorted(set(state_positions))
    dtype = q_THK.dtype
    if dtype == torch.float32 and q_THK.is_cuda and log_decay is None:
        dtype = torch.bfloat16
        _warn_once_that_float32_runs_in_bfloat16()
    if log_decay is None and q_THK.shape[1] != H:
        q_THK, k_THK = (x.repeat_interleave(H // x.shape[1], 1) for x in (q_THK, k_THK))
    inputs = {name: x.to(dtype) for name, x in zip(("q", "k", "v", "beta"), (q_THK, k_THK, v_THV, beta_TH))}
    if log_decay is not None:
        inputs["g"] = log_decay.float()

    starts = [start for cuts in cuts_of_sequence for start in cuts[:-1]]
    # Split once: the backward of one slice per piece would fill and add a gradient of all T tokens for every piece.
    pieces = {name: x.split([end - start for start, end in zip(starts, [*starts[1:], T])]) for name, x in inputs.items()}
    place = {start: i for i, start in enumerate(starts)}
    num_levels = max(len(cuts) - 1 for cuts in cuts_of_sequence)
    initial = None if initial_state_NHKV is None else initial_state_NHKV.float()
    out_of_piece: dict[int, torch.Tensor] = {}
    state_after: dict[int, torch.Tensor] = {}
    for level in range(num_levels):
        active = [n for n, cuts in enumerate(cuts_of_sequence) if len(cuts) - 1 > level]
        spans = [(cuts_of_sequence[n][level], cuts_of_sequence[n][level + 1]) for n in active]
        if len(spans) == len(starts):
            selected = {name: x[None] for name, x in inputs.items()}
        else:
            selected = {name: _joined([split[place[start]] for start, _ in spans])[None] for name, split in pieces.items()}
        if level:
            initial = torch.stack([state_after[start] for start, _ in spans])
        offsets = [0, *accumulate(end - start for start, end in spans)]
        wanted = []
        for n, (start, end), offset in zip(active, spans, offsets):
            goes_on = end < cuts_of_sequence[n][-1]
            wanted += [(r, r + offset - start) for r in _within(positions, start, end, goes_on)]
        out, found = run(selected, initial, offsets, [r for _, r in wanted])
        out = out.squeeze(0)
        if num_levels == 1:
            return out.to(v_THV.dtype), _in_order(found, tuple(r for r, _ in wanted), tuple(state_positions))
        for start, piece_out in zip((start for start, _ in spans), out.split([end - start for start, end in spans])):
            out_of_piece[start] = piece_out
        state_after.update(zip((r for r, _ in wanted), found.unbind(0)))
    states = [state_after[r] for r in state_positions]
    out_THV = _joined([out_of_piece[start] for start in starts]).to(v_THV.dtype)
    return out_THV, torch.stack(states) if states else q_THK.new_zeros(0, H, K, V, dtype=torch.float32)


def _in_order(states_PHKV: torch.Tensor, found: tuple[int, ...], wanted: tuple[int, ...]) -> torch.Tensor:
    """The states at positions `wanted`, given those at positions `found` (no repetition); no copy if both are equal."""
    if found == wanted:
        return states_PHKV
    # Not index_select: if a state is wanted twice, its backward adds the two gradients in an order that may change between runs.
    state_at = dict(zip(found, states_PHKV.unbind()))
    return torch.stack([state_at[r] for r in wanted]) if wanted else states_PHKV[:0]


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.cat`, without a copy if there is a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _run(inputs: dict[str, torch.Tensor], initial, offsets: list[int], positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of packed pieces and their states at the given positions."""
    g, is_short = inputs.get("g"), max(end - start for start, end in zip(offsets, offsets[1:])) <= RECURRENT_MAX_TOKENS
    ends = _offsets(tuple(offsets))
    has_channel_decay = g is not None and g.dim() == 4
    if is_short and g is None:
        operator = fused_recurrent_delta_rule
    elif is_short and not torch.is_grad_enabled():  # the gated recurrent kernel has no backward
        operator = _recurrent_with_channel_decay if has_channel_decay else fused_recurrent_gated_delta_rule
    elif has_channel_decay:
        # Given them on the host too, it plans its chunks without waiting for the device.
        operator = functools.partial(chunk_kda, cu_seqlens_cpu=ends.on(torch.device("cpu")))
    else:
        return chunked_with_states(inputs["q"], inputs["k"], inputs["v"], inputs["beta"], g, initial, offsets, positions)
    # These operators return states at the ends of pieces only; here no position lies inside a piece.
    out, states = operator(**inputs, initial_state=initial, output_final_state=True, cu_seqlens=ends.on(inputs["q"].device))
    return out, _in_order(states, tuple(offsets[1:]), tuple(positions))


@cached_plan(maxsize=64)
def _offsets(offsets: tuple[int, ...]) -> PlannedTensor:
    return PlannedTensor(torch.tensor(offsets))


def _recurrent_with_channel_decay(*, g, **arguments):
    return fused_recurrent_gated_delta_rule(gk=g, **arguments)


@functools.cache
def _warn_once_that_float32_runs_in_bfloat16() -> None:
    warnings.warn("flash-linear-attention's chunk kernel refuses float32: the delta rule runs in bfloat16, states in float32", stacklevel=3)


def _cuts(cu_seqlens: Sequence[int], state_positions: Sequence[int], chunk: int) -> list[list[int]]:
    """For each sequence, the token indices at which it starts, is cut, and ends. A position at the end of a chunk needs no cut;
    `chunk = 0` cuts at every position."""
    cuts = [[start] for start in cu_seqlens[:-1]]
    for r in sorted(set(state_positions)):
        of_sequence = cuts[sequence_of_token(cu_seqlens, r - 1)]
        if not chunk or (r - of_sequence[-1]) % chunk:
            of_sequence.append(r)
    return [[*points, end] if points[-1] < end else points for points, end in zip(cuts, cu_seqlens[1:])]


def _within(positions: list[int], start: int, end: int, goes_on: bool) -> list[int]:
    """The sorted positions in `start + 1..end`. If the sequence goes on after `end`, `end` is added: the next piece needs its state."""
    inside = positions[bisect.bisect_right(positions, start) : bisect.bisect_right(positions, end)]
    return [*inside, end] if goes_on and inside[-1:] != [end] else inside
