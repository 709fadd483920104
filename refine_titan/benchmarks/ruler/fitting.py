"""Finds how much haystack fills a prompt up to a number of tokens, in few calls of the tokenizer."""

from collections.abc import Callable

# Share of the budget that the search leaves unfilled to save calls of the tokenizer on long prompts.
SLACK = 0.005


class LengthTooShort(Exception):
    """Even the smallest prompt is over the budget."""

    def __init__(self, tokens: int):
        super().__init__(tokens)
        self.tokens = tokens


def largest_fitting(count_tokens: Callable[[int], int], budget: int, minimum: int, maximum: int) -> int:
    """A number of units in [minimum, maximum] whose prompt has at most `budget` tokens: the largest such number, or one that
    fills the budget up to `SLACK`.

    Args:
        count_tokens: tokens of the prompt with so many units; it grows with them, though not strictly.

    Raises:
        LengthTooShort: if `minimum` units are too many.
    """
    low, low_tokens = minimum, count_tokens(minimum)
    if low_tokens > budget:
        raise LengthTooShort(low_tokens)
    high = maximum + 1  # the least number known, or taken, not to fit
    tokens_per_unit = 0.0
    step = 32
    calls = 0
    while high - low > 1 and budget - low_tokens > SLACK * budget:
        calls += 1
        if tokens_per_unit == 0.0:
            guess, step = low + step, 2 * step
        elif calls > 12 and high <= maximum:
            guess = (low + high) // 2
        else:
            guess = low + int((budget - low_tokens) / tokens_per_unit)
        guess = min(max(guess, low + 1), high - 1)
        tokens = count_tokens(guess)
        if tokens > low_tokens:
            tokens_per_unit = (tokens - low_tokens) / (guess - low)
        if tokens <= budget:
            low, low_tokens = guess, tokens
        else:
            high = guess
    return low
