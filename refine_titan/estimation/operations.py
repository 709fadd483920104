"""Counts operations and bytes of each stage of a ReFINE step on the run's own model without data, and the least time that they take.

For the present code it counts the floating-point operations of matrix products, and what each operator reads from and writes to the
device's memory. The floor of a stage is what no implementation can avoid: its matrix products, and the weights, states and moments that
it must read or write once. Legend: n rollouts, k tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.attention.varlen  # registers its operators
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count
from torchtitan.tools.utils import set_default_dtype

from refine_kernels.footprint import gpu_footprint, listening_to_traffic
from refine_titan.config.sections import JobConfig
from refine_titan.estimation.rehearsal import MIN_LAYERS, rollout_starts, without_data
from refine_titan.models import build_decoder
from refine_titan.models.context_shard import ContextShard
from refine_titan.models.decoder import DecoderArgs
from refine_titan.models.shared_prefix import SharedPrefixLayout, read_with_snapshots
from refine_titan.rollout.continuation import replay_prefixes, rescore_rollouts
from refine_titan.rollout.engine import RolloutRequest
from refine_titan.rollout.native import NativeEngine

STAGES = ("score", "replay", "decode", "rescore", "backward", "optimizer")
COMPUTE = torch.bfloat16
ATEN = torch.ops.aten
# torch 2.13.0's registry has only the attention operators of GPUs. A backward has 5 products where a forward has 2.
ATTENTION_ON_CPU = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: 1.0,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: 2.5,
}
# The same factors for windowed attention, whose entry in the registry counts all pairs.
WINDOWED_ATTENTION = {torch.ops.torch_attn._varlen_attn: 1.0, torch.ops.torch_attn._varlen_attn_backward: 2.5}
# Operators that allocate memory but do not read or write it.
WITHOUT_TRAFFIC = {ATEN.empty, ATEN.empty_like, ATEN.new_empty, ATEN.empty_strided}
# Operators that only write: they do not read the tensor whose shape they take.
FILLS = {ATEN.zeros_like, ATEN.ones_like, ATEN.full_like, ATEN.new_zeros, ATEN.new_ones, ATEN.new_full}
# Operators that read only the selected rows of a table.
LOOK_UPS = {ATEN.index_select, ATEN.embedding, ATEN.gather}
# Operators that write zeros and copy a gradient into a part of them.
PADDED_GRADIENTS = {ATEN.slice_backward, ATEN.select_backward}
# The optimizer reads weight, gradient and both moments, and writes weight and moments, all in float32.
OPTIMIZER_BYTES = 4 * 7


@dataclass(frozen=True)
class Device:
    """Rates of a device from its data sheet: dense bfloat16 operations, and bytes of memory, per second."""

    flops: float
    bandwidth: float


DEVICES = {"H100 SXM": Device(989.4e12, 3.35e12), "H200": Device(989.4e12, 4.8e12)}


@dataclass
class StageCount:
    """The counts of one stage.

    Attributes:
        flops: floating-point operations of matrix products.
        needed: bytes that any implementation must read or write.
        moved: bytes that the operators of the present code read and write.
        operators: number of these operators.
    """

    flops: float = 0
    needed: float = 0
    moved: float = 0
    operators: float = 0

    def floor_seconds(self, device: Device) -> float:
        return max(self.flops / device.flops, self.needed / device.bandwidth)

    def memory_seconds(self, device: Device) -> float:
        """The least seconds of the present code, whose operators all read from and write to the device's memory."""
        return max(self.flops / device.flops, self.moved / device.bandwidth)

    def extended(self, deeper: "StageCount", steps: int) -> "StageCount":
        """The counts of a model that has `steps` times as many additional layers as `deeper`."""
        mine, theirs = vars(self), vars(deeper)
        return StageCount(**{name: mine[name] + steps * (theirs[name] - mine[name]) for name in mine})


def count_operations(config: JobConfig, args: DecoderArgs) -> dict[str, StageCount]:
    """Counts one step for one sequence on one device, in bfloat16, without activation checkpointing: a ReFINE step of the form `training`,
    or a next-token step, which has the stages `score`, `backward` and `optimizer`.

    The optimizer's step is counted once, as if the sequence were the whole batch.
    """
    period = args.layer_period
    few = min(MIN_LAYERS + (args.n_layers - MIN_LAYERS) % period, args.n_layers)
    if args.n_layers <= few + period:
        return _Counting(config, args).run()
    shallow, deeper = (_Counting(config, args.with_layers(n)).run() for n in (few, few + period))
    steps = (args.n_layers - few) // period
    return {name: shallow[name].extended(deeper[name], steps) for name in STAGES}


