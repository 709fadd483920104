"""Lets flash-linear-attention's kernels run on a CPU: import this before fla, in a process of its own.

It switches Triton to its interpreter. Three things keep fla 0.6.0's kernels from running there (triton 3.7.1): the
autotuner times on a device, `range` yields plain integers where kernels call tensor methods, and fla enters CUDA device
contexts.
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
        return (tl.tensor(interpreter.TensorHandle(np.array([i], dtype=np.int32), tl.int32), tl.int32) for i in builtins.range(*plain))

    for cls in (interpreter.GridExecutor, interpreter.InterpretedFunction):
        original = cls.__call__

        def call(self, *args, _original=original, **kwargs):
            self.fn.__globals__["range"] = tensor_range
            return _original(self, *args, **kwargs)

        cls.__call__ = call


use_only_the_first_config()
make_range_yield_tensors()
torch.cuda.device = lambda *args: contextlib.nullcontext()
