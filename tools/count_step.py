"""Counts operations and bytes of each stage of a ReFINE step on one sequence, and the least time that they take on a GPU.

    python tools/count_step.py CONFIG.toml [--section.key value ...]

Runs the run's own model at its full size without data: nothing is computed and no GPU is needed. Prints a table. For each stage it has
the TFLOP of matrix products; the bytes that any implementation must read or write, and the least time that both take (the floor); and
for the present code the number of its operators, the bytes that they read and write, and the least time for those.
"""

import argparse
import sys
import warnings

import refine_titan  # noqa: F401  # isort: skip  announces the device before torchtitan is imported
from torchtitan.tools.logging import logger

from refine_titan.errors import UserError
from refine_titan.estimation.operations import DEVICES, StageCount, count_operations
from refine_titan.models.sizes import resolve_args
from refine_titan.validation import load_config


def table(stages: dict[str, StageCount]) -> str:
    """The counts as a Markdown table."""
    times = [f"{kind}, {name}" for kind in ("floor", "today's traffic") for name in DEVICES]
    lines = ["| stage | TFLOP | GB needed | GB moved today | operators | " + " | ".join(times) + " |", "|---" * (5 + len(times)) + "|"]
    # The floor of the step is the sum of the stages' floors, because they run one after another.
    for name, stage in stages.items():
        lines.append(_row(name, [stage]))
    lines.append(_row("step", list(stages.values())))
    return "\n".join(lines)


def _row(name: str, stages: list[StageCount]) -> str:
    floors = [sum(s.floor_seconds(device) for s in stages) for device in DEVICES.values()]
    today = [sum(s.memory_seconds(device) for s in stages) for device in DEVICES.values()]
    sums = (sum(s.flops for s in stages) / 1e12, sum(s.needed for s in stages) / 1e9, sum(s.moved for s in stages) / 1e9)
    cells = [f"{sums[0]:.2f}", f"{sums[1]:.1f}", f"{sums[2]:,.0f}", f"{sum(s.operators for s in stages):,.0f}"]
    return f"| {name} | " + " | ".join([*cells, *(f"{1000 * t:.1f} ms" for t in (*floors, *today))]) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="TOML file of a run")
    arguments, overrides = parser.parse_known_args()
    logger.disabled = True
    warnings.simplefilter("ignore")
    try:
        config = load_config(["--job.config_file", arguments.config, *overrides])
        print(table(count_operations(config, resolve_args(config.model))))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
