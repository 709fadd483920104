"""The delta rule by flash-linear-attention's kernels (0.6.0, public operators only).

Its chunk kernel gives outputs and each sequence's final state, with gradients through both, but no state in between.
So every packed sequence is cut at the wanted positions and the pieces run one after the other, all sequences
together: the first pieces, then the second pieces from the first ones' final states, and so on. The recurrence over
chunks is sequential inside the kernel too; the cut costs launches, not arithmetic.
"""

import functools
import warnings
from collections.abc import Sequence

import torch
from fla.ops.delta_rule import chunk_delta_rule, fused_recurrent_delta_rule

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
    initial_state_NHKV: torch.Tensor | None = None,
    state_positions: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Contract as `refine_kernels.delta_rule.delta_rule`."""
    T, H, K = q_THK.shape
    V = v_THV.shape[2]
    check_packing(cu_seqlens, T, state_positions)
    cuts_of_sequence = _cuts(cu_seqlens, state_positions)
    dtype = q_THK.dtype
    if dtype == torch.float32 and q_THK.is_cuda:
        dtype = torch.bfloat16
        _say_once_that_float32_runs_in_bfloat16()
    rows = [x.to(dtype) for x in (q_THK, k_THK, v_THV, beta_TH)]

    state_of_sequence: dict[int, torch.Tensor] = {}
    if initial_state_NHKV is not None:
        state_of_sequence = dict(enumerate(initial_state_NHKV.float().unbind(0)))
    pieces: list[tuple[int, torch.Tensor]] = []
    state_after: dict[int, torch.Tensor] = {}
    for level in range(max(len(cuts) - 1 for cuts in cuts_of_sequence)):
        active = [n for n, cuts in enumerate(cuts_of_sequence) if len(cuts) - 1 > level]
        spans = [(cuts_of_sequence[n][level], cuts_of_sequence[n][level + 1]) for n in active]
        contiguous = all(a[1] == b[0] for a, b in zip(spans, spans[1:]))
        if contiguous:
            selected = [x[spans[0][0] : spans[-1][1]] for x in rows]
        else:
            selected = [torch.cat([x[start:end] for start, end in spans]) for x in rows]
        lengths = torch.tensor([0] + [end - start for start, end in spans])
        if state_of_sequence:
            zeros = q_THK.new_zeros(H, K, V, dtype=torch.float32)
            initial = torch.stack([state_of_sequence.get(n, zeros) for n in active])
        else:
            initial = None
        longest = int(lengths.max())
        offsets = lengths.cumsum(0)
        operator = chunk_delta_rule if longest > RECURRENT_MAX_ROWS else fused_recurrent_delta_rule
        out, final = operator(
            *(x[None] for x in selected),
            initial_state=initial,
            output_final_state=True,
            cu_seqlens=offsets.to(q_THK.device),
        )
        for i, (n, (start, end)) in enumerate(zip(active, spans)):
            offset = int(offsets[i])
            pieces.append((start, out[0, offset : offset + end - start]))
            state_of_sequence[n] = state_after[end] = final[i]
    pieces.sort(key=lambda piece: piece[0])
    states = [state_after[r] for r in state_positions]
    out_THV = torch.cat([piece for _, piece in pieces]).to(v_THV.dtype)
    return out_THV, torch.stack(states) if states else q_THK.new_zeros(0, H, K, V, dtype=torch.float32)


@functools.cache
def _say_once_that_float32_runs_in_bfloat16() -> None:
    warnings.warn("flash-linear-attention's chunk kernel refuses float32: the delta rule runs in bfloat16, states in float32")


def _cuts(cu_seqlens: Sequence[int], state_positions: Sequence[int]) -> list[list[int]]:
    """Per sequence the sorted row indices at which it starts, is cut, and ends."""
    cuts = [{start, end} for start, end in zip(cu_seqlens, cu_seqlens[1:])]
    for r in state_positions:
        cuts[sequence_of_token(cu_seqlens, r - 1)].add(r)
    return [sorted(points) for points in cuts]
