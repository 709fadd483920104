"""The definition of attention over packed sequences with a past: one sequence at a time, with the whole matrix of scores."""

import math

import torch


def attention_by_definition(q_THD, k_THD, v_THD, cu_seqlens, past_keys=None, past_values=None):
    """Returns the outputs of `refine_kernels.attention.attention`. The pasts are one tensor per sequence, `[tokens, heads, D]`."""
    group = q_THD.shape[1] // k_THD.shape[1]
    outputs = []
    for n, (start, end) in enumerate(zip(cu_seqlens, cu_seqlens[1:])):
        k, v = k_THD[start:end], v_THD[start:end]
        if past_keys is not None:
            k, v = torch.cat([past_keys[n], k]), torch.cat([past_values[n], v])
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q_THD[start:end], k) / math.sqrt(q_THD.shape[2])
        query = torch.arange(end - start, device=k.device)[:, None] + len(k) - (end - start)
        scores = scores.masked_fill(torch.arange(len(k), device=k.device) > query, -math.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outputs)
