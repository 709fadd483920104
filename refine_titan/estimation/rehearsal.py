"""One microbatch of a step on tensors without data: every operator of the run's own model, every tensor it would allocate.

The model is built at its full size on virtual ranks, FSDP2 gathers and frees its weights, activation checkpointing drops and
recomputes, and the bytes alive are counted. Nothing is computed. Kinds of layers repeat, so that two shallow models tell the deep one.
Contact with private parts of torch 2.13.0: FakeTensorMode.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch._subclasses.fake_tensor as fake_tensor
import torch.distributed as dist

from refine_kernels.footprint import gpu_footprint
from refine_kernels.packing import forget_plans
from refine_titan.config.sections import JobConfig
from refine_titan.distributed.precision import compute_precision
from refine_titan.estimation.live_bytes import LiveBytes
from refine_titan.estimation.virtual_ranks import build_model, virtual_ranks
from refine_titan.models.context_shard import ContextShard
from refine_titan.models.decoder import DecoderArgs
from refine_titan.models.shared_prefix import SharedPrefixLayout, read_with_snapshots
from refine_titan.models.sizes import resolve_args
from refine_titan.rollout.continuation import replay_prefixes, rescore_rollouts

# States have a few integers on the host (numbers of tokens read), whose values the mixers need.
MAX_HOST_INTEGERS = 1 << 20
# Fewest layers of a shallow model from which a deeper one is computed: the first and the last layer differ from those between.
MIN_LAYERS = 2
# The part of a microbatch's memory that remains, once it has been read, until the engine has sampled.
KEPT_UNTIL_ROLLOUTS = "kept until the rollouts"


@dataclass
class StepBytes:
    """Bytes of one rank, besides weights, gradients and optimizer.

    Attributes:
        stages: peak of each stage of a microbatch.
        parts: bytes of some parts of these peaks, by name.
    """

    stages: dict[str, int] = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=dict)


def rehearse(config: JobConfig, num_ranks: int, gpu: bool) -> StepBytes:
    """Counts one microbatch.

    Args:
        gpu: whether the GPU's operators run, or those of a CPU.

    Raises:
        UserError: if the run's settings do not fit so many ranks.
    """
    args = resolve_args(config.model)
    period = math.lcm(_period(config), args.layer_period)
    few = MIN_LAYERS + (args.n_layers - MIN_LAYERS) % period
    many = few + period
    if args.n_layers <= many:
        return rehearse_layers(config, args, num_ranks, gpu)
    shallow, deeper = (rehearse_layers(config, args.with_layers(n), num_ranks, gpu) for n in (few, many))
    steps = (args.n_layers - few) // period

    def extended(shallow: dict[str, int], deeper: dict[str, int]) -> dict[str, int]:
        return {name: shallow[name] + steps * (deeper[name] - shallow[name]) for name in shallow}

    return StepBytes(extended(shallow.stages, deeper.stages), extended(shallow.parts, deeper.parts))


def _period(config: JobConfig) -> int:
    """The number of layers after which the pattern of activation checkpointing repeats."""
    checkpointing = config.activation_checkpoint
    every = checkpointing.selective_ac_option
    return int(every) if checkpointing.mode == "selective" and every.isdigit() else 1


def rehearse_layers(config: JobConfig, args: DecoderArgs, num_ranks: int, gpu: bool) -> StepBytes:
    """Counts one microbatch of a model with all its layers."""
    # The second of the ranks that share a sequence: a document arrives from the first one, and mostly one goes on to the third.
    context = config.parallelism.context_parallel_degree
    rank = config.parallelism.tensor_parallel_degree if context > 1 else 0
    with virtual_ranks(config, num_ranks, rank) as parallel_dims, without_data():
        model = build_model(config, args, parallel_dims, device="cpu")
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # gradients of earlier microbatches exist
        amp = compute_precision(config, parallel_dims)
        held = [tensor for parameter in model.parameters() for tensor in (parameter, parameter.grad)]
        with gpu_footprint() if gpu else nullcontext(), LiveBytes(besides=held).counting() as live, amp:
            group = parallel_dims.get_mesh("cp").get_group() if context > 1 else None
            return _Rehearsal(config, model, live, group).run()


class _Rehearsal:
    def __init__(self, config: JobConfig, model: torch.nn.Module, live: LiveBytes, group: dist.ProcessGroup | None):
        self.config, self.model, self.live, self.bytes = config, model, live, StepBytes()
        training = config.training
        cu_seqlens = range(0, (training.local_batch_size + 1) * training.seq_len, training.seq_len)
        self.shard = ContextShard.of_rank(cu_seqlens, group)
        self.starts = rollout_starts(self.shard, config, model.model_args)
        self.tokens_T = torch.zeros(self.shard.cu_seqlens[-1], dtype=torch.long)
        self.tokens_nk = torch.zeros(len(self.starts), config.refine.rollout_length, dtype=torch.long)
        model.output.register_forward_pre_hook(self._enter_head)
        model.output.register_forward_hook(self._leave_head)

    def run(self) -> StepBytes:
        refine = self.config.refine
        if refine.objective == "ntp":
            with self.stage("update"):
                out = self.forward(labels=self.labels_T)
                self.backward(out.losses.nll_sum)
        elif refine.scores_in_training_pass(refine.num_mini_batches):
            with self.stage("update"):
                self.backward(*self.score_and_roll_out())
        else:
            with torch.no_grad():
                self.score_and_roll_out()
            branches = tuple(r - self.shard.begin for r in self.starts), refine.rollout_length
            rows = SharedPrefixLayout(self.shard.local_cu_seqlens, *branches).predicting_rows()
            with self.stage("update"):
                out = self.forward(*branches, labels=self.labels_T, logit_rows=rows)
                self.backward(out.losses.nll_sum, out.logits)
        return self.bytes

    def score_and_roll_out(self) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Runs both stages; returns the summed loss and the logits of the rollouts."""
        stride = self.model.model_args.snapshot_stride(self.config.refine.snapshot_stride)
        with self.stage("score"):
            labels = self.tokens_T if torch.is_grad_enabled() else None
            out, bank = read_with_snapshots(self.model, self.tokens_T, self.shard, stride, labels=labels, entropy=True)
        self.bytes.parts["snapshots"] = sum(layer.nbytes for layer in bank.layers)
        with self.stage("roll out"):
            prefix = replay_prefixes(self.model, bank, self.tokens_T, self.starts)
            self.bytes.parts["states at rollout starts"] = sum(layer.nbytes for layer in prefix.layers)
            bank, out = None, out._replace(hidden_TD=None, losses=out.losses._replace(entropy_T=None))
            self.bytes.parts[KEPT_UNTIL_ROLLOUTS] = self.live.now
            logits = rescore_rollouts(self.model, prefix, self.tokens_nk).logits_nkV
        return out.losses.nll_sum, logits

    @property
    def labels_T(self) -> torch.Tensor:
        return self.tokens_T[self.shard.tokens]

    def forward(self, branch_starts=(), branch_length=0, **arguments):
        layout = SharedPrefixLayout(self.shard.local_cu_seqlens, branch_starts, branch_length, shard=self.shard)
        trunk = self.tokens_T[self.shard.tokens]
        return self.model(torch.cat([trunk, self.tokens_nk.flatten()]) if branch_starts else trunk, layout, **arguments)

    def backward(self, nll_sum: torch.Tensor, logits: torch.Tensor | None = None) -> None:
        self.bytes.parts["kept for backward"] = self.live.now
        loss = nll_sum if logits is None else nll_sum + logits.log_softmax(-1).sum()
        loss.backward()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.live.reset_peak()
        self._peak = 0
        yield
        self.bytes.stages[name] = max(self._peak, self.live.peak)

    def _enter_head(self, *_) -> None:
        self._peak = max(self._peak, self.live.peak)
        self.live.reset_peak()
        self._before_head = self.live.now

    def _leave_head(self, *_) -> None:
        needed = self.live.peak - self._before_head
        self.bytes.parts["head"] = max(self.bytes.parts.get("head", 0), needed)


