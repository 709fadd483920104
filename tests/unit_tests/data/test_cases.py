"""The inputs about data and tokenizers that people have reported, as one script writes them, through the dry run: what each must give."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from refine_titan.train import main
from tests.conftest import ORACLES

SCRIPT = ORACLES.parent / "cases" / "make_cases.py"
POST = ["--refine.phase", "posttrain", "--posttrain.outer", "sft", "--posttrain.answer_tokens", "32"]
ODD = ["--data.prompt_column", "input", "--data.answer_column", "outputs"]


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Path:
    if not SCRIPT.is_file():
        pytest.skip(f"the script of the cases is not at {SCRIPT}")
    spec = importlib.util.spec_from_file_location("make_cases", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("cases")
    module.documents(folder / "data")
    module.tokenizers(folder / "tokenizers")
    with_template = folder / "tokenizers" / "with_template"
    with_template.mkdir()
    for path in (folder / "tokenizers" / "vocab_and_merges").iterdir():
        (with_template / path.name).write_bytes(path.read_bytes())
    template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    (with_template / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "chat_template": template}))
    return folder


@pytest.mark.parametrize(
    "source, arguments, expected",
    [
        ("data/bom.jsonl", [], "1 file(s), 9,927 bytes, 6 row(s): bom.jsonl"),
        ("data/array.json", [], "1 file(s), 9,930 bytes, 6 row(s): array.json"),
        ("data/packed.jsonl.gz", [], ", 6 row(s): packed.jsonl.gz"),
        ("data/upper.JSONL", [], "1 file(s), 9,924 bytes, 6 row(s): upper.JSONL"),
        ("data/folder", [], ", 24 row(s): a.jsonl, b.jsonl.gz, c.JSONL, d.jsonl\n  left out, 1 (hidden): .ipynb_checkpoints"),
        ("data/chat.jsonl", [], "error: .*6 no key 'text', and 'prompt' is a list of chat messages"),
        (
            "data/chat.jsonl",
            POST,
            "error: data.prompt_column: 'prompt' of .*chat.jsonl is a list of chat messages, and the tokenizer has no",
        ),
        ("data/chat.jsonl", [*POST, "--model.hf_assets_path", "tokenizers/with_template"], ": '<user>Document 3. word8 stands"),
        ("data/odd_answers.jsonl", [*POST, *ODD], "odd_answers.jsonl:3: 'Document 3."),
        ("data/bom.jsonl", ["--model.hf_assets_path", "tokenizers/vocab_and_merges"], "vocab_and_merges, 280 of 288 embeddings used"),
        ("data/bom.jsonl", ["--model.hf_assets_path", "tokenizers/pointer"], "error: .*tokenizer.json is a Git LFS pointer, not the file"),
    ],
)
def test_the_dry_run_reads_what_people_have(cases, monkeypatch, capsys, source, arguments, expected):
    monkeypatch.chdir(cases)
    monkeypatch.setenv("WORLD_SIZE", "1")
    run = ["--dry-run", "--data.source", source, "--training.seq_len", "512", "--training.mixed_precision_param", "float32"]
    status = main([*run, "--data.min_document_tokens", "100", *arguments])
    printed = capsys.readouterr()
    if expected.startswith("error: "):
        [line] = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert status == 1 and re.match(expected, line)
    else:
        assert status == 0 and expected in printed.out
