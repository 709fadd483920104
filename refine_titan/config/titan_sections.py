"""torchtitan 0.2.2's sections, with the defaults of ReFINE training and the bounds that torchtitan leaves unsaid.

A section keeps torchtitan's meaning. A class here declares again only the settings that have another default or a bound, and names
those that are not supported: they would have no effect or give wrong gradients. Paper values are those of arXiv 2602.16704 and its code
for mid-training.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from torchtitan.config import job_config as titan

from refine_titan.config.bounds import above, at_least, at_most, below, each, either, matching, one_of, unsupported
from refine_titan.config.fates import APPLIES, NO_EFFECT, REFUSED, SAME_DATA, SAME_MODEL, on_resume


@unsupported("refine_titan's sections are built in", "custom_config_module")
@on_resume(NO_EFFECT)
@dataclass
class Job(titan.Job):
    """torchtitan's job section."""


@on_resume(NO_EFFECT)
@dataclass
class Profiling(titan.Profiling):
    """torchtitan's profiling section. Traces and memory snapshots need a GPU."""

    profile_freq: Annotated[int, at_least(1)] = 10
    """Steps between two traces; at least `profiler_warmup` + `profiler_active`."""

    profiler_active: Annotated[int, at_least(1)] = 1
    """Steps that a trace records."""

    profiler_warmup: Annotated[int, at_least(0)] = 3
    """Steps that the profiler runs before it records."""


@unsupported("rank 0 writes the metrics of all ranks", "save_for_all_ranks")
@on_resume(NO_EFFECT)
@dataclass
class Metrics(titan.Metrics):
    """torchtitan's metrics section."""

    log_freq: Annotated[int, at_least(1)] = 1
    """Steps between two lines of the log and two points in TensorBoard; `metrics.jsonl` has every step."""

    enable_tensorboard: bool = True
    """Whether to write TensorBoard files."""

    save_tb_folder: str = "tb"
    """Folder of TensorBoard's files in the run's folder: one for all starts of a run."""

    enable_wandb: bool = False
    """Whether to log to Weights & Biases ([metrics.md](metrics.md)); needs the extra `wandb`."""

    disable_color_printing: bool = False
    """Whether the log has no colours on a terminal either. Elsewhere it never has."""

    log_stages: bool = False
    """Whether the seconds of each stage of a step follow its line of the log; `metrics.jsonl` always has them."""


@unsupported("use model.hf_assets_path", "tokenizer_path")
@on_resume(NO_EFFECT)
@dataclass
class Model(titan.Model):
    """torchtitan's model section."""

    name: Annotated[str, SAME_MODEL] = "delta_net"
    """Model family."""

    flavor: Annotated[str, SAME_MODEL] = "debug"
    """Size of the model within its family: a preset, the path of a Hugging Face `config.json` or of a folder that holds one, or a model of
    the Hugging Face Hub (`owner/name` or `owner/name@revision`)."""

    hf_assets_path: Annotated[str, SAME_DATA] = ""
    """Folder with Hugging Face's `tokenizer.json` (or `vocab.json` with `merges.txt`), and with the weights if they are to be loaded; or a
    model of the Hugging Face Hub (`owner/name` or `owner/name@revision`). Empty: the built-in tokenizer, whose tokens are bytes."""

    options: Annotated[list[str], SAME_MODEL] = field(default_factory=lambda: [])
    """Sizes and options of the family that override those of the flavor, each written `name=value`: the fields of its
    `refine_titan/models/FAMILY/args.py`, such as `chunk_size=1024` or `newton_schulz_dtype=float32` of `lact`. On the command line
    separated by commas."""

    converters: Annotated[list[str], APPLIES] = field(default_factory=list)
    """What torchtitan changes in the model: `quantize.linear.float8`, or nothing."""


