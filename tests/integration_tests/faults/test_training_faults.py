"""Training on a machine that fails: every place that a run writes, and every fault there."""

import json
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util

from refine_titan.conversion.dcp_metadata import CheckedReader
from refine_titan.monitoring.metric_names import LOSS
from tests.integration_tests.faults.machine import Fault, Machine, Outcome
from tests.integration_tests.faults.matrix import cell
from tests.integration_tests.runs import TINY, losses

SLOW = pytest.mark.slow
STEPS = 4
FULL = "No space left on device"
BROKEN = "Input/output error"


def train(machine: Machine, folder: Path, *overrides, fault: Fault | None = None, ranks: int = 1) -> Outcome:
    """Trains the small model in `folder`, where it lies beside its run."""
    model = {"model_type": "delta_net", "vocab_size": 288, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "hidden_ratio": 3}
    flavor = folder.parent / f"{folder.name}.json"
    flavor.write_text(json.dumps(model))
    steps = [] if "--training.epochs" in overrides else ["--training.steps", STEPS]
    settings = ["--job.config_file", TINY, "--job.dump_folder", folder, "--model.flavor", flavor, *steps, *overrides]
    launch = ["-m", "refine_titan.launch", f"--nproc-per-node={ranks}", "--rdzv-backend=loopback"] if ranks > 1 else []
    if ranks > 1:
        settings += ["--refine.num_mini_batches", 1]
    return machine.run(*launch, "-m", "refine_titan.train", *settings, fault=fault, folder=folder)


def finish(machine: Machine, folder: Path, *overrides, ranks: int = 1) -> Outcome:
    outcome = train(machine, folder, *overrides, ranks=ranks)
    assert outcome.status == 0, outcome.output[-2000:] + outcome.errors[-3000:]
    return outcome


def checkpoint(folder: Path, step: int = STEPS) -> dict:
    """The bytes of every record of a checkpoint, by entry and place in the tensor."""
    reader = CheckedReader(folder / "checkpoint" / f"step-{step}")
    return {(index.fqn, index.offset): reader.read_record(index) for index in reader.read_metadata().storage_data}


