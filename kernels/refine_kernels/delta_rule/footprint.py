"""A stand-in for the delta rule's GPU kernels, for estimates of memory and traffic on machines that have no GPU.

It allocates what `flash_linear_attention.py` allocates, saves for backward what its kernels save, reports the bytes that they read
and write, and computes nothing: outputs are uninitialised. Sizes are those of flash-linear-attention 0.6.0
(`ops/delta_rule/chunk.py`, `ops/gated_delta_rule/chunk.py`, `ops/kda/chunk.py` and what they call).
Legend: T tokens, N sequences, H value heads, K key and V value channels of a head.
"""

import torch

from refine_kernels.footprint import report_traffic

# Chunk length of the kernels: they keep one state per chunk, and per token one row of a matrix of this width.
KERNEL_CHUNK = 64


def delta_rule_footprint(q_THK, k_THK, v_THV, beta_TH, cu_seqlens, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Same contract and shapes as `refine_kernels.delta_rule.delta_rule`; values are undefined."""
    from refine_kernels.delta_rule.flash_linear_attention import segmented_delta_rule

    return segmented_delta_rule(q_THK, k_THK, v_THV, beta_TH, cu_seqlens, run=_run, **arguments)


def _run(inputs: dict[str, torch.Tensor], initial, offsets: list[int], positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return _Piece.apply(inputs["q"], inputs["k"], inputs["v"], inputs["beta"], inputs.get("g"), initial, len(positions))


class _Piece(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, g, initial_state, num_states):
        """Takes tensors `[1, T, H, ...]`; returns outputs of v's shape and states `[num_states, H, K, V]`."""
        H, V, K = *v.shape[2:], k.shape[3]
        has_channel_decay = g is not None and g.dim() == 4
        cumulated = None if g is None else torch.empty_like(g)
        matrices = [k.new_empty(*v.shape[:3], KERNEL_CHUNK) for _ in range(2 if has_channel_decay else 1)]
        ctx.save_for_backward(q, k, v, beta, cumulated, initial_state, *matrices)
        inner = _inner_tensors(k, v)
        states = k.new_empty(num_states, H, K, V, dtype=torch.float32)
        out = torch.empty_like(v)
        # Five kernels: the matrix of a chunk's products in float32, its inverse, w and u, the scan over the chunks, the outputs. Four of
        # them read the keys; every intermediate is written once and read once.
        between = 2 * sum(x.nbytes for x in inner) + 2 * (2 + 1) * matrices[0].nbytes
        report_traffic(4 * k.nbytes + q.nbytes + v.nbytes + out.nbytes + states.nbytes + between, 5)
        del inner
        return out, states

    @staticmethod
    def backward(ctx, grad_out, grad_states_found):
        q, k, v, beta, cumulated, initial_state, *matrices = ctx.saved_tensors
        inner = _inner_tensors(k, v)
        grad_states = torch.empty_like(inner[0])
        # Gradients of w and of the updated values; the latter twice, before and after the scan over the chunks.
        others = [torch.empty_like(inner[1]), torch.empty_like(inner[2]), torch.empty_like(v)]
        # Gradients of keys and queries for every value head, and of keys once more.
        wide = [k.new_empty(*v.shape[:3], k.shape[3]) for _ in range(3)]
        grads = [torch.empty_like(x) for x in (q, k, v, beta)]
        grads.append(None if cumulated is None else torch.empty_like(cumulated))
        grads.append(None if initial_state is None else torch.empty_like(initial_state))
        # Eight kernels: w and u and the scan over the chunks again; gradients of updates, inside chunks and through the states; of q, k
        # and w; of the inputs of w and u, with the gradients of the keys added up.
        states, w, u, updates = (x.nbytes for x in inner)
        inputs = 11 * k.nbytes + 4 * q.nbytes + 3 * v.nbytes + 3 * grad_out.nbytes
        report_traffic(inputs + 4 * states + 5 * w + 2 * u + 7 * updates + grad_states_found.nbytes + 2 * matrices[0].nbytes, 8)
        del inner, grad_states, others, wide
        return *grads, None


def _inner_tensors(k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """The state before every chunk, w, u and the updated values."""
    (_, T, H, V), K = v.shape, k.shape[3]
    states = k.new_empty(-(-T // KERNEL_CHUNK), H, K, V)
    return [states, k.new_empty(1, T, H, K), torch.empty_like(v), torch.empty_like(v)]
