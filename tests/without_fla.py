"""Hides flash-linear-attention from transformers, which would call its kernels, which need a GPU: import this before transformers, in a
process of its own."""

import sys

sys.modules["fla"] = None
