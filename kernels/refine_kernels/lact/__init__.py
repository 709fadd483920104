"""LaCT's block-causal fast weights over packed sequences. The operator returns outputs and the state at any position.

Open README.md for the maths, then reference.py, which defines the result.
"""

from refine_kernels.lact.chunked import fixed_states, lact, reading_weights
from refine_kernels.lact.elementwise import unit_vectors
from refine_kernels.lact.state import FastWeights, FixedState, LaCTState, WritingTokens, WrittenSums

__all__ = [
    "FastWeights",
    "FixedState",
    "LaCTState",
    "WritingTokens",
    "WrittenSums",
    "fixed_states",
    "lact",
    "reading_weights",
    "unit_vectors",
]
