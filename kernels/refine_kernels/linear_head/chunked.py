"""Next-token loss and entropy over blocks of tokens; the gradient is computed in the forward pass.

Only the logits of one block exist at a time. Because the loss is one sum, its gradient with respect to the logits is known in
forward up to a scalar, so backward computes nothing again: three matrix products in all, as in the plain head.
If the vocabulary is sharded over ranks, each rank has only its shard of the logits; collectives of a few numbers per token complete
the sums over the vocabulary.
Legend: T tokens, D hidden channels, V vocabulary (of this rank's shard), R tokens of a block.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

IGNORE_INDEX = -100
# Number of logits in one block, 64 MiB in float32, unless that were very few tokens: every block reads the weights twice and adds to
# their gradients.
BLOCK_ELEMENTS, MIN_BLOCK_TOKENS = 1 << 24, 512


class HeadLosses(NamedTuple):
    """Results of the head. A field that was not requested is None.

    Attributes:
        nll_sum: negative log-likelihood in nats, summed over labelled tokens; differentiable, float32.
        nll_T: the terms of that sum, 0 for unlabelled tokens; detached.
        entropy_T: entropy of each token's next-token distribution, in nats; detached.
        hit_T: whether a token's label is its likeliest next token (also if others are as likely), False for unlabelled tokens; None where
            a gradient is needed, to spare training a pass over the logits.
    """

    nll_sum: torch.Tensor | None
    nll_T: torch.Tensor | None
    entropy_T: torch.Tensor | None
    hit_T: torch.Tensor | None = None


@dataclass(frozen=True)
class VocabularyShard:
    """The part of the vocabulary that this rank holds.

    Attributes:
        group: the ranks that hold the whole vocabulary together.
        offset: first vocabulary entry of the shard.
    """

    group: dist.ProcessGroup
    offset: int

    def maximum(self, x_R: torch.Tensor) -> torch.Tensor:
        """The maximum over the ranks, in place."""
        dist.all_reduce(x_R, op=dist.ReduceOp.MAX, group=self.group)
        return x_R

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place."""
        dist.all_reduce(x, group=self.group)
        return x


def linear_head_losses(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_T: torch.Tensor | None,
    *,
    entropy: bool = False,
    block_tokens: int | None = None,
    shard: VocabularyShard | None = None,
) -> HeadLosses:
    """Computes negative log-likelihood and entropy of `softmax(hidden weight^T)`; the softmax runs in at least float32.

    Args:
        hidden_TD: hidden vectors of T tokens.
        weight_VD: weight of the head.
        labels_T: target of each token, -100 for none; None if no loss is wanted.
        entropy: whether to compute `entropy_T`.
        block_tokens: tokens per block; by default as many as keep a block's logits under 2^24 elements, at least 512.
        shard: given if `weight_VD` is one of several shards. Losses and entropies are then those of the whole vocabulary, on every
            rank; the gradient of `hidden_TD` is this shard's part, to be summed over the ranks.
    """
    if block_tokens is None:
        block_tokens = max(MIN_BLOCK_TOKENS, BLOCK_ELEMENTS // weight_VD.shape[0])
    if labels_T is None and not entropy:
        return HeadLosses(None, None, None)
    if labels_T is None:
        with torch.no_grad():
            weight_VD = _cast_once(weight_VD)
            return HeadLosses(None, None, torch.cat([_entropy(h, weight_VD, shard) for h in hidden_TD.split(block_tokens)]))
    if not torch.is_grad_enabled():  # torch tells a Function that a parameter needs its gradient here too
        hidden_TD, weight_VD = hidden_TD.detach(), weight_VD.detach()
    nll_sum, nll_T, entropy_T, hit_T = _BlockwiseHead.apply(hidden_TD, weight_VD, labels_T, entropy, block_tokens, shard)
    return HeadLosses(nll_sum, nll_T, entropy_T if entropy else None, None if nll_sum.requires_grad else hit_T)


def as_logits(product: torch.Tensor) -> torch.Tensor:
    """The logits in the dtype of the softmax: at least float32, whatever the product ran in."""
    return product if product.dtype == torch.float64 else product.float()


def _cast_once(weight_VD: torch.Tensor) -> torch.Tensor:
    """Casts the weight once, as autocast would cast it for every block.

    Autocast itself would cache the cast weight; cast without gradient, it would be used by the next product with the parameter.
    """
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
    def forward(ctx, hidden_TD, weight_VD, labels_T, entropy, block_tokens, shard):
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        ctx.weight_dtype = weight_VD.dtype
        weight_VD = _cast_once(weight_VD)
        grad_hidden = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_weight = None
        nlls, entropies, hits = [], [], []
        for start in range(0, hidden_TD.shape[0], block_tokens):
            logits_RV = probabilities_RV = grad_logits = None  # frees those of the block before
            block = slice(start, start + block_tokens)
            hidden_RD, labels_R = hidden_TD[block], labels_T[block]
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
            if not (needs_hidden or needs_weight):
                largest_R = logits_RV.amax(-1)
                hits.append((target_logit_R >= (largest_R if shard is None else shard.maximum(largest_R))) & labelled_R)
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
                    grad_hidden[block] = grad_logits @ weight_VD
                if needs_weight:
                    if grad_weight is None:
                        grad_weight = torch.zeros_like(weight_VD, dtype=logits_RV.dtype)
                    grad_weight += grad_logits.t() @ hidden_RD
        ctx.save_for_backward(grad_hidden, grad_weight)
        nll_T = torch.cat(nlls)
        entropy_T = torch.cat(entropies) if entropies else nll_T.new_empty(0)
        hit_T = torch.cat(hits) if hits else torch.empty(0, dtype=torch.bool, device=nll_T.device)
        ctx.mark_non_differentiable(nll_T, entropy_T, hit_T)
        return nll_T.sum(), nll_T, entropy_T, hit_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_sum, _grad_nll, _grad_entropy, _grad_hit):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_sum.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_sum).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None
