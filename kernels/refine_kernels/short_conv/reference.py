"""Short causal depthwise convolution in plain torch.

A sum of W shifted products is faster on a CPU than `torch.nn.functional.conv1d` with one group per channel.
Legend: T tokens, N sequences, D channels, W filter width, P positions, E = T + N (W - 1) tokens of the extended stream, in which each
sequence's window stands before its tokens.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from refine_kernels.footprint import wants_gpu_footprint
from refine_kernels.packing import PlannedTensor, cached_plan, check_packing, sequence_of_token


def short_conv(
    x_TD: torch.Tensor,
    weight_DW: torch.Tensor,
    cu_seqlens: Sequence[int],
    *,
    silu: bool = False,
    initial_window: torch.Tensor | None = None,
    window_positions: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes `y_t = sum_j weight[:, W-1-j] x_{t-j}` inside each packed sequence, then SiLU if `silu`.

    Args:
        x_TD: inputs of T tokens in N packed sequences.
        weight_DW: one filter per channel, last tap on the current token.
        cu_seqlens: N + 1 token indices at which the sequences begin and end, as host integers.
        initial_window: `[N, W-1, D]`, the inputs before each sequence's first token; zeros if None.
        window_positions: P positions r in 1..T.

    Returns:
        Outputs `[T, D]` and windows `[P, W-1, D]`: the W - 1 inputs up to and including token r - 1, which begin in the
        initial window if the sequence has fewer tokens.

    Raises:
        ValueError: `cu_seqlens` does not cover the tokens or a position lies outside.
    """
    T, D = x_TD.shape
    num_sequences, W = len(cu_seqlens) - 1, weight_DW.shape[1]
    if initial_window is None:
        initial_window = x_TD.new_zeros(num_sequences, W - 1, D)
    plan = _plan_windows(tuple(cu_seqlens), T, W, tuple(window_positions))
    if num_sequences == 1:
        extended_ED = torch.cat([initial_window[0].to(x_TD.dtype), x_TD])
    else:
        windows_first = [t for pair in zip(initial_window.to(x_TD.dtype), x_TD.split(_lengths(cu_seqlens))) for t in pair]
        extended_ED = torch.cat(windows_first)
    y, windows = _convolution(extended_ED).apply(extended_ED, weight_DW, silu, plan)
    return y, windows.reshape(len(window_positions), W - 1, D)


def _convolution(x_ED: torch.Tensor) -> type[torch.autograd.Function]:
    if wants_gpu_footprint():
        return _Footprint
    if not x_ED.is_cuda:
        return _ShiftedProducts
    from refine_kernels.short_conv.convolution_kernels import Convolution  # triton is not on every machine without a GPU

    return Convolution


def _lengths(cu_seqlens: Sequence[int]) -> list[int]:
    return [end - start for start, end in zip(cu_seqlens, cu_seqlens[1:])]


class KeptTokens:
    """The tokens of a stream that are kept as windows, where a token of several windows occurs several times."""

    def __init__(self, tokens: list[int]):
        self._index = PlannedTensor(torch.tensor(tokens, dtype=torch.long))
        earlier: Counter[int] = Counter()
        rounds: list[list[int]] = []
        for place, token in enumerate(tokens):
            if earlier[token] == len(rounds):
                rounds.append([])
            rounds[earlier[token]].append(place)
            earlier[token] += 1
        self._rounds = [tuple(PlannedTensor(torch.tensor(x)) for x in (places, [tokens[i] for i in places])) for places in rounds]

    def read(self, x_ED: torch.Tensor) -> torch.Tensor:
        """Copies the tokens out of the stream."""
        return x_ED.index_select(0, self._index.on(x_ED.device))

    def add_gradients_(self, grad_x_ED: torch.Tensor, grad_kept: torch.Tensor) -> None:
        """Adds the gradients of the kept tokens to those of the stream. In one operator no token occurs twice: a GPU adds by atomic
        operations, whose order may change between runs."""
        grad_kept = grad_kept.to(grad_x_ED.dtype)
        for places, tokens in self._rounds:
            own = grad_kept if len(self._rounds) == 1 else grad_kept.index_select(0, places.on(grad_kept.device))
            grad_x_ED.index_add_(0, tokens.on(grad_x_ED.device), own)


class StreamPlan(NamedTuple):
    """Where the tokens are in the extended stream.

    Attributes:
        num_tokens: T.
        outputs: index of each token's output among the stream's E - W + 1, `[T]`; None where all outputs belong to tokens.
        token_of_output: the inverse: the token of each output, int32, and -1 for an output that mixes two sequences.
        kept: the tokens of the wanted windows.
    """

    num_tokens: int
    outputs: PlannedTensor | None
    token_of_output: PlannedTensor | None
    kept: KeptTokens


