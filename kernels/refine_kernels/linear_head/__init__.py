"""Loss and entropy of a linear language-model head without the [T, V] logits."""

from refine_kernels.linear_head.chunked import HeadLosses, linear_head_losses

__all__ = ["HeadLosses", "linear_head_losses"]
