"""Where rollouts start: one position per chunk of a sequence, weighted by entropy (paper section 3.1).

Legend: S tokens of a sequence, c chunks, k rollout length.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from refine_titan.errors import UserError

# A rollout starts at least this many tokens after the first and before the end of its document.
MARGIN = 20


def smooth_entropy(entropy_S: torch.Tensor, rollout_length: int) -> torch.Tensor:
    """Average over a window of k tokens (k + 1 if k is even), stride 1; zero padding counts in the mean."""
    if rollout_length == 1:
        return entropy_S
    width = rollout_length + 1 - rollout_length % 2
    return F.avg_pool1d(entropy_S[None, None], width, stride=1, padding=width // 2)[0, 0]


def select_positions(
    entropy_S: torch.Tensor,
    cu_seqlens: Sequence[int],
    *,
    num_chunks: int,
    rollout_length: int,
    mode: str,
    temperature: float,
    generator: torch.Generator,
) -> list[int]:
    """Draws c rollout starts in one sequence of packed documents.

    The sequence is cut into c chunks of floor(S / c) tokens. In each, one token t is drawn and the rollout starts at
    t + 1, moved to [first + 20, end - 20] of the drawn token's document. Documents too short for that (a rest at a
    sequence's edge) are never drawn from.

    Args:
        entropy_S: entropy of the next-token distribution at every token, nats, float32, on the CPU.
        cu_seqlens: the sequence's documents, from 0 to S.
        mode: `entropy` (weights softmax(smoothed entropy / temperature)), `uniform`, `argmax`, `argmin` (of the
            entropy itself, not smoothed).
        generator: source of the draws of `entropy` and `uniform`.

    Raises:
        UserError: if there are fewer tokens than chunks, or a chunk holds no document long enough.
    """
    S = entropy_S.shape[0]
    size = S // num_chunks
    if size == 0:
        raise UserError(f"num_chunks = {num_chunks} is more than the sequence's {S} tokens")
    drawable_S, lowest_S, highest_S = _allowed_starts(cu_seqlens, S)
    smoothed_S = smooth_entropy(entropy_S, rollout_length)
    starts = []
    for chunk in range(num_chunks):
        span = slice(chunk * size, (chunk + 1) * size)
        drawable = drawable_S[span]
        if not drawable.any():
            raise UserError(
                f"tokens {span.start}..{span.stop} hold only documents shorter than {2 * MARGIN + 1} tokens: no rollout "
                "can start there; raise data.min_document_tokens or lower refine.num_chunks"
            )
        if mode == "argmax":
            token = int(entropy_S[span].masked_fill(~drawable, -torch.inf).argmax())
        elif mode == "argmin":
            token = int(entropy_S[span].masked_fill(~drawable, torch.inf).argmin())
        else:
            logits = smoothed_S[span].double() / temperature if mode == "entropy" else torch.zeros(size, dtype=torch.double)
            weights = logits.masked_fill(~drawable, -torch.inf).softmax(0)
            token = int(torch.multinomial(weights, 1, generator=generator))
        token += span.start
        starts.append(min(max(token + 1, int(lowest_S[token])), int(highest_S[token])))
    return starts


def _allowed_starts(cu_seqlens: Sequence[int], num_tokens: int):
    """Per token: whether its document is long enough to start in, and the lowest and highest start there."""
    drawable = torch.zeros(num_tokens, dtype=torch.bool)
    lowest = torch.zeros(num_tokens, dtype=torch.long)
    highest = torch.zeros(num_tokens, dtype=torch.long)
    for start, end in zip(cu_seqlens, cu_seqlens[1:]):
        drawable[start:end] = end - start > 2 * MARGIN
        lowest[start:end] = start + MARGIN
        highest[start:end] = end - MARGIN
    return drawable, lowest, highest
