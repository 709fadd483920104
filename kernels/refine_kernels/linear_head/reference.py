"""The head's losses from whole logits: the definition against which the blockwise form is tested."""

import torch
import torch.nn.functional as F

from refine_kernels.linear_head.chunked import IGNORE_INDEX, HeadLosses


def dense_head_losses(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, labels_T: torch.Tensor) -> HeadLosses:
    """Same contract as `refine_kernels.linear_head.linear_head_losses` with `entropy=True`, with [T, V] logits."""
    log_probs_TV = (hidden_TD @ weight_VD.t()).log_softmax(-1)
    nll_T = F.nll_loss(log_probs_TV, labels_T, ignore_index=IGNORE_INDEX, reduction="none")
    entropy_T = -(log_probs_TV.exp() * log_probs_TV).sum(-1)
    likeliest_T = log_probs_TV.argmax(-1)
    return HeadLosses(nll_T.sum(), nll_T.detach(), entropy_T.detach(), likeliest_T == labels_T)
