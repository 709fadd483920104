"""Keeps away a fault of torch 2.13.0 on CPUs: the first call of a function such as `exp` may be of low precision.

Its MKL (2024.2) chooses the implementation of each vectorised function during that function's first call. Where two threads make
it at once, one of them may compute its part with the least precise one: what a delta rule made of half of an `exp` was 7e-5 off,
in one of some 40 fresh processes, and right at the second call. See https://github.com/pytorch/pytorch/issues/188792.
"""

import torch

# Those that torch may hand to MKL.
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
    """Has MKL choose every implementation on one number, which no second thread has a part in. Takes two milliseconds."""
    for dtype in (torch.float32, torch.float64):
        number = torch.full((1,), 0.5, dtype=dtype, device="cpu")
        for name in _FUNCTIONS:
            getattr(torch, name)(number)
