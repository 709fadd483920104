"""Compares refine_kernels' flash-linear-attention path with the reference, forward and gradients, on a CPU.

Run as a script: it switches Triton to its interpreter. Three things keep fla 0.6.0's kernels from running there
(triton 3.7.1): the autotuner times on a device, `range` yields plain integers where kernels call tensor methods, and
fla enters CUDA device contexts.
"""

import builtins
import contextlib
import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
import triton.runtime.autotuner as autotuner
import triton.runtime.interpreter as interpreter


def use_only_the_first_config():
    original = autotuner.Autotuner.__init__

    def init(self, fn, arg_names, configs, *args, **kwargs):
        original(self, fn, arg_names, list(configs or [])[:1], *args, **kwargs)

    autotuner.Autotuner.__init__ = init


def make_range_yield_tensors():
    def tensor_range(*bounds):
        if not any(isinstance(bound, tl.tensor) for bound in bounds):
            return builtins.range(*bounds)
        plain = [int(b.handle.data.item()) if isinstance(b, tl.tensor) else int(b) for b in bounds]
        return (
            tl.tensor(interpreter.TensorHandle(np.array([i], dtype=np.int32), tl.int32), tl.int32)
            for i in builtins.range(*plain)
        )

    for cls in (interpreter.GridExecutor, interpreter.InterpretedFunction):
        original = cls.__call__

        def call(self, *args, _original=original, **kwargs):
            self.fn.__globals__["range"] = tensor_range
            return _original(self, *args, **kwargs)

        cls.__call__ = call


use_only_the_first_config()
make_range_yield_tensors()
torch.cuda.device = lambda *args: contextlib.nullcontext()

from fla.ops.delta_rule.chunk import ChunkDeltaRuleFunction

import refine_kernels.delta_rule.flash_linear_attention as fla_path
from refine_kernels.delta_rule.reference import chunked_delta_rule
from tests.unit_tests.kernels.test_delta_rule import make_inputs, run_with_gradients
from tests.helpers import relative_rms


def chunk_delta_rule_in_float32(q, k, v, beta, initial_state, output_final_state, cu_seqlens):
    """fla's chunk kernels without the refusal of float32, which is about tensor cores. bfloat16 products are wrong in
    triton 3.7.1's interpreter."""
    scale = q.shape[-1] ** -0.5
    return ChunkDeltaRuleFunction.apply(q, k, v, beta, scale, initial_state, output_final_state, False, cu_seqlens, None, 64)


fla_path.chunk_delta_rule = chunk_delta_rule_in_float32

CASES = [
    # cu_seqlens, state positions, with an initial state, decay, value heads a key head
    ((0, 100), (), False, "none", 1),
    ((0, 200), (1, 64, 130, 130, 200), False, "none", 2),
    ((0, 90, 170), (91, 90, 155), True, "none", 1),
    ((0, 1, 2, 3), (1, 2, 3), True, "none", 1),  # a decode step: one row a sequence
    ((0, 100), (1, 65), False, "per head", 1),
    ((0, 90, 170), (91, 155), True, "per head", 2),
    ((0, 90, 100), (50,), True, "per channel", 1),
]

for cu_seqlens, positions, use_initial, decay, groups in CASES:
    size = dict(H=2, K=16, V=16, groups=groups, decay=decay)
    inputs = make_inputs(cu_seqlens[-1], len(cu_seqlens) - 1, dtype=torch.float32, **size)
    expected = run_with_gradients(chunked_delta_rule, inputs, cu_seqlens, positions, use_initial)
    found = run_with_gradients(fla_path.segmented_delta_rule, inputs, cu_seqlens, positions, use_initial)
    # fla keeps some intermediates in a lower precision than float32 matrix products; interpreted products are float32
    for name, a, b in [("out", found[0], expected[0]), ("states", found[1], expected[1])]:
        assert relative_rms(a, b) < 1e-5, (cu_seqlens, name, relative_rms(a, b))
    for name, gradient in expected[2].items():
        error = relative_rms(found[2][name], gradient)
        assert error < 1e-4, (cu_seqlens, name, error)
    print("equal:", cu_seqlens, positions, decay, flush=True)

for decay in ("none", "per head", "per channel"):  # decoding without gradient, where the recurrent kernels run
    with torch.no_grad():
        q, k, v, beta, initial, log_decay = make_inputs(6, 3, H=2, K=16, V=16, dtype=torch.float32, decay=decay)
        arguments = dict(log_decay=log_decay, initial_state_NHKV=initial, state_positions=(1, 3, 6))
        expected = chunked_delta_rule(q, k, v, beta, (0, 1, 3, 6), **arguments)
        found = fla_path.segmented_delta_rule(q, k, v, beta, (0, 1, 3, 6), **arguments)
    for a, b in zip(found, expected):
        assert relative_rms(a, b) < 1e-5, (decay, relative_rms(a, b))
    print("equal: decoding", decay, flush=True)
print("all equal")
