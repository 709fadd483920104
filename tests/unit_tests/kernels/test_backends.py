"""Which kernels flash-linear-attention runs for us, whatever packages are installed beside it."""

import pytest
from fla import backends as fla_backends
from fla.ops.common.backends.tilelang import CommonTileLangBackend
from fla.utils import TRITON_ABOVE_3_7_1, autotune_cache_kwargs

import refine_kernels.delta_rule.flash_linear_attention  # noqa: F401  chooses
from refine_kernels.delta_rule import state_scan

# Another device's.
ASCEND = "triton_ascend"


@pytest.mark.skipif(not TRITON_ABOVE_3_7_1, reason="older Triton needs TileLang's backward on Hopper")
@pytest.mark.parametrize("operation", ["common", "gated_delta_rule", "kda"])
def test_triton_kernels_are_the_only_ones_that_run(operation, monkeypatch):
    monkeypatch.setattr(CommonTileLangBackend, "default_enable", True)  # as on Hopper
    backends = fla_backends._load_operation_registry(operation)._get_sorted_backends()
    assert backends
    assert [type(b).__name__ for b in backends if b.is_enabled() and b.backend_type != ASCEND] == []


@pytest.mark.skipif(not autotune_cache_kwargs, reason="this Triton keeps no tuning results")
@pytest.mark.parametrize("kernel", [state_scan._scan_kernel, state_scan._gradient_kernel])
def test_a_process_takes_the_configuration_that_an_earlier_one_has_chosen(kernel):
    assert kernel.cache_results
