"""Draws tokens in the same way for every engine: each token has a number in [0, 1), which derives from the seed of its rollout.

Legend: n rollouts, k tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch

from refine_kernels.packing import on_device


def uniform_draws(seeds: Sequence[int], length: int) -> torch.Tensor:
    """Returns `[n, k]` float64 numbers in [0, 1), each row from its own seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(length, generator=generator, dtype=torch.float64) for generator in generators])


def sample_tokens(logits_nV: torch.Tensor, uniforms_n: torch.Tensor, temperature: float, top_k: int = 0) -> torch.Tensor:
    """Draws one token per row: the inverse of the cumulative distribution at the row's number; argmax at temperature 0. With `top_k`
    above 0 only that many likeliest tokens can be drawn, and tokens as likely as the last of them.

    The same number gives the same token whatever the other rows are.
    """
    if temperature == 0:
        return logits_nV.argmax(-1)
    if 0 < top_k < logits_nV.shape[-1]:
        least_n1 = logits_nV.topk(top_k, dim=-1).values[:, -1:]
        logits_nV = logits_nV.masked_fill(logits_nV < least_n1, -torch.inf)
    cumulative = (logits_nV / temperature).double().softmax(-1).cumsum(-1)
    threshold = uniforms_n.to(cumulative.device)[:, None] * cumulative[:, -1:]
    token_n = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return token_n.clamp(max=logits_nV.shape[-1] - 1)


class Draws:
    """The random numbers of a round's outputs, and the log-probabilities of the tokens that they choose, on the device that samples.

    Attributes:
        uniforms_nk: numbers in [0, 1).
        logprobs_nk: float32, at the sampling temperature and over the whole vocabulary; NaN where nothing was drawn yet.
    """

    def __init__(self, uniforms_nk: torch.Tensor, device: torch.device, temperature: float, top_k: int = 0):
        self.uniforms_nk, self.temperature, self.top_k = on_device(uniforms_nk, device), temperature, top_k
        self.logprobs_nk = torch.full(uniforms_nk.shape, torch.nan, device=device)
