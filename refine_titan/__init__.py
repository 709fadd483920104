"""ReFINE training of fast-weight language models on torchtitan."""

import sys

from refine_titan.terminal import end_when_interrupted, escape_log_records

if sys.argv[0] == "-m":  # a program is starting (`python -m refine_titan.train`), which takes seconds
    end_when_interrupted()

# Before any arithmetic on a CPU: `refine_kernels.cpu_math` says why.
import refine_kernels  # noqa: E402, F401

# torchtitan picks its device when it is imported, so the CPU has to be announced before anything imports it.
from refine_titan.distributed.compiled_kernels import keep_compiled_kernels  # noqa: E402
from refine_titan.distributed.device import announce_device  # noqa: E402
from refine_titan.distributed.gloo import use_one_worker_per_group  # noqa: E402

keep_compiled_kernels()
escape_log_records()
announce_device()
use_one_worker_per_group()
