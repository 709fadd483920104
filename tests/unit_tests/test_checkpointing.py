"""What a run loads, what a resumed optimizer takes from its checkpoint and what from the settings, and which checkpoints are kept."""

import copy
import os
import shutil
import time

import pytest
import torch
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import build_optimizers

from refine_titan.checkpointing import keep_latest_whole, keep_settings_when_loading, resume_step
from refine_titan.config.sections import JobConfig
from refine_titan.errors import UserError

BEFORE = {"lr": 1e-2, "beta2": 0.9, "weight_decay": 0.1, "warmup_steps": 4}


class Run:
    """A linear layer with torchtitan's optimizer, schedule and checkpoints in `folder`."""

    def __init__(self, folder, exclude=(), steps=10, keep_latest_k=0, initial_load_path=None, **settings):
        config = JobConfig()
        config.checkpoint.exclude_from_loading = list(exclude)
        config.checkpoint.keep_latest_k = keep_latest_k  # above 0 the manager has a thread, which `close` ends
        config.checkpoint.interval = 1
        config.checkpoint.initial_load_path = initial_load_path
        for name, value in (BEFORE | settings).items():
            setattr(config.lr_scheduler if hasattr(config.lr_scheduler, name) else config.optimizer, name, value)
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        self.model = model
        self.optimizers = build_optimizers([model], config.optimizer, None)
        self.lr_schedulers = build_lr_schedulers(self.optimizers, config.lr_scheduler, steps)
        self.checkpointer = CheckpointManager(
            None, [model], self.optimizers, self.lr_schedulers, {}, config.checkpoint, None, base_folder=str(folder)
        )
        keep_settings_when_loading(self.checkpointer, self.optimizers, self.lr_schedulers)
        keep_latest_whole(self.checkpointer)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.model(torch.ones(1, 3)).square().sum().backward()
            self.optimizers.step()
            self.optimizers.zero_grad()
            self.lr_schedulers.step()

    @property
    def group(self) -> dict:
        [group] = self.optimizers.optimizers[0].param_groups
        return group

    @property
    def shown_learning_rate(self) -> float:
        return self.lr_schedulers.schedulers[0].get_last_lr()[0]

    @property
    def moments(self) -> list[torch.Tensor]:
        return [state[name] for state in self.optimizers.optimizers[0].state.values() for name in ("exp_avg", "exp_avg_sq", "step")]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that has written a checkpoint after its second step, in the middle of its warm-up."""
    run = Run(tmp_path_factory.mktemp("run"))
    run.train(2)
    run.checkpointer.save(curr_step=2, last_step=True)
    return run


def resumed(stopped, **settings) -> Run:
    run = Run(stopped.checkpointer.folder.removesuffix("/checkpoint"), **settings)
    assert run.checkpointer.load()
    return run


def test_unchanged_settings_go_on_bitwise(stopped):
    run, unstopped = resumed(stopped), copy.deepcopy(stopped.model.state_dict())
    assert all(torch.equal(run.model.state_dict()[name], tensor) for name, tensor in unstopped.items())
    assert {k: v for k, v in run.group.items() if k != "params"} == {k: v for k, v in stopped.group.items() if k != "params"}
    assert all(map(torch.equal, run.moments, stopped.moments))
    assert run.lr_schedulers.state_dict() == stopped.lr_schedulers.state_dict()


def test_changed_hyperparameters_train_and_are_shown(stopped):
    run = resumed(stopped, lr=4e-3, beta2=0.99, weight_decay=0.0)
    # Step 3 of a warm-up of 4 steps
    assert run.group["lr"] == run.shown_learning_rate == pytest.approx(4e-3 * 3 / 4)
    assert run.group["betas"] == (0.9, 0.99) and run.group["weight_decay"] == 0.0
    assert all(map(torch.equal, run.moments, stopped.moments))
    run.train(2)
    assert run.group["lr"] == run.shown_learning_rate == 4e-3


def test_changed_schedule_takes_over_where_the_run_stands(stopped):
    run = resumed(stopped, warmup_steps=0, decay_ratio=0.8)
    # Two of ten steps are constant; the third is the first of eight steps of decay.
    assert run.group["lr"] == run.shown_learning_rate == pytest.approx(1e-2)
    run.train(1)
    assert run.group["lr"] == run.shown_learning_rate < 1e-2


def test_other_optimizer_takes_the_moments(stopped):
    run = resumed(stopped, name="Adam")
    assert not run.group["decoupled_weight_decay"] and stopped.group["decoupled_weight_decay"]
    assert all(map(torch.equal, run.moments, stopped.moments))


def test_excluded_optimizer_begins_anew_with_the_learning_rate_that_is_shown(stopped):
    run = resumed(stopped, exclude=["optimizer"], lr=4e-3)
    assert not run.moments
    assert run.group["lr"] == run.shown_learning_rate == pytest.approx(4e-3 * 3 / 4)


def test_excluded_schedule_begins_anew_with_the_learning_rate_that_is_shown(stopped):
    run = resumed(stopped, exclude=["lr_scheduler"])
    assert run.group["lr"] == run.shown_learning_rate == pytest.approx(1e-2 / 4)
    assert all(map(torch.equal, run.moments, stopped.moments))


@pytest.fixture
def keeping(tmp_path, monkeypatch):
    """A run that keeps two checkpoints, with two written; and a function that writes another and says which steps are there."""
    monkeypatch.setattr("torch.distributed.get_rank", lambda group=None: 0)
    run = Run(tmp_path, keep_latest_k=2)
    folder = tmp_path / "checkpoint"
    for step in (1, 2):
        run.checkpointer.save(step)

    def steps_after(step: int, last_step: bool = False) -> list[str]:
        run.checkpointer.save(step, last_step)
        run.checkpointer.purge_queue.put(str(folder / "nothing"))
        while not run.checkpointer.purge_queue.empty():
            time.sleep(0.01)
        run.checkpointer.close()
        return sorted(path.name for path in folder.iterdir())

    yield folder, steps_after
    run.checkpointer.close()


@pytest.mark.parametrize("last_step", [False, True])
def test_as_many_checkpoints_are_kept_as_is_said(keeping, last_step):
    assert keeping[1](3, last_step) == ["step-2", "step-3"]


def damaged_by(content: str, caplog) -> bool:
    return f"is damaged and not counted by checkpoint.keep_latest_k: {content}" in caplog.text


def test_a_checkpoint_that_lacks_a_file_does_not_count(keeping, caplog):
    folder, steps_after = keeping
    (folder / "step-2" / "__0_0.distcp").unlink()
    assert steps_after(3) == ["step-1", "step-2", "step-3"] and damaged_by("__0_0.distcp does not exist", caplog)


def test_a_checkpoint_that_was_cut_does_not_count(keeping, caplog):
    folder, steps_after = keeping
    os.truncate(folder / "step-2" / "__0_0.distcp", 10)
    assert steps_after(3) == ["step-1", "step-2", "step-3"] and damaged_by("__0_0.distcp is truncated", caplog)


def test_a_checkpoint_without_readable_metadata_does_not_count(keeping, caplog):
    folder, steps_after = keeping
    (folder / "step-2" / ".metadata").write_bytes(b"")
    assert steps_after(3) == ["step-1", "step-2", "step-3"] and damaged_by("", caplog)


def test_a_checkpoint_that_is_being_written_does_not_count(keeping):
    folder, steps_after = keeping
    (folder / "step-9").mkdir()  # as an asynchronous save makes it before the data are on disk
    assert steps_after(3) == ["step-2", "step-3", "step-9"]


def test_copies_under_other_names_are_left_alone(keeping):
    folder, steps_after = keeping
    for name in ("best-step-1", "step-1.bak", "step-0-of-march"):
        shutil.copytree(folder / "step-1", folder / name)
    assert steps_after(3) == ["best-step-1", "step-0-of-march", "step-1.bak", "step-2", "step-3"]


def test_damaged_checkpoints_older_than_those_kept_are_removed(keeping):
    folder, steps_after = keeping
    (folder / "step-1" / "__0_0.distcp").unlink()
    assert steps_after(3) == ["step-2", "step-3"]


def holding(folder, content: tuple[str, ...]) -> str:
    """A checkpoint folder with files and folders that no run writes."""
    for path in (folder / "checkpoint" / name for name in content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    return str(folder)


@pytest.mark.parametrize(
    "content",
    [(), ("lost+found/file",), (".nfs0001",), ("old/.metadata",), ("step-9.damaged/.metadata",), ("step-09/.metadata",)],
)
def test_start_is_loaded_whatever_else_is_in_the_checkpoint_folder(stopped, tmp_path, content):
    start = f"{stopped.checkpointer.folder}/step-2"
    run = Run(holding(tmp_path, content), initial_load_path=start)
    assert not torch.equal(run.model.weight, stopped.model.weight)
    assert run.checkpointer.load()
    assert torch.equal(run.model.weight, stopped.model.weight) and run.checkpointer.folder == str(tmp_path / "checkpoint")
    assert not Run(tmp_path).checkpointer.load()  # without a start the weights are random


def test_checkpoint_that_was_renamed_is_not_resumed(stopped, tmp_path):
    shutil.copytree(stopped.checkpointer.folder, tmp_path / "checkpoint")
    run = Run(holding(tmp_path, ("step-40.damaged/.metadata",)))
    assert run.checkpointer.load()
    assert torch.equal(run.model.weight, stopped.model.weight)


@pytest.mark.parametrize("load_only", [False, True])
def test_step_before_the_last_one_is_refused(stopped, tmp_path, load_only):
    for step in (1, 2):
        shutil.copytree(f"{stopped.checkpointer.folder}/step-2", tmp_path / "checkpoint" / f"step-{step}")
    run = Run(tmp_path)
    run.checkpointer.load_only = load_only
    with pytest.raises(UserError, match="load_step is 1, but .*checkpoint goes on to step 2; .* Start in another job.dump_folder with"):
        resume_step(run.checkpointer, 1, 1)