@unsupported("gradients are clipped before the optimizer's step", "early_step_in_backward")
@on_resume(APPLIES)
@dataclass
class Optimizer(titan.Optimizer):
    """torchtitan's optimizer section."""

    name: Literal["Adam", "AdamW"] = "AdamW"
    """Optimizer."""

    lr: Annotated[float, at_least(0)] = 1e-6
    """Learning rate."""

    beta1: Annotated[float, at_least(0), below(1)] = 0.9
    """Decay of the optimizer's mean of gradients."""

    beta2: Annotated[float, at_least(0), below(1)] = 0.999
    """Decay of the optimizer's mean of squared gradients."""

    eps: Annotated[float, above(0)] = 1e-8
    """Term that keeps the optimizer from dividing by zero."""

    weight_decay: Annotated[float, at_least(0)] = 0.01
    """Weight decay."""


@on_resume(APPLIES)
@dataclass
class LRScheduler(titan.LRScheduler):
    """torchtitan's learning-rate schedule: warm-up, constant, decay. The default is constant throughout."""

    warmup_steps: Annotated[int, at_least(0)] = 0
    """Steps in which the learning rate rises linearly."""

    total_steps: Annotated[int | None, at_least(1)] = None
    """Steps that the schedule is made for; at least `training.steps`. Not set: `training.steps`."""

    decay_ratio: Annotated[float | None, at_least(0), at_most(1)] = 0.0
    """Share of the schedule's steps, its last ones, in which the learning rate decays."""

    min_lr_factor: Annotated[float, at_least(0), at_most(1)] = 0.0
    """Factor of the learning rate at the end of the decay."""


@unsupported("data.batches_ahead has data read in advance")
@dataclass
class DataLoader(titan.DataLoader):
    """torchtitan's settings of PyTorch's DataLoader, which is not used."""


@unsupported("use data.source", "dataset", "dataset_path")
@on_resume(NO_EFFECT)
@dataclass
class Training(titan.Training):
    """torchtitan's training section."""

    seq_len: Annotated[int, at_least(1), SAME_DATA] = 16384
    """Tokens of a sequence."""

    local_batch_size: Annotated[int, at_least(1), APPLIES] = 1
    """Sequences of one forward on one rank (a microbatch)."""

    global_batch_size: Annotated[int, either(-1, at_least(1)), APPLIES] = 128
    """Sequences of a step over all ranks; -1: one microbatch a rank. With `epochs` a run that resumes keeps their number."""

    steps: Annotated[int, at_least(1), APPLIES] = 100
    """Steps to train."""

    epochs: Annotated[int, at_least(0), APPLIES] = 0
    """Passes over the data, in place of `steps`: in each, every document once, in an order drawn over all of them. Needs data whose
    documents are found in any order ([data.md](data.md#epochs)). A file may not set both; the command line's one replaces the file's. 0:
    `steps` says how long."""

    max_norm: Annotated[float, above(0), APPLIES] = 1.0
    """Norm that gradients are clipped to."""

    dtype: Annotated[Literal["bfloat16", "float32"], REFUSED] = "float32"
    """Precision of the weights that are trained, and of the optimizer."""

    mixed_precision_param: Annotated[Literal["bfloat16", "float32"], APPLIES] = "bfloat16"
    """Precision of the model's arithmetic."""

    gc_freq: Annotated[int, at_least(1)] = 50
    """Steps between two collections of Python's garbage."""

    dataloader: DataLoader = field(default_factory=DataLoader)


@unsupported(
    "pipeline parallelism is not supported",
    "pipeline_parallel_degree",
    "pipeline_parallel_first_stage_less_layers",
    "pipeline_parallel_last_stage_less_layers",
    "pipeline_parallel_layers_per_stage",
    "pipeline_parallel_schedule",
    "pipeline_parallel_schedule_csv",
    "pipeline_parallel_microbatch_size",
    "pipeline_parallel_expert_parallel_overlap",
    "module_fqns_per_model_part",
)
@unsupported(
    "no model here has experts",
    "expert_parallel_degree",
    "expert_tensor_parallel_degree",
    "expert_parallel_comm_backend",
)
@unsupported("the head computes its loss itself", "disable_loss_parallel")
@unsupported("asynchronous tensor parallelism is not supported", "enable_async_tensor_parallel")
@unsupported(
    "ranks hold contiguous parts of a sequence, which cost the same, and hand on states",
    "context_parallel_load_balancer",
    "context_parallel_rotate_method",
)
@on_resume(NO_EFFECT)
@dataclass
class Parallelism(titan.Parallelism):
    """torchtitan's parallelism section."""

    data_parallel_replicate_degree: Annotated[int, at_least(1)] = 1
    """Copies of the model (HSDP), each spread over `data_parallel_shard_degree` ranks."""

    data_parallel_shard_degree: Annotated[int, either(-1, at_least(1))] = -1
    """Ranks that share one copy of the model (FSDP2); -1: what the other degrees leave."""

    tensor_parallel_degree: Annotated[int, at_least(1)] = 1
    """Ranks that share the heads and channels of every layer."""

    context_parallel_degree: Annotated[int, at_least(1)] = 1
    """Ranks that share the tokens of a microbatch, in contiguous parts."""

    context_parallel_load_balancer: str | None = None

    def __post_init__(self):
        """Leaves torchtitan's check to the bound of the setting, whose error names it."""


