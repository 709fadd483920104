"""The command `refine-titan compare`, which refine_titan/commands/compare.py describes."""

import sys

from refine_titan.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
