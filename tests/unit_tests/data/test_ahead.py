"""Batches of a worker process: batches, positions, errors and warnings are those without it; and what happens when a process dies."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import pyarrow
import pyarrow.parquet
import pytest
import torch

from refine_titan.config.sections import JobConfig
from refine_titan.data import ahead
from refine_titan.data.ahead import AheadDataLoader, build_training_dataloader
from refine_titan.data.dataloader import DataProgress, PackedDataLoader, build_dataloader
from refine_titan.data.tokenizer import ByteTokenizer
from refine_titan.errors import UserError
from refine_titan.worker_process import WorkerProcess

TEXTS = [chr(97 + i % 26) * (40 + 31 * i % 170) for i in range(30)]


def job(source, **data) -> JobConfig:
    config = JobConfig()
    config.training.seq_len, config.training.local_batch_size = 100, 2
    config.data.source, config.data.min_document_tokens, config.data.shuffle_buffer = str(source), 50, 4
    config.data.long_documents = "split"
    for name, value in data.items():
        setattr(config.data, name, value)
    return config


def write_jsonl(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def mid_training(folder, **data) -> JobConfig:
    write_jsonl(folder / "a.jsonl", [{"text": text} for text in TEXTS[:20]])
    pyarrow.parquet.write_table(pyarrow.table({"text": [*TEXTS[20:], None]}), folder / "b.parquet", row_group_size=7)
    return job(folder, **data)


def post_training(folder) -> JobConfig:
    write_jsonl(folder / "a.jsonl", [{"prompt": text, "answers": [f"answer {i}", "no"]} for i, text in enumerate(TEXTS)])
    config = job(folder / "a.jsonl")
    config.refine.phase, config.posttrain.answer_tokens = "posttrain", 8
    return config


def in_process(config, rank=0, num_ranks=1) -> PackedDataLoader:
    return build_dataloader(num_ranks, rank, ByteTokenizer(), config)


def assert_same(a, b) -> None:
    assert torch.equal(a.tokens_T, b.tokens_T) and torch.equal(a.labels_T, b.labels_T)
    assert (a.cu_seqlens, a.cu_sequences, a.document_names) == (b.cu_seqlens, b.cu_sequences, b.document_names)
    assert (a.answers, a.references) == (b.answers, b.references)


@pytest.fixture(scope="module")
def worker():
    worker = WorkerProcess()
    yield worker
    worker.end()


@pytest.fixture
def with_worker(worker, monkeypatch):
    """Builds loaders that take turns with one worker, whose start takes seconds."""
    monkeypatch.setattr(ahead, "WorkerProcess", lambda: worker)
    made = []

    def build(config, rank=0, num_ranks=1, batches=3) -> AheadDataLoader:
        for loader in made:
            drain(loader)
        made.append(AheadDataLoader(num_ranks, rank, config, batches))
        return made[-1]

    yield build
    for loader in made:
        drain(loader)


def drain(loader: AheadDataLoader) -> None:
    while loader._asked:
        loader._take_microbatch()


CASES = {
    "one stream": (lambda folder: mid_training(folder), 0, 1),
    "three streams": (lambda folder: mid_training(folder, num_streams=3), 0, 1),
    "rank 1 of 2": (lambda folder: mid_training(folder, num_streams=4), 1, 2),
    "prompts": (post_training, 0, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_batches_and_positions_are_those_without_a_worker(tmp_path, with_worker, case):
    prepare, *share = CASES[case]
    config = prepare(tmp_path)
    expected, found = in_process(config, *share), with_worker(config, *share)
    assert found.source_description() == expected.source_description() and found.state_dict() == expected.state_dict()
    states = []
    for _ in range(24):
        assert_same(expected.next_batch(), found.next_batch())
        states.append(found.state_dict())
        assert states[-1] == expected.state_dict()  # of the batch that was taken last, not of those made ahead
    assert DataProgress.at(states[-1]).passes >= 1

    # Twelve batches are 24 sequences, which every number of streams here divides. The worker has gone further since.
    state = json.loads(json.dumps(states[11]))
    resumed = in_process(config, *share)
    resumed.load_state_dict(state)
    found.load_state_dict(state)
    assert found.state_dict() == resumed.state_dict() == state
    for _ in range(6):
        assert_same(resumed.next_batch(), found.next_batch())
    assert found.state_dict() == resumed.state_dict()


def test_errors_and_warnings_are_those_without_a_worker(tmp_path, with_worker, caplog):
    def error_of(use) -> str:
        with pytest.raises(UserError) as error:
            use()
        return str(error.value)

    def three_batches(loader) -> None:
        for _ in range(3):
            loader.next_batch()

    missing = job(tmp_path / "missing")
    assert error_of(lambda: in_process(missing)) == error_of(with_worker(missing).source_description)

    packed = gzip.compress("".join(json.dumps({"text": text * 3}) + "\n" for text in TEXTS).encode())
    (tmp_path / "damaged.jsonl.gz").write_bytes(packed[:-400])
    damaged = job(tmp_path / "damaged.jsonl.gz", shuffle_buffer=1)
    assert error_of(lambda: drain_all(in_process(damaged))) == error_of(lambda: drain_all(with_worker(damaged)))

    write_jsonl(tmp_path / "short.jsonl", [{"text": "short"}])
    short = job(tmp_path / "short.jsonl")
    caplog.clear()
    assert error_of(lambda: three_batches(in_process(short))) == error_of(lambda: three_batches(with_worker(short)))
    assert [record.levelname for record in caplog.records if "too short" in record.message] == ["WARNING"] * 2

    config = mid_training(tmp_path)
    state = in_process(short).state_dict()
    assert error_of(lambda: in_process(config).load_state_dict(state)) == error_of(lambda: with_worker(config).load_state_dict(state))


def drain_all(loader) -> None:
    while True:
        loader.next_batch()


def test_a_worker_survives_stop_signals_and_its_death_or_silence_is_one_line(tmp_path, monkeypatch):
    loader = AheadDataLoader(1, 0, mid_training(tmp_path), 1)
    pid = loader._worker.pid
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(pid, number)  # even while it starts
    assert_same(loader.next_batch(), in_process(mid_training(tmp_path)).next_batch())
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(ahead, "BATCH_SECONDS", 0.3)
    with pytest.raises(UserError, match=rf"^the data worker \(process {pid}\) has not answered for 0 seconds; .* --data.batches_ahead 0"):
        drain_all(loader)
    os.kill(pid, signal.SIGKILL)
    monkeypatch.setattr(ahead, "BATCH_SECONDS", 30.0)
    with pytest.raises(
        UserError, match="^the data worker is gone: a worker process ended by signal SIGKILL .*; memory may have run out."
    ) as error:
        drain_all(loader)
    assert "\n" not in str(error.value)
    loader.close()
    loader.close()


def test_a_worker_ends_with_a_parent_that_is_killed():
    program = (
        "import os, time\nfrom refine_titan.worker_process import WorkerProcess\nworker = WorkerProcess()\nworker.send(os.getpid)\n"
        "print(worker.receive(os.getpid), flush=True)\nworker.send(time.sleep, 60)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline, "the worker has outlived its parent"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("setting, has_gpu, microbatches", [(0, True, 0), (-1, False, 0), (-1, True, 8), (1, False, 4)])
@pytest.mark.parametrize("may_resume", [False, True])
def test_the_setting_chooses_and_counts_microbatches(tmp_path, with_worker, monkeypatch, setting, has_gpu, microbatches, may_resume):
    (tmp_path / "data").mkdir()
    config = mid_training(tmp_path / "data", batches_ahead=setting)
    config.training.global_batch_size = 8
    config.checkpoint.enable, config.job.dump_folder = True, str(tmp_path)
    if may_resume:
        (tmp_path / config.checkpoint.folder).mkdir()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    loader = build_training_dataloader(1, 0, ByteTokenizer(), config)
    assert type(loader) is (AheadDataLoader if microbatches else PackedDataLoader)
    if not microbatches:
        return
    assert loader._ahead == microbatches and loader._asked == (0 if may_resume else microbatches + 1)
    expected = in_process(config)
    assert loader.state_dict() == expected.state_dict()  # nothing is taken yet
    loader.load_state_dict(expected.state_dict())
    assert_same(loader.next_batch(), expected.next_batch())
    drain(loader)
