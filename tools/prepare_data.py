"""The command `refine-titan prepare`, which refine_titan/commands/prepare.py describes."""

import sys

from refine_titan.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
