"""The next row of sequences whose windows are changed in place: the short convolution while decoding. Without gradient.

Legend: N sequences, D channels, W filter width.
"""

import torch
import torch.nn.functional as F

from refine_kernels.footprint import wants_gpu_footprint


def short_conv_step_(window: torch.Tensor, x_ND: torch.Tensor, weight_DW: torch.Tensor, *, silu: bool = False) -> torch.Tensor:
    """What `refine_kernels.short_conv.short_conv` computes, for one row more of every sequence.

    Reads nothing on the host and allocates nothing but its result: a GPU can record it in a graph.

    Args:
        window: the last inputs `[N, W - 1, D]`, contiguous; afterwards those after the row.
        x_ND: the rows.
        weight_DW: one filter per channel, last tap on the current row.

    Returns:
        Outputs `[N, D]` in x's dtype.
    """
    if wants_gpu_footprint():
        window.neg_()  # read once and written once
        return torch.empty_like(x_ND)
    if window.is_cuda:
        from refine_kernels.short_conv.convolution_kernels import run_step  # triton is not on every machine without a GPU

        return run_step(window, x_ND, weight_DW, silu)
    rows = torch.cat([window, x_ND[:, None]], 1)
    window.copy_(rows[:, 1:])
    y_ND = (rows * weight_DW.to(torch.promote_types(x_ND.dtype, torch.float32)).t()).sum(1)
    return (F.silu(y_ND) if silu else y_ND).to(x_ND.dtype)
