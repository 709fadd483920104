"""The CUDA builds of torch and vLLM run whole jobs on a GPU that does nothing: `./run_tests.sh --null-gpu`. README.md says what that shows.

`counts.json` holds, for every run, the most that its last step may launch, wait for and copy. NULL_GPU_RECORD=1 writes what was counted.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from refine_titan.models.sizes import resolve_flavor
from tests.checkpoints import random_weights, write_hf_folder
from tests.conftest import ORACLES

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
SOURCES = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"  # whichever checkout the environment was made for
LIBRARY = os.environ.get("NULL_GPU_LIBRARY", "")
needs_null_gpu = pytest.mark.skipif(not LIBRARY, reason="needs CUDA builds and no GPU: ./run_tests.sh --null-gpu")

COUNTS = HERE / "counts.json"
# What counts.json bounds, in its order.
BOUNDED = ("launches", "waits", "to_device", "to_host", "pageable", "collectives")
FAMILIES = {
    "delta_net": "debug_midtrain",
    "gated_delta_net": "debug_gated_delta_net",
    "lact": "debug_lact",
    "kda": "debug_kda",
    "gated_delta_product": "debug_gated_delta_product",
}
# With layers of attention, whose rounds and steps are not recorded.
HYBRIDS = {"qwen3_5": "debug_qwen3_5", "olmo_hybrid": "debug_olmo_hybrid"}
STEPS = 3  # a round of rollouts is recorded in the second
TOKENS = 5  # of a rollout
SHORT = ["--training.seq_len", "1024", "--refine.num_chunks", "4", "--training.mixed_precision_param", "bfloat16"]
VLLM = ["--rollout.engine", "vllm"]
FSDP = ["--training.global_batch_size", "2"]
TIMEOUT = 1800
ACCEPTANCE = ("parity", "native", "lact-vllm", "vllm", "step", "step-fla", "step-lact", "step-vllm", "profile")


@dataclass(frozen=True)
class Run:
    """A job.

    Attributes:
        name: in counts.json.
        config: file in train_configs.
        settings: overrides.
        ranks: processes.
        graphs: recorded graphs that its last step starts: of the native engine a round, of vLLM a decoding step.
        program: `train`, or a tool, which has one step.
        model: options of the family's debug model.
    """

    name: str
    config: str
    settings: list[str] = field(default_factory=list)
    ranks: int = 1
    graphs: int = 0
    program: str = "train"
    model: dict = field(default_factory=dict)


RUNS = [
    *(Run(f"{family} native", config, graphs=1) for family, config in FAMILIES.items()),
    *(Run(f"{family} native", config) for family, config in HYBRIDS.items()),
    *(Run(f"{family} vllm", config, VLLM, graphs=0 if family == "lact" else TOKENS) for family, config in FAMILIES.items()),
    *(Run(f"{family} vllm", config, VLLM) for family, config in HYBRIDS.items()),
    Run("fsdp 2", "debug_midtrain", FSDP, ranks=2),
    Run("fsdp 2 vllm", "debug_midtrain", [*FSDP, *VLLM], ranks=2, graphs=TOKENS),
    Run("tensor parallel 2", "debug_midtrain", ["--parallelism.tensor_parallel_degree", "2"], ranks=2),
    Run("tensor parallel 2 vllm", "debug_midtrain", ["--parallelism.tensor_parallel_degree", "2", *VLLM], ranks=2),
    Run("context parallel 2", "debug_midtrain", ["--parallelism.context_parallel_degree", "2"], ranks=2),
    Run("context parallel 2 lact", "debug_lact", ["--parallelism.context_parallel_degree", "2"], ranks=2),
    Run("compile", "debug_midtrain", ["--compile.enable"], graphs=1),
    Run("float8", "debug_midtrain", ["--compile.enable", "--model.converters", "quantize.linear.float8"], graphs=1),
    Run("activation checkpointing", "debug_midtrain", ["--activation_checkpoint.mode", "full"], graphs=1),
    Run("deterministic", "debug_lact", ["--debug.deterministic"], graphs=1),
    Run("separate scoring pass", "debug_midtrain", ["--refine.scoring_pass", "separate"], graphs=1),
    Run("256 key channels", "debug_gated_delta_net", graphs=1, model={"n_heads": 1, "head_dim": 256}),
    *(Run(f"{family} next-token", config, ["--refine.objective", "ntp"]) for family, config in FAMILIES.items()),
    Run("post-training", "debug_posttrain", graphs=1),
    Run("evaluation", "evaluate_debug", program="tools/evaluate.py"),
    Run("test-time training", "debug_ttt", program="tools/evaluate.py"),
]


def command(run: Run, folder: Path) -> list[str]:
    config = str(REPOSITORY / "train_configs" / f"{run.config}.toml")
    launcher = [sys.executable]
    if run.ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={run.ranks}", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    program = [str(HERE / "run.py"), str(folder / "report.json"), run.program]
    dump_folder = ["--job.dump_folder", str(folder / "run")]
    if run.program != "train":
        args = resolve_flavor("delta_net", "debug")
        checkpoint = str(write_hf_folder(folder / "weights", args, random_weights(args)))
        few = ["--checkpoint", checkpoint, "--tasks", "ruler/niah_single_1", "--lengths", "1024", "--num-samples", "2"]
        return [*launcher, *program, "run", config, *few, *dump_folder]
    settings = ["--training.steps", str(STEPS), *([] if run.name == "post-training" else SHORT), *model_of(run, folder), *run.settings]
    if run.ranks > 1:  # ranks agree on a checkpoint by pickled objects, which collectives that do nothing do not deliver
        settings.append("--checkpoint.no-enable")
    return [*launcher, *program, "--job.config_file", config, *dump_folder, *settings]


def model_of(run: Run, folder: Path) -> list[str]:
    if not run.model:
        return []
    args = replace(resolve_flavor("gated_delta_net", "debug"), **run.model)
    (folder / "config.json").write_text(json.dumps(args.to_hf_config()))
    return ["--model.flavor", str(folder)]


def test_every_job_has_counts():
    assert set(json.loads(COUNTS.read_text())) == {run.name for run in RUNS}


def on_null_gpus(ranks: int, command: list[str], timeout: int = TIMEOUT) -> subprocess.CompletedProcess:
    environment = os.environ | {"LD_PRELOAD": LIBRARY, "NULL_GPU_COUNT": str(ranks), "OMP_NUM_THREADS": "1", "PYTHONPATH": SOURCES}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout)


@needs_null_gpu
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_job_ends_and_a_step_costs_no_more_than_was_reviewed(run, tmp_path):
    result = on_null_gpus(run.ranks, command(run, tmp_path))
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["status"] == 0 and len(report["steps"]) == (STEPS if run.program == "train" else 1)
    assert sum(step["cpu_pointers"] for step in report["steps"]) == 0, "a kernel was given a pointer of the host"
    last = report["steps"][-1]
    if run.program == "train":
        assert last["graph_launches"] == run.graphs
    counted = {name: last[name] for name in BOUNDED}
    counts = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
    if os.environ.get("NULL_GPU_RECORD"):
        COUNTS.write_text(json.dumps(counts | {run.name: counted}, indent=1) + "\n")
        return
    if run.name not in counts:
        pytest.fail(f"counts.json has no {run.name!r}: NULL_GPU_RECORD=1 adds {counted}")
    above = {name: (counted[name], most) for name, most in counts[run.name].items() if counted[name] > most}
    assert not above, f"(counted, allowed): {above}; waits by place: {json.dumps(report['waits_by_place'], indent=1)}"


@needs_null_gpu
def test_acceptance_runs_to_its_end(tmp_path):
    seconds = len(ACCEPTANCE) * TIMEOUT  # kernels are compiled the first time
    limits = [word for part in ACCEPTANCE for word in ("--limit", f"{part}={TIMEOUT}")]
    golden = ["--oracles", str(ORACLES)] if ORACLES.is_dir() else []
    options = ["--output", str(tmp_path / "out"), "--small", "--null-gpu", "--minutes", str(seconds // 60), *limits, *golden]
    result = on_null_gpus(1, [sys.executable, "tools/gpu_acceptance.py", *options], seconds)
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    parts = json.loads((tmp_path / "out" / "report.json").read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(ACCEPTANCE, "passed") | (
        {} if golden else {"parity": "left out"}
    )
    # Of values that kernels would have computed none is judged.
    assert {check["ok"] for part in parts.values() for check in part["checks"]} == {None}
