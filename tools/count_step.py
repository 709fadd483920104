"""Counts operations and bytes of each stage of a ReFINE step on one sequence, and the least time that they take on a GPU.

    python tools/count_step.py CONFIG.toml [--section.key value ...]

Runs the run's own model at its full size without data: nothing is computed and no GPU is needed. Prints a table. For each stage it has
the TFLOP of matrix products; the bytes that any implementation must read or write, and the least time that both take (the floor); and
for the present code the number of its operators, the bytes that they read and write, and the least time for those. The last lines have a
next-token step on the same tokens, and how many times as much the ReFINE step costs.
"""

import argparse
import sys
import warnings
from collections.abc import Iterable
from dataclasses import replace

import refine_titan  # noqa: F401  # isort: skip  announces the device before torchtitan is imported
from torchtitan.tools.logging import logger

from refine_titan.commands.ends import run_to_end
from refine_titan.estimation.operations import DEVICES, StageCount, count_operations
from refine_titan.models.sizes import resolve_args
from refine_titan.validation import load_config


def table(stages: dict[str, StageCount], next_token: dict[str, StageCount]) -> str:
    """The counts of both steps as a Markdown table."""
    times = [f"{kind}, {name}" for kind in ("floor", "today's traffic") for name in DEVICES]
    lines = ["| stage | TFLOP | GB needed | GB moved today | operators | " + " | ".join(times) + " |", "|---" * (5 + len(times)) + "|"]
    step, plain = _sums(stages.values()), _sums(next_token.values())
    rows = {name: _sums([stage]) for name, stage in stages.items()} | {"step": step, "next-token step": plain}
    for name, sums in rows.items():
        cells = [f"{sums[0]:.2f}", f"{sums[1]:.1f}", f"{sums[2]:,.0f}", f"{sums[3]:,.0f}", *(f"{t:.1f} ms" for t in sums[4:])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"| over next-token | {' | '.join(f'{ours / theirs:.2f}' for ours, theirs in zip(step, plain))} |")
    return "\n".join(lines)


def _sums(stages: Iterable[StageCount]) -> list[float]:
    """TFLOP, GB needed, GB moved, operators; milliseconds of floor and traffic on each device, which are sums because stages run one after
    another."""
    stages = list(stages)
    counts = [sum(s.flops for s in stages) / 1e12, sum(s.needed for s in stages) / 1e9, sum(s.moved for s in stages) / 1e9]
    floors = [1000 * sum(s.floor_seconds(device) for s in stages) for device in DEVICES.values()]
    today = [1000 * sum(s.memory_seconds(device) for s in stages) for device in DEVICES.values()]
    return [*counts, sum(s.operators for s in stages), *floors, *today]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="TOML file of a run")
    arguments, overrides = parser.parse_known_args()
    logger.disabled = True
    warnings.simplefilter("ignore")

    def work() -> int:
        config = load_config(["--job.config_file", arguments.config, *overrides])
        args = resolve_args(config.model)
        next_token = replace(config, refine=replace(config.refine, objective="ntp"))
        print(table(count_operations(config, args), count_operations(next_token, args)))
        return 0

    return run_to_end(work, lambda: "Interrupted.")


if __name__ == "__main__":
    sys.exit(main())
