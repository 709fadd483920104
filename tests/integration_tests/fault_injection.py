"""Trains like `refine_titan.train`, and fails at a chosen moment.

    python -m tests.integration_tests.fault_injection FAULT [arguments of refine_titan.train]

Killed with SIGKILL: `update:N` in the middle of step N, between forward and backward; `outer:N` before its outer step;
`checkpoint:N` while the checkpoint of step N is being written, data files on disk, metadata not yet; `lost:N` the last rank in
step N.
Broken in step N: `engine:N` vLLM raises while it runs the model; `sync:N` half the weights are synchronised; `shape:N` a weight
changes its shape; `nan:N` a weight is NaN; `infinite:N` the outer step's loss is not finite; `gap:N` the engine's
log-probabilities are wrong; `rank:N` the last rank raises.
Asked to stop: `stop:N` the last rank gets SIGTERM in the middle of step N.
Hostile places: `vanish:N` the run's folder is removed before step N; `clock:N` from step N on each reading of the clock is earlier than
the one before.
From the start: `missing:0` vllm is not installed; `moved:0`, no fault, lets ranks that share a sequence share attention evenly however
short it is.
"""

import importlib.util
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from refine_titan.errors import UserError
from refine_titan.models.attention import shares
from refine_titan.models.shared_prefix import SharedPrefixMixer
from refine_titan.rollout import vllm_runtime
from refine_titan.rollout.vllm_engine import VLLMEngine
from refine_titan.rollout.weight_sync import WeightSync
from refine_titan.steps.outer_step import OuterStep
from refine_titan.steps.refine_step import RefineStep
from refine_titan.train import main
from refine_titan.trainer import RefineTrainer


def kill_at(step: int, owner: type, method: str, after: bool = False, by: signal.Signals = signal.SIGKILL) -> None:
    original = getattr(owner, method)

    def dying(self, *args, **kwargs):
        result = original(self, *args, **kwargs) if after else None
        if RUNNING["trainer"] is not None and RUNNING["trainer"].step == step:
            os.kill(os.getpid(), by)
        return result if after else original(self, *args, **kwargs)

    setattr(owner, method, dying)


RUNNING = {"trainer": None}


def at_step(step: int) -> bool:
    return RUNNING["trainer"] is not None and RUNNING["trainer"].step == step


def raise_at(step: int, owner: type, method: str, error: Exception) -> None:
    original = getattr(owner, method)

    def failing(self, *args, **kwargs):
        if at_step(step):
            raise error
        return original(self, *args, **kwargs)

    setattr(owner, method, failing)


def fail_inside_vllm(step: int) -> None:
    original = vllm_runtime.run_requests

    def run_requests(*args):
        with pytest.MonkeyPatch.context() as patch:
            if at_step(step):
                patch.setattr(SharedPrefixMixer, "forward", lambda *_, **__: 1 / 0)
            return original(*args)

    vllm_runtime.run_requests = run_requests


def interrupt_sync(step: int) -> None:
    original = WeightSync._stream

    def stream(self):
        for i, item in enumerate(original(self)):
            if i == 20 and at_step(step):
                raise RuntimeError("connection lost")
            yield item

    WeightSync._stream = stream


def before_sync(step: int, change: Callable[[RefineTrainer], None]) -> None:
    original = WeightSync.sync

    def sync(self, version):
        if at_step(step):
            change(RUNNING["trainer"])
        original(self, version)

    WeightSync.sync = sync


def break_shape(trainer: RefineTrainer) -> None:
    trainer.model_parts[0].norm.weight = torch.nn.Parameter(torch.ones(3))


def break_value(trainer: RefineTrainer) -> None:
    trainer.model_parts[0].norm.weight.data[5] = torch.nan


def before_step(step: int, act: Callable[[RefineTrainer], None]) -> None:
    original = RefineTrainer.train_step

    def train_step(self, batches):
        if self.step == step:
            act(self)
        return original(self, batches)

    RefineTrainer.train_step = train_step


def turn_the_clock_back(trainer: RefineTrainer) -> None:
    readings = iter(range(int(time.time()) - 3600, 0, -60))
    time.time = lambda: float(next(readings))
    time.time_ns = lambda: next(readings) * 10**9


def falsify_logprobs(step: int) -> None:
    original = VLLMEngine.generate

    def generate(self, request, prefix):
        rollouts = original(self, request, prefix)
        return replace(rollouts, logprobs_nk=rollouts.logprobs_nk - 4) if at_step(step) else rollouts

    VLLMEngine.generate = generate


def make_infinite(step: int) -> None:
    original = OuterStep.answer_loss

    def answer_loss(self, *args):
        loss = original(self, *args)
        return loss * torch.inf if at_step(step) else loss

    OuterStep.answer_loss = answer_loss


def remember_trainer() -> None:
    original = RefineTrainer.train

    def train(self):
        RUNNING["trainer"] = self
        return original(self)

    RefineTrainer.train = train


if __name__ == "__main__":
    fault, step = sys.argv[1].split(":")
    step = int(step)
    remember_trainer()
    is_last_rank = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    match fault:
        case "update":
            kill_at(step, RefineStep, "loss", after=True)
        case "outer":
            kill_at(step, OuterStep, "run")
        case "infinite":
            make_infinite(step)
        case "checkpoint":
            kill_at(step, FileSystemWriter, "finish")
        case "engine":
            fail_inside_vllm(step)
        case "sync":
            interrupt_sync(step)
        case "shape":
            before_sync(step, break_shape)
        case "nan":
            before_sync(step, break_value)
        case "vanish":
            before_step(step, lambda trainer: shutil.rmtree(trainer.job_config.job.dump_folder))
        case "clock":
            before_step(step, turn_the_clock_back)
        case "missing":
            find = importlib.util.find_spec
            importlib.util.find_spec = lambda name, *rest: None if name == "vllm" else find(name, *rest)
        case "moved":
            shares.KEYS_PER_MOVED_TOKEN = 0
        case "gap":
            falsify_logprobs(step)
        case "rank" if is_last_rank:
            raise_at(step, RefineStep, "loss", UserError("this rank has had enough"))
        case "lost" if is_last_rank:
            kill_at(step, RefineStep, "loss")
        case "stop" if is_last_rank:
            kill_at(step, RefineStep, "loss", by=signal.SIGTERM)
        case "rank" | "lost" | "stop":
            pass
        case _:
            raise SystemExit(f"unknown fault {fault}")
    sys.exit(main(sys.argv[2:]))
