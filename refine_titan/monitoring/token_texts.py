"""Says what text each token of a rollout adds, so that rollouts can be read token by token."""

from collections.abc import Sequence

from torchtitan.components.tokenizer import BaseTokenizer

# What decoders write for bytes that are no character yet.
REPLACEMENT = "\ufffd"


def token_texts(tokenizer: BaseTokenizer, tokens: Sequence[int]) -> list[str]:
    """Returns the text that each token adds to those before it; "" for a token that ends within a character, or adds none.

    Joined, the texts are the decoded tokens without replacement characters: bytes that never become a character have no text.
    """
    texts, shown = [], ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(list(tokens[:end]))
        # A decoder may still change the end of a text; the next token brings it.
        is_whole = text.startswith(shown) and (end == len(tokens) or not text.endswith(REPLACEMENT))
        texts.append(text[len(shown) :].replace(REPLACEMENT, "") if is_whole else "")
        shown = text if is_whole else shown
    return texts