def files(folder: Path) -> set[str]:
    """The names of all files of a run, those of TensorBoard without time and process."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {re.sub(r"tb/.*tfevents.*", "tb/events", name) for name in names}


@dataclass(frozen=True)
class Run:
    """A run without faults, with which others are compared."""

    folder: Path
    options: tuple[str, ...]
    ranks: int

    def assert_same(self, folder: Path) -> None:
        """Another run has the same numbers and weights to the last bit, and neither more nor fewer files."""
        assert losses(folder) == losses(self.folder)
        assert (folder / "rollouts.jsonl").read_text() == (self.folder / "rollouts.jsonl").read_text()
        assert checkpoint(folder) == checkpoint(self.folder)
        assert files(folder) == files(self.folder)


def reference(machine: Machine, folder: Path, *options: str, ranks: int = 1) -> Run:
    finish(machine, folder, *options, ranks=ranks)
    return Run(folder, options, ranks)


@pytest.fixture(scope="module")
def one_rank(machine, tmp_path_factory) -> Run:
    return reference(machine, tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def two_ranks(machine, tmp_path_factory) -> Run:
    return reference(machine, tmp_path_factory.mktemp("two") / "run", ranks=2)


def assert_one_error(outcome: Outcome, *parts: str) -> None:
    """The command ended with status 1 and one line that says what to mend."""
    everything = outcome.output + outcome.errors
    assert outcome.status == 1 and "Traceback" not in everything, everything[-5000:]
    [line] = outcome.error_lines
    for part in parts:
        assert re.search(part, line), line


# Files of a checkpoint, in the order in which they are written.
CHECKPOINT_FILES = {
    "checkpoint: folder": "",
    "checkpoint: config.json": "/config.json",
    "checkpoint: data": "/__*_0.distcp",
    "checkpoint: checksums": "/__*_checksums.json",
    "checkpoint: metadata": "/.metadata.tmp",
    "checkpoint: metadata's checksum": "/.metadata.xxh3",
    "checkpoint: metadata's name": "/.metadata",
}


def fault_at(place: str, name: str) -> Fault:
    """The fault that strikes when the file of a place is written; a full disk then stays full for everything."""
    step = 2 if name == "SIGTERM twice" else STEPS
    files = f"{{folder}}/checkpoint/step-{step}{CHECKPOINT_FILES[place]}"
    calls = {"checkpoint: folder": "mkdir", "checkpoint: metadata's name": "rename"}.get(place, "write")
    match name:
        case "disk full" | "EIO" | "EROFS":
            return Fault(calls, {"disk full": "ENOSPC"}.get(name, name), files)
        case "EIO while syncing":
            return Fault("sync", "EIO", files)
        case "SIGKILL":
            return Fault(calls, "kill", files)
        case "SIGTERM twice":
            return Fault(calls, "term", files, count=1)
    raise ValueError(name)


def cases() -> list:
    found = []
    for place in CHECKPOINT_FILES:
        faults = ["disk full", "EIO", "SIGKILL", "SIGTERM twice"]
        if place not in ("checkpoint: folder", "checkpoint: metadata's name"):
            faults.insert(2, "EIO while syncing")
        for fault in faults:
            for ranks in (1, 2):
                is_first = (place, fault, ranks) == ("checkpoint: data", "disk full", 1)
                found.append(pytest.param(place, fault, ranks, marks=[] if is_first else SLOW, id=f"{place}, {fault}, {ranks}"))
    return found


@pytest.mark.parametrize("place, fault, ranks", cases())
def test_checkpoint(machine, request, tmp_path, place, fault, ranks):
    expected = request.getfixturevalue("one_rank" if ranks == 1 else "two_ranks")
    folder = tmp_path / "run"
    with cell(f"{place}, {ranks} rank(s)", fault):
        outcome = train(machine, folder, fault=fault_at(place, fault), ranks=ranks)
        if fault == "SIGTERM twice":
            assert outcome.status == 75 and not outcome.error_lines, outcome.errors[-3000:]
            assert (folder / "checkpoint" / "step-3" / ".metadata").is_file()
        elif fault == "SIGKILL":
            assert outcome.status == (-signal.SIGKILL if ranks == 1 else 1)
            assert (folder / "checkpoint" / "step-4").is_dir() or place == "checkpoint: folder"
        else:
            assert_one_error(
                outcome,
                rf"{folder}/checkpoint/step-4 cannot be written: .*{FULL if fault == 'disk full' else BROKEN}",
                "goes on from step-2",
            )
            # With two ranks the second one may make the folder again that the first one has removed.
            assert not (folder / "checkpoint" / "step-4").exists() or (ranks == 2 and not (folder / "checkpoint/step-4/.metadata").exists())
        again = finish(machine, folder, ranks=ranks)
        assert f"Training starts at step {4 if fault == 'SIGTERM twice' else 3}" in again.output + again.errors
        shutil.rmtree(folder / "checkpoint" / "step-3", ignore_errors=True)
        expected.assert_same(folder)


TENSORBOARD = ("--metrics.enable_tensorboard", "--metrics.log_freq", "1")
VALIDATION = ("--validation.enable", "--validation.freq", "2", "--evaluation.tasks", "perplexity", "--evaluation.perplexity_source")
VALIDATION += ("python-stdlib", "--evaluation.perplexity_tokens", "256", "--evaluation.num_samples", "2")
RECORDS = {"metrics": "metrics.jsonl", "rollouts": "rollouts.jsonl", "validation": "validation.jsonl", "TensorBoard": "tb/*tfevents*"}


@pytest.fixture(scope="module")
def recorded(machine, tmp_path_factory) -> Run:
    """A run that writes every kind of record."""
    return reference(machine, tmp_path_factory.mktemp("recorded") / "run", *TENSORBOARD, *VALIDATION)


def events(folder: Path) -> list[tuple[int, str, float]]:
    """Step, name and value of all numbers in TensorBoard's files but those of time."""
    found = []
    for path in sorted(folder.glob("tb/**/*tfevents*")):
        for event in EventFileLoader(str(path)).Load():
            found += [(event.step, value.tag, tensor_util.make_ndarray(value.tensor).item()) for value in event.summary.value]
    return sorted(value for value in found if value[1] in (LOSS, "grad_norm"))


