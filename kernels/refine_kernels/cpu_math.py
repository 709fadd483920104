"""Works around a fault of torch 2.13.0 on CPUs: the first call of a function such as `exp` may have low precision.

torch's MKL (2024.2) chooses the implementation of each vectorised function during the first call of that function. If two threads
make this call at once, one of them may compute its part with the least precise implementation. We saw it in about one of 40 fresh
processes: half of the elements of an `exp` were wrong, and the delta rule that used them was off by 7e-5; the second call was
right. See https://github.com/pytorch/pytorch/issues/188792.
"""

import torch

# The functions that torch may hand to MKL.
_FUNCTIONS = (
    "acos",
    "asin",
    "atan",
    "cos",
    "cosh",
    "erf",
    "erfc",
    "erfinv",
    "exp",
    "exp2",
    "expm1",
    "lgamma",
    "log",
    "log10",
    "log1p",
    "log2",
    "sin",
    "sinh",
    "sqrt",
    "tan",
    "tanh",
    "trunc",
)


def call_once_from_one_thread() -> None:
    """Calls every function on a single number, so that one thread alone makes MKL choose. Takes two milliseconds."""
    for dtype in (torch.float32, torch.float64):
        number = torch.full((1,), 0.5, dtype=dtype, device="cpu")
        for name in _FUNCTIONS:
            getattr(torch, name)(number)
