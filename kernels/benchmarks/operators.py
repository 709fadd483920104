"""Checks every operator, forward and backward, against its plain-torch reference, then times both side by side.

    python kernels/benchmarks/operators.py [--repeats 25] [--baseline FILE | --write FILE]

Prints JSON: for each operator the milliseconds of operator and reference (medians), their ratio, and the peak of the bytes that
tensors hold besides the inputs. On a CPU sizes are small. With --baseline, the exit status is 1 if a result differs from FILE's:
bytes by more than 1 %, time ratios by more than 15 %. Times are compared only if device, threads and torch are those of FILE; if
not, the script says so.
"""

import argparse
import ctypes
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from refine_kernels.attention import attention
from refine_kernels.attention.reference import attention_by_definition as softmax_by_definition
from refine_kernels.delta_rule import delta_rule
from refine_kernels.delta_rule.reference import recurrent_delta_rule
from refine_kernels.lact import FastWeights, lact
from refine_kernels.lact.reference import lact_by_definition
from refine_kernels.linear_head import linear_head_losses
from refine_kernels.linear_head.reference import dense_head_losses
from refine_kernels.past_tokens import TokenSpans
from refine_kernels.short_conv import short_conv
from refine_kernels.sliding_window import sliding_window_attention
from refine_kernels.sliding_window.reference import attention_by_definition
from refine_titan.estimation.live_bytes import LiveBytes
from refine_titan.monitoring.run_folder import write_atomically

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
BYTES_TOLERANCE, TIME_TOLERANCE = 0.01, 0.15
# Relative error of outputs and gradients in float32: sums of hundreds of terms in another order.
TOLERANCE = 1e-4

Outputs = tuple[torch.Tensor, ...]


class Case(NamedTuple):
    """An operator and its reference: functions of the inputs that return the same outputs."""

    inputs: list[torch.Tensor]
    operator: Callable[..., Outputs]
    reference: Callable[..., Outputs]


