"""`python -m refine_titan` is the command `refine-titan`."""

import sys

from refine_titan.commands.main import main

sys.exit(main())
