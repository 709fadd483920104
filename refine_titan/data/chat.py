"""Renders lists of chat messages as text, with the chat template of a tokenizer."""

import hashlib
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.tools.logging import logger

from refine_titan.errors import UserError
from refine_titan.files.git_lfs import refuse_lfs_pointer
from refine_titan.files.limits import check_small_file
from refine_titan.models.model_config import read_json

TEMPLATE_FILE = "chat_template.jinja"
# Files that may hold the template and the special tokens that it names; later ones count more.
CONFIG_FILES = ("special_tokens_map.json", "tokenizer_config.json")
# Templates that ask for the date get Llama's default one, so that a run that resumes on another day reads the same prompts.
DATE = datetime(2024, 7, 26)
# Exceptions of the Python operators in a template that meet messages of another shape.
RENDERING_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
NO_TEMPLATE = "a list of chat messages, and the tokenizer has no chat template"


def is_chat(value: Any) -> bool:
    """Whether a value is a list of chat messages: objects with a role."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and "role" in item for item in value)


class ChatTemplate:
    """The chat template of a tokenizer. Jinja runs it in the sandbox of transformers, where it reaches nothing but its variables."""

    def __init__(self, source: str, special_tokens: dict[str, str], where: str):
        """
        Args:
            source: the template.
            special_tokens: values of `bos_token`, `eos_token` and others that the template may name.
            where: file that holds the template, for messages.
        """
        self.source, self.special_tokens, self.where = source, special_tokens, where
        self._has_refused = False

    @classmethod
    def of_tokenizer(cls, tokenizer: BaseTokenizer) -> "ChatTemplate | None":
        """The template beside a tokenizer: `chat_template.jinja`, or the one in `tokenizer_config.json`; None for none.

        Raises:
            UserError: a file cannot be read, or holds something that is no template.
        """
        path = getattr(tokenizer, "tokenizer_path", None)
        if path is None:
            return None
        folder, values = Path(path), {}
        for name in CONFIG_FILES:
            values |= read_json(folder / name) if (folder / name).is_file() else {}
        named = {key: value.get("content") if isinstance(value, dict) else value for key, value in values.items()}
        special_tokens = {key: value for key, value in named.items() if key.endswith("_token") and isinstance(value, str)}
        if (folder / TEMPLATE_FILE).is_file():
            source, where = _read_text(folder / TEMPLATE_FILE), TEMPLATE_FILE
        else:
            source, where = values.get("chat_template"), CONFIG_FILES[-1]
        if isinstance(source, list):  # several templates with names
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        if source is not None and not isinstance(source, str):
            raise UserError(f"{folder / where}: chat_template is {source!r:.80}; allowed: a text, or a list of named ones")
        return cls(source, special_tokens, str(folder / where)) if source else None

    @property
    def sha256(self) -> str:
        """Hash of everything that decides what messages become."""
        return hashlib.sha256(repr([self.source, sorted(self.special_tokens.items())]).encode("utf-8", "surrogatepass")).hexdigest()

    def render(self, messages: list[dict[str, Any]]) -> str | None:
        """Renders messages up to where the answer begins: after the prompt of an assistant, or within the assistant's last message.

        Returns:
            None if the template refuses the messages; the first reason is logged.

        Raises:
            UserError: the template is not valid.
        """
        # A column of a table has every key in every message; a message without it and one with null are the same.
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        goes_on, render = messages[-1]["role"] == "assistant", self._render
        try:
            [text], _ = render(
                [messages],
                chat_template=self.source,
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
                strftime_now=DATE.strftime,
                **self.special_tokens,
            )
        except RENDERING_ERRORS as error:
            if not self._has_refused:
                self._has_refused = True
                logger.warning(f"The chat template of {self.where} refuses messages: {error}")
            return None
        return text

    @cached_property
    def _render(self):
        from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

        try:
            _compile_jinja_template(self.source)
        except RENDERING_ERRORS as error:
            raise UserError(f"{self.where} is not a chat template: {error}") from error
        return render_jinja_template


def _read_text(path: Path) -> str:
    try:
        check_small_file(path)
        refuse_lfs_pointer(path)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
