"""Searches for the amount of haystack that fills a prompt to a given number of tokens, with few calls of the tokenizer."""

from collections.abc import Callable

# Share of the budget that may stay unfilled. It saves calls of the tokenizer on long prompts.
SLACK = 0.005


class LengthTooShort(Exception):
    """The smallest prompt does not fit the budget; `tokens` is its length."""

    def __init__(self, tokens: int):
        super().__init__(tokens)
        self.tokens = tokens


def largest_fitting(count_tokens: Callable[[int], int], budget: int, minimum: int, maximum: int) -> int:
    """Finds a number of units in [minimum, maximum] whose prompt has at most `budget` tokens.

    It is the largest such number, or one that leaves at most the share `SLACK` of the budget unfilled.

    Args:
        count_tokens: number of units -> tokens of the prompt; more units never give fewer tokens.

    Raises:
        LengthTooShort: if `minimum` units do not fit.
    """
    low, low_tokens = minimum, count_tokens(minimum)
    if low_tokens > budget:
        raise LengthTooShort(low_tokens)
    high = maximum + 1  # smallest number known, or assumed, not to fit
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
