"""Rollouts are read token by token: each token's text, and none for parts of characters."""

from refine_titan.config.sections import JobConfig
from refine_titan.data.tokenizer import build_tokenizer
from refine_titan.monitoring.token_texts import token_texts


def test_each_token_has_the_text_that_it_adds():
    tokenizer = build_tokenizer(JobConfig())  # bytes

    def texts(content: bytes, *ids: int) -> list[str]:
        return token_texts(tokenizer, [*content, *ids])

    assert texts(b"a b\n") == ["a", " ", "b", "\n"]
    assert texts("aé日".encode()) == ["a", "", "é", "", "", "日"]
    assert texts(b"\xddD\x8e") == ["", "D", ""]  # bytes that are no character
    assert texts(b"x", 300) == ["x", ""]  # beyond the vocabulary
    assert texts(b"") == []
