"""The memory of the GPU's delta rule without its arithmetic, for estimates on machines that have no GPU.

Allocates what `flash_linear_attention.py` allocates, keeps for backward what its kernels keep, reports what they read and write, and
computes nothing: outputs are uninitialised. Sizes are those of flash-linear-attention 0.6.0 (`ops/delta_rule/chunk.py`,
`ops/gated_delta_rule/chunk.py`, `ops/kda/chunk.py` and what they call).
Legend: T rows, N sequences, H value heads, K key and V value channels of a head.
"""

import torch

from refine_kernels.footprint import report_traffic

# Rows for which the kernels keep one state inside, and the width of the matrices that they keep for every row.
KERNEL_CHUNK = 64


def delta_rule_footprint(q_THK, k_THK, v_THV, beta_TH, cu_seqlens, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes and contract as `refine_kernels.delta_rule.delta_rule`, values undefined."""
    from refine_kernels.delta_rule.flash_linear_attention import segmented_delta_rule

    return segmented_delta_rule(q_THK, k_THK, v_THV, beta_TH, cu_seqlens, run=_run, **arguments)


def _run(rows: dict[str, torch.Tensor], initial, offsets: list[int], positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return _Piece.apply(rows["q"], rows["k"], rows["v"], rows["beta"], rows.get("g"), initial, len(positions))


class _Piece(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, g, initial_state, num_states):
        """`[1, T, H, ...]`; returns outputs and states `[num_states, H, K, V]`."""
        H, V, K = *v.shape[2:], k.shape[3]
        has_channel_decay = g is not None and g.dim() == 4
        cumulated = None if g is None else torch.empty_like(g)
        matrices = [k.new_empty(*v.shape[:3], KERNEL_CHUNK) for _ in range(2 if has_channel_decay else 1)]
        ctx.save_for_backward(q, k, v, beta, cumulated, initial_state, *matrices)
        inner = _inner_tensors(k, v)
        states = k.new_empty(num_states, H, K, V, dtype=torch.float32)
        out = torch.empty_like(v)
        # A matrix of a chunk's products in float32 and its inverse, w and u, the pass over the chunks, the outputs: keys are read by
        # four kernels, what one writes another reads.
        between = 2 * sum(x.nbytes for x in inner) + 2 * (2 + 1) * matrices[0].nbytes
        report_traffic(4 * k.nbytes + q.nbytes + v.nbytes + out.nbytes + states.nbytes + between, 5)
        del inner
        return out, states

    @staticmethod
    def backward(ctx, grad_out, grad_states_found):
        q, k, v, beta, cumulated, initial_state, *matrices = ctx.saved_tensors
        inner = _inner_tensors(k, v)
        grad_states = torch.empty_like(inner[0])
        # Of w and of the updated values; the latter twice, before and after the pass over the states.
        others = [torch.empty_like(inner[1]), torch.empty_like(inner[2]), torch.empty_like(v)]
        # Of keys and queries for every value head, and of keys once more.
        wide = [k.new_empty(*v.shape[:3], k.shape[3]) for _ in range(3)]
        grads = [torch.empty_like(x) for x in (q, k, v, beta)]
        grads.append(None if cumulated is None else torch.empty_like(cumulated))
        grads.append(None if initial_state is None else torch.empty_like(initial_state))
        # w and u and the pass over the chunks again; gradients of updates inside chunks and through the states; of q, k and w; of what
        # w and u are made of, with keys' gradients added up.
        states, w, u, updates = (x.nbytes for x in inner)
        rows = 11 * k.nbytes + 4 * q.nbytes + 3 * v.nbytes + 3 * grad_out.nbytes
        report_traffic(rows + 4 * states + 5 * w + 2 * u + 7 * updates + grad_states_found.nbytes + 2 * matrices[0].nbytes, 8)
        del inner, grad_states, others, wide
        return *grads, None


def _inner_tensors(k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """The state before every chunk, w, u and the updated values."""
    (_, T, H, V), K = v.shape, k.shape[3]
    states = k.new_empty(-(-T // KERNEL_CHUNK), H, K, V)
    return [states, k.new_empty(1, T, H, K), torch.empty_like(v), torch.empty_like(v)]
