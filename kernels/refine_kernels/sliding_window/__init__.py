"""Causal sliding-window attention over packed sequences, which may continue from a window of past keys and values.

Open README.md first, then reference.py, which defines the result.
"""

from refine_kernels.sliding_window.attention import WindowedAttention, sliding_window_attention

__all__ = ["WindowedAttention", "sliding_window_attention"]
