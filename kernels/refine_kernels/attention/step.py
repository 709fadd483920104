"""Attention while decoding: the next token of many sequences, without gradient, by plain products that read every key once.

Legend: n sequences, H query heads, K key heads, G = H / K, D channels of a head, C tokens for which a buffer has room.
"""

import math

import torch

from refine_kernels.attention.plan import as_bounds, units
from refine_kernels.past_tokens import TokenSpans


def attention_step(
    q_nHD: torch.Tensor, keys: TokenSpans, values: TokenSpans, own_keys_CnKD: torch.Tensor, own_values_CnKD: torch.Tensor
) -> torch.Tensor:
    """Lets the next token of each sequence attend to the sequence's past and to its tokens in the buffers.

    Scores are scaled by `1 / sqrt(D)`.

    Args:
        q_nHD: queries of the next tokens.
        keys, values: the past of each sequence.
        own_keys_CnKD, own_values_CnKD: the tokens since the past, including the query's own.

    Returns:
        Outputs `[n, H, D]`.
    """
    n, H, D = q_nHD.shape
    out = torch.empty_like(q_nHD, memory_format=torch.contiguous_format)
    # Plan for one token per sequence. The last part of a unit, the sequences' own tokens, is replaced by the buffers.
    for unit in units(tuple(range(n + 1)), as_bounds(keys.bounds)):
        q = unit.take(q_nHD).unflatten(1, (own_keys_CnKD.shape[2], -1))  # [tokens, K, G, D]
        own_k, own_v = (unit.take(x.transpose(0, 1)).transpose(1, 2) for x in (own_keys_CnKD, own_values_CnKD))  # [tokens, K, C, D]
        parts, shared_q = unit.parts[:-1], q.transpose(0, 1).flatten(1, 2)  # [K, tokens * G, D]
        scores = [_product(q.flatten(0, 1), own_k.flatten(0, 1).mT).view(*q.shape[:3], -1)]
        for part in parts:
            k = keys.pools[part.pool][part.first : part.end].to(q.dtype).permute(1, 2, 0)
            found = _product(shared_q, k).unflatten(1, (q.shape[0], -1)).transpose(0, 1)
            visible = part.mask(q.device)
            scores.append(found if visible is None else found.masked_fill(~visible[:, None, None], -math.inf))
        weights = (torch.cat(scores, -1) / math.sqrt(D)).softmax(-1).to(q.dtype).split([x.shape[-1] for x in scores], -1)
        result = _product(weights[0].flatten(0, 1), own_v.flatten(0, 1)).view(*q.shape)
        for part, weight in zip(parts, weights[1:]):
            v = values.pools[part.pool][part.first : part.end].to(q.dtype).transpose(0, 1)
            found = _product(weight.transpose(0, 1).flatten(1, 2), v)
            result = result + found.unflatten(1, (q.shape[0], -1)).transpose(0, 1)
        unit.put(out, result.flatten(1, 2).to(out.dtype))
    return out


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiplies batches of matrices with results in at least float32, as attention kernels do."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return torch.bmm(a.to(wide), b.to(wide))
