"""A small Hugging Face tokenizer, trained on the spot; what a command changes in its process is taken back."""

import logging
import signal
import warnings
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from refine_titan.benchmarks.ruler.haystacks import SubstituteEssays
from refine_titan.data.tokenizer import ByteTokenizer, PlainHuggingFaceTokenizer


@pytest.fixture(scope="session")
def hf_tokenizer_folder(tmp_path_factory) -> Path:
    """Byte-pair encoding with sentencepiece's spaces and byte fallback, as the 32,000-word vocabularies of the real models."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    special_tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=special_tokens, show_progress=False)
    tokenizer.train_from_iterator(SubstituteEssays().sentences(1000), trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def hf_tokenizer(hf_tokenizer_folder) -> PlainHuggingFaceTokenizer:
    return PlainHuggingFaceTokenizer(str(hf_tokenizer_folder))


@pytest.fixture(scope="session", params=["bytes", "bpe"])
def tokenizer(request):
    return ByteTokenizer() if request.param == "bytes" else request.getfixturevalue("hf_tokenizer")


@pytest.fixture
def this_process_stays_as_it_is(monkeypatch):
    """Commands that run in this process change its log, its warnings and its signals."""
    root = logging.getLogger()
    handlers, level, numbers = root.handlers[:], root.level, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    signals = {number: signal.getsignal(number) for number in numbers}
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for number, handler in signals.items():
        signal.signal(number, handler)
