"""Rotary position encoding by given positions, any number of rows and heads. Maths in README.md."""

from refine_kernels.rotary.reference import Rotation

__all__ = ["Rotation"]
