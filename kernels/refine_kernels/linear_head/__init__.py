"""Computes loss and entropy of a linear language-model head without the [T, V] logits.

Open README.md for the maths, then chunked.py.
"""

from refine_kernels.linear_head.chunked import IGNORE_INDEX, HeadLosses, VocabularyShard, as_logits, linear_head_losses

__all__ = ["IGNORE_INDEX", "HeadLosses", "VocabularyShard", "as_logits", "linear_head_losses"]
