"""Works around a race in gloo's process groups on CPUs. Only this file touches private parts of torch 2.13.0's `ProcessGroupGloo`."""

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from refine_titan.distributed.loopback import ADDRESS, is_one_machine


def use_one_worker_per_group() -> None:
    """Gives every gloo group that Python makes from now on one worker thread, instead of two per network interface.

    After a collective, a worker writes its name into a string of the group, without a lock. If two workers finish at the same time, one
    frees the memory that the other writes to, and the process dies later of a damaged heap ("malloc(): unaligned tcache chunk
    detected"; in one of 93 short runs with tensor parallelism). One worker costs nothing, as the collectives of a group run one after
    another anyway. (`split_group`, which nothing here calls, makes its groups in C++ and is not covered.)
    """
    if not dist.is_available() or not dist.is_gloo_available():
        return
    make = dist.ProcessGroupGloo.__init__

    def make_with_one_worker(self, store, rank, size, options: Any = None, timeout: timedelta | None = None) -> None:
        if isinstance(options, timedelta):  # torch's constructor takes either at this position
            options, timeout = None, options
        if options is None:
            options = dist.ProcessGroupGloo._Options()
            options._devices = _devices()
            if timeout is not None:
                options._timeout = timeout
        options._threads = 1
        make(self, store, rank, size, options)

    dist.ProcessGroupGloo.__init__ = make_with_one_worker


def _devices() -> list[Any]:
    """The network devices that torch chooses by default, but the loopback device for ranks of one machine."""
    interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    if not interfaces and is_one_machine():
        return [dist.ProcessGroupGloo.create_device(hostname=ADDRESS)]
    if not interfaces:
        return [dist.ProcessGroupGloo.create_default_device()]
    return [dist.ProcessGroupGloo.create_device(interface=name) for name in interfaces]
