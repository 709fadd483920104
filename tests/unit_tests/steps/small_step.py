"""A step of a small random model in this process, with records of what a run would write down."""

from contextlib import nullcontext
from dataclasses import fields, replace

import torch
from torchtitan.components.optimizer import build_optimizers
from torchtitan.distributed import ParallelDims

from refine_titan.config.phases import needs_engine
from refine_titan.config.sections import JobConfig
from refine_titan.data.tokenizer import ByteTokenizer
from refine_titan.rollout.build import build_rollout_engine
from refine_titan.rollout.engine import RolloutEngine
from refine_titan.steps.refine_step import RefineStep
from refine_titan.steps.runtime import StepRuntime
from tests.helpers import two_layers
from tests.integration_tests.vllm_engines import random_model


class Records:
    """Keeps what a run would write down, by the recorder's arguments."""

    def __init__(self):
        self.rollouts, self.answers = [], []

    def record_rollouts(self, *rollouts):
        self.rollouts.append(rollouts)

    def record_answers(self, *answers):
        self.answers.append(answers)


def small_step(config: JobConfig, family: str = "delta_net", engine: RolloutEngine | None = None, **runtime) -> RefineStep:
    """The first step of a job on one rank.

    Args:
        engine: None for the one that the job names, if it needs any.
        runtime: fields of `StepRuntime` that are to be others.
    """
    args = replace(two_layers(family), dim=64, intermediate_size=64)
    args.compute_in_float32()
    args = replace(args, n_heads=2, head_dim=32) if "head_dim" in {f.name for f in fields(args)} else args
    model = random_model(args)
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    optimizers = build_optimizers([model], config.optimizer, dims)
    given = StepRuntime(config, model, optimizers, dims, torch.device("cpu"), precision=nullcontext)
    given = replace(given, **runtime)
    if engine is None and needs_engine(config):
        engine = build_rollout_engine(config, given.engine_host)
    step = RefineStep(given, engine, Records(), ByteTokenizer().decode)
    step.begin(1)
    return step