@pytest.mark.slow
@pytest.mark.parametrize("place", RECORDS)
@pytest.mark.parametrize("fault", ["EIO once", "EIO", "ENOSPC", "disk full", "SIGKILL", "SIGTERM twice"])
def test_record(machine, recorded, tmp_path, place, fault):
    """Records that cannot be written do not end the run before its next checkpoint, of step 2."""
    folder, written = tmp_path / "run", f"{{folder}}/{RECORDS[place]}"
    skip = 1 if place == "TensorBoard" else 0  # the first piece is written when the run starts
    injected = {
        "EIO once": Fault("write", "EIO", written, skip, count=1),
        "EIO": Fault("write", "EIO", written, skip),
        "ENOSPC": Fault("write", "ENOSPC", written, skip, count=1000),
        "disk full": Fault("write", "ENOSPC", written, skip),
        "SIGKILL": Fault("write", "kill", written, skip),
        "SIGTERM twice": Fault("write", "term", written, skip, count=1),
    }[fault]
    with cell(place, fault):
        outcome = train(machine, folder, *recorded.options, fault=injected)
        everything = outcome.output + outcome.errors
        is_lost = False
        if fault == "SIGKILL":
            assert outcome.status == -signal.SIGKILL
        elif fault == "SIGTERM twice":
            assert outcome.status == 75, everything[-3000:]
        elif fault == "disk full":
            assert_one_error(outcome, rf"{folder}/(checkpoint/step-2|config.json|validation.jsonl).*{FULL} \(0 bytes are free\)")
        elif fault == "EIO once":
            assert outcome.status == 0 and " is complete again" in everything, everything[-3000:]
        elif place == "TensorBoard":
            assert outcome.status == 0 and "Traceback" not in everything and "cannot be written" in everything, everything[-3000:]
            is_lost = True
        else:
            reason = BROKEN if fault == "EIO" else FULL
            lost = r"line\(s\) of it are lost. The same command goes on from step-2"
            assert_one_error(outcome, rf"{RECORDS[place]} cannot be written: {reason}.*{lost}")
            assert (folder / "checkpoint" / "step-2" / ".metadata").is_file()
            is_lost = True
        if not (is_lost and place == "TensorBoard"):
            finish(machine, folder, *recorded.options)
        for path in folder.glob("checkpoint/step-[13]"):
            shutil.rmtree(path)
        assert checkpoint(folder) == checkpoint(recorded.folder)
        for name in ("metrics.jsonl", "rollouts.jsonl", "validation.jsonl"):
            found, expected = (repeatable(path / name) for path in (folder, recorded.folder))
            if is_lost and name == RECORDS[place]:
                assert found and all(line in expected for line in found)
            else:
                assert found == expected
        if not is_lost or place != "TensorBoard":
            assert events(folder) == events(recorded.folder)
        assert files(folder) == files(recorded.folder)


def repeatable(path: Path) -> list[dict]:
    """The lines of a file without times and memory."""
    varying = ("timing/", "time_metrics/", "memory/", "validation_metrics/memory/", "seconds", "throughput", "tflops")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(varying)} for line in lines]


@pytest.fixture(scope="module")
def killed(machine, recorded, tmp_path_factory) -> Callable[[Path], Path]:
    """Copies a run that was killed in its last checkpoint, and can go on from step 2."""
    source = tmp_path_factory.mktemp("killed") / "run"
    outcome = train(machine, source, *recorded.options, fault=fault_at("checkpoint: folder", "SIGKILL"))
    assert outcome.status == -signal.SIGKILL

    def copy(parent: Path) -> Path:
        return Path(shutil.copytree(source, parent / "run"))

    return copy


READ = {
    "resume: metadata": "checkpoint/step-2/.metadata",
    "resume: data": "checkpoint/step-2/__0_0.distcp",
    "resume: checksums": "checkpoint/step-2/__0_checksums.json",
    "resume: settings": "config.json",
    "resume: metrics": "metrics.jsonl",
    "resume: rollouts": "rollouts.jsonl",
    "resume: validation": "validation.jsonl",
}


def assert_goes_on(machine: Machine, recorded: Run, folder: Path) -> None:
    finish(machine, folder, *recorded.options)
    assert checkpoint(folder) == checkpoint(recorded.folder) and losses(folder) == losses(recorded.folder)


