"""The chunked delta rule on a GPU, which also returns the states after chosen chunks, with its own backward.

The work inside a chunk is done by flash-linear-attention's kernels, which have no public names. Only this file calls them; it is
written for flash-linear-attention 0.6.0 (`ops/delta_rule/chunk.py`, `ops/gated_delta_rule/chunk.py`). `state_scan.py` does the
scan over the chunks.
"""

import os
from collections.abc import Sequence

import torch
from fla.ops.common.chunk_o import chunk_bwd_dqkwg, chunk_bwd_dv_local, chunk_fwd_o
from fla.ops.delta_rule import wy_fast as plain_wy
from fla.ops.gated_delta_rule import wy_fast as gated_wy
from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra
from fla.ops.utils import chunk_local_cumsum
from fla.ops.utils.constant import RCP_LN2
from fla.utils import TRITON_ABOVE_3_7_1, input_guard

from refine_kernels.delta_rule.state_scan import scan_gradients, scan_states
from refine_kernels.packing import PlannedTensor, cached_plan, sequence_of_token

CHUNK = 64

# If certain packages are installed (TileLang comes with vLLM), flash-linear-attention replaces its Triton kernels by others, which are
# neither tested nor compiled ahead here. These variables switch the replacements off. A value that the caller has set stays.
OTHER_BACKENDS = ("FLA_TILELANG", "FLA_FLASH_QLA", "FLA_FLASH_KDA")
if TRITON_ABOVE_3_7_1:  # with older versions the gated backward in Triton is wrong on Hopper, and needs TileLang
    for switch in OTHER_BACKENDS:
        os.environ.setdefault(switch, "0")


def chunked_with_states(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: Sequence[int],
    state_positions: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the chunked delta rule on packed sequences.

    Args:
        q, k: `[1, T, H, K]`, normalised.
        v: `[1, T, HV, V]`.
        beta: `[1, T, HV]`.
        g: log decays `[1, T, HV]`, or None.
        initial_state: float32 `[N, HV, K, V]`, or None.
        cu_seqlens: host integers.
        state_positions: positions without repetition, each at the end of a sequence or of one of its chunks (64 tokens, counted
            from the sequence's start).

    Returns:
        Outputs `[1, T, HV, V]` in v's dtype and float32 states `[P, HV, K, V]`.
    """
    plan = _plan(tuple(cu_seqlens), tuple(state_positions))
    return _ChunkedWithStates.apply(q, k, v, beta, g, initial_state, [x.on(q.device) for x in plan], len(state_positions))


@cached_plan(maxsize=64)
def _plan(cu_seqlens: tuple[int, ...], state_positions: tuple[int, ...]) -> tuple[PlannedTensor, ...]:
    """cu_seqlens, for each chunk its sequence and its number in it, the first chunk of each sequence, and for each chunk the index of its
    snapshot, or -1."""
    first_chunks = [0]
    for start, end in zip(cu_seqlens, cu_seqlens[1:]):
        first_chunks.append(first_chunks[-1] - (start - end) // CHUNK)
    snapshot_of_chunk = [-1] * first_chunks[-1]
    for i, r in enumerate(state_positions):
        n = sequence_of_token(cu_seqlens, r - 1)
        assert (r - cu_seqlens[n]) % CHUNK == 0 or r == cu_seqlens[n + 1], f"{r} is inside a chunk"
        snapshot_of_chunk[first_chunks[n] + (r - 1 - cu_seqlens[n]) // CHUNK] = i
    counts = torch.tensor(first_chunks).diff()
    sequence_of_chunk = torch.arange(len(counts)).repeat_interleave(counts)
    number_in_sequence = torch.arange(first_chunks[-1]) - torch.tensor(first_chunks)[sequence_of_chunk]
    chunks = torch.stack([sequence_of_chunk, number_in_sequence], 1)
    snapshots = torch.tensor(snapshot_of_chunk, dtype=torch.int32)
    return tuple(map(PlannedTensor, (torch.tensor(cu_seqlens), chunks, torch.tensor(first_chunks), snapshots)))


class _ChunkedWithStates(torch.autograd.Function):
    @staticmethod
    @input_guard
    def forward(ctx, q, k, v, beta, g, initial_state, plan, num_snapshots):
        cu_seqlens, chunk_indices, chunk_offsets, snapshot_of_chunk = plan
        ctx.scale = q.shape[-1] ** -0.5
        shared = dict(cu_seqlens=cu_seqlens, chunk_indices=chunk_indices, chunk_size=CHUNK)
        if g is None:
            w, u, A = plain_wy.prepare_wy_repr_fwd(k=k, v=v, beta=beta, **shared)
        else:
            g = chunk_local_cumsum(g, scale=RCP_LN2, **shared)
            w, u, A = chunk_gated_delta_rule_fwd_intra(k=k, v=v, g=g, beta=beta, **shared)
        states, updates, snapshots = scan_states(
            k, w, u, g, initial_state, snapshot_of_chunk, num_snapshots, cu_seqlens, chunk_offsets, CHUNK
        )
        out = chunk_fwd_o(q=q, k=k, v=updates, h=states, g=g, scale=ctx.scale, **shared)
        ctx.save_for_backward(q, k, v, beta, g, initial_state, A, *plan)
        return out.to(v.dtype), snapshots

    @staticmethod
    @input_guard
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_snapshots):
        q, k, v, beta, g, initial_state, A, cu_seqlens, chunk_indices, chunk_offsets, snapshot_of_chunk = ctx.saved_tensors
        shared = dict(cu_seqlens=cu_seqlens, chunk_indices=chunk_indices)
        sized = shared | dict(chunk_size=CHUNK)
        gate = {} if g is None else {"g": g}
        wy = plain_wy if g is None else gated_wy
        # w and u are computed again: they are larger than what they are computed from.
        w, u = wy.recompute_w_u_fwd(k=k, v=v, beta=beta, A=A, **gate, **shared)
        walk = cu_seqlens, chunk_offsets, CHUNK
        states, updates, _ = scan_states(k, w, u, g, initial_state, torch.full_like(snapshot_of_chunk, -1), 0, *walk)
        grad_local = chunk_bwd_dv_local(q=q, k=k, do=grad_out, g=g, scale=ctx.scale, **sized)
        grad_states, grad_initial, grad_updates = scan_gradients(
            q, k, w, g, grad_out, grad_local, grad_snapshots, initial_state is not None, snapshot_of_chunk, ctx.scale, *walk
        )
        dq, dk, dw, dg = chunk_bwd_dqkwg(
            q=q, k=k, v=updates, h=states, w=w, dv=grad_updates, do=grad_out, dh=grad_states, g=g, scale=ctx.scale, **sized
        )
        dk_wy, dv, dbeta, *dg_wy = wy.prepare_wy_repr_bwd(k=k, v=v, beta=beta, A=A, dw=dw, du=grad_updates, **gate, **shared)
        if g is not None:
            dg = chunk_local_cumsum(dg + dg_wy[0], reverse=True, **sized)
        grads = (dq.to(q.dtype), (dk + dk_wy).to(k.dtype), dv.to(v.dtype), dbeta.to(beta.dtype))
        return *grads, dg if g is not None else None, grad_initial, None, None
