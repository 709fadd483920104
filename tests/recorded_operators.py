"""What a CUDA graph does, on a CPU: operators recorded once run again on the same tensors, and no Python with them."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from refine_titan.rollout.decode_graph import WARM_UPS


def record_operators(function: Callable[[], None]) -> Callable[[], None]:
    """In place of `rollout.decode_graph.CudaGraphs.record`, warm-ups included."""
    for _ in range(WARM_UPS):
        function()
    with _Recording() as recording:
        function()
    return recording.replay


class _Recording(TorchDispatchMode):
    """Keeps every operator with its very arguments and results: the memory that it reads and writes."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        self.operators.append((operator, args, kwargs, result))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for operator, args, kwargs, before in self.operators:
                given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
                after = operator(*args, **kwargs)
                for old, new in zip(tree_leaves(before), tree_leaves(after)):
                    # Views, and what is written in place, lie in the arguments' memory already.
                    if isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() not in given:
                        old.copy_(new)
