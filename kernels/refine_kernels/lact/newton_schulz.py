"""Orthogonalisation by Newton-Schulz iterations (Muon), batched."""

import torch

# Quintic iterations with a schedule of coefficients: the singular values of a matrix of norm 1 end near 1.
COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def orthogonalise(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Nearly `U V^T` of `x = U S V^T`, for `x` of shape `[..., rows, columns]`, computed and returned in `dtype`."""
    y = x.to(dtype).flatten(0, -3)
    is_tall = y.shape[-2] > y.shape[-1]
    if is_tall:
        y = y.mT
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in COEFFICIENTS:
        gram = y @ y.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        y = torch.baddbmm(y, polynomial, y, beta=a)
    return (y.mT if is_tall else y).reshape(x.shape)
