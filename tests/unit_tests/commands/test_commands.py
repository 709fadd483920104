"""The command `refine-titan`: help without torch, exit statuses, errors and interruptions in one line."""

import os
import re
import runpy
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from refine_titan.commands import main as commands
from refine_titan.commands.ends import run_to_end
from refine_titan.commands.main import COMMANDS, main
from refine_titan.errors import RunFailure, UsageError, UserError

REPOSITORY = Path(__file__).parents[3]
pytestmark = pytest.mark.usefixtures("this_process_stays_as_it_is")
TOOLS = {
    "evaluate": "evaluate",
    "prepare": "prepare_data",
    "convert": "convert_checkpoint",
    "report": "report",
    "compare": "compare",
    "reproduce": "reproduce",
    "estimate": "estimate_memory",
}


def ended(capsys, *arguments) -> tuple[int, str, str]:
    """Status and output of a command in this process."""
    try:
        status = main([*map(str, arguments)])
    except SystemExit as end:
        status = end.code or 0
    return status, *capsys.readouterr()


def test_help_of_every_command_imports_no_torch_and_takes_less_than_a_second():
    """By CPU time of all commands in one process, which other programs on the machine do not lengthen."""
    script = (
        "import sys, time\n"
        "from refine_titan.commands.main import COMMANDS, main\n"
        "for arguments in [[], *([name] for name in COMMANDS), ['evaluate', 'run'], ['prepare', 'run'], ['convert', 'to-hf']]:\n"
        "    try: assert main([*arguments, '--help']) == 0\n"
        "    except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'torchtitan', 'vllm', 'pyarrow', 'transformers'} & sys.modules.keys()\n"
        "assert time.process_time() < 1.0\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert all(f"refine-titan {name}" in result.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", sorted(TOOLS))
def test_tools_are_the_same_commands(monkeypatch, capsys, command):
    monkeypatch.setattr(sys, "argv", [f"{TOOLS[command]}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPOSITORY / "tools" / f"{TOOLS[command]}.py"), run_name="__main__")
    assert not end.value.code and capsys.readouterr().out.startswith(f"usage: refine-titan {command}")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["evalaute"], "error: refine-titan has no command 'evalaute'; did you mean 'evaluate'? (refine-titan --help)"),
        (["evaluate", "rum"], "invalid choice: 'rum'"),
        (["evaluate", "run"], "the following arguments are required: config"),
        (["evaluate", "run", "a.toml", "--num-sample", "4"], "there is no option --num-sample; did you mean '--num-samples'?"),
        (["evaluate", "run", "{config}", "--trainin.steps", "4"], "there is no setting --trainin.steps; did you mean '--training.steps'?"),
        (["evaluate", "score", "a.jsonl", "b.jsonl"], "unrecognized arguments: b.jsonl"),
        (["convert", "to-hf", "a", "b", "--dtyp", "float32"], "there is no option --dtyp; did you mean '--dtype'?"),
        (["prepare", "run", "--input", "a", "--output", "b"], "the following arguments are required: --tokenizer"),
        (["compare", "a"], "the following arguments are required: B"),
        (["report", "a", "b"], "several folders need --markdown, --latex, --csv or --svg"),
        (["reproduce", "--seed", "1"], "there is no option --seed; did you mean '--seeds'?"),
        (["estimate", "{config}", "--training.steps", "few"], "--training.steps is 'few'; allowed: a whole number"),
        (["train", "{config}", "--training.stpes", "3"], "there is no setting --training.stpes; did you mean '--training.steps'?"),
        (["train", "{config}", "other.toml"], "'other.toml' belongs to no option"),
    ],
)
def test_wrong_command_line_is_one_line_and_status_2(capsys, arguments, message):
    config = REPOSITORY / "train_configs" / "debug_midtrain.toml"
    status, _, errors = ended(capsys, *(word.format(config=config) for word in arguments))
    assert status == 2 and message in errors and errors.startswith("error: ") and errors.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "score", "{nowhere}"],
        ["prepare", "show", "{nowhere}"],
        ["convert", "inspect", "{nowhere}"],
        ["report", "{nowhere}"],
        ["compare", "{nowhere}", "{nowhere}"],
        ["reproduce", "{nowhere}"],
        ["estimate", "{nowhere}"],
        ["train", "{nowhere}"],
    ],
)
def test_file_that_is_not_there_is_one_line_and_status_1(tmp_path, capsys, arguments):
    status, _, errors = ended(capsys, *(word.format(nowhere=tmp_path / "nowhere") for word in arguments))
    assert status == 1 and "nowhere" in errors and errors.startswith("error: ") and errors.count("\n") == 1


@pytest.mark.parametrize(
    "error, status, line",
    [
        (UserError("x is 1"), 1, "error: x is 1\n"),
        (UsageError("no option"), 2, "error: no option\n"),
        (RunFailure("a rank is gone"), 1, "error: a rank is gone; kept\n"),
        (FileExistsError(17, "File exists", "out"), 1, "error: out: File exists; kept\n"),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
    ],
)
def test_how_commands_end(capsys, error, status, line):
    def work():
        raise error

    assert run_to_end(work, lambda: "Interrupted.", lambda: "; kept") == status
    assert capsys.readouterr().err == line


def test_fault_of_the_program_keeps_its_traceback():
    def work():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_to_end(work, lambda: "Interrupted.")


def test_interrupt_during_imports_is_one_line(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "import_module", interrupted)
    assert ended(capsys, "evaluate", "run") == (130, "", "Interrupted.\n")


def test_interrupt_while_torch_is_imported_is_one_line(tmp_path):
    """A real signal, which a stand-in for torch sends to its own process."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}:{REPOSITORY / 'kernels'}"}
    for arguments in (["convert", "inspect", "."], ["train", "my.toml"], ["evaluate", "run", "my.toml"], ["launch", "-m", "x"]):
        command = [sys.executable, "-m", "refine_titan", *arguments]
        # Also where the tests run in the background, whose processes ignore Ctrl-C.
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, preexec_fn=heed)
        assert result.returncode == 130 and re.fullmatch(r"Interrupted[.;].*\n", result.stderr), (arguments, result.stderr)
