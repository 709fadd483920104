"""Causal depthwise convolution over packed sequences. It returns outputs and the input window at any position.

Open README.md for the maths, then reference.py, which defines the result.
"""

from refine_kernels.short_conv.reference import short_conv
from refine_kernels.short_conv.step import short_conv_step_

__all__ = ["short_conv", "short_conv_step_"]