@pytest.mark.slow
@pytest.mark.parametrize("place", READ)
@pytest.mark.parametrize("fault", ["EIO", "cannot be opened"])
def test_read_on_resume(machine, recorded, killed, tmp_path, place, fault):
    folder = killed(tmp_path)
    with cell(place, fault):
        call, action, reason = ("read", "EIO", BROKEN) if fault == "EIO" else ("open", "EACCES", "Permission denied")
        outcome = train(machine, folder, *recorded.options, fault=Fault(call, action, f"{{folder}}/{READ[place]}"))
        assert_one_error(outcome, Path(READ[place]).name, reason)
        assert_goes_on(machine, recorded, folder)


def damaged(content: bytes, how: str) -> bytes:
    match how:
        case "truncated":
            return content[: len(content) // 2]
        case "zeroed":
            begin, count = len(content) // 3, max(len(content) // 3, 1)
            return content[:begin] + bytes(count) + content[begin + count :]
    return b""


@pytest.mark.slow
@pytest.mark.parametrize("place", READ)
@pytest.mark.parametrize("how", ["truncated", "zeroed", "emptied"])
def test_damaged_before_resume(machine, recorded, killed, tmp_path, place, how):
    """Damage of what a run goes on from is refused, and with the file as it was the run goes on; damaged records are left out."""
    folder = killed(tmp_path)
    path = folder / READ[place]
    content = path.read_bytes()
    with cell(place, how):
        path.write_bytes(damaged(content, how))
        if path.suffix == ".jsonl":
            finish(machine, folder, *recorded.options)
            assert checkpoint(folder) == checkpoint(recorded.folder)
            expected = repeatable(recorded.folder / path.name)
            assert all(record in expected for record in repeatable_whole_lines(path))
            return
        assert_one_error(train(machine, folder, *recorded.options), str(path.name if "config" in path.name else "step-2"))
        path.write_bytes(content)
        assert_goes_on(machine, recorded, folder)


def repeatable_whole_lines(path: Path) -> list[dict]:
    """As `repeatable`, without lines that are damaged."""
    whole = path.with_name("whole.jsonl")
    whole.write_bytes(b"".join(line for line in path.read_bytes().splitlines(keepends=True) if b"\0" not in line))
    return repeatable(whole)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["ENOLCK", "EIO"])
def test_lock(machine, one_rank, tmp_path, fault):
    folder = tmp_path / "run"
    with cell("lock", fault):
        outcome = train(machine, folder, fault=Fault("lock", fault, "{folder}/lock"))
        if fault == "ENOLCK":
            assert outcome.status == 0 and "is on a file system without locks" in outcome.output + outcome.errors
        else:
            assert_one_error(outcome, rf"{folder}/lock", BROKEN)
            finish(machine, folder)
        one_rank.assert_same(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "place, call, pattern",
    [
        ("run folder", "mkdir", "{folder}"),
        ("lock's file", "create", "{folder}/lock"),
        ("settings", "write", "{folder}/.config.json*"),
        ("settings' name", "rename", "{folder}/config.json"),
        ("versions", "write", "{folder}/.versions.json*"),
        ("metrics' file", "create", "{folder}/metrics.jsonl"),
    ],
)
@pytest.mark.parametrize("fault", ["EIO", "EROFS", "disk full", "SIGKILL"])
def test_start(machine, one_rank, tmp_path, place, call, pattern, fault):
    """What a run writes before its first checkpoint: nothing is lost when it ends there."""
    folder = tmp_path / "run"
    with cell(place, fault):
        action = {"disk full": "ENOSPC", "SIGKILL": "kill"}.get(fault, fault)
        outcome = train(machine, folder, fault=Fault(call, action, pattern))
        if fault == "SIGKILL":
            assert outcome.status == -signal.SIGKILL
        else:
            assert_one_error(outcome, str(folder), {"disk full": FULL, "EIO": BROKEN, "EROFS": "Read-only file system"}[fault])
        finish(machine, folder)
        one_rank.assert_same(folder)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["EIO", "cannot be opened"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "txt"])
def test_data(machine, tmp_path, suffix, fault):
    source = tmp_path / f"corpus.{suffix}"
    texts = [f"{i} " + "a few words, again and again. " * 40 for i in range(40)]
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), source)
    else:
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) if suffix == "jsonl" else "".join(texts))
    options = ["--data.source", source, "--data.long_documents", "split"]
    with cell(f"data: {suffix}", fault):
        finish(machine, tmp_path / "whole", *options)
        call, action, reason = ("read", "EIO", BROKEN) if fault == "EIO" else ("open", "EACCES", "Permission denied")
        for skip in (0, 1):  # at the start, and later
            outcome = train(machine, tmp_path / "run", *options, fault=Fault(call, action, str(source), skip))
            assert_one_error(outcome, source.name, reason)
        finish(machine, tmp_path / "run", *options)
        assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["disk full", "EIO", "EIO while syncing", "SIGKILL"])
