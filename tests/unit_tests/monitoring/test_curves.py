"""A run has one folder of TensorBoard, in which every step stands once, however often it starts."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from refine_titan.config.sections import JobConfig
from refine_titan.errors import UserError
from refine_titan.monitoring import curves
from refine_titan.monitoring.curves import Curves, known_peak
from refine_titan.monitoring.tensorboard import TensorBoardLogger
from refine_titan.validation import validate
from tests.integration_tests.runs import assert_finished, train


def log_steps(folder: Path, last_step: int, steps: range) -> None:
    logger = TensorBoardLogger(folder, last_step)
    for step in steps:
        logger.log({"loss_metrics/global_avg_loss": 10.0 * last_step + step, "mfu(%)": 1.0}, step)
    logger.close()


def scalars(folder: Path) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in accumulator.Scalars("loss_metrics/global_avg_loss")]


@pytest.fixture(autouse=True)
def other_process_each_time(monkeypatch):
    """Event files are named by second and process; here all are written by one process in one second."""
    numbers = iter(range(1, 100))
    monkeypatch.setattr(os, "getpid", lambda: next(numbers))


def test_later_steps_of_a_killed_start_are_dropped(tmp_path):
    log_steps(tmp_path, -1, range(0, 6))
    [first] = tmp_path.iterdir()
    with first.open("ab") as file:
        file.write(b"\x40\0\0\0\0\0\0\0half")  # it was killed while it wrote
    log_steps(tmp_path, 3, range(4, 6))
    log_steps(tmp_path, 5, range(6, 7))
    assert scalars(tmp_path) == [(0, -10.0), (1, -9.0), (2, -8.0), (3, -7.0), (4, 34.0), (5, 35.0), (6, 56.0)]
    assert len(list(tmp_path.iterdir())) == 3


def test_run_that_starts_again_leaves_nothing_of_the_start_before(tmp_path):
    log_steps(tmp_path, -1, range(0, 3))
    log_steps(tmp_path, -1, range(0, 2))
    assert scalars(tmp_path) == [(0, -10.0), (1, -9.0)]
    assert len(list(tmp_path.iterdir())) == 1


def test_file_of_another_kind_is_left_alone_and_one_that_is_damaged_ends_where_it_is_damaged(tmp_path):
    log_steps(tmp_path, -1, range(0, 4))
    [path] = tmp_path.iterdir()
    (tmp_path / "notes.txt").write_text("mine")
    content = path.read_bytes()
    (tmp_path / path.name).write_bytes(content[:-60] + bytes([255]) * 60)
    log_steps(tmp_path, 9, range(10, 11))
    assert scalars(tmp_path) == [(0, -10.0), (1, -9.0), (2, -8.0), (10, 100.0)]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_curves_open_when_the_run_begins_and_take_what_has_a_value(tmp_path):
    config = JobConfig()
    config.job.dump_folder = str(tmp_path)
    found = Curves(config)
    assert not list(tmp_path.iterdir())
    found.begin(-1)
    found.log({"loss_metrics/global_avg_loss": 2.0, "refine/pg_loss": None}, 1)
    found.close()
    assert scalars(tmp_path / "tb") == [(1, 2.0)]


def test_peak_of_a_gpu_that_torchtitan_does_not_know_is_none(monkeypatch):
    monkeypatch.setattr(curves, "get_peak_flops", lambda name: {"NVIDIA H100": 989e12}.get(name, 312e12))
    assert known_peak("NVIDIA H100") == 989e12 and known_peak("NVIDIA A100-SXM4") == 312e12
    assert known_peak("NVIDIA RTX 6000") is None


def test_weights_and_biases_without_its_package_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = JobConfig()
    config.metrics.enable_wandb = True
    with pytest.raises(UserError, match="metrics.enable_wandb is true, but the package wandb is not installed"):
        validate(config)


@pytest.mark.slow
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    """Two starts of a run are one run of Weights & Biases; its steps and numbers are those of metrics.jsonl."""
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_RUN_ID", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    wandb = ["--metrics.enable_wandb"]
    assert_finished(train(tmp_path / "run", *wandb, "--training.steps", "2"))
    assert_finished(train(tmp_path / "run", *wandb, "--training.steps", "4"))
    rows, ids = [], set()
    for path in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")):
        for record in wandb_records(path.read_bytes()):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            elif record.WhichOneof("record_type") == "history":
                rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ids == {(tmp_path / "run" / "wandb_run_id").read_text().strip()}
    assert [row["_step"] for row in rows] == [line["step"] for line in written] == [1, 2, 3, 4]
    for row, line in zip(rows, written):
        numbers = {name: value for name, value in line.items() if name != "step" and value is not None}
        assert {name: row[name] for name in numbers} == pytest.approx(numbers)


def wandb_records(content: bytes) -> Iterator:
    """The records of a run's file: those of a LevelDB log, in blocks of 32 KiB, after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    place, parts = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""
