"""No command executes what the files of strangers hold: every way in, with payloads that would make a file, with one and two ranks."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.hostile_checkpoints import Payload, poison_entry, poison_metadata
from tests.integration_tests.runs import REPOSITORY, TINY, assert_finished, train

POSTTRAIN = REPOSITORY / "tests" / "assets" / "tiny_posttrain.toml"
CONVERT, EVALUATE = ("tools/convert_checkpoint.py",), ("tools/evaluate.py", "run")
ENVIRONMENT = {n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {"OMP_NUM_THREADS": "1"}
ONE_BATCH = ("--refine.num_mini_batches", "1")  # a rank of two has one microbatch
LATER = ("--training.steps", "3", "--checkpoint.interval", "3", *ONE_BATCH)


def run(ranks: int, *command, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
    """A command of Python by so many ranks, as run_train.sh and run_evaluate.sh start them."""
    launcher = [] if ranks == 1 else ["-m", "refine_titan.launch", f"--nproc-per-node={ranks}", "--rdzv-backend=loopback"]
    call = [sys.executable, *launcher, *map(str, command)]
    return subprocess.run(call, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)


def training(config: Path, folder: Path, *overrides) -> list:
    return ["-m", "refine_titan.train", "--job.config_file", config, "--job.dump_folder", folder, *overrides]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert_finished(train(folder, "--training.steps", "2", "--data.num_streams", "2", *ONE_BATCH))
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "hotpotqa.jsonl"
    rows = [{"prompt": f"Question {i}: {'what ' * 30}?", "answers": [f"{i}"], "max_new_tokens": 4} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ways(folder: Path, questions: Path) -> dict[str, list]:
    """The commands that read the checkpoint of the run in `folder`."""
    step, out = folder / "checkpoint" / "step-2", folder.parent
    start = ["--checkpoint.initial_load_path", step, *LATER]
    adapting = ["--refine.phase", "ttt", "--ttt.steps", "1", "--refine.num_chunks", "2", "--refine.num_mini_batches", "1"]
    evaluation = [*EVALUATE, TINY, "--checkpoint", step, "--tasks", questions]
    return {
        "resume": training(TINY, folder, *LATER, "--data.num_streams", "2"),
        "start": training(TINY, out / "start", *start),
        "full start": training(TINY, out / "full", *start, "--checkpoint.no-initial_load_model_only", "--data.num_streams", "2"),
        "post-training": training(POSTTRAIN, out / "post", *start, "--data.source", questions),
        "evaluation": [*evaluation, "--output", out / "evaluation"],
        "test-time training": [*evaluation, *adapting, "--output", out / "adapted"],
        "inspection": [*CONVERT, "inspect", step],
        "conversion": [*CONVERT, "to-hf", step, out / "hf"],
    }


# The ways that read the entry: training state is not needed for weights alone.
READ_STATE = ("resume", "full start")
PAYLOADS = {
    "metadata": poison_metadata,
    "entry": lambda step, marker: poison_entry(step, "train_state.step", marker),
    "optimizer": lambda step, marker: poison_entry(step, "optimizer.param_groups.norm.weight.betas", marker),
}
CASES = [(way, payload, 1) for way in ways(Path("a"), Path("b")) for payload in ("metadata", "entry")]
CASES += [(way, "metadata", 2) for way in ("resume", "start", "post-training", "evaluation", "test-time training")]
CASES += [(way, "entry", 2) for way in READ_STATE] + [(way, "optimizer", ranks) for way in READ_STATE for ranks in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("way, payload, ranks", CASES)
def test_payload_of_a_checkpoint_does_not_run(trained, questions, tmp_path, way, payload, ranks):
    folder, marker = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(trained, folder)
    PAYLOADS[payload](folder / "checkpoint" / "step-2", marker)
    result = run(ranks, *ways(folder, questions)[way])
    assert not marker.exists(), result.stderr
    if payload == "metadata" or way in READ_STATE:
        errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
        assert result.returncode in (1, 2) and "Traceback" not in result.stderr, result.stderr[-3000:]
        assert len(errors) == 1 and "mkdir" in errors[0]
    else:
        assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "hf"
    result = run(1, *CONVERT, "to-hf", trained / "checkpoint" / "step-2", folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("way", ["from-hf", "inspect", "start", "evaluation"])
def test_code_and_pickles_of_a_published_folder_do_not_run(exported, questions, tmp_path, way, ranks):
    """Modules that `auto_map` names, pickled weights, a template that reaches for the system, and an `__init__` in the current folder."""
    if ranks == 2 and way in ("from-hf", "inspect"):
        pytest.skip("conversion has one process")
    folder, marker = tmp_path / "hf", tmp_path / "ran"
    shutil.copytree(exported, folder)
    code = f"import os\nos.mkdir({str(marker)!r})\n"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "__init__.py", "custom_generate.py", "sitecustomize.py"):
        (folder / name).write_text(code)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "configuration_x.Config", "AutoModelForCausalLM": "modeling_x.Model", "AutoModel": "modeling_x.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": classes}))
    tokenizer = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    template = "{{ cycler.__init__.__globals__.os.mkdir('MARKER') }}{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (folder / "chat_template.jinja").write_text(template.replace("MARKER", str(marker)))
    torch.save(Payload(marker), folder / "pytorch_model.bin")
    (folder / "training_args.bin").write_bytes(pickle.dumps(Payload(marker)))
    start = ["--checkpoint.initial_load_path", folder, "--checkpoint.initial_load_in_hf", *LATER]
    commands = {
        "from-hf": [*CONVERT, "from-hf", folder, tmp_path / "dcp"],
        "inspect": [*CONVERT, "inspect", folder],
        "start": training(TINY, tmp_path / "run", *start),
        "evaluation": [*EVALUATE, TINY, "--checkpoint", folder, "--tasks", questions, "--output", tmp_path / "evaluation"],
    }
    result = run(ranks, *commands[way])
    assert result.returncode == 0, result.stderr[-3000:]
    assert not marker.exists()


@pytest.mark.slow
def test_settings_and_names_reach_no_shell(tmp_path):
    """run_train.sh and run_evaluate.sh hand their arguments on as they are."""
    marker = tmp_path / "ran"

    def call(*command, **variables) -> int:
        given = ENVIRONMENT | variables
        options = {"cwd": REPOSITORY, "capture_output": True, "text": True, "timeout": 300, "start_new_session": True}
        status = subprocess.run(command, env=given, **options).returncode
        assert not marker.exists(), (command, variables)
        return status

    text = f"$(mkdir {marker}) `mkdir {marker}`; mkdir {marker};\nmkdir {marker}\n__import__('os').mkdir('{marker}')"
    assert call("./run_train.sh", "--dry-run", "--model.options", f"num_heads={text}") == 1
    assert call("./run_train.sh", "--dry-run", "--data.source", text, CONFIG_FILE=text) == 1
    assert call("./run_evaluate.sh", text, "--checkpoint", text, "--tasks", text) != 0
    for name in ("NGPU", "NNODES", "NODE_RANK", "SLURM_NODEID", "SLURM_JOB_NAME", "MASTER_PORT", "MASTER_ADDR"):
        for value in (text, f"a[$(mkdir {marker})]"):
            call("./run_train.sh", "--dry-run", "--training.steps", "many", **{name: value})
