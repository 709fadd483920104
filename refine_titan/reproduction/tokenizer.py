"""The tokenizer of the reproduction: byte pairs of the retrieval corpus, one token a digit.

    python -m refine_titan.reproduction.tokenizer FOLDER    # writes FOLDER/tokenizer.json

Its 512 tokens make a document a quarter as long as bytes would, and keep the embeddings small. That a digit is a token lets a
value be copied one token at a time.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from refine_titan.data.synthetic import RetrievalCorpus
from refine_titan.data.words import ADJECTIVES, NOUNS
from refine_titan.monitoring.run_folder import write_atomically

VOCAB_SIZE = 512
NUM_DOCUMENTS = 300


def retrieval_tokenizer() -> Tokenizer:
    """The same tokenizer every time. Id 0 is end-of-sequence."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer


def _texts() -> Iterator[str]:
    """Documents of about 400 words, and every word that keys are made of."""
    corpus = RetrievalCorpus(_Words, num_tokens=400, num_needles=8, seed=0)
    yield from map(corpus.document, range(NUM_DOCUMENTS))
    yield from (f" {adjective}-" for adjective in ADJECTIVES)
    yield from (f"-{noun}" for noun in NOUNS)


class _Words:
    """Counts words where there are no tokens yet."""

    encode = staticmethod(str.split)


if __name__ == "__main__":
    write_atomically(Path(sys.argv[1], "tokenizer.json"), retrieval_tokenizer().to_str(pretty=True) + "\n")
