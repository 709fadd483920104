"""The definition of sliding-window attention: one sequence at a time, with the whole matrix of scores."""

import torch
import torch.nn.functional as F


def attention_by_definition(q_THD, k_THD, v_THD, cu_seqlens, window, *, past=None, past_lengths=None):
    """Returns the outputs of `refine_kernels.sliding_window.sliding_window_attention`; `past` are two tensors `[N, W - 1, H, D]`."""
    outputs = []
    for n, (start, end) in enumerate(zip(cu_seqlens, cu_seqlens[1:])):
        k, v = k_THD[start:end], v_THD[start:end]
        seen = 0
        if past is not None:
            seen = min(past_lengths[n], window - 1)
            k = torch.cat([past[0][n, window - 1 - seen :], k])
            v = torch.cat([past[1][n, window - 1 - seen :], v])
        query = torch.arange(end - start, device=k.device)[:, None] + seen
        key = torch.arange(k.shape[0], device=k.device)
        visible = (key <= query) & (key > query - window)
        q, k, v = (x.transpose(0, 1) for x in (q_THD[start:end], k, v))
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(0, 1))
    return torch.cat(outputs)
