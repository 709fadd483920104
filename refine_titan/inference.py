"""Builds a model for answering, with the weights of a checkpoint, and without data, optimizer or run folder.

    with Inference.from_config(config, "outputs/run/checkpoint/step-24") as inference:
        engine = inference.build_engine("native", width=8, max_tokens=16384)
        completions = engine.complete(request, inference.tokenizer.decode)

`inference.forward` calls the model in the run's compute precision. Inference uses one process and one device, whatever
`[parallelism]` says. Several ranks can each have one of their own: `evaluation/ranks.py`.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type, set_default_dtype

from refine_titan.checkpointing import complete_steps
from refine_titan.config.sections import JobConfig
from refine_titan.conversion.dcp_checksums import METADATA_FILE
from refine_titan.conversion.dcp_weights import DCPWeights
from refine_titan.data.end_of_sequence import end_of_sequence_ids
from refine_titan.distributed.parallelize import parallelize
from refine_titan.distributed.precision import compute_precision
from refine_titan.distributed.toolchain import check_compiler
from refine_titan.errors import UserError
from refine_titan.models import build_decoder
from refine_titan.models.decoder import DecoderArgs, DecoderOutput, FastWeightDecoder
from refine_titan.models.hf_weights import HFWeights
from refine_titan.models.loading import read_parameters
from refine_titan.models.model_config import CONFIG_FILE, ModelConfig
from refine_titan.models.sizes import is_path, resolve_args
from refine_titan.registration import register_models
from refine_titan.rollout.build import EngineName, build_completion_engine
from refine_titan.rollout.completion import CompletionEngine
from refine_titan.rollout.engine_host import EngineHost
from refine_titan.starting_point import start_folder, validate_start

SINGLE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@dataclass
class Inference:
    """A model with the weights of a checkpoint.

    Attributes:
        config: the job. Inference uses `[model]` except its converters, `[rollout]`, `debug.seed`, and `dtype` and
            `mixed_precision_param` of `[training]`.
        checkpoint: folder that the weights were read from; None if they are random.
        args: the model's sizes and options.
        model: on `device`, with parameters in `training.dtype`.
        parallel_dims: a mesh of one rank.
        tokenizer: the config's tokenizer.
        stop_tokens: the end-of-sequence ids that the files of tokenizer and checkpoint name.
        device: the model's device.
    """

    config: JobConfig
    checkpoint: Path | None
    args: DecoderArgs
    model: FastWeightDecoder
    parallel_dims: ParallelDims
    tokenizer: BaseTokenizer
    stop_tokens: tuple[int, ...]
    device: torch.device

    @classmethod
    def from_config(cls, config: JobConfig, checkpoint: str | Path | None = None, *, trainable: bool = False) -> Self:
        """Builds the model and reads its weights.

        Args:
            config: validated settings.
            checkpoint: a DCP folder (a run's `checkpoint/step-N`, or one that `convert_checkpoint.py from-hf` wrote) or a Hugging
                Face folder. None takes the start that `[checkpoint]` names, or random weights from `debug.seed` if it names none.
            trainable: whether compile and activation checkpointing are applied as in training.

        Raises:
            UserError: if this process is one of several ranks, or the checkpoint does not fit the config's model.
        """
        refuse_several_ranks()
        check_compiler()
        register_models()
        join_process_group()
        args = resolve_args(config.model)
        folder = Path(checkpoint) if checkpoint is not None else start_folder(config)
        if checkpoint is not None:
            check_checkpoint(config, args, folder)
        tokenizer = get_train_spec(config.model.name).build_tokenizer_fn(config)
        device = torch.device(device_type, torch.cuda.current_device()) if device_type == "cuda" else torch.device(device_type)
        parallel_dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
        with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
            model = build_decoder(args)
        if trainable:
            model = parallelize(model, parallel_dims, config)
        model.to_empty(device=device)
        model.tie()  # leaving the meta device has untied shared parameters
        if folder is None:
            logger.warning("No checkpoint is given: the weights are random")
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(config.debug.seed)
                model.init_weights()
        else:
            load_weights(model, folder)
        return cls(config, folder, args, model.train(trainable), parallel_dims, tokenizer, stop_tokens(config, tokenizer, folder), device)

    def forward(self, *args, **kwargs) -> DecoderOutput:
        """Calls the model in the run's compute precision."""
        with self.amp():
            return self.model(*args, **kwargs)

    def amp(self) -> AbstractContextManager:
        """Context of the run's compute precision."""
        return compute_precision(self.config, self.parallel_dims)

    def build_engine(self, name: EngineName, *, width: int, max_tokens: int) -> CompletionEngine:
        """Builds an engine that completes prompts with the model's present weights. The caller closes it.

        Args:
            width: outputs decoded at once.
            max_tokens: longest prompt and output together (vLLM).

        Raises:
            UserError: if vLLM is not installed or its states do not fit.
        """
        return build_completion_engine(name, self.config, self.engine_host, width=width, max_tokens=max_tokens)

    @property
    def engine_host(self) -> EngineHost:
        """What engines of this model are built for."""
        return EngineHost(self.model, self.device, self.amp)

    def close(self) -> None:
        """Ends the process group that `from_config` began."""
        leave_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def stop_tokens(config: JobConfig, tokenizer: BaseTokenizer, checkpoint: Path | None = None) -> tuple[int, ...]:
    """The end-of-sequence ids that the files beside tokenizer, model and weights name.

    Args:
        checkpoint: the folder of the weights; None for those from which the run starts, and the run's newest checkpoint, which has the
            same files and is still there if those weights are gone.

    Raises:
        UserError: a file names something that is no id.
    """
    model = config.model
    folders = [Path(model.hf_assets_path)] if model.hf_assets_path else []
    if is_path(model.name, model.flavor):
        flavor = Path(model.flavor)
        folders.append(flavor if flavor.is_dir() else flavor.parent)
    if checkpoint is not None:
        folders.append(checkpoint)
    else:
        own, start = Path(config.job.dump_folder, config.checkpoint.folder), start_folder(config)
        folders += [start] if start is not None else []
        folders += [own / f"step-{max(steps)}"] if config.checkpoint.enable and (steps := complete_steps(own)) else []
    return end_of_sequence_ids(tokenizer, dict.fromkeys(folders))


def refuse_several_ranks() -> None:
    """Raises UserError if this process is one of several ranks."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise UserError(f"this runs in one process, and torchrun has started {ranks}; `refine-titan evaluate run` is what ranks can share")


def check_checkpoint(config: JobConfig, args: DecoderArgs, folder: Path) -> None:
    """Checks that a folder holds weights of the config's model.

    Raises:
        UserError: if something is missing or differs; the message names it.
    """
    if not folder.is_dir():
        raise UserError(f"checkpoint: {folder} is not a folder")
    is_dcp = (folder / METADATA_FILE).is_file()
    if not is_dcp and (folder / config.checkpoint.folder).is_dir():
        raise UserError(f"checkpoint: {folder} is the folder of a run; its checkpoints are {folder / config.checkpoint.folder}/step-N")
    if not is_dcp and not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"checkpoint: {folder} holds neither {METADATA_FILE} (a DCP checkpoint; a run's are its checkpoint/step-N) nor "
            f"{CONFIG_FILE} (a Hugging Face folder)"
        )
    start = replace(config.checkpoint, initial_load_path=str(folder), initial_load_in_hf=not is_dcp)
    try:
        validate_start(replace(config, checkpoint=start), args)
    except UserError as error:
        reason = str(error).removeprefix("checkpoint.initial_load_path: ").removeprefix("checkpoint.initial_load_in_hf: ")
        raise UserError(f"checkpoint: {reason}") from error


@torch.no_grad()
def load_weights(model: FastWeightDecoder, folder: Path) -> None:
    """Copies the weights of a checked checkpoint into a model, one tensor at a time, and casts them to the parameters' dtypes."""
    targets = model.state_dict()
    for name, tensor in _weights(folder):
        targets[name].copy_(tensor)


def _weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    if (folder / METADATA_FILE).is_file():
        weights = DCPWeights(folder)
        yield from ((name, weights.read(name)) for name in weights.tensors)
        return
    yield from read_parameters(HFWeights(folder), ModelConfig.read(folder))


_began_process_group = False


def join_process_group() -> None:
    """Begins a process group of this process alone, which engines join, unless there is a process group."""
    global _began_process_group
    if dist.is_initialized():
        return
    for name, value in SINGLE_RANK.items():
        os.environ.setdefault(name, value)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", rank=0, world_size=1, store=dist.HashStore())
    _began_process_group = True


def leave_process_group() -> None:
    """Ends the process group that `join_process_group` began."""
    global _began_process_group
    if _began_process_group and dist.is_initialized():
        dist.destroy_process_group()
    _began_process_group = False
