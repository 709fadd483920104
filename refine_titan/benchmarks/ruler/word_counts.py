"""Aggregation tasks: ask for the ten most common words of a list (cwe), or the three most frequent words of a coded text (fwe)."""

import math
import random
import string

from refine_titan.benchmarks.ruler.drafts import CountTokens, Draft
from refine_titan.data.words import ADJECTIVES, NOUNS

NUM_COMMON = 10
NUM_EXAMPLE = 2 * NUM_COMMON  # words of the worked example
MAX_NEW_TOKENS = 120
CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most "
    "often.\n{context}\nQuestion: What are the 10 most common words in the above list? "
    "Answer: The top 10 words that appear most often in the list are:"
)
FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded "
    "words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
    "frequently appeared words in the above coded text? "
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)
DOTS = "...."
ZETA_2 = math.pi**2 / 6
# Fewest words of a text in which the word of rank 4 appears twice: floor(53 / 16 / zeta(2)) = 2.
MIN_FREQUENT_WORDS = 53


def draft_common_words(rng: random.Random, length: int, count_tokens: CountTokens) -> Draft:
    """Drafts a list in which ten words appear more often than the others.

    Common and other words appear 30 and 3 times; below 4096 tokens 6 times and once; 3 times and once if even that does not fit.
    The last of the other words may appear less often. A worked example comes first if it takes at most a quarter of the length.
    """
    usual = (30, 3) if length >= 4096 else (6, 1)
    order = rng.getrandbits(63)
    for times in (usual, (6, 1), (3, 1)):
        word_list = _WordList(rng, length, times, order, count_tokens)
        response = f" {_numbered(word_list.common)}"
        least = count_tokens(word_list.question(word_list.min_units)) + max(MAX_NEW_TOKENS, count_tokens(response) + 1)
        if least <= length:
            break
    notes = ()
    if times != usual:
        notes += (f"cwe at {length} tokens: common words appear {times[0]} times, others once (RULER: {usual[0]}, {usual[1]})",)
    example = word_list.worked_example(rng, length)
    if count_tokens(example) > min(length / 4, length - least):
        example, notes = "", (*notes, f"cwe at {length} tokens: without the worked example")
    return Draft(
        lambda units, filler: example + word_list.question(units),
        tuple(word_list.common),
        response=response,
        max_new_tokens=MAX_NEW_TOKENS,
        min_units=word_list.min_units,
        max_units=len(word_list.others) * times[1],
        notes=notes,
    )


def draft_frequent_words(rng: random.Random) -> Draft:
    """Drafts a text of coded words whose frequencies follow a Zipf law with exponent 2.

    The most frequent "word" is dots, which the question tells to ignore. The next three are more frequent than all others.
    """
    order = rng.getrandbits(63)
    vocabulary = [DOTS]
    coded = random.Random(rng.getrandbits(63))

    def prompt(units: int, filler: int) -> str:
        counts = zipf_counts(units)
        while len(vocabulary) < len(counts):
            word = "".join(coded.choices(string.ascii_lowercase, k=6))
            if word not in vocabulary:
                vocabulary.append(word)
        words = [word for word, count in zip(vocabulary, counts) for _ in range(count)] + [DOTS] * filler
        random.Random(order).shuffle(words)
        return FWE.format(context=" ".join(words))

    prompt(MIN_FREQUENT_WORDS, 0)
    answers = tuple(vocabulary[1:4])
    return Draft(prompt, answers, response=f" {', '.join(answers)}", max_new_tokens=50, min_units=MIN_FREQUENT_WORDS)


def zipf_counts(num_words: int) -> list[int]:
    """Number of appearances of each rank's word among about `num_words`; ranks from 5 on appear less often than rank 4."""
    counts = []
    while (count := int(num_words / ZETA_2 / (len(counts) + 1) ** 2)) > 0:
        counts.append(count if len(counts) < 4 else min(count, counts[3] - 1))
    return counts


class _WordList:
    """The words of one sample.

    Args:
        times: number of appearances of a common word, and of any other word.
        order: seed of the list's order.
    """

    def __init__(self, rng: random.Random, length: int, times: tuple[int, int], order: int, count_tokens: CountTokens):
        words = _distinct_words(rng, length, times[1], count_tokens)
        self.common = words[:NUM_COMMON]
        self.others = words[NUM_COMMON:-NUM_EXAMPLE]
        self.example = words[-NUM_EXAMPLE:]
        self.times = times
        self.order = order
        self.min_units = NUM_COMMON * times[1]

    def question(self, units: int) -> str:
        """Makes the prompt with `units` appearances of words that are not common."""
        drawn = self.common * self.times[0] + [self.others[unit // self.times[1]] for unit in range(units)]
        random.Random(self.order).shuffle(drawn)
        return CWE.format(context=_numbered(drawn))

    def worked_example(self, rng: random.Random, length: int) -> str:
        common, others = self.example[:NUM_COMMON], self.example[NUM_COMMON:]
        common_times, other_times = (10, 3) if length >= 4096 else (3, 1)
        drawn = common * common_times + others * other_times
        rng.shuffle(drawn)
        return f"{CWE.format(context=_numbered(drawn))} {_numbered(common)}\n"


def _distinct_words(rng: random.Random, length: int, other_times: int, count_tokens: CountTokens) -> list[str]:
    """Draws as many different words as a list of the length can hold.

    Either all are single words or all are compounds, so that a word's form does not tell whether it is common.
    """
    single = [*ADJECTIVES, *NOUNS]
    rng.shuffle(single)
    tokens_per_item = count_tokens(_numbered(single[:200])) / 200
    if length / tokens_per_item / other_times + NUM_COMMON + NUM_EXAMPLE <= len(single):
        return single
    num_words = min(length // other_times + NUM_COMMON + NUM_EXAMPLE, 200_000)
    pairs = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), num_words)
    return [f"{ADJECTIVES[pair % len(ADJECTIVES)]}-{NOUNS[pair // len(ADJECTIVES)]}" for pair in pairs]


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))
