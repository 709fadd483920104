"""The delta rule by flash-linear-attention's kernels (0.6.0, public operators only).

Its chunk kernel gives outputs and each sequence's final state, with gradients through both, but no state in between.
So every packed sequence is cut at the wanted positions and the pieces run one after the other, all sequences
together: the first pieces, then the second pieces from the first ones' final states, and so on. The recurrence over
chunks is sequential inside the kernel too; the cut costs launches, not arithmetic.
"""

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from fla.ops.delta_rule import chunk_delta_rule, fused_recurrent_delta_rule
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from fla.ops.kda import chunk_kda

from refine_kernels.packing import check_packing, sequence_of_token

# Below this many rows a piece goes through the recurrent kernel, as in flash-linear-attention's own layer.
RECURRENT_MAX_ROWS = 64


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
    operator: Callable | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Contract as `refine_kernels.delta_rule.delta_rule`. `operator` stands in for the choice of kernels."""
    operator = operator or _operator
    T, _, K = q_THK.shape
    H, V = v_THV.shape[1:]
    check_packing(cu_seqlens, T, state_positions)
    cuts_of_sequence = _cuts(cu_seqlens, state_positions)
    dtype = q_THK.dtype
    if dtype == torch.float32 and q_THK.is_cuda and log_decay is None:
        dtype = torch.bfloat16
        _say_once_that_float32_runs_in_bfloat16()
    if log_decay is None and q_THK.shape[1] != H:
        q_THK, k_THK = (x.repeat_interleave(H // x.shape[1], 1) for x in (q_THK, k_THK))
    rows = {name: x.to(dtype) for name, x in zip(("q", "k", "v", "beta"), (q_THK, k_THK, v_THV, beta_TH))}
    if log_decay is not None:
        rows["g"] = log_decay.float()

    state_of_sequence: dict[int, torch.Tensor] = {}
    if initial_state_NHKV is not None:
        state_of_sequence = dict(enumerate(initial_state_NHKV.float().unbind(0)))
    starts = [start for cuts in cuts_of_sequence for start in cuts[:-1]]
    # Split once: the backward of a slice a piece would fill and add all rows every time.
    pieces = {name: x.split([end - start for start, end in zip(starts, [*starts[1:], T])]) for name, x in rows.items()}
    place = {start: i for i, start in enumerate(starts)}
    out_of_piece: dict[int, torch.Tensor] = {}
    state_after: dict[int, torch.Tensor] = {}
    for level in range(max(len(cuts) - 1 for cuts in cuts_of_sequence)):
        active = [n for n, cuts in enumerate(cuts_of_sequence) if len(cuts) - 1 > level]
        spans = [(cuts_of_sequence[n][level], cuts_of_sequence[n][level + 1]) for n in active]
        if len(spans) == len(starts):
            selected = {name: x[None] for name, x in rows.items()}
        else:
            selected = {name: _joined([split[place[start]] for start, _ in spans])[None] for name, split in pieces.items()}
        lengths = torch.tensor([0] + [end - start for start, end in spans])
        if state_of_sequence:
            zeros = q_THK.new_zeros(H, K, V, dtype=torch.float32)
            initial = torch.stack([state_of_sequence.get(n, zeros) for n in active])
        else:
            initial = None
        longest = int(lengths.max())
        offsets = lengths.cumsum(0)
        out, final = operator(log_decay, longest)(
            **selected,
            initial_state=initial,
            output_final_state=True,
            cu_seqlens=offsets.to(q_THK.device),
        )
        outs = out[0].split([end - start for start, end in spans])
        for n, (start, end), piece_out, piece_final in zip(active, spans, outs, final.unbind(0)):
            out_of_piece[start] = piece_out
            state_of_sequence[n] = state_after[end] = piece_final
    states = [state_after[r] for r in state_positions]
    out_THV = _joined([out_of_piece[start] for start in starts]).to(v_THV.dtype)
    return out_THV, torch.stack(states) if states else q_THK.new_zeros(0, H, K, V, dtype=torch.float32)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.cat`, without a copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _operator(log_decay: torch.Tensor | None, longest: int):
    is_short = longest <= RECURRENT_MAX_ROWS
    if log_decay is None:
        return fused_recurrent_delta_rule if is_short else chunk_delta_rule
    if is_short and not torch.is_grad_enabled():  # the gated recurrent kernel has no backward
        return fused_recurrent_gated_delta_rule if log_decay.dim() == 2 else _recurrent_with_channel_decay
    return chunk_gated_delta_rule if log_decay.dim() == 2 else chunk_kda


def _recurrent_with_channel_decay(*, g, **arguments):
    return fused_recurrent_gated_delta_rule(gk=g, **arguments)


@functools.cache
def _say_once_that_float32_runs_in_bfloat16() -> None:
    warnings.warn("flash-linear-attention's chunk kernel refuses float32: the delta rule runs in bfloat16, states in float32")


def _cuts(cu_seqlens: Sequence[int], state_positions: Sequence[int]) -> list[list[int]]:
    """Per sequence the sorted row indices at which it starts, is cut, and ends."""
    cuts = [{start, end} for start, end in zip(cu_seqlens, cu_seqlens[1:])]
    for r in state_positions:
        cuts[sequence_of_token(cu_seqlens, r - 1)].add(r)
    return [sorted(points) for points in cuts]
