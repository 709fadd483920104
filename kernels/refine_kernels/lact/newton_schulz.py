"""Orthogonalises batches of matrices by Newton-Schulz iterations (Muon). README.md has the maths."""

import torch

# One triple (a, b, c) per iteration. They bring the singular values of a matrix of norm 1 near 1.
COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
EPS = 1e-7


def orthogonalise(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns approximately `U V^T` for `x = U S V^T` of shape `[..., rows, columns]`, computed and returned in `dtype`."""
    y = x.to(dtype).flatten(0, -3)
    is_tall = y.shape[-2] > y.shape[-1]
    y = _Iterations.apply(y.mT if is_tall else y)
    return (y.mT if is_tall else y).reshape(x.shape)


class _Iterations(torch.autograd.Function):
    """Scales wide matrices `[n, rows, columns]` to norm 1 and iterates. It has a backward of its own, because `G` and `P` are
    symmetric: that halves the matrix products of automatic differentiation."""

    @staticmethod
    def forward(ctx, x):
        norm = x.norm(dim=(-2, -1), keepdim=True)
        size = norm + EPS
        y = x / size
        kept = [norm, size]
        for a, b, c in COEFFICIENTS:
            gram = y @ y.mT
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            kept += [y, gram, polynomial]
            y = torch.baddbmm(y, polynomial, y, beta=a)
        ctx.save_for_backward(*kept)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        norm, size, *kept = ctx.saved_tensors
        for i, (a, b, c) in reversed(list(enumerate(COEFFICIENTS))):
            y, gram, polynomial = kept[3 * i : 3 * i + 3]
            grad_polynomial = grad @ y.mT
            grad_gram = torch.baddbmm(grad_polynomial, grad_polynomial, gram, beta=b, alpha=c)
            grad_gram = torch.baddbmm(grad_gram, gram, grad_polynomial, alpha=c)
            grad = torch.baddbmm(grad, polynomial, grad, beta=a)
            grad = torch.baddbmm(grad, grad_gram + grad_gram.mT, y)
        y = kept[0]
        along = (y * grad).sum((-2, -1), keepdim=True) / norm.clamp(min=EPS)
        return torch.addcmul(grad / size, y, along, value=-1)
