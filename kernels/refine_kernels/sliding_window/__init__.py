"""Causal sliding-window attention over packed sequences that may continue from a window of past keys and values."""

from refine_kernels.sliding_window.attention import WindowedAttention, sliding_window_attention

__all__ = ["WindowedAttention", "sliding_window_attention"]
