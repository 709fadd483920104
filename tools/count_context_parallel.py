"""Counts the work of the ranks that share a sequence of a model with layers of attention: how evenly it is divided, and what it moves.

    python tools/count_context_parallel.py CONFIG.toml [--ranks 8] [--tokens 32768,131072,262144] [--section.key value ...]

Prints a table with one line per length of a sequence that is one document. Computed from the model's sizes: nothing runs.
"""

import argparse
import sys

import refine_titan  # noqa: F401  # isort: skip  announces the device before torchtitan is imported
from torchtitan.tools.logging import logger

from refine_titan.commands.ends import run_to_end
from refine_titan.errors import UsageError, UserError
from refine_titan.estimation.context_parallel import shared_work
from refine_titan.models.sizes import resolve_args
from refine_titan.validation import load_config

MIB = 1 << 20
COLUMNS = (
    "tokens",
    "attention's share of the operations",
    "slowest rank over the mean, each attending for its shard",
    "as computed",
    "keys and values received, a layer",
    "queries and outputs received, a layer",
)


def table(config, lengths: list[int], num_ranks: int) -> str:
    """The counts as a Markdown table."""
    args = resolve_args(config.model)
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for tokens in lengths:
        try:
            work = shared_work(args, (0, tokens), num_ranks)
        except ValueError as error:
            raise UserError(f"model.name is {config.model.name!r}: {error}") from error
        cells = (f"{tokens:,}", f"{work.of_attention:.0%}", f"{work.slowest_of_shards:.2f}", f"{work.slowest:.2f}")
        lines.append(f"| {' | '.join((*cells, f'{work.gathered / MIB:,.0f} MiB', f'{work.moved / MIB:,.0f} MiB'))} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="TOML file of a run")
    parser.add_argument("--ranks", type=int, default=8, help="ranks that share a sequence (8)")
    parser.add_argument("--tokens", default="32768,131072,262144", help="lengths of the sequence (32768,131072,262144)")
    arguments, overrides = parser.parse_known_args()
    logger.disabled = True

    def work() -> int:
        lengths = [int(n) if n.isdecimal() else 0 for n in arguments.tokens.split(",")]
        if arguments.ranks < 1:
            raise UsageError(f"--ranks is {arguments.ranks}; allowed: at least 1")
        if not all(n > 0 and n % arguments.ranks == 0 for n in lengths):
            raise UsageError(
                f"--tokens is {arguments.tokens!r}; allowed: positive multiples of --ranks ({arguments.ranks}), comma-separated"
            )
        print(table(load_config(["--job.config_file", arguments.config, *overrides]), lengths, arguments.ranks))
        return 0

    return run_to_end(work, lambda: "Interrupted.")


if __name__ == "__main__":
    sys.exit(main())
