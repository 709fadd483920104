"""Next-token loss by position in long documents, which shows whether a model's memory still helps far into a text.

A document is read in pieces, each from the states at the end of the piece before it, so that memory does not grow with its length.
The head computes losses without `[T, V]` logits. Legend: T tokens of a document, V tokens of vocabulary.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from refine_kernels.linear_head import IGNORE_INDEX
from refine_titan.benchmarks.samples import Sample, TaskSamples
from refine_titan.config.sections import JobConfig
from refine_titan.data.rows import DocumentSource
from refine_titan.data.shards import is_prepared
from refine_titan.errors import UserError
from refine_titan.evaluation.held_out import held_out_source
from refine_titan.models.shared_prefix import SharedPrefixLayout
from refine_titan.rollout.continuation import Model
from refine_titan.rollout.engine import EngineError
from refine_titan.rollout.native_completion import READ_TOKENS

TASK = "perplexity"
# Number of documents if `evaluation.num_samples` is 0.
DEFAULT_DOCUMENTS = 100


@dataclass(frozen=True)
class PositionLosses:
    """Mean next-token loss of a document in bins of positions.

    Attributes:
        positions: first position of each bin. Position 0 is the document's first token, which has no loss.
        nll_by_position: mean loss of each bin, in nats a token.
        nll: mean loss over all positions.
        accuracy: share of the positions whose token is the likeliest one.
    """

    positions: list[int]
    nll_by_position: list[float]
    nll: float
    accuracy: float


def token_losses(model: Model, tokens_T: torch.Tensor, piece_tokens: int = READ_TOKENS) -> torch.Tensor:
    """Computes the loss of each token but the first, given all tokens before it: `[T - 1]`, float32, on the CPU."""
    return read_tokens(model, tokens_T, piece_tokens)[0]


@torch.no_grad()
def read_tokens(model: Model, tokens_T: torch.Tensor, piece_tokens: int = READ_TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes `token_losses`, and whether each of these tokens is the likeliest one: `[T - 1]`, bool, on the CPU."""
    states, losses, hits = None, [], []
    labels_T = torch.cat([tokens_T[1:], tokens_T.new_full((1,), IGNORE_INDEX)])
    for tokens, labels in zip(tokens_T.split(piece_tokens), labels_T.split(piece_tokens)):
        count = tokens.shape[0]
        out = model(tokens, SharedPrefixLayout((0, count), state_positions=(count,)), initial_states=states, labels=labels)
        states = [layer.detach() for layer in out.states]
        losses.append(out.losses.nll_T.float().cpu())
        hits.append(out.losses.hit_T.cpu())
    return torch.cat(losses)[:-1], torch.cat(hits)[:-1]


def bin_losses(losses: torch.Tensor, hits: torch.Tensor, bin_tokens: int) -> PositionLosses:
    """Averages the result of `read_tokens` over bins of `bin_tokens` positions; the last bin may be shorter."""
    padded = torch.cat([losses.new_zeros(1), losses]).double()  # index t now holds the loss of position t
    positions = list(range(0, padded.shape[0], bin_tokens))
    means = [float(padded[max(p, 1) : p + bin_tokens].mean()) for p in positions if p > 0 or bin_tokens > 1]
    return PositionLosses(positions[-len(means) :], means, float(losses.double().mean()), float(hits.double().mean()))


def document_losses(sample: Sample, model: Model, tokenizer, device: torch.device, bin_tokens: int) -> tuple[PositionLosses, float]:
    """Computes the losses of a document's first `sample.length` tokens; returns them and the seconds that this took.

    Raises:
        EngineError: if the losses are not finite.
    """
    begin = time.perf_counter()
    tokens_T = torch.tensor(tokenizer.encode(sample.prompt)[: sample.length], device=device)
    losses = bin_losses(*read_tokens(model, tokens_T), bin_tokens)
    if not math.isfinite(losses.nll):
        raise EngineError(f"the loss of document {sample.index} of {TASK} is {losses.nll}: the model's outputs are not finite")
    return losses, time.perf_counter() - begin


def count_forwards(sample: Sample) -> int:
    """Forwards in which `document_losses` reads a document."""
    return -(-sample.length // READ_TOKENS)


def load_documents(config: JobConfig, tokenizer) -> TaskSamples:
    """Loads documents of `evaluation.perplexity_source` as samples whose prompt is the text.

    A sample's length is `evaluation.perplexity_tokens`; shorter documents are skipped and counted.

    Raises:
        UserError: if the source cannot be read or has no document that is long enough.
    """
    settings = config.evaluation
    name = settings.perplexity_source or config.data.source
    tokens = settings.perplexity_tokens or config.training.seq_len
    wanted = settings.num_samples or DEFAULT_DOCUMENTS
    if is_prepared(Path(name)):
        setting, way = "data.source", "name files of text as evaluation.perplexity_source"
        if settings.perplexity_source:
            setting, way = "evaluation.perplexity_source", "name the files from which it was made"
        raise UserError(f"{setting} is {name!r}, prepared data, which holds tokens; perplexity reads text: {way}")
    source, note = held_out_source(config, tokenizer, tokens, settings.seed)
    samples, skipped = [], {}
    for number, text, reason in _texts(source):
        if reason is None and len(tokenizer.encode(text)) < tokens:
            reason = "document too short"
        if reason is not None:
            skipped[reason] = skipped.get(reason, 0) + 1
            continue
        samples.append(Sample(TASK, TASK, number, text, (), 0, tokens))
        if len(samples) == wanted:
            break
    if not samples:
        counts = ", ".join(f"{reason}: {count}" for reason, count in skipped.items()) or "no documents"
        raise UserError(
            f"evaluation.perplexity_tokens: no document of {name!r} has {tokens} tokens ({counts}); lower it, or give another "
            "evaluation.perplexity_source or data.text_column"
        )
    return TaskSamples(TASK, samples, skipped, (f"perplexity: {note}",) if note else ())


def _texts(source: DocumentSource) -> Iterator[tuple[int, str | None, str | None]]:
    """Yields number, text and reason to skip of every row; text or reason is None."""
    number = 0
    for file in range(source.num_files()):
        for _, row in source.rows(file, 0):
            yield number, row.text, None if row.text is not None else row.skip_reason
            number += 1
