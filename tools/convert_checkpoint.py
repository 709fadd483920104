"""The command `refine-titan convert`, which refine_titan/commands/convert.py describes."""

import sys

from refine_titan.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
