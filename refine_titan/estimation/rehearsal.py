"""One microbatch of a step on tensors without data: every operator of the run's own model, every tensor it would allocate.

The model is built at its full size on virtual ranks, FSDP2 gathers and frees its weights, activation checkpointing drops and
recomputes, and the bytes alive are counted. Nothing is computed. Layers are alike, so that two shallow models tell the deep one.
Contact with private parts of torch 2.13.0: FakeTensorMode.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
import torch._subclasses.fake_tensor as fake_tensor
from refine_kernels.delta_rule.footprint import gpu_footprint
from refine_kernels.packing import forget_plans
from torchtitan.distributed.utils import maybe_enable_amp
from torchtitan.tools.utils import device_type

from refine_titan.estimation.live_bytes import LiveBytes
from refine_titan.estimation.virtual_ranks import build_model, model_args, virtual_ranks
from refine_titan.job_config import JobConfig
from refine_titan.models.decoder import DecoderArgs
from refine_titan.models.shared_prefix import IndexedRows, LayerState, SharedPrefixLayout, SnapshotBank
from refine_titan.rollout.continuation import evaluate_rollouts, replay_prefixes

# States carry a few integers of the host (rows read), whose values the mixers need.
MAX_HOST_INTEGERS = 1 << 16
# Fewest layers of a model that is rehearsed for a deeper one: the first and the last differ from those between.
MIN_LAYERS = 2


@dataclass
class StepBytes:
    """Bytes of one rank beyond weights, gradients and optimizer.

    Attributes:
        stages: peak of each stage of a microbatch.
        parts: what is in them, by name.
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
    args = model_args(config)
    period = _period(config)
    few = MIN_LAYERS + (args.n_layers - MIN_LAYERS) % period
    many = few + period
    if args.n_layers <= many:
        return rehearse_layers(config, args, num_ranks, gpu)
    shallow, deeper = (rehearse_layers(config, replace(args, n_layers=n), num_ranks, gpu) for n in (few, many))
    steps = (args.n_layers - few) // period

    def extended(shallow: dict[str, int], deeper: dict[str, int]) -> dict[str, int]:
        return {name: shallow[name] + steps * (deeper[name] - shallow[name]) for name in shallow}

    return StepBytes(extended(shallow.stages, deeper.stages), extended(shallow.parts, deeper.parts))


def _period(config: JobConfig) -> int:
    """Layers after which a pattern of activation checkpointing repeats."""
    checkpointing = config.activation_checkpoint
    every = checkpointing.selective_ac_option
    return int(every) if checkpointing.mode == "selective" and every.isdigit() else 1


def rehearse_layers(config: JobConfig, args: DecoderArgs, num_ranks: int, gpu: bool) -> StepBytes:
    """Counts one microbatch of a model as it is, layer by layer."""
    with virtual_ranks(config, num_ranks) as parallel_dims, _without_data():
        model = build_model(config, args, parallel_dims, device="cpu")
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # held from the microbatches before
        amp = maybe_enable_amp(parallel_dims, config.training.mixed_precision_param, device_type)
        if config.training.mixed_precision_param == "float32":
            amp = nullcontext()
        held = [tensor for parameter in model.parameters() for tensor in (parameter, parameter.grad)]
        with gpu_footprint() if gpu else nullcontext(), LiveBytes(besides=held).counting() as live, amp:
            return _Rehearsal(config, model, live).run()


class _Rehearsal:
    def __init__(self, config: JobConfig, model: torch.nn.Module, live: LiveBytes):
        self.config, self.model, self.live, self.bytes = config, model, live, StepBytes()
        refine, ranks_of_a_sequence = config.refine, config.parallelism.context_parallel_degree
        rows = config.training.seq_len // ranks_of_a_sequence
        self.cu_seqlens = tuple(range(0, config.training.local_batch_size * rows + 1, rows))
        chunks = -(-refine.num_chunks // ranks_of_a_sequence)
        starts = [start + _longest_replay(rows // chunks, i, refine.snapshot_stride) for start in self.cu_seqlens[:-1] for i in range(chunks)]
        self.starts = tuple(r for r in starts for _ in range(refine.rollouts_per_position))
        self.tokens_T = torch.zeros(self.cu_seqlens[-1], dtype=torch.long)
        self.tokens_nk = torch.zeros(len(self.starts), refine.rollout_length, dtype=torch.long)
        model.output.register_forward_pre_hook(self._enter_head)
        model.output.register_forward_hook(self._leave_head)

    def run(self) -> StepBytes:
        refine = self.config.refine
        if refine.objective == "ntp":
            with self.stage("update"):
                out = self.forward(SharedPrefixLayout(self.cu_seqlens), labels=self.tokens_T)
                self.backward(out.losses.nll_sum)
        elif refine.scoring_pass != "separate" and refine.num_mini_batches == 1:
            with self.stage("update"):
                self.backward(*self.score_and_roll_out())
        else:
            with torch.no_grad():
                self.score_and_roll_out()
            layout = SharedPrefixLayout(self.cu_seqlens, self.starts, refine.rollout_length)
            with self.stage("update"):
                out = self.forward(layout, labels=self.tokens_T, logit_rows=layout.predicting_rows())
                self.backward(out.losses.nll_sum, out.logits)
        return self.bytes

    def score_and_roll_out(self) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The summed loss, and the logits of the rollouts."""
        stride = self.config.refine.snapshot_stride
        boundaries = SnapshotBank.boundaries(self.cu_seqlens, stride)
        with self.stage("score"):
            labels = self.tokens_T if torch.is_grad_enabled() else None
            out = self.forward(SharedPrefixLayout(self.cu_seqlens, state_positions=boundaries), labels=labels, entropy=True)
        bank = SnapshotBank.from_forward(self.cu_seqlens, stride, out.states)
        self.bytes.parts["snapshots"] = sum(_state_bytes(layer) for layer in bank.layers)
        with self.stage("roll out"):
            prefix = replay_prefixes(self.model, bank, self.tokens_T, self.starts)
            self.bytes.parts["states at rollout starts"] = sum(_state_bytes(layer) for layer in prefix.layers)
            logits = evaluate_rollouts(self.model, prefix, self.tokens_nk).logits_nkV
        return out.losses.nll_sum, logits

    def forward(self, layout: SharedPrefixLayout, **arguments):
        num_rows = layout.num_branches * layout.branch_length
        stream = torch.cat([self.tokens_T, self.tokens_nk.flatten()]) if num_rows else self.tokens_T
        return self.model(stream, layout, **arguments)

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


def _longest_replay(chunk: int, index: int, stride: int) -> int:
    """Rows before a rollout in a chunk, so that its replay is as long as it gets there."""
    begin = chunk * index
    boundary = -(-begin // stride) * stride
    return boundary + stride + 1 if boundary + stride < begin + chunk else begin + chunk // 2


def _state_bytes(layer: LayerState) -> int:
    tensors = [x.pool if isinstance(x, IndexedRows) else x for x in layer.tensors.values()]
    return sum(x.nbytes for x in tensors)


@contextmanager
def _without_data() -> Iterator[None]:
    """Tensors have shapes and no data. FakeTensorMode keeps the values of small constants only; plans are made anew, since
    tensors of two such modes do not mix."""
    limit = fake_tensor.CONSTANT_NUMEL_LIMIT
    fake_tensor.CONSTANT_NUMEL_LIMIT = MAX_HOST_INTEGERS
    forget_plans()
    try:
        with fake_tensor.FakeTensorMode():
            yield
    finally:
        fake_tensor.CONSTANT_NUMEL_LIMIT = limit
        forget_plans()
