"""Parameters and hidden states that tensor parallelism has made DTensors, as mixers and the head use them."""

import torch
import torch.distributed.nn.functional as differentiable
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_rows(x_TD: torch.Tensor) -> torch.Tensor:
    """All rows of a tensor whose rows are sharded. Every rank then does a part of the computation, and the gradients of the parts are
    summed."""
    if not isinstance(x_TD, DTensor):
        return x_TD
    return x_TD.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def whole_columns(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """All columns of a tensor whose last dim is sharded over `mesh`. Every rank then computes the same with it, and a rank's gradient is
    its part of the whole one."""
    sharded = DTensor.from_local(x, mesh, [Shard(x.dim() - 1)], run_check=False)
    return sharded.redistribute(placements=[Replicate()]).to_local()


class FullWidthRMSNorm(nn.RMSNorm):
    """RMSNorm over channels that may be sharded: the mean square is taken over the channels of all ranks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.weight, DTensor):
            return super().forward(x).to(x.dtype)  # a GPU's autocast gives float32
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = differentiable.all_reduce(wide.square().sum(-1, keepdim=True), group=self.weight.device_mesh.get_group())
        normalised = wide * torch.rsqrt(squares / self.normalized_shape[0] + self.eps)
        return (normalised * self.weight.to_local()).to(x.dtype)
