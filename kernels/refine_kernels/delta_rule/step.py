"""The delta rule while decoding: the next tokens of sequences whose states are updated in place. Without gradient.

Legend: N sequences, R next tokens of each, H value heads, K key and V value channels of a head.
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
    """Computes what `refine_kernels.delta_rule.delta_rule` computes for the next R tokens of N sequences, and updates their states.

    It reads nothing on the host and allocates only its result, so that a CUDA graph can capture it.

    Args:
        state_NHKV: states of the sequences, contiguous, float32 (float64 for float64 inputs); updated in place.
        q_NRHK, k_NRHK: queries and keys, already normalised. The number of their heads divides H.
        v_NRHV, beta_NRH: values and write strengths.
        log_decay: `[N, R, H]`, `[N, R, H, K]`, or None for no decay.

    Returns:
        Outputs `[N, R, H, V]` in v's dtype.

    Raises:
        ValueError: on a GPU, if the states are not contiguous.
    """
    if wants_gpu_footprint():
        state_NHKV.neg_()  # read once and written once
        return torch.empty_like(v_NRHV)
    if state_NHKV.is_cuda:
        from refine_kernels.delta_rule.step_kernel import run_step  # triton is not on every machine without a GPU

        inputs = q_NRHK, k_NRHK, v_NRHV, beta_NRH
        if log_decay is None and v_NRHV.dtype == torch.float32:
            # As for the chunks' kernels (`flash_linear_attention.py`), so that sampling rounds as training does.
            inputs = (x.bfloat16() for x in inputs)
        return run_step(state_NHKV, *inputs, log_decay).to(v_NRHV.dtype)
    return _plain_step(state_NHKV, q_NRHK, k_NRHK, v_NRHV, beta_NRH, log_decay)


def _plain_step(state_NHKV, q_NRHK, k_NRHK, v_NRHV, beta_NRH, log_decay) -> torch.Tensor:
    """The step in plain torch, with sums of products instead of matrix products, which autocast would round."""
    dtype, group = state_NHKV.dtype, v_NRHV.shape[2] // k_NRHK.shape[2]
    q, k, v, beta = (x.to(dtype) for x in (q_NRHK, k_NRHK, v_NRHV, beta_NRH))
    if group > 1:
        q, k = (x.repeat_interleave(group, 2) for x in (q, k))
    # A last dim of one, so that they multiply the state's `[K, V]`.
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
