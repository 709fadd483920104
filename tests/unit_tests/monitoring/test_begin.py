"""A run begins anew in its folder only where nothing is lost."""

import json

import pytest

from refine_titan.config.sections import JobConfig
from refine_titan.errors import UserError
from refine_titan.monitoring.curves import CurvesProcessor
from refine_titan.monitoring.run_monitor import RunMonitor


class NoCurves(CurvesProcessor):
    def __init__(self):
        pass

    def begin(self, last_step: int) -> None:
        pass


def begin(run, monkeypatch, **settings) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    config = JobConfig()
    config.job.dump_folder = str(run)
    for name, value in settings.items():
        setattr(config.checkpoint, name, value)
    monitor = RunMonitor(config, None, NoCurves())
    monitor.begin(None)
    monitor.metrics_file.close(), monitor.rollouts_file.close()


@pytest.mark.parametrize(
    ("earlier", "settings", "place"),
    [
        ({"enable": True, "folder": "checkpoint"}, {"folder": "other"}, ", but for checkpoint.folder = 'checkpoint'"),
        ({"enable": True, "folder": "checkpoint"}, {"enable": False}, ""),
        ({"enable": False, "folder": "checkpoint"}, {}, ""),
        ({"enable": True, "folder": "checkpoint", "load_only": True}, {}, ""),
        ({"enable": True, "folder": "checkpoint"}, {"load_only": True}, ""),
    ],
)
def test_records_are_not_overwritten(tmp_path, monkeypatch, earlier, settings, place):
    (tmp_path / "config.json").write_text(json.dumps({"checkpoint": earlier}))
    records = '{"step": 1}\n'
    (tmp_path / "metrics.jsonl").write_text(records)
    with pytest.raises(UserError, match=f"holds the records of a run without a checkpoint to go on from{place}, and they would be"):
        begin(tmp_path, monkeypatch, **settings)
    assert (tmp_path / "metrics.jsonl").read_text() == records


def test_run_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"checkpoint": {"enable": True, "folder": "checkpoint"}}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    begin(tmp_path, monkeypatch)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize(("epochs", "longer"), [(0, "a larger --training.steps"), (2, "more --training.epochs")])
def test_finished_run_says_which_setting_makes_it_longer(tmp_path, monkeypatch, caplog, epochs, longer):
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr(RunMonitor, "summary", lambda *arguments: "")
    config = JobConfig()
    config.job.dump_folder, config.training.epochs = str(tmp_path), epochs
    monitor = RunMonitor(config, None, NoCurves())
    monitor.begin(config.training.steps)
    monitor.finish(config.training.steps, 0, None)
    monitor.close()
    assert "Nothing was trained" in caplog.text and f"or go on with {longer}" in caplog.text