def rollout_starts(shard: ContextShard, config: JobConfig, args: DecoderArgs) -> tuple[int, ...]:
    """Where the rank's rollouts begin: as far after a snapshot as the chunk allows, or anywhere in it if every position has one."""
    refine, seq_len = config.refine, config.training.seq_len
    chunk = seq_len // refine.num_chunks
    stride = args.snapshot_stride(refine.snapshot_stride)
    offsets = [chunk * i + chunk // 3 if stride == 1 else _longest_replay(chunk, i, stride) for i in range(refine.num_chunks)]
    starts = (row + offset for row in range(0, shard.cu_seqlens[-1], seq_len) for offset in offsets)
    own = [r for r in starts if shard.owns(r)] or [shard.end]
    return tuple(r for r in own for _ in range(refine.rollouts_per_position))


def _longest_replay(chunk: int, index: int, stride: int) -> int:
    """The position in a chunk at which a rollout has the longest replay."""
    begin = chunk * index
    boundary = -(-begin // stride) * stride
    return boundary + stride if boundary + stride < begin + chunk else begin + chunk // 2


@contextmanager
def without_data() -> Iterator[None]:
    """Inside the context, tensors have shapes and no data.

    FakeTensorMode keeps only the values of small constants, hence the higher limit. Plans are dropped before and after, because tensors
    of two such modes do not mix.
    """
    limit = fake_tensor.CONSTANT_NUMEL_LIMIT
    fake_tensor.CONSTANT_NUMEL_LIMIT = MAX_HOST_INTEGERS
    forget_plans()
    try:
        with fake_tensor.FakeTensorMode():
            yield
    finally:
        fake_tensor.CONSTANT_NUMEL_LIMIT = limit
        forget_plans()
