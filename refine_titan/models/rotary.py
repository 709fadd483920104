"""Rotary position encoding. Legend: T rows, H heads, D channels of a head."""

import torch


class Rotation:
    """Cosines and sines of the angles of given positions, for heads of D channels, `[T, D / 2]` in at least float32."""

    def __init__(self, positions_T: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype):
        dtype = torch.promote_types(dtype, torch.float32)
        exponents = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32) / head_dim
        # float32 as in flash-linear-attention's rotary embedding: at position 10^5 the rounding of an angle shows
        angles = positions_T.to(torch.float32)[:, None] * (1.0 / theta**exponents)
        self.cos, self.sin = (x[:, None].to(dtype) for x in (angles.cos(), angles.sin()))

    def apply(self, x_THD: torch.Tensor) -> torch.Tensor:
        """Rotates channel i with channel i + D / 2."""
        a, b = x_THD.to(self.cos.dtype).chunk(2, -1)
        return torch.cat([a * self.cos - b * self.sin, a * self.sin + b * self.cos], -1).to(x_THD.dtype)
