"""Times forward and backward of the blockwise head, of liger-kernel's fused linear loss, and of whole logits.

    python kernels/benchmarks/linear_head.py [--tokens 4096] [--dim 1024] [--vocab 32000] [--repeats 5]

liger-kernel is not a dependency: without `pip install liger-kernel==0.8.5` it is left out. The script checks results before it times
them. Peak memory is the most that the process held during the call, less what it held before.
"""

import argparse
import importlib.util
import json
import statistics
import time

import torch

from refine_kernels.linear_head import linear_head_losses
from refine_kernels.linear_head.reference import dense_head_losses
from refine_titan.distributed.device import (
    peak_resident_bytes,
    release_free_memory,
    reset_peak_resident_bytes,
    resident_bytes,
)

TOLERANCE = 1e-4  # float32 sums over the vocabulary in different orders


def contenders() -> dict:
    """The functions to compare, by name: each takes (hidden, weight, labels) and returns the summed loss."""
    found = {
        "whole logits, with entropy": lambda h, w, y: dense_head_losses(h, w, y).nll_sum,
        "blockwise, with entropy": lambda h, w, y: linear_head_losses(h, w, y, entropy=True).nll_sum,
        "blockwise": lambda h, w, y: linear_head_losses(h, w, y).nll_sum,
    }
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

        apply = LigerFusedLinearScaledCrossEntropyFunction.apply
        found["liger-kernel, with entropy"] = lambda h, w, y: apply(h, w, y, return_entropy=True)[0].sum()
        found["liger-kernel"] = lambda h, w, y: apply(h, w, y).sum()
    return found


def run(function, hidden, weight, labels) -> tuple[float, int, tuple]:
    """Seconds, bytes gained at the peak, and (loss, gradients) of one forward and backward."""
    hidden.grad = weight.grad = None
    release_free_memory()
    on_gpu = hidden.is_cuda
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak_resident_bytes()
    held = torch.cuda.memory_allocated() if on_gpu else resident_bytes()
    begin = time.perf_counter()
    loss = function(hidden, weight, labels)
    loss.backward()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes()
    return seconds, peak - held, (loss.detach(), hidden.grad, weight.grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden = torch.randn(arguments.tokens, arguments.dim, device=device, requires_grad=True)
    weight = (torch.randn(arguments.vocab, arguments.dim, device=device) * 0.02).requires_grad_()
    labels = torch.randint(0, arguments.vocab, (arguments.tokens,), device=device)

    functions = contenders()
    expected = run(functions["blockwise"], hidden, weight, labels)[2]
    for name, function in functions.items():
        for a, b in zip(run(function, hidden, weight, labels)[2], expected):
            error = float((a - b).norm() / b.norm())
            if not error < TOLERANCE:
                raise SystemExit(f"{name} is off by {error:.1e}: not timed")
    # In rounds over all functions, so that a slow moment of the machine affects all of them.
    rounds = [{name: run(f, hidden, weight, labels)[:2] for name, f in functions.items()} for _ in range(arguments.repeats)]
    results = {
        name: {
            "seconds": round(statistics.median(r[name][0] for r in rounds), 4),
            "gained_mib": round(statistics.median(r[name][1] for r in rounds) / 2**20),
        }
        for name in functions
    }
    print(json.dumps({**vars(arguments), "device": device, "torch": torch.__version__, "results": results}, indent=1))


if __name__ == "__main__":
    main()
