"""Trains a model.

    refine-titan train CONFIG.toml [--section.key value ...]
    refine-titan train CONFIG.toml --dry-run        # checks everything and describes the run
    refine-titan train --help-settings              # every setting; docs/configuration.md has them with their bounds

A setting on the command line overrides that of the file; relative paths are relative to the folder in which the command is called.
NGPU=8 starts eight processes on this machine; several nodes are started by run_train.sh of the repository (docs/multi_node.md). The same
command goes on from the last checkpoint. Exit status 0 for success, 1 for a failure, 2 for a wrong command line, 75 after SIGTERM or
SIGUSR1, 130 after Ctrl-C.
"""

import os
import sys

from refine_titan.commands.ends import USAGE

HELP, SETTINGS, DRY_RUN = ("-h", "--help"), "--help-settings", "--dry-run"


def main(arguments: list[str]) -> int:
    """Trains, as this process or as several; returns the exit status."""
    if any(word in HELP for word in arguments) or not arguments:
        print(__doc__.strip(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else USAGE
    arguments = ["--help" if word == SETTINGS else word for word in arguments]
    ranks = os.environ.get("NGPU", "1")
    if "RANK" not in os.environ and (ranks != "1" or os.environ.get("NNODES", "1") != "1"):
        if not ranks.isdecimal() or ranks == "0" or os.environ.get("NNODES", "1") != "1":
            print("error: NGPU has to be a whole number from 1, and NNODES 1; several nodes: docs/multi_node.md", file=sys.stderr)
            return USAGE
        if DRY_RUN not in arguments:
            return launch(int(ranks), arguments)
        os.environ.setdefault("WORLD_SIZE", ranks)
    from torch.distributed.elastic.multiprocessing.errors import record

    from refine_titan.train import main as train

    return record(train)(arguments)


def launch(ranks: int, arguments: list[str]) -> int:
    """Runs the training as several processes of this machine; returns the exit status."""
    from refine_titan.launch import main as start

    options = ["--rdzv-backend=loopback", f"--nproc-per-node={ranks}", "--local-ranks-filter=0", "--role=rank", "--tee=3"]
    return start([*options, "-m", "refine_titan", "train", *arguments])
