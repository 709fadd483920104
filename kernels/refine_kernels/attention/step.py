"""Attention of the next row of many sequences, without gradient: scores by plain products, for they read every key once anyway.

Legend: n sequences, H query heads, K key heads, G = H / K, D channels of a head, C rows that a buffer has room for.
"""

import math

import torch

from refine_kernels.attention.plan import as_bounds, units
from refine_kernels.rows import RowSpans


def attention_step(
    q_nHD: torch.Tensor, keys: RowSpans, values: RowSpans, own_keys_CnKD: torch.Tensor, own_values_CnKD: torch.Tensor
) -> torch.Tensor:
    """Outputs `[n, H, D]`. Each sequence attends to its past and to its rows in the buffers, scores scaled by `1 / sqrt(D)`.

    Args:
        q_nHD: queries.
        keys, values: each sequence's past.
        own_keys_CnKD, own_values_CnKD: its rows since then, that of the query included, as far as there are such.
    """
    n, H, D = q_nHD.shape
    out = torch.empty_like(q_nHD, memory_format=torch.contiguous_format)
    # One row a sequence: a unit's own part, the last one, is in the buffers instead.
    for unit in units(tuple(range(n + 1)), as_bounds(keys.bounds)):
        q = unit.take(q_nHD).unflatten(1, (own_keys_CnKD.shape[2], -1))  # [rows, K, G, D]
        own_k, own_v = (unit.take(x.transpose(0, 1)).transpose(1, 2) for x in (own_keys_CnKD, own_values_CnKD))  # [rows, K, C, D]
        parts, shared_q = unit.parts[:-1], q.transpose(0, 1).flatten(1, 2)  # [K, rows * G, D]
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
    """Products of batches of matrices in at least float32, as attention kernels form them."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return torch.bmm(a.to(wide), b.to(wide))