@unsupported("fault tolerance is not supported", "enable_ft_dataloader_checkpoints")
@unsupported("quantized weights are not read", "initial_load_in_hf_quantized")
@on_resume(NO_EFFECT)
@dataclass
class Checkpoint(titan.Checkpoint):
    """torchtitan's checkpoint section."""

    enable: bool = True
    """Whether a training writes checkpoints, resumes from them, and loads the weights from which it starts. False: it trains from random
    weights, and is refused if settings name a start; `load_only` is for a start without checkpoints."""

    interval: Annotated[int, at_least(1)] = 500
    """Steps between two checkpoints."""

    last_save_model_only: bool = False
    """False: the last checkpoint can be resumed like any other, e.g. with more `training.steps`."""

    keep_latest_k: Annotated[int, either(0, at_least(2))] = 10
    """Checkpoints that are kept, the latest ones whose files are all there; 0: all."""

    initial_load_path: str | None = None
    """Checkpoint from which a run starts: a DCP folder, a Hugging Face folder (`initial_load_in_hf`), or a model of the Hugging Face Hub
    (`owner/name` or `owner/name@revision`), which is always read as the latter. Not set: random weights."""

    load_step: Annotated[int, at_least(-1)] = -1
    """Step of the checkpoint to resume from; -1: the latest."""

    load_only: bool = False
    """Whether a training writes no checkpoints; it resumes and starts as others do."""

    exclude_from_loading: Annotated[list[str], each(one_of("optimizer", "lr_scheduler", "dataloader")), APPLIES] = field(
        default_factory=list
    )
    """Parts of a checkpoint that a run begins anew instead of resuming them. It does so once: started again with the same settings, it
    resumes them too, and says so. With `training.epochs` the data cannot begin anew: its steps count from their beginning."""


@unsupported("blocks are not compiled as wholes", "memory_budget", "visualize_memory_budget_pareto")
@on_resume(NO_EFFECT)
@dataclass
class ActivationCheckpoint(titan.ActivationCheckpoint):
    """torchtitan's section on activation checkpointing."""

    mode: Literal["auto", "selective", "full", "none"] = "selective"
    """What is computed a second time in the backward pass instead of being kept: nothing (`none`), every block (`full`), or what
    `selective_ac_option` says. `auto` takes the first of `none`, `selective` and `full` with which the estimated peak fits the device;
    log and dry run say which and why. In post-training and test-time training, which the estimate does not cover, that is `full`.
    torchtitan's `memory_budget` needs blocks that are compiled as wholes, which these are not."""

    selective_ac_option: Annotated[str, matching("op|0*[1-9][0-9]*", "'op', or n for every n-th layer, at least '1'")] = "2"
    """`mode = "selective"`: `op` keeps the outputs of expensive operators, a number n checkpoints every n-th layer."""


@on_resume(NO_EFFECT)
@dataclass
class Compile(titan.Compile):
    """torchtitan's compile section."""

    components: list[str] = field(default_factory=lambda: ["model"])
    """What is compiled; `model`, the parts of every block that work token by token, is all there is."""


