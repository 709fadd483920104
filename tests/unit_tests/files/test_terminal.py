"""Names from files reach the terminal without control characters, and Markdown without markup, links or images."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchtitan.tools.logging import logger

from refine_titan.commands.main import main
from refine_titan.conversion.dcp_metadata import DamagedCheckpoint
from refine_titan.conversion.from_hf import from_hf
from refine_titan.data.file_source import FileSource
from refine_titan.data.rows import TextReader
from refine_titan.data.sources import list_files
from refine_titan.errors import ExtensionError, UserError, printable
from refine_titan.models import FAMILIES
from refine_titan.report.comparison import compare
from refine_titan.report.comparison_report import markdown_report
from refine_titan.report.markdown import as_text, results_page
from refine_titan.report.results import write_results
from refine_titan.terminal import EscapedRecord, show
from tests.checkpoints import random_weights, write_hf_folder
from tests.evaluation_runs import sample_lines, write_run

# Clears the screen, sets the title, moves up, hides; a forged line; reversed text; half of a surrogate pair.
HOSTILE = "x\x1b[2J\x1b]0;title\x07\x1b[1A\x9b8m\rerror: all is well\nerror: forged\u202e\ud800\u2028"
ESCAPED = "x\\x1b[2J\\x1b]0;title\\x07\\x1b[1A\\x9b8m\\rerror: all is well\\nerror: forged\\u202e\\ud800\\u2028"
ARGS = replace(FAMILIES["delta_net"].flavors["debug"], n_layers=1, vocab_size=8)


def test_printable_escapes_what_does_more_than_stand_on_a_line():
    assert printable(HOSTILE) == ESCAPED and printable("naïve 漢字 \U0001f600") == "naïve 漢字 \U0001f600"
    assert printable("a\tb\nc\x1b", kept="\t\n") == "a\tb\nc\\x1b"


@pytest.mark.parametrize("error", [UserError(HOSTILE), ExtensionError(HOSTILE), DamagedCheckpoint(Path(HOSTILE), HOSTILE)])
def test_every_error_of_a_user_is_one_printable_line(error):
    assert ESCAPED in str(error) and printable(error) == str(error)


def test_log_records_are_printable(caplog):
    # vLLM's factory, once it is imported, adds to what the one before it makes.
    assert isinstance(logging.getLogRecordFactory()("n", logging.INFO, "p", 1, "text", (), None), EscapedRecord)

    def message(path: str, text: str) -> str:
        return EscapedRecord("n", logging.INFO, path, 1, "%s", (text,), None).getMessage()

    assert message("/a/refine_titan/b.py", HOSTILE) == ESCAPED
    assert message("/a/other/b.py", HOSTILE) == ESCAPED.replace("\\n", "\n")
    assert message("/a/torchtitan/b.py", "\x1b[31mred\x1b[0m\x1b[2J") == "red\\x1b[2J"
    logger.warning(HOSTILE)
    assert caplog.messages == [ESCAPED.replace("\\n", "\n")]


def run_tool(capsys, tool: str, *arguments) -> str:
    """Everything that a tool writes."""
    main([tool, *map(str, arguments)])
    return "".join(capsys.readouterr())


def assert_printable(text: str) -> None:
    assert printable(text, kept="\n\t") == text and "\\x1b" in text
    assert not any(line.startswith("error: forged") for line in text.splitlines())


def test_keys_and_tensors_of_a_checkpoint_are_shown_escaped(tmp_path, capsys):
    name = HOSTILE.replace("\ud800", "")
    hf = write_hf_folder(tmp_path / "hf", ARGS, random_weights(ARGS))
    from_hf(hf, tmp_path / "dcp")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {HOSTILE: HOSTILE}))
    assert_printable(run_tool(capsys, "convert", "inspect", hf))
    assert_printable(run_tool(capsys, "convert", "from-hf", hf, tmp_path / "out"))
    (hf / "config.json").write_text(json.dumps(config))
    save_file(random_weights(ARGS) | {name: torch.ones(1)}, hf / "model.safetensors", metadata={"format": "pt"})
    assert_printable(run_tool(capsys, "convert", "inspect", hf))
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: "../" + name}}))
    assert_printable(run_tool(capsys, "convert", "inspect", hf))


def test_names_of_data_files_are_shown_escaped(tmp_path, capsys):
    name = HOSTILE.replace("\ud800", "")
    (tmp_path / f"{name}.jsonl").write_text('{"text": "a b c"}\n')
    (tmp_path / f"{name}.bin").write_text("")
    content = list_files(tmp_path, [".jsonl"])
    show("\n".join(map(printable, FileSource(content.files, TextReader("text"), tmp_path, content).description())))
    assert_printable(capsys.readouterr().out)
    arguments = ("--input", tmp_path, "--tokenizer", "bytes", "--output", tmp_path.parent / f"{tmp_path.name}-out", "--workers", 1)
    run_tool(capsys, "prepare", "run", *arguments)
    assert_printable(run_tool(capsys, "prepare", "show", arguments[5]))


LINKS = "[a](http://evil.example/?x) ![b](https://evil.example/i.png) <img src=x> www.evil.example me@evil.example `c` &lt;b&gt; | d"


def test_markdown_of_names_is_text(tmp_path, capsys):
    text = as_text(LINKS)
    assert text == (
        "\\[a\\](http\\://evil.example/?x) !\\[b\\](https\\://evil.example/i.png) &lt;img src=x> www\\.evil.example me\\@evil.example "
        "\\`c\\` &amp;lt;b&amp;gt; \\| d"
    )
    lines = sample_lines({("ruler", "vt", 4096): (3, 0.5)})
    runs = [write_run(tmp_path / name, lines, name=LINKS + HOSTILE.replace("\ud800", ""), checkpoint=LINKS, notes=[LINKS]) for name in "ab"]
    pages = [results_page([write_results(runs[0])]), markdown_report(compare(*runs))]
    for page in pages:
        assert text in page and not re.search(r"(?<!\\)\]\(", page) and "\x1b" not in page
    shown = run_tool(capsys, "compare", *runs)
    assert_printable(shown)
