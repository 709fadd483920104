"""The tokenizer of bytes as files: the ids of `ByteTokenizer` in every library that reads them."""

import json
import sys

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from refine_titan.config.sections import JobConfig
from refine_titan.conversion.byte_tokenizer import END_OF_TEXT, byte_letters, byte_tokenizer_files, holds_byte_tokenizer
from refine_titan.conversion.to_hf import BYTES
from refine_titan.data.tokenizer import ByteTokenizer, PlainHuggingFaceTokenizer, load_tokenizer, tokenizer_sha256
from refine_titan.models.sizes import resolve_args
from tests.checkpoints import export, random_weights

# Every character in one byte, every two-byte one, and some of every block of three and four bytes: with these every byte of UTF-8.
CHARACTERS = [chr(i) for i in (*range(0x800), *range(0x800, 0xD800, 97), *range(0xE000, sys.maxunicode + 1, 997), sys.maxunicode)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    for name, content in byte_tokenizer_files().items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module", params=["tokenizers", "AutoTokenizer", "our own"])
def encode_and_decode(request, folder):
    """How a library encodes a text to ids and decodes them."""
    if request.param == "AutoTokenizer":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return lambda text: tokenizer.encode(text, add_special_tokens=False), tokenizer.decode
    if request.param == "our own":
        tokenizer = PlainHuggingFaceTokenizer(str(folder))
        return tokenizer.encode, tokenizer.decode
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: tokenizer.encode(text).ids, lambda ids: tokenizer.decode(ids, skip_special_tokens=False)


def test_letters_are_those_of_the_library():
    assert sorted(byte_letters()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert byte_letters()[ord("a")] == "a" and byte_letters()[ord(" ")] == "Ġ"


def test_every_character_has_its_bytes_as_ids(encode_and_decode):
    encode, decode = encode_and_decode
    seen = set()
    for text in [*CHARACTERS, "".join(CHARACTERS), "", " a  b\n\tc ", "naïve 漢字 \U0001f600"]:
        ids = encode(text)
        assert ids == ByteTokenizer().encode(text)
        assert decode(ids) == text
        seen.update(ids)
    assert seen == set(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}  # which UTF-8 never has


def test_every_id_stands_for_its_byte(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 257 and tokenizer.eos_token_id == 256 == ByteTokenizer().eos_id
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(257)] == [*byte_letters(), END_OF_TEXT]
    assert tokenizer.decode([0xF0, 0x9F]) == "\ufffd"  # half of a character


def test_it_is_recognised_also_after_a_library_has_saved_it(folder, tmp_path):
    assert isinstance(load_tokenizer(str(folder), "model.hf_assets_path"), ByteTokenizer)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() != (folder / "tokenizer.json").read_bytes()
    assert tokenizer_sha256(load_tokenizer(str(tmp_path), "model.hf_assets_path")) == tokenizer_sha256(ByteTokenizer())


@pytest.mark.parametrize("change", [("model", "merges", [["a", "b"]]), ("model", "vocab", {"a": 0}), ("pre_tokenizer", "use_regex", True)])
def test_another_tokenizer_is_not_taken_for_it(folder, tmp_path, change):
    section, name, value = change
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer[section][name] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert not holds_byte_tokenizer(tmp_path)


def test_an_export_has_what_auto_tokenizer_needs(tmp_path, hf_tokenizer_folder):
    args = resolve_args(JobConfig().model)
    exported = export(tmp_path / "a", args, random_weights(args), tokenizer=BYTES)
    assert AutoTokenizer.from_pretrained(exported).encode("é") == [0xC3, 0xA9]
    exported = export(tmp_path / "b", args, random_weights(args), tokenizer=hf_tokenizer_folder)  # it has no tokenizer_config.json
    expected = PlainHuggingFaceTokenizer(str(hf_tokenizer_folder)).encode("The quick brown fox")
    assert AutoTokenizer.from_pretrained(exported).encode("The quick brown fox", add_special_tokens=False) == expected
