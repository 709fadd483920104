"""Operators of fast-weight models: for each a plain-torch reference, a GPU path, and a dispatch between them."""

from refine_kernels.cpu_math import call_once_from_one_thread

call_once_from_one_thread()
