"""Softmax attention over packed sequences, which may continue from past tokens that they refer to instead of copying.

Open README.md for the maths, then reference.py, which defines the result.
"""

from refine_kernels.attention.attend import MAX_HEAD_CHANNELS, attention
from refine_kernels.attention.step import attention_step

__all__ = ["MAX_HEAD_CHANNELS", "attention", "attention_step"]
