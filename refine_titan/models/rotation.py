"""Rotary positions of packed sequences that may go on from tokens read before."""

from itertools import zip_longest

import torch

from refine_kernels.packing import cached_plan, on_device
from refine_kernels.rotary import Rotation


@cached_plan(maxsize=4)
def rotation_of(
    cu_seqlens: tuple[int, ...], seen: tuple[int, ...], head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> Rotation:
    """The rotation of every token, the same in every layer of a pass.

    Args:
        cu_seqlens: where the sequences begin and end.
        seen: tokens that each of the first sequences has read before; the others have read none.
        head_dim: channels that are rotated.
    """
    spans = zip_longest(seen, cu_seqlens[:-1], cu_seqlens[1:], fillvalue=0)
    positions_T = on_device(torch.cat([past + torch.arange(end - start) for past, start, end in spans]), device)
    return Rotation(positions_T, head_dim, theta, dtype)