def cases(device: torch.device) -> dict[str, Case]:
    """The case of each operator, on packed documents of uneven length. The slowest reference, a loop over the T tokens, takes about a
    second."""
    T = 256 if device.type == "cpu" else 4096
    cu_seqlens = (0, T // 3, T - 5, T)
    positions = tuple(range(64, T + 1, 64))
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(device).requires_grad_()

    def unit(*shape: int) -> torch.Tensor:
        return F.normalize(draw(*shape).detach(), dim=-1).requires_grad_()

    def between(low: float, high: float, *shape: int) -> torch.Tensor:
        return (low + (high - low) * torch.rand(*shape, generator=generator)).to(device).requires_grad_()

    H, D = 4, 64
    rule = [unit(T, H, D), unit(T, H, D), draw(T, H, D), between(0, 1, T, H)]
    found = {
        "delta_rule": Case(
            rule,
            lambda q, k, v, b: delta_rule(q, k, v, b, cu_seqlens, state_positions=positions),
            lambda q, k, v, b: recurrent_delta_rule(q, k, v, b, cu_seqlens, state_positions=positions),
        )
    }
    for name, shape in (("head", (T, H)), ("channel", (T, H, D))):
        found[f"delta_rule, decay per {name}"] = Case(
            [*rule, between(-0.5, 0, *shape)],
            lambda q, k, v, b, g: delta_rule(q, k, v, b, cu_seqlens, log_decay=g, state_positions=positions),
            lambda q, k, v, b, g: recurrent_delta_rule(q, k, v, b, cu_seqlens, log_decay=g, state_positions=positions),
        )
    weights = [draw(H, D, D, scale=D**-0.5) for _ in range(3)]
    for muon in (False, True):
        options = dict(chunk_size=64, muon=muon, newton_schulz_dtype=torch.float32)
        found[f"lact{' with Muon' if muon else ''}"] = Case(
            [unit(T, H, D), unit(T, H, D), draw(T, H, D), between(0, 0.1, T, H, 3, 1), between(0, 1, T, H), *weights],
            lambda q, k, v, lr, m, *w, o=options: (lact(q, k, v, lr, m, FastWeights(*w), cu_seqlens, **o)[0],),
            lambda q, k, v, lr, m, *w, o=options: (lact_by_definition(q, k, v, lr, m, w, cu_seqlens, **o),),
        )
    found["sliding_window"] = Case(
        [draw(T, H, D) for _ in range(3)],
        lambda q, k, v: (sliding_window_attention(q, k, v, cu_seqlens, 64).out_THD,),
        lambda q, k, v: (attention_by_definition(q, k, v, cu_seqlens, 64),),
    )
    starts = [1, *range(32, T + 1, 32)]
    branches = tuple(range(0, 5 * len(starts) + 1, 5))
    documents = [max(start for start in cu_seqlens if start < r) for r in starts]
    bounds = torch.tensor(list(zip(documents, starts)))[:, None]
    shapes = [(T, 2 * H, D), (T, H, D), (T, H, D)]
    found["attention"] = Case(
        [draw(*shape) for shape in (*shapes, *((branches[-1], *shape[1:]) for shape in shapes))],
        lambda q, k, v, *b: (
            attention(q, k, v, cu_seqlens),
            attention(*b, branches, past=tuple(TokenSpans((x,), bounds) for x in (k, v))),
        ),
        lambda q, k, v, *b: (
            softmax_by_definition(q, k, v, cu_seqlens),
            softmax_by_definition(*b, branches, *(TokenSpans((x,), bounds).read() for x in (k, v))),
        ),
    )
    found["short_conv"] = Case(
        [draw(T, H * D), draw(H * D, 4)],
        lambda x, w: (short_conv(x, w, cu_seqlens)[0],),
        lambda x, w: (_convolve_each(x, w, cu_seqlens),),
    )
    labels = torch.randint(0, 16384, (T,), generator=generator).to(device)
    found["linear_head"] = Case(
        [draw(T, H * D), draw(16384, H * D, scale=0.05)],
        lambda h, w: (linear_head_losses(h, w, labels).nll_sum,),
        lambda h, w: (dense_head_losses(h, w, labels).nll_sum,),
    )
    return found


def _convolve_each(x_TD: torch.Tensor, weight_DW: torch.Tensor, cu_seqlens: tuple[int, ...]) -> torch.Tensor:
    """torch's own convolution with one group per channel, one document at a time."""
    D, W = weight_DW.shape
    documents = [F.pad(x_TD[start:end].t(), (W - 1, 0))[None] for start, end in zip(cu_seqlens, cu_seqlens[1:])]
    return torch.cat([F.conv1d(x, weight_DW[:, None], groups=D)[0].t() for x in documents])


def run(function: Callable[..., Outputs], inputs: list[torch.Tensor]) -> tuple[float, Outputs]:
    """Returns the seconds of one forward and backward, and outputs and gradients."""
    _synchronize(inputs[0])
    begin = time.perf_counter()
    outputs = function(*inputs)
    gradients = torch.autograd.grad(sum(out.float().sin().sum() for out in outputs), inputs)
    _synchronize(inputs[0])
    return time.perf_counter() - begin, (*outputs, *gradients)


def peak_bytes(function: Callable[..., Outputs], inputs: list[torch.Tensor]) -> int:
    """The most bytes that tensors hold at once, besides the inputs."""
    if inputs[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run(function, inputs)
        return torch.cuda.max_memory_allocated() - held
    with LiveBytes(besides=inputs).counting() as live:
        run(function, inputs)
    return live.peak


def measure(case: Case, repeats: int) -> dict[str, float]:
    """Returns error, times and memory of a case. Raises SystemExit if operator and reference differ."""
    results = [run(function, case.inputs)[1] for function in (case.operator, case.reference)]
    error = max(float((a - b).detach().norm() / b.detach().norm().clamp_min(1e-30)) for a, b in zip(*results))
    if not error < TOLERANCE:
        raise SystemExit(f"off by {error:.1e}: not timed")
    del results
    # Alternating, so that a slow moment of the machine affects both.
    seconds = [[run(function, case.inputs)[0] for function in (case.operator, case.reference)] for _ in range(repeats)]
    operator, reference = (statistics.median(column) for column in zip(*seconds))
    return {
        "error": float(f"{error:.1e}"),
        "operator_ms": round(1e3 * operator, 3),
        "reference_ms": round(1e3 * reference, 3),
        "time_ratio": round(statistics.median(a / b for a, b in seconds), 4),
        "peak_bytes": peak_bytes(case.operator, case.inputs),
    }


def differences(found: dict[str, Any], baseline: dict[str, Any]) -> tuple[list[str], str | None]:
    """One line per difference beyond the tolerances, and the reason if times were not compared."""
    machine = [name for name in ("device", "threads", "torch") if found[name] != baseline[name]]
    wrong = []
    for name in sorted(found["operators"].keys() ^ baseline["operators"].keys()):
        wrong.append(f"{name}: only in {'the baseline' if name in baseline['operators'] else 'this run'}")
    for name in found["operators"].keys() & baseline["operators"].keys():
        for quantity, tolerance in (("peak_bytes", BYTES_TOLERANCE), ("time_ratio", TIME_TOLERANCE)):
            value, before = found["operators"][name][quantity], baseline["operators"][name][quantity]
            if abs(value - before) > tolerance * before and not (quantity == "time_ratio" and machine):
                wrong.append(f"{name}: {quantity} is {value}, the baseline's {before} (allowed: within {tolerance:.0%})")
    reason = f"times were not compared: another {', '.join(machine)} than the baseline's" if machine else None
    return sorted(wrong), reason


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")


def _keep_freed_memory() -> None:
    """Makes the C allocator (glibc) keep freed memory. Otherwise it maps large blocks again or not, depending on what ran before, and the
    page faults change an operator's time by a quarter."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, 1 << 30), (M_TOP_PAD, 1 << 28)):
            mallopt(option, value)


def _synchronize(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--baseline", type=Path, help="results to compare with")
    parser.add_argument("--write", type=Path, help="file for the results")
    arguments = parser.parse_args()
    _keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {"device": _device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__, "operators": {}}
    for name, case in cases(device).items():
        try:
            found["operators"][name] = measure(case, arguments.repeats)
        except SystemExit as error:
            raise SystemExit(f"{name} is {error}") from error
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.write is not None:
        write_atomically(arguments.write, text + "\n")
    if arguments.baseline is None:
        return 0
    wrong, reason = differences(found, json.loads(arguments.baseline.read_text(encoding="utf-8")))
    for line in [*wrong, *([reason] if reason else [])]:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
