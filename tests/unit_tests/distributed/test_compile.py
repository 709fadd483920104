"""torch.compile of the token-wise parts: same gradients, and no further graph for another layout."""

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters
from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.distributed.activation_checkpoint import apply_ac

from refine_titan.config.titan_sections import Compile
from refine_titan.distributed.compile import apply_compile
from tests.helpers import relative_rms
from tests.unit_tests.models.test_shared_prefix import build
from tests.whole_step import FORMS, gradients, step_loss

SLOW = pytest.mark.slow
# `project`, `finish` and `add_mlp`, each with and without gradient; hybrids have two mixers, and OLMo's blocks of two forms.
GRAPHS = {"qwen3_5": 10, "olmo_hybrid": 12}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(family: str, backend: str, **overrides):
    model = build(family, **overrides)
    apply_compile(model, Compile(enable=True, backend=backend))
    return model


def assert_same_gradients(model, family: str, **overrides) -> None:
    for form in FORMS:
        plain = build(family, **overrides)
        losses = [step_loss(m, form) for m in (plain, model)]
        for loss in losses:
            loss.backward()
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-11)
        expected, found = gradients(plain), gradients(model)
        for name, gradient in expected.items():
            assert relative_rms(found[name], gradient) < 1e-9, (form, name)


@pytest.mark.parametrize(
    "family", ["delta_net", *(pytest.param(f, marks=SLOW) for f in ("gated_delta_net", "lact", "qwen3_5", "olmo_hybrid"))]
)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=SLOW)])
def test_gradients_are_those_of_eager_in_both_forms(family, backend):
    assert_same_gradients(compiled(family, backend), family)


@SLOW
def test_gradients_of_one_fast_head_of_many_channels_are_those_of_eager():
    """A rank has one head if tensor parallelism splits heads that far; inductor's vector code for CPUs computes it wrongly."""
    sizes = {"dim": 256, "n_fast_heads": 1}
    assert_same_gradients(compiled("lact", "inductor", **sizes), "lact", **sizes)


@pytest.mark.parametrize("family", ["delta_net", *(pytest.param(f, marks=SLOW) for f in ("kda", "lact", "qwen3_5", "olmo_hybrid"))])
def test_ten_steps_with_different_layouts_compile_nothing_again(family):
    model = compiled(family, "aot_eager")
    for step in range(10):
        starts = tuple(2 + step + 7 * i for i in range(3 + step % 4))
        cu_seqlens = (0, 60 + step, 100 + 3 * step)
        for form in FORMS:
            with torch.no_grad():
                step_loss(model, form, starts, cu_seqlens)
            step_loss(model, form, starts, cu_seqlens).backward()
    assert counters["stats"]["unique_graphs"] == GRAPHS.get(family, 6)
    assert not counters["graph_break"] and not counters["recompile_limit"]


def test_compiled_and_checkpointed_gradients_are_those_of_eager():
    model = compiled("delta_net", "aot_eager")
    apply_ac(model, ActivationCheckpoint(mode="full"))
    assert_same_gradients(model, "delta_net")
