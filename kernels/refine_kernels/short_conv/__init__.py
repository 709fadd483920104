"""Causal depthwise convolution over packed sequences, with the input window at any position as an output."""

from refine_kernels.short_conv.reference import short_conv
from refine_kernels.short_conv.step import short_conv_step_

__all__ = ["short_conv", "short_conv_step_"]
