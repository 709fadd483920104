"""Times forward and backward of the short convolution and of torch's `conv1d` with one group per channel, on one sequence.

    python kernels/benchmarks/short_conv.py [--tokens 4096] [--channels 768] [--width 4] [--repeats 7]

The script checks results before it times them.
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F

from refine_kernels.short_conv import short_conv

TOLERANCE = 1e-5  # float32 sums of `width` products in another order


def torch_conv(x_TD, weight_DW):
    padded = F.pad(x_TD.t()[None], (weight_DW.shape[1] - 1, 0))
    return F.conv1d(padded, weight_DW[:, None], groups=x_TD.shape[1])[0].t()


def run(function, x_TD, weight_DW):
    """Returns the seconds of forward and of backward, and the outputs with the gradients."""
    x_TD.grad = weight_DW.grad = None
    begin = time.perf_counter()
    y_TD = function(x_TD, weight_DW)
    middle = time.perf_counter()
    y_TD.sin().sum().backward()
    end = time.perf_counter()
    return middle - begin, end - middle, (y_TD.detach(), x_TD.grad, weight_DW.grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 4096), ("channels", 768), ("width", 4), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    x_TD = torch.randn(arguments.tokens, arguments.channels, requires_grad=True)
    weight_DW = torch.randn(arguments.channels, arguments.width, requires_grad=True)
    functions = {
        "conv1d": torch_conv,
        "shifted products": lambda x, w: short_conv(x, w, (0, arguments.tokens))[0],
    }
    expected = run(torch_conv, x_TD, weight_DW)[2]
    for name, function in functions.items():
        for a, b in zip(run(function, x_TD, weight_DW)[2], expected):
            error = float((a - b).norm() / b.norm())
            if not error < TOLERANCE:
                raise SystemExit(f"{name} is off by {error:.1e}: not timed")
    rounds = [{name: run(f, x_TD, weight_DW)[:2] for name, f in functions.items()} for _ in range(arguments.repeats)]
    results = {
        name: {
            stage: round(1e3 * statistics.median(r[name][i] for r in rounds), 2) for i, stage in enumerate(("forward_ms", "backward_ms"))
        }
        for name in functions
    }
    print(json.dumps({**vars(arguments), "torch": torch.__version__, "results": results}, indent=1))


if __name__ == "__main__":
    main()
