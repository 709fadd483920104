"""Decides which documents an evaluation reads: those of a source of its own, or the training data's documents that are held out."""

from dataclasses import replace
from pathlib import Path

from refine_titan.config.reading import DATASET_PREFIX
from refine_titan.config.sections import JobConfig
from refine_titan.data.hf_datasets import names_dataset
from refine_titan.data.holdout import held_out_part
from refine_titan.data.rows import DocumentSource
from refine_titan.data.shards import is_prepared, read_manifest
from refine_titan.data.sources import WORDS, build_source
from refine_titan.hub.names import hub_name


def held_out_source(config: JobConfig, tokenizer, tokens: int, seed: int, min_tokens: int = 0) -> tuple[DocumentSource, str]:
    """Builds the source that `evaluation.perplexity_source` names; if that is empty, or the same as `data.source`, the held-out part of
    `data.source`, or all of that if no part is held out.

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
    setting = "evaluation.perplexity_source" if own else "data.source"
    data = replace(config.data, min_document_tokens=min_tokens)
    if own and _in_full(own) != _in_full(data.source):
        note = f"documents of {own!r}, some of which may be among those of the training data's source, {data.source!r}"
        other = replace(data, source=own, split="", subset="", holdout_percent=0.0)  # these are of the training data
        return build_source(other, tokenizer, tokens, seed, setting), note if _may_share_documents(own, data.source) else ""
    source = build_source(data, tokenizer, tokens, seed, setting)
    if data.holdout_percent:
        return held_out_part(source, data), ""
    return source, f"documents of the training data's source, {data.source!r}"


def _in_full(source: str) -> str:
    """A source in one of the ways in which it may be written: with its whole path, if it has one."""
    path, prefix = Path(source.removeprefix(DATASET_PREFIX)), DATASET_PREFIX if names_dataset(source) else ""
    return source if source in WORDS or not path.exists() else f"{prefix}{path.resolve()}"


def _may_share_documents(one: str, other: str) -> bool:
    """Whether two sources are one place that is read in two ways, or one lies in the other, or is prepared from it, or both are revisions
    of one repository. Copies elsewhere are not noticed."""
    paths = [Path(source.removeprefix(DATASET_PREFIX)) for source in (one, other)]
    if all(path.exists() for path in paths):
        first, second = (path.resolve() for path in paths)
        if first.is_relative_to(second) or second.is_relative_to(first):
            return True
        return (is_prepared(first) or is_prepared(second)) and not _files(first).isdisjoint(_files(second))
    names = [hub_name(path) for path in paths]
    return None not in names and names[0].repository == names[1].repository


def _files(path: Path) -> set[tuple[str, int]]:
    """Names and sizes of the files of a source, or of those from which it was prepared."""
    if is_prepared(path):
        return {(Path(file["name"]).name, file["bytes"]) for file in read_manifest(path)["inputs"]}
    files = [path] if path.is_file() else path.rglob("*")
    return {(file.name, file.stat().st_size) for file in files if file.is_file()}
