"""Operators of fast-weight models. Each has a plain-torch reference, a GPU path, and a function that chooses between them.

Open an operator's README.md first: it has the maths and says which file does what.
"""

from refine_kernels.cpu_math import call_once_from_one_thread

call_once_from_one_thread()
