"""Norms that torch does not have."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class OffsetRMSNorm(nn.Module):
    """RMSNorm that multiplies by 1 + its weight, which starts at 0. The sum is formed in at least float32: near 1 a bfloat16 would
    lose most of a small weight."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, 1.0 + self.weight.to(wide), self.eps).to(x.dtype)
