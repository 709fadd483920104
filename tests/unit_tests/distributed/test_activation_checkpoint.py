"""Activation checkpointing of blocks that return states and are called several times per step."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.distributed.activation_checkpoint import apply_ac

from refine_titan.distributed.parallelize import SAVED_OPERATORS
from tests.unit_tests.models.test_shared_prefix import build
from tests.whole_step import FORMS, gradients, step_loss

MODES = {
    "full": ActivationCheckpoint(mode="full"),
    "every second layer": ActivationCheckpoint(mode="selective", selective_ac_option="2"),
    "operators": ActivationCheckpoint(mode="selective", selective_ac_option="op"),
}


def checkpointed(family: str, mode: str):
    model = build(family)
    apply_ac(model, MODES[mode], op_sac_save_list=SAVED_OPERATORS)
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["delta_net", pytest.param("gated_delta_net", marks=pytest.mark.slow), "lact"])
def test_gradients_are_those_without_checkpointing_to_the_last_bit(family, mode, form):
    plain, model = build(family), checkpointed(family, mode)
    for m in (plain, model):
        step_loss(m, form).backward()
    expected, found = gradients(plain), gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def saved_bytes(model, form: str) -> int:
    """Bytes of all tensors that the forward saves for backward; those inside checkpointed blocks are not saved."""
    sizes = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step_loss(model, form).backward()
    return sum(sizes.values())


@pytest.mark.parametrize("form", FORMS)
def test_checkpointing_keeps_less(form):
    half, full = (saved_bytes(checkpointed("delta_net", mode), form) for mode in ("every second layer", "full"))
    plain = saved_bytes(build(), form)
    assert full < half < plain
    assert full < 0.6 * plain


class _CountOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


def test_kept_operators_are_not_computed_again():
    """Every second matrix product is kept, and all attention."""
    calls = {}
    for mode in ("full", "operators"):
        loss = step_loss(checkpointed("lact", mode), "separate")
        with _CountOperators() as counting:
            loss.backward()
        calls[mode] = counting.calls
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert calls["full"][attention] > 0 and calls["operators"][attention] == 0
    assert calls["operators"][torch.ops.aten.mm.default] < calls["full"][torch.ops.aten.mm.default]
