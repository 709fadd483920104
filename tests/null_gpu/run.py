"""One job on the GPU that does nothing; `test_null_gpu.py` says what it needs around it.

    python run.py REPORT.json train ARGUMENTS OF refine_titan.train
    python run.py REPORT.json tools/evaluate.py ARGUMENTS

Writes to REPORT.json what each training step (of a tool: all of it) launched, copied and waited for, and where in our code the
last one waited. Kernels do not run, so device memory holds what was there before; the few places where host code decides by a value that
a kernel would have computed get one here.
"""

import collections
import ctypes
import functools
import json
import os
import runpy
import sys
import time
import traceback
import warnings
from collections.abc import Callable
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
        """Notes the innermost line of ours that waits (of `on_host`, its caller), and the line of vLLM, if it is vLLM that waits."""
        tests, repository = f"{REPOSITORY}/tests/null_gpu/", f"{REPOSITORY}/"
        frames = [f for f in traceback.extract_stack() if not f.filename.startswith(tests) and f.name != "on_host"]
        stack = [(f.filename, f.lineno) for f in frames]
        ours = [frame for frame in stack if frame[0].startswith(repository) and not frame[0].startswith(sys.prefix)][-1:]
        after = stack[stack.index(ours[0]) + 1 :] if ours else stack
        inside = [frame for frame in after if "/site-packages/vllm/" in frame[0]][-1:]
        places = [f"{name.removeprefix(repository).rpartition('/site-packages/')[2]}:{line}" for name, line in ours + inside]
        self._waits[" > ".join(places) or "elsewhere"] += 1

    def write(self, status: int) -> None:
        if int(os.environ.get("RANK", "0")) == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            places = dict(sorted(self.waits_by_place.items(), key=lambda place: -place[1]))
            self.path.write_text(json.dumps({"status": status, "steps": self.steps, "waits_by_place": places}, indent=1))


def note_waits(report: Report) -> None:
    """Torch warns of what waits for the device; waits that are called by name are not among these."""

    def on_warning(message, category, filename, lineno, file=None, line=None):
        if "synchronizing CUDA operation" in str(message):
            report.add_wait()

    warnings.showwarning = on_warning
    warnings.simplefilter("always")
    torch.cuda.set_sync_debug_mode("warn")
    torch.Event = type("Event", (torch.Event,), {})  # the class itself takes no new methods
    for owner in (torch.cuda, torch.accelerator, torch.cuda.Event, torch.cuda.Stream, torch.Event):
        owner.synchronize = noted(report, owner.synchronize)


def noted(report: Report, wait: Callable) -> Callable:
    @functools.wraps(wait)
    def waiting(*arguments):
        report.add_wait()
        return wait(*arguments)

    return waiting


def decide_for_the_host() -> None:
    """Puts values in the place of those that a kernel would have computed and that host code decides by."""
    from torchtitan.distributed import utils as dist_utils

    from refine_titan.monitoring import step_metrics
    from refine_titan.rollout import weight_sync
    from refine_titan.steps import checked_rollouts, refine_step

    weight_sync.WeightSync._compare_ranks = lambda self, checksum: None
    select = refine_step.select_positions
    refine_step.select_positions = lambda entropy_T, *arguments, **settings: select(torch.ones_like(entropy_T), *arguments, **settings)
    # These read as the real ones do.
    read_sums = weight_sync._read
    weight_sync._read = lambda groups, flags: tuple([0] * len(found) for found in read_sums(groups, flags))
    checked_rollouts.refuse_gap = lambda limit, request, rollouts, logprobs_nk, window: logprobs_nk.sum().item()
    clip, norm = dist_utils.clip_grad_norm_, torch.ones(()).cuda()
    dist_utils.clip_grad_norm_ = lambda *arguments, **settings: (clip(*arguments, **settings), norm)[1]
    read = step_metrics._read
    step_metrics._read = lambda numbers: [1.0 if isinstance(x, torch.Tensor) else x for x, _ in zip(numbers, read(numbers))]


def give_vllm_the_runtime() -> None:
    """vLLM's sleep loads the runtime by the path of the one that this process has mapped, which is the real one."""
    from refine_titan.rollout import vllm_runtime

    build = vllm_runtime.build_llm

    def build_llm(*arguments, **settings):
        from vllm.distributed.device_communicators.cuda_wrapper import CudaRTLibrary

        load = CudaRTLibrary.__init__
        CudaRTLibrary.__init__ = lambda self, so_file=None: load(self, os.environ["NULL_GPU_LIBRARY"])
        return build(*arguments, **settings)

    vllm_runtime.build_llm = build_llm


def await_ranks(folder: Path) -> None:
    """Waits until all ranks have come here: collectives that do nothing hold none back, and one could end before another has begun."""
    (folder / f"rank_{os.environ.get('RANK', '0')}").touch()
    while len(list(folder.glob("rank_*"))) < int(os.environ.get("WORLD_SIZE", "1")):
        time.sleep(0.05)


def count_steps(report: Report) -> None:
    from refine_titan.trainer import RefineTrainer

    train_step = RefineTrainer.train_step

    def counted(self, data_iterator):
        await_ranks(report.path.parent)
        report.begin_step()
        train_step(self, data_iterator)
        report.end_step()

    RefineTrainer.train_step = counted


def main(path: str, program: str, arguments: list[str]) -> int:
    report = Report(Path(path))
    note_waits(report)
    decide_for_the_host()
    give_vllm_the_runtime()
    status = 1
    try:
        if program == "train":
            from refine_titan.train import main as train

            count_steps(report)
            status = train(arguments)
        else:
            sys.argv = [program, *arguments]
            sys.path.insert(0, str(REPOSITORY / "tools"))  # as if the tool were started by itself
            try:
                runpy.run_path(str(REPOSITORY / program), run_name="__main__")
            except SystemExit as ended:
                status = ended.code or 0
            report.end_step()
    finally:
        report.write(status)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
