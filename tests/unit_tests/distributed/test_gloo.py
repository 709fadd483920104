"""Gloo groups have one worker thread, and otherwise the options that they were made with."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import refine_titan  # noqa: F401  # isort: skip


def options_of(group: dist.ProcessGroup):
    return group._get_backend(torch.device("cpu")).options


@pytest.mark.parametrize("interfaces", [None, "lo", "lo,lo"])
def test_groups_have_one_worker_and_the_asked_timeout(monkeypatch, interfaces):
    if interfaces is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    else:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interfaces)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore(), timeout=timedelta(seconds=77))
    try:
        for group, seconds in ((dist.group.WORLD, 77), (dist.new_group([0], timeout=timedelta(seconds=33)), 33)):
            options = options_of(group)
            assert (options._threads, options._timeout.total_seconds()) == (1, seconds)
            assert len(options._devices) == (2 if interfaces == "lo,lo" else 1)
            dist.all_reduce(torch.ones(3), group=group)
    finally:
        dist.destroy_process_group()


def test_both_forms_of_the_constructor_still_work():
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_default_device()]
    options._threads = 2
    assert dist.ProcessGroupGloo(dist.HashStore(), 0, 1, options).options._threads == 1
    assert dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=5)).options._timeout.total_seconds() == 5
