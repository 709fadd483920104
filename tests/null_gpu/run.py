"""One job on the GPU that does nothing; `test_null_gpu.py` says what it needs around it.

    python run.py REPORT.json train ARGUMENTS OF refine_titan.train
    python run.py REPORT.json evaluate ARGUMENTS OF tools/evaluate.py

Writes to REPORT.json what each training step (of an evaluation: all of it) launched, copied and waited for, and where in our code the
last one waited. Kernels do not run, so device memory holds what was there before; the few places where host code decides by a value that
a kernel would have computed get one here.
"""

import collections
import ctypes
import json
import os
import runpy
import sys
import traceback
import warnings
from pathlib import Path

import torch

import refine_titan  # noqa: F401  # isort: skip  announces the device before torchtitan is imported

REPOSITORY = Path(__file__).parents[2]
# The counters of driver.c, in its order.
COUNTERS = (
    "launches products stream_waits device_waits event_waits to_device to_host pageable graph_launches recorded collectives cpu_pointers"
).split()
_counters = (ctypes.c_long * len(COUNTERS)).in_dll(ctypes.CDLL(os.environ["NULL_GPU_LIBRARY"]), "null_counters")


class Report:
    """What was counted, step by step."""

    def __init__(self, path: Path):
        self.path = path
        self.steps: list[dict[str, int]] = []
        self.waits_by_place: dict[str, int] = {}
        self.begin_step()

    def begin_step(self) -> None:
        self._before, self._waits = self._counted(), collections.Counter()

    @staticmethod
    def _counted() -> dict[str, int]:
        counts = dict(zip(COUNTERS, _counters))
        counts["waits"] = counts.pop("stream_waits") + counts.pop("device_waits") + counts.pop("event_waits")
        return counts

    def end_step(self) -> None:
        counted = self._counted()
        self.steps.append({name: counted[name] - self._before[name] for name in counted})
        self.waits_by_place = self._waits
        self.begin_step()

    def add_wait(self) -> None:
        """Notes the innermost line of ours that waits."""
        libraries = (sys.prefix, f"{REPOSITORY}/tests/null_gpu/")
        stack = [f for f in traceback.extract_stack() if f.filename.startswith(f"{REPOSITORY}/")]
        ours = [f for f in stack if not f.filename.startswith(libraries)]
        self._waits[f"{ours[-1].filename.removeprefix(f'{REPOSITORY}/')}:{ours[-1].lineno}" if ours else "elsewhere"] += 1

    def write(self, status: int) -> None:
        if int(os.environ.get("RANK", "0")) == 0:
            places = dict(sorted(self.waits_by_place.items(), key=lambda place: -place[1]))
            self.path.write_text(json.dumps({"status": status, "steps": self.steps, "waits_by_place": places}, indent=1))


def note_waits(report: Report) -> None:
    """Torch warns of what waits for the device; explicit barriers are not among these."""

    def on_warning(message, category, filename, lineno, file=None, line=None):
        if "synchronizing CUDA operation" in str(message):
            report.add_wait()

    warnings.showwarning = on_warning
    warnings.simplefilter("always")
    torch.cuda.set_sync_debug_mode("warn")
    synchronize = torch.cuda.synchronize

    def barrier(*args):
        report.add_wait()
        synchronize(*args)

    torch.cuda.synchronize = barrier


def decide_for_the_host() -> None:
    """Puts values in the place of those that a kernel would have computed and that host code decides by."""
    from refine_titan.monitoring import step_metrics
    from refine_titan.rollout import weight_sync
    from refine_titan.steps import checked_rollouts

    weight_sync.WeightSync._refuse_non_finite = lambda self, version: None
    weight_sync.WeightSync._compare_ranks = lambda self, checksum: None
    # These read as the real ones do.
    checksums = weight_sync._checksums
    weight_sync._checksums = lambda *groups: [0 for _ in checksums(*groups)]
    checked_rollouts.refuse_gap = lambda limit, request, rollouts, logprobs_nk, window: logprobs_nk.sum().item()
    read = step_metrics._read
    step_metrics._read = lambda numbers: [1.0 if isinstance(x, torch.Tensor) else x for x, _ in zip(numbers, read(numbers))]


def give_vllm_the_runtime() -> None:
    """vLLM's sleep loads the runtime by the path of the one that this process has mapped, which is the real one."""
    from vllm.distributed.device_communicators.cuda_wrapper import CudaRTLibrary

    load = CudaRTLibrary.__init__
    CudaRTLibrary.__init__ = lambda self, so_file=None: load(self, os.environ["NULL_GPU_LIBRARY"])


def count_steps(report: Report) -> None:
    from refine_titan.trainer import RefineTrainer

    train_step = RefineTrainer.train_step

    def counted(self, data_iterator):
        report.begin_step()
        train_step(self, data_iterator)
        report.end_step()

    RefineTrainer.train_step = counted


def main(path: str, program: str, arguments: list[str]) -> int:
    report = Report(Path(path))
    note_waits(report)
    decide_for_the_host()
    if "vllm" in arguments:
        give_vllm_the_runtime()
    status = 1
    try:
        if program == "train":
            from refine_titan.train import main as train

            count_steps(report)
            status = train(arguments)
        else:
            sys.argv = ["evaluate.py", *arguments]
            try:
                runpy.run_path(str(REPOSITORY / "tools" / "evaluate.py"), run_name="__main__")
            except SystemExit as ended:
                status = ended.code or 0
            report.end_step()
    finally:
        report.write(status)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
