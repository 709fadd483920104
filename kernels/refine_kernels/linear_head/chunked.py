"""Next-token loss and entropy over blocks of rows; the gradient is formed in the forward pass.

Only a block of logits exists at a time. Because the loss is one sum, its gradient with respect to the logits is known
in forward up to a scalar, so backward recomputes nothing: three matrix products in all, as the plain head has.
With the vocabulary sharded over ranks each has its shard of the logits only; sums over the vocabulary are completed by
collectives of a few numbers a row.
Legend: T rows, D hidden channels, V vocabulary (of this rank's shard), R rows of a block.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

IGNORE_INDEX = -100
# Logits of one block, in elements: 64 MiB in float32.
BLOCK_ELEMENTS = 1 << 24


class HeadLosses(NamedTuple):
    """`nll_sum`: differentiable sum over labelled rows, float32. `nll_T`: its terms, 0 where unlabelled, detached.
    `entropy_T`: entropy of each row's next-token distribution in nats, detached. A field not asked for is None."""

    nll_sum: torch.Tensor | None
    nll_T: torch.Tensor | None
    entropy_T: torch.Tensor | None


@dataclass(frozen=True)
class VocabularyShard:
    """The rows of the head's weight that this rank holds.

    Attributes:
        group: ranks that hold the others.
        offset: first token of the shard.
    """

    group: dist.ProcessGroup
    offset: int

    def maximum(self, x_R: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x_R, op=dist.ReduceOp.MAX, group=self.group)
        return x_R

    def total(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, group=self.group)
        return x


def linear_head_losses(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_T: torch.Tensor | None,
    *,
    entropy: bool = False,
    block_rows: int | None = None,
    shard: VocabularyShard | None = None,
) -> HeadLosses:
    """Negative log-likelihood and entropy of `softmax(hidden weight^T)`; softmax arithmetic in float32.

    Args:
        labels_T: target token per row, -100 for none; None if no loss is wanted.
        entropy: whether to compute `entropy_T`.
        block_rows: rows per block; by default as many as keep a block's logits under 2^24 elements.
        shard: where `weight_VD` is one of several shards. Losses and entropies are then those of the whole vocabulary, on every
            rank; the gradient of `hidden_TD` is this shard's part, to be summed over the ranks.
    """
    if block_rows is None:
        block_rows = max(1, BLOCK_ELEMENTS // weight_VD.shape[0])
    if labels_T is None and not entropy:
        return HeadLosses(None, None, None)
    if labels_T is None:
        with torch.no_grad():
            weight_VD = _cast_once(weight_VD)
            return HeadLosses(None, None, torch.cat([_entropy(h, weight_VD, shard) for h in hidden_TD.split(block_rows)]))
    nll_sum, nll_T, entropy_T = _BlockwiseHead.apply(hidden_TD, weight_VD, labels_T, entropy, block_rows, shard)
    return HeadLosses(nll_sum, nll_T, entropy_T if entropy else None)


def as_logits(product: torch.Tensor) -> torch.Tensor:
    """Logits for softmax arithmetic: at least float32 whatever the product ran in."""
    return product if product.dtype == torch.float64 else product.float()


def _cast_once(weight_VD: torch.Tensor) -> torch.Tensor:
    """The weight as autocast would cast it for the products of every block. (Autocast itself would keep what it casts here, without
    gradient, for whoever multiplies with the parameter next.)"""
    device = weight_VD.device.type
    if not torch.is_autocast_enabled(device) or weight_VD.dtype == torch.float64:
        return weight_VD
    return weight_VD.to(torch.get_autocast_dtype(device))


def _log_normaliser(logits_RV: torch.Tensor, shard: VocabularyShard | None) -> torch.Tensor:
    if shard is None:
        return logits_RV.logsumexp(-1)
    largest_R = shard.maximum(logits_RV.amax(-1))
    return largest_R + shard.total((logits_RV - largest_R[:, None]).exp_().sum(-1)).log()


def _entropy_of(logits_RV, probabilities_RV, log_z_R, shard):
    mean_R = (probabilities_RV * logits_RV).sum(-1)
    return log_z_R - (mean_R if shard is None else shard.total(mean_R))


def _entropy(hidden_RD, weight_VD, shard):
    logits_RV = as_logits(hidden_RD @ weight_VD.t())
    log_z_R = _log_normaliser(logits_RV, shard)
    return _entropy_of(logits_RV, (logits_RV - log_z_R[:, None]).exp_(), log_z_R, shard)


class _BlockwiseHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, labels_T, entropy, block_rows, shard):
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        ctx.weight_dtype = weight_VD.dtype
        weight_VD = _cast_once(weight_VD)
        grad_hidden = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_weight = None
        nlls, entropies = [], []
        for start in range(0, hidden_TD.shape[0], block_rows):
            rows = slice(start, start + block_rows)
            hidden_RD, labels_R = hidden_TD[rows], labels_T[rows]
            logits_RV = as_logits(hidden_RD @ weight_VD.t())
            compute_dtype = torch.promote_types(hidden_RD.dtype, weight_VD.dtype)
            log_z_R = _log_normaliser(logits_RV, shard)
            labelled_R = labels_R != IGNORE_INDEX
            target_R1, held_R1 = labels_R.clamp(min=0)[:, None], None
            if shard is not None:
                target_R1 = target_R1 - shard.offset
                held_R1 = (target_R1 >= 0) & (target_R1 < logits_RV.shape[-1])
                target_R1 = target_R1.clamp(0, logits_RV.shape[-1] - 1)
            target_logit_R = logits_RV.gather(-1, target_R1)[:, 0]
            if shard is not None:
                target_logit_R = shard.total(target_logit_R * held_R1[:, 0])
            nlls.append((log_z_R - target_logit_R) * labelled_R)
            if not (entropy or needs_hidden or needs_weight):
                continue
            if entropy:
                probabilities_RV = (logits_RV - log_z_R[:, None]).exp_()
                entropies.append(_entropy_of(logits_RV, probabilities_RV, log_z_R, shard))
            else:
                probabilities_RV = logits_RV.sub_(log_z_R[:, None]).exp_()
            if needs_hidden or needs_weight:
                minus_one = -torch.ones_like(probabilities_RV[:, :1])
                grad_logits = probabilities_RV.scatter_add_(-1, target_R1, minus_one if shard is None else minus_one * held_R1)
                grad_logits = grad_logits.mul_(labelled_R[:, None]).to(compute_dtype)
                if needs_hidden:
                    grad_hidden[rows] = grad_logits @ weight_VD
                if needs_weight:
                    if grad_weight is None:
                        grad_weight = torch.zeros_like(weight_VD, dtype=logits_RV.dtype)
                    grad_weight += grad_logits.t() @ hidden_RD
        ctx.save_for_backward(grad_hidden, grad_weight)
        nll_T = torch.cat(nlls)
        entropy_T = torch.cat(entropies) if entropies else nll_T.new_empty(0)
        ctx.mark_non_differentiable(nll_T, entropy_T)
        return nll_T.sum(), nll_T, entropy_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_sum, _grad_nll, _grad_entropy):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_sum.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_sum).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None
