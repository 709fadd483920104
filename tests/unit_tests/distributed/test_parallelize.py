"""FSDP2 on one rank, whose step has to be that of the model without it."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from refine_titan.config.sections import JobConfig
from refine_titan.distributed.parallelize import parallelize
from refine_titan.models import build_decoder
from tests.unit_tests.models.test_shared_prefix import build
from tests.whole_step import FORMS, step_loss


@pytest.fixture
def one_shard():
    """What `parallelize` reads of torchtitan's ParallelDims, for a mesh of one rank."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))
    yield SimpleNamespace(tp_enabled=False, fsdp_enabled=True, dp_replicate_enabled=False, get_mesh=lambda axes: mesh)
    dist.destroy_process_group()


@pytest.mark.parametrize("reshard", ["default", "never"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tied", [False, True])
def test_sharded_step_is_that_of_the_whole_model(one_shard, form, tied, reshard):
    config = JobConfig()
    config.training.mixed_precision_param = config.training.mixed_precision_reduce = "float32"
    config.activation_checkpoint.mode = "none"
    config.parallelism.fsdp_reshard_after_forward = reshard
    whole = build(tie_word_embeddings=tied).float()
    with torch.device("meta"):
        sharded = build_decoder(whole.model_args)
    parallelize(sharded, one_shard, config)
    sharded.to_empty(device="cpu")
    weights = whole.state_dict()
    with torch.no_grad():
        sharded.init_weights()
        for name, parameter in sharded.state_dict().items():
            parameter.to_local().copy_(weights[name])

    losses = [step_loss(model, form) for model in (whole, sharded)]
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=0)
    for loss in losses:
        loss.backward()
    sharded_parameters = dict(sharded.named_parameters())
    assert sharded_parameters.keys() == dict(whole.named_parameters()).keys()
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(sharded_parameters[name].grad.to_local(), parameter.grad, rtol=0, atol=0)