class _Counting:
    def __init__(self, config: JobConfig, args: DecoderArgs):
        self.config, self.args, self.refine = config, args, config.refine
        self.stages = {name: StageCount() for name in STAGES}

    def run(self) -> dict[str, StageCount]:
        with without_data(), gpu_footprint():
            with set_default_dtype(COMPUTE):
                self.model = build_decoder(self.args)
            # Of the embeddings, only the rows of the batch's tokens are read.
            self.weights = sum(p.nbytes for p in self.model.parameters()) - self.model.tok_embeddings.weight.nbytes
            if self.refine.objective == "ntp":
                self._count_next_token_step()
            else:
                self._count_refine_step()
        num_parameters = sum(p.numel() for p in self.model.parameters())
        self.stages["optimizer"].needed = self.stages["optimizer"].moved = OPTIMIZER_BYTES * num_parameters
        self.stages["optimizer"].operators = 1  # fused
        return self.stages

    def _count_next_token_step(self) -> None:
        tokens_T = torch.zeros(self.config.training.seq_len, dtype=torch.long)
        with self.stage("score", self.weights, num_tokens=len(tokens_T)):
            out = self.model(tokens_T, SharedPrefixLayout((0, len(tokens_T))), labels=tokens_T)
        with self.stage("backward", 2 * self.weights, num_tokens=2 * len(tokens_T)):
            out.losses.nll_sum.backward()

    def _count_refine_step(self) -> None:
        refine = self.refine
        shard = ContextShard.of_rank((0, self.config.training.seq_len), None)
        tokens_T = torch.zeros(shard.num_tokens, dtype=torch.long)
        stride = self.args.snapshot_stride(refine.snapshot_stride)
        starts = rollout_starts(shard, self.config, self.args)
        k, n = refine.rollout_length, len(starts)
        with self.stage("score", self.weights, num_tokens=shard.num_tokens):
            out, bank = read_with_snapshots(self.model, tokens_T, shard, stride, labels=tokens_T, entropy=True)
        states = sum(block.mixer.bytes_read_per_token(COMPUTE, r - 1) for block in self.model.layers.values() for r in starts)
        replayed = sum(r - 1 - bank.boundary_before(r)[0] for r in set(starts))
        with self.stage("replay", self.weights + 2 * states if replayed else 0, num_tokens=replayed):
            prefix = replay_prefixes(self.model, bank, tokens_T, starts)
        request = RolloutRequest(tokens_T, shard.cu_seqlens, starts, (0,) * n, k, 0.0, 0)
        engine = NativeEngine(self.model)
        engine.sync_weights(0)
        with self.stage("decode", k * (self.weights + states), num_tokens=k * n):
            tokens_nk = engine.generate(request, prefix).tokens_nk
        with self.stage("rescore", self.weights + states, num_tokens=(k + 1) * n):
            rescored = rescore_rollouts(self.model, prefix, tokens_nk)
        loss = out.losses.nll_sum + rescored.logits_nkV.log_softmax(-1).sum()
        # Backward reads the weights once more and writes their gradients.
        with self.stage("backward", 2 * self.weights, num_tokens=2 * (shard.num_tokens + replayed + (k + 1) * n)):
            loss.backward()

    @contextmanager
    def stage(self, name: str, needed: int, num_tokens: int) -> Iterator[None]:
        """Counts what runs inside the context. A mixer's kernel does not run without data; its operations are computed from the args."""
        with CountOperators() as counted, listening_to_traffic(counted.add):
            yield
        kernels = sum(block.mixer.is_one_kernel for block in self.model.layers.values())
        counted.flops += num_tokens * kernels * self.args.mixer_flops_per_token()
        self.stages[name] = StageCount(counted.flops, needed, counted.bytes, counted.operators)


class CountOperators(TorchDispatchMode):
    """Sums the floating-point operations of matrix products, the bytes that operators read and write, and the number of operators."""

    def __init__(self):
        super().__init__()
        self.flops = self.bytes = self.operators = 0

    def add(self, num_bytes: int, operators: int) -> None:
        self.bytes += num_bytes
        self.operators += operators

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        operator = function._overloadpacket
        if operator in WINDOWED_ATTENTION:
            self.flops += WINDOWED_ATTENTION[operator] * _window_products(function._schema, args, kwargs)
        elif operator in flop_registry:
            self.flops += flop_registry[operator](*args, **kwargs, out_val=result)
        elif operator in ATTENTION_ON_CPU:
            q, k, v = args[1:4] if operator is ATEN._scaled_dot_product_flash_attention_for_cpu_backward else args[:3]
            self.flops += ATTENTION_ON_CPU[operator] * sdpa_flop_count(q.shape, k.shape, v.shape)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        held = {x.untyped_storage()._cdata for x in inputs}
        written = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        is_view = all(x.untyped_storage()._cdata in held for x in written) and not function._schema.is_mutable
        # Operators on integers alone are index arithmetic on the host.
        is_host = not any(x.is_floating_point() for x in (*inputs, *written))
        if written and not is_view and not is_host and operator not in WITHOUT_TRAFFIC:
            self.bytes += _touched(operator, args, inputs, written)
            self.operators += 1
        return result


def _window_products(schema: torch._C.FunctionSchema, args: tuple, kwargs: dict) -> int:
    """Operations of a forward of flash attention, counting only pairs inside windows; sequences are assumed to be equally long."""
    given = dict(zip((argument.name for argument in schema.arguments), args)) | kwargs
    (num_queries, H, D), num_keys = given["query"].shape, given["key"].shape[0]
    num_sequences = given["cu_seq_q"].shape[0] - 1
    queries, keys = num_queries // num_sequences, num_keys // num_sequences
    window = given["window_size"][0]  # tokens before a query's own; -1 for all
    pairs = sum(min(keys - queries + i, keys if window < 0 else window) + 1 for i in range(queries))
    return num_sequences * pairs * 2 * 2 * H * D


def _touched(operator: torch._ops.OpOverloadPacket, args: tuple, inputs: list[torch.Tensor], written: list[torch.Tensor]) -> int:
    """Bytes that an operator reads and writes."""
    if operator is ATEN.index_copy_:
        return 2 * args[3].nbytes
    if operator in (ATEN.index_add, ATEN.index_add_):
        # Counted as in place; without data torch 2.13.0 runs the form that copies.
        return 3 * args[3].nbytes
    if operator in FILLS:
        return sum(x.nbytes for x in written)
    if operator in LOOK_UPS:
        return 2 * sum(x.nbytes for x in written)
    if operator in PADDED_GRADIENTS:
        return 2 * args[0].nbytes + sum(x.nbytes for x in written)
    return sum(x.nbytes for x in (*inputs, *written))
