"""Trains like `refine_titan.train`, and kills its own process with SIGKILL at a chosen moment.

    python -m tests.integration_tests.fault_injection FAULT [arguments of refine_titan.train]

FAULT: `update:N` in the middle of step N, between forward and backward; `checkpoint:N` while the checkpoint of step N is
being written, data files on disk, metadata not yet.
"""

import os
import signal
import sys

from refine_titan.train import main
from refine_titan.trainer import RefineTrainer
from torch.distributed.checkpoint.filesystem import FileSystemWriter


def kill_at(step: int, owner: type, method: str, after: bool = False) -> None:
    original = getattr(owner, method)

    def dying(self, *args, **kwargs):
        result = original(self, *args, **kwargs) if after else None
        if RUNNING["trainer"] is not None and RUNNING["trainer"].step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return result if after else original(self, *args, **kwargs)

    setattr(owner, method, dying)


RUNNING = {"trainer": None}


def remember_trainer() -> None:
    original = RefineTrainer.train

    def train(self):
        RUNNING["trainer"] = self
        return original(self)

    RefineTrainer.train = train


if __name__ == "__main__":
    fault, step = sys.argv[1].split(":")
    remember_trainer()
    if fault == "update":
        kill_at(int(step), RefineTrainer, "loss", after=True)
    elif fault == "checkpoint":
        kill_at(int(step), FileSystemWriter, "finish")
    else:
        raise SystemExit(f"unknown fault {fault}")
    sys.exit(main(sys.argv[2:]))