@cached_plan(maxsize=64)
def _plan_windows(cu_seqlens, num_tokens, width, window_positions) -> StreamPlan:
    check_packing(cu_seqlens, num_tokens, window_positions)
    window_index = []
    for r in window_positions:
        last = r - 1 + (sequence_of_token(cu_seqlens, r - 1) + 1) * (width - 1)
        window_index.extend(range(last - width + 2, last + 1))
    outputs = token_of_output = None
    if len(cu_seqlens) > 2:
        index, token_of = [], []
        for n, (start, end) in enumerate(zip(cu_seqlens, cu_seqlens[1:])):
            index.extend(range(start + n * (width - 1), end + n * (width - 1)))
            token_of.extend([*[-1] * (width - 1 if n else 0), *range(start, end)])
        outputs, token_of_output = PlannedTensor(torch.tensor(index)), PlannedTensor(torch.tensor(token_of, dtype=torch.int32))
    return StreamPlan(num_tokens, outputs, token_of_output, KeptTokens(window_index))


class _ShiftedProducts(torch.autograd.Function):
    """Computes `y_e = sum_j weight_j x_{e+j}`, summed in at least float32, then SiLU if `silu`; returns each token's y, `[T, D]`, and the
    kept tokens of x. Backward computes SiLU again and adds the gradient of the kept tokens to x's."""

    @staticmethod
    def forward(ctx, x_ED, weight_DW, silu, plan):
        ctx.save_for_backward(x_ED, weight_DW)
        ctx.silu, ctx.plan = silu, plan
        pre = _correlate(x_ED, weight_DW)
        y = torch.nn.functional.silu(pre, inplace=True) if silu else pre
        y = y.to(x_ED.dtype)
        return y if plan.outputs is None else y.index_select(0, plan.outputs.on(y.device)), plan.kept.read(x_ED)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, grad_kept):
        x_ED, weight_DW = ctx.saved_tensors
        W = weight_DW.shape[1]
        num_outputs = x_ED.shape[0] - W + 1
        taps_WD = _taps(x_ED, weight_DW)
        if ctx.plan.outputs is not None:
            grad_y = grad_y.new_zeros(num_outputs, grad_y.shape[1]).index_copy_(0, ctx.plan.outputs.on(grad_y.device), grad_y)
        grad_y = grad_y.to(taps_WD.dtype)
        if ctx.silu:
            grad_y = torch.ops.aten.silu_backward(grad_y, _correlate(x_ED, weight_DW))
        grad_x = torch.zeros_like(x_ED, dtype=taps_WD.dtype)
        grad_taps = []
        for j in range(W):
            grad_x[j : j + num_outputs].addcmul_(grad_y, taps_WD[j])
            grad_taps.append((grad_y * x_ED[j : j + num_outputs]).sum(0))
        ctx.plan.kept.add_gradients_(grad_x, grad_kept)
        return grad_x.to(x_ED.dtype), torch.stack(grad_taps, 1).to(weight_DW.dtype), None, None


class _Footprint(torch.autograd.Function):
    """Reads and writes as many bytes as the GPU's kernels, without their arithmetic; values mean nothing."""

    @staticmethod
    def forward(ctx, x_ED, weight_DW, silu, plan):
        ctx.save_for_backward(x_ED, weight_DW)
        ctx.plan = plan
        return x_ED[-plan.num_tokens :].neg(), plan.kept.read(x_ED)

    @staticmethod
    def backward(ctx, grad_y, grad_kept):
        x_ED, weight_DW = ctx.saved_tensors
        grad_x, T = torch.empty_like(x_ED), ctx.plan.num_tokens
        torch.add(x_ED[-T:], grad_y, out=grad_x[-T:])
        ctx.plan.kept.add_gradients_(grad_x, grad_kept)
        return grad_x, torch.empty_like(weight_DW), None, None


def _taps(x_ED, weight_DW):
    return weight_DW.to(torch.promote_types(x_ED.dtype, torch.float32)).t().contiguous()


def _correlate(x_ED, weight_DW):
    W = weight_DW.shape[1]
    num_outputs = x_ED.shape[0] - W + 1
    taps_WD = _taps(x_ED, weight_DW)
    y = x_ED[W - 1 :] * taps_WD[W - 1]
    for j in range(W - 1):
        y.addcmul_(x_ED[j : j + num_outputs], taps_WD[j])
    return y
