"""The command `refine-titan report`, which refine_titan/commands/report.py describes."""

import sys

from refine_titan.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
