"""A stand-in for compiled flex attention, for estimates of memory and traffic on machines that have no GPU."""

import torch

from refine_kernels.footprint import report_traffic


def flex_footprint(q_THD: torch.Tensor, k_RKD: torch.Tensor, v_RKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns outputs `[T, H, D]` and log-sums `[T, H]`; values are undefined."""
    return _Flex.apply(q_THD, k_RKD, v_RKD)


class _Flex(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        out, log_sums = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sums)
        report_traffic(q.nbytes + k.nbytes + v.nbytes + out.nbytes + log_sums.nbytes, 1)
        return out, log_sums

    @staticmethod
    def backward(ctx, grad_out, grad_log_sums):
        q, k, v, out, log_sums = ctx.saved_tensors
        # One kernel multiplies outputs with their gradients; another computes the gradients of queries, keys and values, and reads all
        # its inputs twice.
        products = torch.empty_like(log_sums)
        grads = tuple(torch.empty_like(x) for x in (q, k, v))
        read = grad_out.nbytes + q.nbytes + k.nbytes + v.nbytes + 2 * log_sums.nbytes
        report_traffic(grad_out.nbytes + out.nbytes + products.nbytes + 2 * read + sum(x.nbytes for x in grads), 2)
        return grads
