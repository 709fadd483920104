"""The next rows of sequences whose states are changed in place: the delta rule while decoding. Without gradient.

Legend: N sequences, R rows of each, H value heads, K key and V value channels of a head.
"""

import torch

from refine_kernels.footprint import wants_gpu_footprint


def delta_rule_step_(
    state_NHKV: torch.Tensor,
    q_NRHK: torch.Tensor,
    k_NRHK: torch.Tensor,
    v_NRHV: torch.Tensor,
    beta_NRH: torch.Tensor,
    log_decay: torch.Tensor | None = None,
) -> torch.Tensor:
    """Row after row what `refine_kernels.delta_rule.delta_rule` computes, on every sequence at once.

    Reads nothing on the host and allocates nothing but its result: a GPU can record it in a graph.

    Args:
        state_NHKV: contiguous, float32 (float64 for float64 rows); afterwards the states after the rows.
        q_NRHK, k_NRHK: already normalised. Their heads divide those of v.
        v_NRHV, beta_NRH: H heads.
        log_decay: `[N, R, H]`, `[N, R, H, K]`, or None for no decay.

    Returns:
        Outputs `[N, R, H, V]` in v's dtype.
    """
    if wants_gpu_footprint():
        state_NHKV.neg_()  # read once and written once
        return torch.empty_like(v_NRHV)
    if state_NHKV.is_cuda:
        from refine_kernels.delta_rule.step_kernel import run_step  # triton is not on every machine without a GPU

        rows = q_NRHK, k_NRHK, v_NRHV, beta_NRH
        if log_decay is None and v_NRHV.dtype == torch.float32:
            # As the chunks' kernels have them: who samples and who trains round alike.
            rows = (x.bfloat16() for x in rows)
        return run_step(state_NHKV, *rows, log_decay).to(v_NRHV.dtype)
    return _plain_step(state_NHKV, q_NRHK, k_NRHK, v_NRHV, beta_NRH, log_decay)


def _plain_step(state_NHKV, q_NRHK, k_NRHK, v_NRHV, beta_NRH, log_decay) -> torch.Tensor:
    """Sums of products and no matrix products, which autocast would round."""
    dtype, group = state_NHKV.dtype, v_NRHV.shape[2] // k_NRHK.shape[2]
    q, k, v, beta = (x.to(dtype) for x in (q_NRHK, k_NRHK, v_NRHV, beta_NRH))
    if group > 1:
        q, k = (x.repeat_interleave(group, 2) for x in (q, k))
    # Key channels as columns beside the state's.
    q, k, scale = q[..., None], k[..., None], q.shape[-1] ** -0.5
    if log_decay is not None:
        decay = log_decay.to(dtype).exp()
        decay = decay[..., None] if decay.dim() == 4 else decay[..., None, None]
    outputs = []
    for r in range(q.shape[1]):
        if log_decay is not None:
            state_NHKV.mul_(decay[:, r])
        error = v[:, r] - (state_NHKV * k[:, r]).sum(-2)
        state_NHKV.addcmul_(k[:, r], (beta[:, r, :, None] * error)[..., None, :])
        outputs.append((state_NHKV * q[:, r]).sum(-2) * scale)
    return torch.stack(outputs, 1).to(v_NRHV.dtype)
