"""A reward and a selection for refine_titan, in a package of their own. Legend: n rollouts, C tokens of a chunk."""

import torch

from refine_titan.objective.positions import Candidates
from refine_titan.objective.rewards import RewardInputs

# Share of a chunk's tokens that `high_entropy` draws from.
SHARE = 0.1


def edit_distance(inputs: RewardInputs) -> torch.Tensor:
    """1 for a rollout whose text is the true one, 0 for one that has nothing of it: 1 - edit distance / length of the longer text."""
    rewards = []
    for text, true_text in zip(inputs.texts(), inputs.true_texts()):
        longer = max(len(text), len(true_text))
        rewards.append(1.0 - levenshtein(text, true_text) / longer if longer else 1.0)
    return torch.tensor(rewards, dtype=torch.float32, device=inputs.tokens_nk.device)


def levenshtein(a: str, b: str) -> int:
    """Least number of characters to insert, delete or replace to turn `a` into `b`."""
    distances = list(range(len(b) + 1))  # from the part of a that has been read to every beginning of b
    for i, character in enumerate(a, start=1):
        diagonal, distances[0] = distances[0], i
        for j, other in enumerate(b, start=1):
            diagonal, distances[j] = distances[j], min(distances[j] + 1, distances[j - 1] + 1, diagonal + (character != other))
    return distances[-1]


def high_entropy(candidates: Candidates) -> int:
    """Draws with equal weights from the tenth of the chunk's tokens that have the highest smoothed entropy."""
    entropy_C = candidates.smoothed_entropy_C.masked_fill(~candidates.allowed_C, -torch.inf)
    count = max(1, int(SHARE * int(candidates.allowed_C.sum())))
    highest = entropy_C.topk(count).indices
    return int(highest[torch.randint(count, (1,), generator=candidates.generator)])
