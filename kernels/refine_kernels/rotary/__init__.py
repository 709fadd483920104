"""Rotary position encoding at given positions, for any number of tokens and heads.

Open README.md for the maths, then reference.py, which defines the result.
"""

from refine_kernels.rotary.reference import Rotation

__all__ = ["Rotation"]