def test_lengths_of_documents(machine, tmp_path, fault):
    """With epochs a run reads all documents first, and keeps how long they are."""
    source, folder, index = tmp_path / "corpus.jsonl", tmp_path / "run", "documents.npz"
    source.write_text("".join(json.dumps({"text": f"{i} " + "a few words, again and again. " * 40}) + "\n" for i in range(10)))
    options = ["--data.source", source, "--data.long_documents", "split", "--training.epochs", "1"]
    with cell("lengths of documents", fault):
        finish(machine, tmp_path / "whole", *options)
        call = "sync" if fault == "EIO while syncing" else "write"
        action = {"disk full": "ENOSPC", "SIGKILL": "kill"}.get(fault, "EIO")
        outcome = train(machine, folder, *options, fault=Fault(call, action, f"{{folder}}/.{index}*"))
        if fault == "SIGKILL":
            assert outcome.status == -signal.SIGKILL
        else:
            assert_one_error(outcome, index, FULL if fault == "disk full" else BROKEN)
        assert not (folder / index).exists()
        finish(machine, folder, *options)
        assert losses(folder) == losses(tmp_path / "whole") and files(folder) == files(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("fault", ["disk full", "EIO", "EIO while syncing"])
@pytest.mark.parametrize("place", ["checkpoint: config.json", "checkpoint: data", "checkpoint: metadata"])
def test_asynchronous_checkpoint(machine, request, tmp_path, place, fault, ranks):
    """The checkpoint of step 2 is written while step 3 trains, and its failure is noticed at the next one: the run begins anew."""
    expected = request.getfixturevalue("one_rank" if ranks == 1 else "two_ranks")
    folder, mode = tmp_path / "run", ("--checkpoint.async_mode", "async")
    injected = fault_at(place, fault)
    injected = replace(injected, files=injected.files.replace("step-4", "step-2"))
    with cell(f"{place}, asynchronous, {ranks} rank(s)", fault):
        outcome = train(machine, folder, *mode, fault=injected, ranks=ranks)
        reason = FULL if fault == "disk full" else BROKEN
        assert_one_error(outcome, rf"{folder}/checkpoint/step-2 cannot be written: .*{reason}", "begins anew: no step is complete")
        finish(machine, folder, *mode, ranks=ranks)
        expected.assert_same(folder)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["disk full", "EIO", "SIGKILL"])
def test_second_rank_fails_alone(machine, two_ranks, tmp_path, fault):
    folder = tmp_path / "run"
    with cell("checkpoint: data of the second rank", fault):
        action = {"disk full": "ENOSPC", "SIGKILL": "kill"}.get(fault, fault)
        outcome = train(machine, folder, fault=Fault("write", action, "{folder}/checkpoint/step-4/__1_0.distcp"), ranks=2)
        if fault == "SIGKILL":
            assert_one_error(outcome, "rank 1 .* was killed by SIGKILL")
        else:
            assert_one_error(outcome, rf"{folder}/checkpoint/step-4 cannot be written: __[01]_0.distcp: ", "goes on from step-2")
        finish(machine, folder, ranks=2)
        two_ranks.assert_same(folder)


@pytest.mark.slow
def test_data_read_in_advance(machine, tmp_path):
    """A process beside the rank reads: its error is the run's."""
    source = tmp_path / "corpus.jsonl"
    source.write_text("".join(json.dumps({"text": f"{i} " + "a few words, again and again. " * 40}) + "\n" for i in range(40)))
    options = ["--data.source", source, "--data.long_documents", "split", "--data.batches_ahead", "1"]
    with cell("data: read in advance", "EIO"):
        finish(machine, tmp_path / "whole", *options)
        outcome = train(machine, tmp_path / "run", *options, fault=Fault("read", "EIO", str(source), 1))
        assert_one_error(outcome, source.name, BROKEN)
        finish(machine, tmp_path / "run", *options)
        assert losses(tmp_path / "run") == losses(tmp_path / "whole")
