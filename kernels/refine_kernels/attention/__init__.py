"""Softmax attention over packed sequences that may go on from rows which they refer to. Maths in README.md."""

from refine_kernels.attention.attend import MAX_HEAD_CHANNELS, attention
from refine_kernels.attention.step import attention_step

__all__ = ["MAX_HEAD_CHANNELS", "attention", "attention_step"]
