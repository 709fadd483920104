"""Questions in the rows of tables: one rule for prompts and answers, whoever reads them (post-training, evaluation, preparation)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow

from refine_titan.data.chat import NO_TEMPLATE, ChatTemplate, is_chat
from refine_titan.data.rows import Row, RowReader, text_row
from refine_titan.errors import UserError

# Columns that may hold answers if none is named.
ANSWER_COLUMNS = ("answers", "answer")


class QuestionRow(NamedTuple):
    """A `Row` with answers; `text` is the prompt."""

    text: str | None
    skip_reason: str = ""
    tokens: list[int] | None = None
    answers: tuple[str, ...] = ()


def question_row(prompt: Any, answers: Any, chat: ChatTemplate | None = None) -> QuestionRow:
    """Makes a row of the values that a file holds as prompt and answers, or of the reason to skip it.

    A prompt is a text, or a list of chat messages, which `chat` renders. Answers are a text or a list of texts; those that are null or
    blank are left out. Any other value makes the row one that is skipped.
    """
    for value in (prompt, answers):
        if isinstance(value, Row):
            return QuestionRow(None, value.skip_reason)
    if is_chat(prompt):
        if chat is None:
            return QuestionRow(None, f"prompt is {NO_TEMPLATE}")
        prompt = chat.render(prompt)
        if prompt is None:
            return QuestionRow(None, "prompt is a list of chat messages that the chat template refuses")
    text = text_row(prompt)
    if text.text is None:
        return QuestionRow(None, f"{text.skip_reason} prompt")
    if not text.text.strip():
        return QuestionRow(None, "empty prompt")
    found = usable_answers(answers)
    return QuestionRow(None, found) if isinstance(found, str) else QuestionRow(text.text, answers=found)


def usable_answers(value: Any) -> tuple[str, ...] | str:
    """The answers of a value that should be a text or a list of texts, without those that are null or blank; or why it has none."""
    rows = [text_row(answer) for answer in (value if isinstance(value, (list, tuple)) else [value])]
    wrong = next((row for row in rows if row.text is None and row.skip_reason not in ("null", "empty")), None)
    if wrong is not None:
        return f"{wrong.skip_reason} answer"
    return tuple(row.text for row in rows if row.text is not None and row.text.strip()) or "no answers"


class QuestionReader(RowReader):
    """Makes questions of rows.

    Attributes:
        has_chat: whether a file that was checked has prompts that are lists of chat messages.
    """

    checks_objects = True

    def __init__(self, prompt_column: str, answer_column: str, chat: ChatTemplate | None = None):
        """An empty `answer_column` stands for the first of `ANSWER_COLUMNS` that a file has."""
        self.prompt_column = prompt_column
        self.answer_columns = (answer_column,) if answer_column else ANSWER_COLUMNS
        self.chat, self.has_chat = chat, False

    def identity(self) -> list:
        rendered = [self.chat.sha256] if self.has_chat and self.chat else []
        return [self.prompt_column, *self.answer_columns, *rendered]

    def columns(self, names: Sequence[str], where: Path | str) -> list[str]:
        answers = self._answer_column(names)
        if self.prompt_column not in names:
            raise UserError(f"data.prompt_column is {self.prompt_column!r}; {where} has the columns: {', '.join(names)}")
        if answers is None:
            if len(self.answer_columns) == 1:
                raise UserError(f"data.answer_column is {self.answer_columns[0]!r}; {where} has the columns: {', '.join(names)}")
            raise UserError(
                f"data.answer_column is not set, and {where} has neither {' nor '.join(map(repr, ANSWER_COLUMNS))}; it has the "
                f"columns: {', '.join(names)}"
            )
        return [self.prompt_column, answers]

    def check_schema(self, schema: pyarrow.Schema, where: Path | str) -> None:
        super().check_schema(schema, where)
        of_prompt = schema.field(self.prompt_column).type
        if pyarrow.types.is_list(of_prompt) or pyarrow.types.is_large_list(of_prompt):
            item = of_prompt.value_type
            self._meet_chat(pyarrow.types.is_struct(item) and item.get_field_index("role") >= 0, where)

    def check_objects(self, objects: Sequence[Any], where: Path | str) -> None:
        """Checks the keys of the first objects taken together. A single object that lacks a key is skipped later."""
        objects = [value for value in objects if isinstance(value, dict)]
        names = list(dict.fromkeys(name for value in objects for name in value))
        if names:
            self.columns(names, where)
        self._meet_chat(any(is_chat(value.get(self.prompt_column)) for value in objects), where)

    def row(self, values: list[Any]) -> QuestionRow:
        return question_row(*values, chat=self.chat)

    def object_row(self, value: Any) -> QuestionRow:
        if not isinstance(value, dict) or self.prompt_column not in value:
            return QuestionRow(None, f"no key {self.prompt_column!r}")
        column = self._answer_column(list(value))
        return self.row([value[self.prompt_column], value[column] if column is not None else []])

    def skipped(self, reason: str) -> QuestionRow:
        return QuestionRow(None, reason)

    def _answer_column(self, names: Sequence[str]) -> str | None:
        return next((name for name in self.answer_columns if name in names), None)

    def _meet_chat(self, has_chat: bool, where: Path | str) -> None:
        self.has_chat |= has_chat
        if has_chat and self.chat is None:
            raise UserError(
                f"data.prompt_column: {self.prompt_column!r} of {where} is {NO_TEMPLATE} (model.hf_assets_path: chat_template.jinja, or "
                "chat_template in tokenizer_config.json)"
            )