@on_resume(APPLIES)
@dataclass
class Float8Linear(titan.Float8Linear):
    """torchtitan's settings of linear layers in float8, with `model.converters = ['quantize.linear.float8']`."""

    enable_fsdp_float8_all_gather: bool = False
    """Whether FSDP2 gathers weights in float8; only with scales of whole tensors, that is without `recipe_name`."""

    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Whether the scales of all weights are computed together after the optimizer's step; needs `enable_fsdp_float8_all_gather`."""

    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """What has a scale of its own: a tensor, or each row of it (`rowwise_with_gw_hp`: but for the gradients of weights, which are
    computed in high precision). Not set: a tensor."""

    filter_fqns: list[str] = field(default_factory=list)
    """Parts of the names of linear layers that keep their precision."""

    emulate: bool = False
    """Whether ordinary matrix products compute the same casts, for machines without float8; not with `compile.enable`."""


@unsupported("torchtitan 0.2.2 takes MX formats from an interface that torchao 0.18.0 does not have")
@dataclass
class MXLinear(titan.MXLinear):
    """torchtitan's settings of linear layers in MX formats."""


@dataclass
class QuantizedLinear(titan.QuantizedLinear):
    """torchtitan's settings of quantized linear layers."""

    float8: Float8Linear = field(default_factory=Float8Linear)
    mx: MXLinear = field(default_factory=MXLinear)


@unsupported("no model here has experts")
@dataclass
class Float8GroupedMM(titan.Float8GroupedMM):
    """torchtitan's settings of experts in float8."""


@unsupported("no model here has experts")
@dataclass
class MXGroupedMM(titan.MXGroupedMM):
    """torchtitan's settings of experts in MX formats."""


@dataclass
class QuantizedGroupedMM(titan.QuantizedGroupedMM):
    """torchtitan's settings of quantized experts."""

    float8: Float8GroupedMM = field(default_factory=Float8GroupedMM)
    mx: MXGroupedMM = field(default_factory=MXGroupedMM)


@on_resume(APPLIES)
@dataclass
class Quantize(titan.Quantize):
    """torchtitan's quantize section."""

    linear: QuantizedLinear = field(default_factory=QuantizedLinear)
    grouped_mm: QuantizedGroupedMM = field(default_factory=QuantizedGroupedMM)


@unsupported("ranks have to exchange data", "mode")
@on_resume(NO_EFFECT)
@dataclass
class Comm(titan.Comm):
    """torchtitan's section on communication between ranks."""

    init_timeout_seconds: Annotated[int, at_least(1)] = 300
    """Seconds that a collective may take during the start and the first step."""

    train_timeout_seconds: Annotated[int, at_least(1)] = 100
    """Seconds that a collective may take after the first step."""

    trace_buf_size: Annotated[int, at_least(0)] = 20000
    """Collectives that the flight recorder remembers; 0: it is off."""


@unsupported("use refine-titan estimate")
@dataclass
class MemoryEstimation(titan.MemoryEstimation):
    """torchtitan's section on estimating memory."""


@unsupported("fault tolerance is not supported")
@dataclass
class FaultTolerance(titan.FaultTolerance):
    """torchtitan's section on fault-tolerant training (TorchFT)."""


@unsupported("refine_titan's sections are built in", "custom_args_module")
@on_resume(APPLIES)
@dataclass
class Experimental(titan.Experimental):
    """torchtitan's experimental section."""


@unsupported("[evaluation] says what is evaluated", "dataset", "dataset_path", "local_batch_size", "seq_len", "steps")
@on_resume(NO_EFFECT)
@dataclass
class Validation(titan.Validation):
    """torchtitan's validation section: evaluation during training. `[evaluation]` says what is evaluated."""

    enable: bool = False
    """Whether to evaluate during training."""

    freq: Annotated[int, at_least(1)] = 10
    """Steps between two evaluations; the first comes after step 1."""

    at_start: bool = False
    """Whether to evaluate before the first step too, as step 0."""

    dataloader: DataLoader = field(default_factory=DataLoader)

    def __post_init__(self):
        """Leaves torchtitan's check to the bound of the setting, whose error names it."""


@unsupported("no model here has experts", "moe_force_load_balance")
@on_resume(APPLIES)
@dataclass
class Debug(titan.Debug):
    """torchtitan's debug section."""

    seed: Annotated[int, at_least(0), below(2**63), REFUSED] = 42
    """Seed of the initial weights, the order of the data, the positions and the rollouts."""
