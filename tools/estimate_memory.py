"""The command `refine-titan estimate`, which refine_titan/commands/estimate.py describes."""

import sys

from refine_titan.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["estimate", *sys.argv[1:]]))
