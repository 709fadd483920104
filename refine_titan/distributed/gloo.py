"""Works around a race in gloo's process groups on CPUs. Only this file touches private parts of torch 2.13.0's `ProcessGroupGloo`."""

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

# On which ranks of one machine meet.
ADDRESS = "127.0.0.1"


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
    if not interfaces and _is_one_machine():
        return [dist.ProcessGroupGloo.create_device(hostname=ADDRESS)]
    if not interfaces:
        return [dist.ProcessGroupGloo.create_default_device()]
    return [dist.ProcessGroupGloo.create_device(interface=name) for name in interfaces]


def _is_one_machine() -> bool:
    """Whether all ranks of the run are on this machine, as far as its environment says."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    return os.environ.get("LOCAL_WORLD_SIZE", ranks) == ranks
