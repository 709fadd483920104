"""ReFINE training of fast-weight language models on torchtitan."""

# Before any arithmetic on a CPU: `refine_kernels.cpu_math` says why.
import refine_kernels  # noqa: F401

# torchtitan picks its device when it is imported, so the CPU has to be announced before anything imports it.
from refine_titan.distributed.compiled_kernels import keep_compiled_kernels
from refine_titan.distributed.device import announce_device
from refine_titan.distributed.gloo import use_one_worker_per_group
from refine_titan.terminal import escape_log_records

keep_compiled_kernels()
escape_log_records()
announce_device()
use_one_worker_per_group()
