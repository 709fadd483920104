"""LaCT's block-causal fast weights over packed sequences, with the state at any position as an output. Maths in README.md."""

from refine_kernels.lact.chunked import fixed_states, lact, reading_weights
from refine_kernels.lact.elementwise import unit_rows
from refine_kernels.lact.state import FastWeights, FixedState, LaCTState, WritingRows, WrittenSums

__all__ = ["FastWeights", "FixedState", "LaCTState", "WritingRows", "WrittenSums", "fixed_states", "lact", "reading_weights", "unit_rows"]
