"""Where rollouts start: one position per chunk of a sequence, weighted by entropy (paper section 3.1).

Legend: S tokens of a sequence, C tokens of a chunk, k tokens of a rollout.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from refine_titan.errors import UserError

# A rollout starts at least this many tokens after the first and before the end of its document.
MARGIN = 20


@dataclass(frozen=True, eq=False)
class Candidates:
    """The tokens of a chunk, of which a selection chooses one. The rollout starts at the token after it.

    Attributes:
        entropy_C: entropy of the next-token distribution at every token, nats, float32, on the CPU.
        smoothed_entropy_C: the same, averaged over a window of k tokens (`smooth_entropy`).
        allowed_C: whether the token may be chosen: its document is long enough for a rollout. True for at least one token.
        temperature: `refine.selection_temperature`.
        generator: source of every draw. It derives from the run's seed, the step and the sequence.
    """

    entropy_C: torch.Tensor
    smoothed_entropy_C: torch.Tensor
    allowed_C: torch.Tensor
    temperature: float
    generator: torch.Generator


# Index in the chunk of the chosen token, an allowed one.
SelectionRule = Callable[[Candidates], int]


def entropy(candidates: Candidates) -> int:
    """Draws with weights softmax(smoothed entropy / temperature), as in the paper."""
    return _draw(candidates.smoothed_entropy_C.double() / candidates.temperature, candidates)


def uniform(candidates: Candidates) -> int:
    """Draws with equal weights."""
    return _draw(torch.zeros_like(candidates.entropy_C, dtype=torch.double), candidates)


def argmax(candidates: Candidates) -> int:
    """Takes the token of highest entropy, not smoothed."""
    return int(candidates.entropy_C.masked_fill(~candidates.allowed_C, -torch.inf).argmax())


def argmin(candidates: Candidates) -> int:
    """Takes the token of lowest entropy, not smoothed."""
    return int(candidates.entropy_C.masked_fill(~candidates.allowed_C, torch.inf).argmin())


def _draw(logits_C: torch.Tensor, candidates: Candidates) -> int:
    """One of the allowed tokens, with weights softmax(logits)."""
    weights_C = logits_C.masked_fill(~candidates.allowed_C, -torch.inf).softmax(0)
    return int(torch.multinomial(weights_C, 1, generator=candidates.generator))


# The built-in values of `refine.selection`; `extensions.py` finds those of installed packages.
SELECTIONS: dict[str, SelectionRule] = {"entropy": entropy, "uniform": uniform, "argmax": argmax, "argmin": argmin}


def smooth_entropy(entropy_S: torch.Tensor, rollout_length: int) -> torch.Tensor:
    """Averages over a window of k tokens (k + 1 if k is even) around each token, `[S]`.

    Beyond the sequence's ends there are zeros, which count in the mean. k = 1 leaves the entropy as it is.
    """
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
    selection: SelectionRule,
    temperature: float,
    generator: torch.Generator,
) -> list[int]:
    """Chooses where the rollouts of one sequence of packed documents start, one position per chunk.

    The sequence is cut into `num_chunks` chunks of floor(S / num_chunks) tokens. In each, the selection chooses one token t and the
    rollout starts at t + 1, moved to [first + 20, end - 20] of the chosen token's document. Documents too short for that (a rest at
    a sequence's edge) are never chosen from.

    Args:
        entropy_S: entropy of the next-token distribution at every token, nats, float32, on the CPU.
        cu_seqlens: the sequence's documents, from 0 to S.
        selection: a function of `SELECTIONS`, or what `extensions.find_selection` returns for a name.
        temperature, generator: handed to the selection.

    Raises:
        UserError: if there are fewer tokens than chunks, or a chunk holds no document long enough.
    """
    S = entropy_S.shape[0]
    size = S // num_chunks
    if size == 0:
        raise UserError(f"num_chunks = {num_chunks} is more than the sequence's {S} tokens")
    allowed_S, lowest_S, highest_S = _allowed_starts(cu_seqlens, S)
    smoothed_S = smooth_entropy(entropy_S, rollout_length)
    starts = []
    for chunk in range(num_chunks):
        span = slice(chunk * size, (chunk + 1) * size)
        if not allowed_S[span].any():
            raise UserError(
                f"tokens {span.start}..{span.stop} hold only documents shorter than {2 * MARGIN + 1} tokens: no rollout "
                "can start there; raise data.min_document_tokens or lower refine.num_chunks"
            )
        candidates = Candidates(entropy_S[span], smoothed_S[span], allowed_S[span], temperature, generator)
        token = span.start + selection(candidates)
        starts.append(min(max(token + 1, int(lowest_S[token])), int(highest_S[token])))
    return starts


def _allowed_starts(cu_seqlens: Sequence[int], num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Says of every token whether its document is long enough for a rollout, and the lowest and the highest start there; `[S]` each."""
    allowed = torch.zeros(num_tokens, dtype=torch.bool)
    lowest = torch.zeros(num_tokens, dtype=torch.long)
    highest = torch.zeros(num_tokens, dtype=torch.long)
    for start, end in zip(cu_seqlens, cu_seqlens[1:]):
        allowed[start:end] = end - start > 2 * MARGIN
        lowest[start:end] = start + MARGIN
        highest[start:end] = end - MARGIN
    return allowed, lowest, highest
