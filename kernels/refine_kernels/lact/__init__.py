"""LaCT's block-causal fast weights over packed sequences, with the state at any position as an output. Maths in README.md."""

from refine_kernels.lact.chunked import lact
from refine_kernels.lact.state import FastWeights, LaCTState

__all__ = ["FastWeights", "LaCTState", "lact"]
