"""The command `refine-titan`: finds the subcommand and starts it."""

import sys
from importlib import import_module

from refine_titan.commands.ends import USAGE
from refine_titan.config.type_checks import did_you_mean
from refine_titan.terminal import INTERRUPTED, end_when_interrupted, raise_when_interrupted

# Modules of this room, with what they do.
COMMANDS = {
    "train": "trains a model: refine-titan train CONFIG.toml [--section.key value ...]",
    "evaluate": "evaluates a checkpoint: RULER, LongBench, held-out text, files of your own, tasks of lm-evaluation-harness",
    "prepare": "makes training shards from parquet, jsonl or text; checks them; shows what they hold",
    "convert": "converts checkpoints between Hugging Face and DCP; shows what they hold",
    "report": "writes the pages of finished evaluations and runs",
    "compare": "compares two evaluations sample by sample",
    "reproduce": "runs experiments: arms from one checkpoint over several seeds, measured and compared",
    "estimate": "counts the memory of a run without a GPU, and says what to change if it does not fit",
}
# Not shown: commands of run_train.sh and run_evaluate.sh.
FOR_SCRIPTS = ("launch",)


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    end_when_interrupted()  # at once, while the libraries of the subcommand are imported
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(usage(), file=sys.stdout if arguments else sys.stderr)
            return 0 if arguments else USAGE
        name = arguments[0]
        if name not in (*COMMANDS, *FOR_SCRIPTS):
            print(f"error: refine-titan has no command {name!r}{did_you_mean(name, COMMANDS)} (refine-titan --help)", file=sys.stderr)
            return USAGE
        return import_module(f"refine_titan.commands.{name}").main(arguments[1:])
    except KeyboardInterrupt:  # before the subcommand has begun, or after it has ended
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    finally:
        raise_when_interrupted()


def usage() -> str:
    """The help of the command itself."""
    lines = [f"  {name:<10} {does}" for name, does in COMMANDS.items()]
    return "\n".join(["usage: refine-titan COMMAND [ARGUMENT ...]", "", *lines, "", "refine-titan COMMAND --help says more."])


if __name__ == "__main__":
    sys.exit(main())
