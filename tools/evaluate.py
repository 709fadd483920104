"""The command `refine-titan evaluate`, which refine_titan/commands/evaluate.py describes."""

import sys

from refine_titan.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
