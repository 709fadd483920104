"""Recall tokens: those that a memory helps to predict, because their n-gram has occurred before in the document, but not recently."""

from collections.abc import Sequence


def recall_tokens(tokens: Sequence[int], ngram: int, beyond: int) -> list[bool]:
    """Says of each token of a document whether it and the `ngram - 1` tokens before it have occurred together before, the last time more
    than `beyond` tokens ago. Whoever sees only the last `beyond` tokens and this n-gram's beginning has not seen how it went on."""
    last: dict[tuple[int, ...], int] = {}
    found = [False] * len(tokens)
    for t in range(ngram - 1, len(tokens)):
        gram = tuple(tokens[t - ngram + 1 : t + 1])
        found[t] = gram in last and t - last[gram] > beyond
        last[gram] = t
    return found


def recall_spans(recall: Sequence[bool], length: int) -> list[int]:
    """First token of each unbroken row of at least `length` recall tokens, ascending."""
    starts, begin = [], None
    for t, is_recall in enumerate([*recall, False]):
        if is_recall and begin is None:
            begin = t
        elif not is_recall and begin is not None:
            if t - begin >= length:
                starts.append(begin)
            begin = None
    return starts
