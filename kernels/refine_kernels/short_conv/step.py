"""The short convolution while decoding: the next token of sequences whose windows are updated in place. Without gradient.

Legend: N sequences, D channels, W filter width.
"""

import torch
import torch.nn.functional as F

from refine_kernels.footprint import wants_gpu_footprint


def short_conv_step_(window: torch.Tensor, x_ND: torch.Tensor, weight_DW: torch.Tensor, *, silu: bool = False) -> torch.Tensor:
    """Computes what `refine_kernels.short_conv.short_conv` computes for the next token of N sequences, and updates their windows.

    It reads nothing on the host and allocates only its result, so that a CUDA graph can capture it.

    Args:
        window: the last W - 1 inputs, `[N, W - 1, D]`, contiguous; updated in place.
        x_ND: inputs of the next token.
        weight_DW: one filter per channel, last tap on the current token.

    Returns:
        Outputs `[N, D]` in x's dtype.

    Raises:
        ValueError: on a GPU, if the windows are not contiguous.
    """
    if wants_gpu_footprint():
        window.neg_()  # read once and written once
        return torch.empty_like(x_ND)
    if window.is_cuda:
        from refine_kernels.short_conv.convolution_kernels import run_step  # triton is not on every machine without a GPU

        return run_step(window, x_ND, weight_DW, silu)
    inputs = torch.cat([window, x_ND[:, None]], 1)
    window.copy_(inputs[:, 1:])
    y_ND = (inputs * weight_DW.to(torch.promote_types(x_ND.dtype, torch.float32)).t()).sum(1)
    return (F.silu(y_ND) if silu else y_ND).to(x_ND.dtype)
