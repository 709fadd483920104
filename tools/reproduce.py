"""The command `refine-titan reproduce`, which refine_titan/commands/reproduce.py describes."""

import sys

from refine_titan.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["reproduce", *sys.argv[1:]]))
