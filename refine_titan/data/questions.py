"""Prompts with answers, for post-training: reads them from files and turns rows into the tokens of a prompt and its answer."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.tools.logging import logger

from refine_titan.config.sections import JobConfig
from refine_titan.data.chat import ChatTemplate
from refine_titan.data.documents import Document, DocumentAddress, DocumentStream
from refine_titan.data.file_source import TABLE_FORMATS, FileSource
from refine_titan.data.hf_datasets import names_dataset, open_dataset
from refine_titan.data.question_rows import QuestionReader, QuestionRow
from refine_titan.data.rows import DocumentSource
from refine_titan.data.shards import check_shards, is_prepared, read_manifest
from refine_titan.data.sources import SyntheticSource, check_format, list_files, refuse_part_of_whole
from refine_titan.data.synthetic import RetrievalCorpus
from refine_titan.errors import UserError


@dataclass(frozen=True)
class Question:
    """A prompt and its answer in tokens.

    Attributes:
        prompt: tokens of the prompt, cut to what the run has room for.
        answer: tokens of the first answer, cut to `posttrain.answer_tokens`.
        references: all answers, as text.
        cut_tokens, cut_answer_tokens: number of tokens that were cut out of the prompt, and off the end of the answer.
    """

    prompt: list[int]
    answer: list[int]
    references: tuple[str, ...]
    cut_tokens: int = 0
    cut_answer_tokens: int = 0


def cut_tokens(tokens: Sequence[int], limit: int, where: Literal["middle", "right"]) -> list[int]:
    """Cuts tokens to at most `limit`: `right` keeps the first ones; `middle` keeps the first and the last half, as LongBench does.

    With `middle` and an odd limit, the end, where the question stands, keeps one token more.
    """
    if len(tokens) <= limit:
        return list(tokens)
    head = limit if where == "right" else limit // 2
    return [*tokens[:head], *tokens[len(tokens) - (limit - head) :]]


class SyntheticQuestionSource(SyntheticSource):
    """Endless generated questions; row i is a function of (seed, i)."""

    def identity(self) -> list:
        return ["synthetic questions", self.corpus.num_tokens, self.corpus.num_needles]

    def rows_again(self, file: int, numbers: set[int]) -> dict[int, QuestionRow]:
        return {row: self._row(row) for row in numbers}

    def rows(self, file: int, first_row: int, stride: int = 1) -> Iterator[tuple[int, QuestionRow]]:
        for row in itertools.count(first_row, stride):
            yield row, self._row(row)

    def _row(self, number: int) -> QuestionRow:
        prompt, answer = self.corpus.question(number)
        return QuestionRow(prompt, answers=(answer,))


@dataclass
class QuestionDocument(Document):
    """A prompt as a document, with its question."""

    question: Question


class QuestionStream(DocumentStream):
    """One share of a source of questions, read again and again; its documents are prompts.

    Prompts and answers that are too long are cut, counted in the first pass, and reported once.
    """

    def __init__(
        self,
        source: DocumentSource,
        tokenizer: BaseTokenizer,
        *,
        max_prompt_tokens: int,
        max_answer_tokens: int,
        cut: Literal["middle", "right"],
        answer_prefix: str,
        append_eos: bool,
        **stream: Any,
    ):
        self.max_answer_tokens, self.cut_where = max_answer_tokens, cut
        self.answer_prefix, self.append_eos = answer_prefix, append_eos
        self.cut: dict[str, int] = {}
        super().__init__(source, tokenizer, seq_len=max_prompt_tokens, split_long=False, **stream)

    def _compute_identity(self) -> dict[str, Any]:
        identity = super()._compute_identity()
        identity["training.seq_len - posttrain.answer_tokens"] = identity.pop("training.seq_len")
        identity["data.min_document_tokens, or what rollouts need,"] = identity.pop("data.min_document_tokens")
        return identity | {
            "posttrain.answer_tokens": self.max_answer_tokens,
            "data.cut": self.cut_where,
            "posttrain.answer_prefix": self.answer_prefix,
            "posttrain.append_eos": self.append_eos,
        }

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"cut": dict(self.cut)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.cut = dict(state["cut"])

    def _read_document(self) -> QuestionDocument | None:
        document = super()._read_document()
        if document is not None and self.epoch == 0:
            question, name = document.question, f"{self.source.file_name(document.address.file)} row {document.address.row}"
            if question.cut_tokens:
                self._count("prompts", f"first {name}: {question.cut_tokens} tokens out of its {self.cut_where}")
            if question.cut_answer_tokens:
                self._count("answers", f"first {name}: {question.cut_answer_tokens} tokens off its end")
        return document

    def _count(self, what: str, first: str) -> None:
        self.cut[what] = self.cut.get(what, 0) + 1
        if self.cut[what] == 1:
            logger.warning(f"Cutting {what} that are too long, {first}; the summary at the end of the run counts them")

    def _skip_reason(self, content: QuestionRow) -> str:
        return content.skip_reason or "answer without tokens"

    def _tokens(self, content: QuestionRow) -> Question | None:
        if content.text is None:
            return None
        prompt = self.tokenizer.encode(content.text)
        answer = self.tokenizer.encode(self.answer_prefix + content.answers[0])
        if not answer:  # the tokenizer knows none of its characters
            return None
        if self.append_eos:
            answer = [*answer, self.tokenizer.eos_id]
        kept = cut_tokens(prompt, self.seq_len, self.cut_where)
        return Question(
            kept,
            answer[: self.max_answer_tokens],
            content.answers,
            len(prompt) - len(kept),
            max(len(answer) - self.max_answer_tokens, 0),
        )

    def _pieces(self, file: int, row: int, question: Question | list) -> list[QuestionDocument]:
        if not question or len(question.prompt) < self.min_tokens:
            return []
        return [QuestionDocument(DocumentAddress(file, row, 0), question.prompt, question)]


def build_question_source(config: JobConfig, tokenizer: BaseTokenizer) -> DocumentSource:
    """Builds the source that `[data] source` names for post-training.

    Raises:
        UserError: the path does not exist or holds no readable file, or a file lacks the columns, or `data.split` or `data.subset` is set
            and the source is read whole.
    """
    refuse_part_of_whole(config.data)
    data, room = config.data, config.training.seq_len - config.posttrain.answer_tokens
    if data.source == "synthetic":
        corpus = RetrievalCorpus(tokenizer, num_tokens=room, num_needles=data.synthetic_needles, seed=config.debug.seed)
        return SyntheticQuestionSource(corpus)
    path, reader = Path(data.source), QuestionReader(data.prompt_column, data.answer_column, ChatTemplate.of_tokenizer(tokenizer))
    if data.source == "python-stdlib":
        raise UserError(
            f"data.source is {data.source!r}; post-training takes prompts with answers: 'synthetic', or a file or folder of files "
            f"ending in {', '.join(TABLE_FORMATS)}"
        )
    if names_dataset(data.source):
        return open_dataset(data.source, data.split, data.subset, reader)
    if path.is_file():
        check_format(path, TABLE_FORMATS, f"data.source is {data.source!r}; post-training takes prompts with answers")
        return FileSource([path], reader, path)
    if is_prepared(path):
        manifest = read_manifest(path)
        if manifest["kind"] != "questions":
            raise UserError(f"data.source: {path} holds {manifest['kind']}, not questions; post-training reads questions")
        return FileSource(check_shards(path, manifest), QuestionReader("prompt", "answers"), path)
    if path.is_dir():
        content = list_files(path, [f for f in TABLE_FORMATS if f != ".json"])
        return FileSource(content.files, reader, path, content)
    raise UserError(f"data.source is {data.source!r}: no such file or folder; or use 'synthetic', or owner/name of a data set of the Hub")


def build_question_stream(
    config: JobConfig,
    source: DocumentSource,
    tokenizer: BaseTokenizer,
    *,
    min_tokens: int,
    number: int,
    num_streams: int,
) -> QuestionStream:
    """Builds share `number` of `num_streams` shares of a source, with the settings of the job."""
    data, posttrain = config.data, config.posttrain
    if posttrain.append_eos and tokenizer.eos_id is None:
        raise UserError(
            f"posttrain.append_eos = true, but the tokenizer of {config.model.hf_assets_path!r} has no end-of-sequence token "
            "(tokenizer_config.json names it)"
        )
    return QuestionStream(
        source,
        tokenizer,
        max_prompt_tokens=config.training.seq_len - posttrain.answer_tokens,
        max_answer_tokens=posttrain.answer_tokens,
        cut=data.cut,
        answer_prefix=posttrain.answer_prefix,
        append_eos=posttrain.append_eos,
        min_tokens=min_tokens,
        shuffle_buffer=data.shuffle_buffer,
        seed=config.debug.seed,
        number=number,
        num_streams=num_streams,
    )
