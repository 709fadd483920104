"""Process groups on CPUs, made safe: contact with private parts of torch 2.13.0's `ProcessGroupGloo`."""

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist


def use_one_worker_a_group() -> None:
    """Gives every gloo group that Python makes from now on one worker thread, instead of two a network interface. (Groups that
    `split_group` makes, which nothing here calls, are made in C++.)

    After a collective a worker notes its name in a string of the group, without a lock. Where two workers end at once, one frees
    what the other writes: the process dies later, of a damaged heap ("malloc(): unaligned tcache chunk detected"; one of 93 short
    runs with tensor parallelism). A group's collectives follow each other anyway.
    """
    if not dist.is_available() or not dist.is_gloo_available():
        return
    make = dist.ProcessGroupGloo.__init__

    def make_with_one_worker(self, store, rank, size, options: Any = None, timeout: timedelta | None = None) -> None:
        if isinstance(options, timedelta):  # torch takes either, in this place
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
    """As torch chooses them where it is given none."""
    interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    if not interfaces:
        return [dist.ProcessGroupGloo.create_default_device()]
    return [dist.ProcessGroupGloo.create_device(interface=name) for name in interfaces]
