"""ReFINE training of fast-weight language models on torchtitan.

What has to happen before torchtitan is imported, or before the first arithmetic on a CPU, happens as soon as torch is imported: a command
that only prints its help does not need torch, whose import takes seconds.
"""

import sys

from refine_titan.distributed.compiled_kernels import keep_compiled_kernels
from refine_titan.terminal import end_when_interrupted, escape_log_records
from refine_titan.torch_import import once_torch_is_imported


def _prepare_torch() -> None:
    # `refine_kernels.cpu_math` says why this comes first.
    import refine_kernels  # noqa: F401
    from refine_titan.distributed.device import announce_device
    from refine_titan.distributed.gloo import use_one_worker_per_group

    announce_device()
    use_one_worker_per_group()


if sys.argv[0] == "-m":  # a program is starting (`python -m refine_titan.train`), which takes seconds
    end_when_interrupted()
keep_compiled_kernels()
escape_log_records()
once_torch_is_imported(_prepare_torch)
