"""Decides which documents an evaluation reads: those of a source of its own, or the training data's documents that are held out."""

from dataclasses import replace

from refine_titan.config.sections import JobConfig
from refine_titan.data.holdout import held_out_part
from refine_titan.data.rows import DocumentSource
from refine_titan.data.sources import build_source


def held_out_source(config: JobConfig, tokenizer, tokens: int, seed: int, min_tokens: int = 0) -> tuple[DocumentSource, str]:
    """Builds the source that `evaluation.perplexity_source` names; without it the held-out part of `data.source`, or all of that if no part
    is held out.

    Args:
        tokens: length of generated documents.
        seed: seed of generated documents.
        min_tokens: as `data.min_document_tokens`.

    Returns:
        The source, and what a reader of the results must know of it, empty if nothing.

    Raises:
        UserError: if the source cannot be read.
    """
    own = config.evaluation.perplexity_source
    data = replace(config.data, min_document_tokens=min_tokens)
    if own:  # split and subset are of the training data
        data = replace(data, source=own, split="", subset="", holdout_percent=0.0)
        return build_source(data, tokenizer, tokens, seed, "evaluation.perplexity_source"), ""
    source = build_source(data, tokenizer, tokens, seed)
    if data.holdout_percent:
        return held_out_part(source, data), ""
    return source, f"documents of the training data's source, {data.source!r}"
