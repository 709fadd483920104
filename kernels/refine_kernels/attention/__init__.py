"""Softmax attention over packed sequences that may go on from rows which they refer to. Maths in README.md."""

from refine_kernels.attention.attend import attention
from refine_kernels.attention.step import attention_step

__all__ = ["attention", "attention_step"]
