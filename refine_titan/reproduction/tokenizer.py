"""Makes the tokenizers of the experiments: byte-pair encoding with one token for each digit.

    python -m refine_titan.reproduction.tokenizer FOLDER            # of the retrieval corpus; writes FOLDER/tokenizer.json
    python -m refine_titan.reproduction.tokenizer FOLDER --python   # of the sources of Python's standard library

The retrieval corpus needs 512 tokens: they make documents a quarter as long as bytes would, and keep the embeddings small. A model can
copy a number one digit, that is one token, at a time. Python sources get 2,048 tokens, of 2.5 characters each.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from refine_titan.data.sources import standard_library
from refine_titan.data.synthetic import RetrievalCorpus
from refine_titan.data.words import ADJECTIVES, NOUNS
from refine_titan.files.whole_files import write_atomically

RETRIEVAL_TOKENS, PYTHON_TOKENS = 512, 2048
NUM_DOCUMENTS = 300


def retrieval_tokenizer() -> Tokenizer:
    """Trains the tokenizer of the retrieval corpus, with the same result every time. Id 0 is the end-of-sequence token."""
    return _train(_texts(), RETRIEVAL_TOKENS)


def python_tokenizer() -> Tokenizer:
    """Trains the tokenizer of this Python's standard library. Id 0 is the end-of-sequence token."""
    return _train((path.read_text(encoding="utf-8", errors="replace") for path in standard_library()), PYTHON_TOKENS)


def _train(texts: Iterator[str], num_tokens: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _texts() -> Iterator[str]:
    """Yields documents of about 400 words, and every word that keys are made of."""
    corpus = RetrievalCorpus(_Words, num_tokens=400, num_needles=8, seed=0)
    yield from map(corpus.document, range(NUM_DOCUMENTS))
    yield from (f" {adjective}-" for adjective in ADJECTIVES)
    yield from (f"-{noun}" for noun in NOUNS)


class _Words:
    """Stands in for the tokenizer that does not exist yet: counts words instead of tokens."""

    encode = staticmethod(str.split)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m refine_titan.reproduction.tokenizer", description="Makes a tokenizer of the experiments."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="gets tokenizer.json")
    parser.add_argument("--python", action="store_true", help="of Python's standard library (default: of the retrieval corpus)")
    options = parser.parse_args()
    make = python_tokenizer if options.python else retrieval_tokenizer
    write_atomically(options.folder / "tokenizer.json", make().to_str(pretty=True) + "\n")
