"""Opens the streams of a run's data, as `[data]` and the phase say."""

from collections.abc import Callable

from torchtitan.components.tokenizer import BaseTokenizer

from refine_titan.config.phases import has_rollouts
from refine_titan.config.sections import JobConfig
from refine_titan.data.documents import DocumentStream
from refine_titan.data.holdout import training_part
from refine_titan.data.questions import build_question_source, build_question_stream
from refine_titan.data.sources import build_source
from refine_titan.objective.positions import MARGIN


def stream_opener(config: JobConfig, tokenizer: BaseTokenizer) -> Callable[[int, int], DocumentStream]:
    """Opens the source of the data once; returns a function that makes stream `number` of `num_streams` of it.

    Raises:
        UserError: the source cannot be read.
    """
    data, training, seed = config.data, config.training, config.debug.seed
    if config.refine.phase == "posttrain":
        questions, min_tokens = build_question_source(config, tokenizer), least_prompt_tokens(config)
        return lambda number, num_streams: build_question_stream(
            config, questions, tokenizer, min_tokens=min_tokens, number=number, num_streams=num_streams
        )
    source = training_part(build_source(data, tokenizer, training.seq_len, seed), data)
    return lambda number, num_streams: DocumentStream(
        source,
        tokenizer,
        seq_len=training.seq_len,
        min_tokens=data.min_document_tokens or training.seq_len,
        split_long=data.long_documents == "split",
        shuffle_buffer=data.shuffle_buffer,
        seed=seed,
        number=number,
        num_streams=num_streams,
    )


def least_prompt_tokens(config: JobConfig) -> int:
    """Length in tokens of the shortest prompt that is trained on, in post-training or at test time."""
    # Rollouts keep a margin from both ends of a document, and every chunk needs a token. Without rollouts the outer step reads a prompt up
    # to its last token, and a next-token loss needs a label.
    needed = max(2 * MARGIN + 1, config.refine.num_chunks) if has_rollouts(config) else 2
    return max(needed, config.data.min_document_tokens) if config.refine.phase == "posttrain" else needed
