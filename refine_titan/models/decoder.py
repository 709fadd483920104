"""The decoder that every family shares: embedding, pre-norm blocks of mixer and gated MLP, final norm, head.

The decoder knows no mixer: a family gives the class that builds one. Attribute names (`tok_embeddings`, `layers`, `norm`, `output`) are
those that torchtitan's activation checkpointing and FSDP functions expect.
Legend: T tokens of the flat stream, D hidden channels, V vocabulary, R tokens whose logits are wanted.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.protocols.model import BaseModelArgs, ModelProtocol

from refine_kernels.gated_silu import gated_silu
from refine_kernels.linear_head import HeadLosses, VocabularyShard, as_logits, linear_head_losses
from refine_kernels.packing import on_device
from refine_titan.config.sections import JobConfig
from refine_titan.errors import UserError
from refine_titan.files.limits import MAX_LAYERS
from refine_titan.models.attention.args import AttentionArgs
from refine_titan.models.hf_format import HFConfigurable
from refine_titan.models.norms import OffsetRMSNorm
from refine_titan.models.options import read_options
from refine_titan.models.sharded_tensors import local, whole_columns, whole_rows
from refine_titan.models.shared_prefix import LayerState, SharedPrefixLayout, SharedPrefixMixer, StateTensors


@dataclass
class DecoderArgs(HFConfigurable, BaseModelArgs, ABC):
    """Sizes and options that every family has; a family adds its mixer's.

    Raises:
        ValueError: if a size is not positive, or a number not finite.
    """

    vocab_size: int = 32000
    dim: int = 2048
    n_layers: int = 24
    hidden_ratio: float | None = 4
    """Sets the MLP's width to `2/3 * hidden_ratio * dim`, rounded up to a multiple of 256, unless `intermediate_size` is
    given. None means 4."""
    intermediate_size: int | None = None
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    offset_norms: ClassVar[bool] = False
    """Whether the norms of rows multiply by 1 + their weight."""

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None or f.metadata.get("may_be_negative"):
                continue
            if f.type in (int, int | None) and not 1 <= value < 2**31:
                raise ValueError(f"{f.name} is {value}; allowed: at least 1, below 2^31")
            if f.type in (float, float | None) and not (0 < value < math.inf):
                raise ValueError(f"{f.name} is {value}; allowed: a finite number above 0")
        if self.n_layers > MAX_LAYERS.value:
            raise ValueError(f"n_layers is {self.n_layers}; allowed: {MAX_LAYERS.words()}")

    @property
    def mlp_dim(self) -> int:
        if self.intermediate_size is not None:
            return self.intermediate_size
        ratio = 4 if self.hidden_ratio is None else self.hidden_ratio
        return -(-int(self.dim * ratio * 2 / 3) // 256) * 256

    @abstractmethod
    def mixer_flops_per_token(self) -> int:
        """Floating-point operations of the forward of the inner operator of the family's own mixer, per token and layer; the projections
        are not part of it."""

    def attention_of(self, layer: int) -> AttentionArgs | None:
        """The attention that stands in a layer instead of the family's own mixer; None where there is none."""
        return None

    def with_layers(self, n_layers: int) -> Self:
        """The same with the first `n_layers` layers only."""
        return replace(self, n_layers=n_layers)

    @property
    def layer_period(self) -> int:
        """Layers after which their kinds repeat."""
        kinds = [(self.attention_of(layer), self.norms_follow(layer)) for layer in range(self.n_layers)]
        periods = range(1, self.n_layers)
        return next((p for p in periods if all(a == b for a, b in zip(kinds, kinds[p:]))), self.n_layers)

    @property
    def has_attention(self) -> bool:
        """Whether the states of some layers grow with their sequences."""
        return any(self.attention_of(layer) is not None for layer in range(self.n_layers))

    def attention_head_sizes(self) -> dict[str, int]:
        """The numbers of heads of layers with attention that a tensor-parallel degree must divide."""
        heads = {a.n_kv_heads for a in map(self.attention_of, range(self.n_layers)) if a is not None}
        return {"key heads of attention": math.gcd(*heads)} if heads else {}

    def norms_follow(self, layer: int) -> bool:
        """Whether a layer's norms come after mixer and MLP instead of before them."""
        return False

    def build_norm(self) -> nn.Module:
        """A norm over the hidden channels."""
        return (OffsetRMSNorm if self.offset_norms else nn.RMSNorm)(self.dim, eps=self.norm_eps)

    def inner_flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of the forward of all layers' inner operators, per token of documents of `seq_len` tokens."""
        attentions = [self.attention_of(layer) for layer in range(self.n_layers)]
        return sum(self.mixer_flops_per_token() if a is None else a.flops_per_token(seq_len) for a in attentions)

    def key_channels(self) -> int | None:
        """Key channels of a head of the delta rule; None in a family without it."""
        return None

    def tensor_parallel_sizes(self) -> dict[str, int]:
        """The numbers of heads that a tensor-parallel degree must divide, by name; empty where the mixer cannot be sharded."""
        return {}

    def reach(self) -> int:
        """How many tokens before its own a layer reads besides the state: the fewest that a rank's shard of a trunk can have."""
        return 0

    def snapshot_stride(self, configured: int) -> int:
        """The distance between snapshots, given the configured one; 1 in a family that has the state at every token for free."""
        return configured

    def with_options(self, options: Sequence[str]) -> Self:
        """A copy in which `[model] options` override fields.

        Raises:
            UserError: naming the option, the value found and what is allowed.
        """
        values = read_options(options, type(self))
        try:
            return replace(self, **values)
        except ValueError as error:
            raise UserError(f"model.options: {error}") from error

    def update_from_config(self, job_config: JobConfig, **kwargs) -> None:
        """Takes `[model] options`; torchtitan's trainer calls it."""
        vars(self).update(vars(self.with_options(job_config.model.options)))

    def compute_in_float32(self) -> None:
        """Takes back every choice to compute a part in a lower precision (fields `*_dtype`), also of a model that has these args."""
        for f in fields(self):
            if f.name.endswith("_dtype"):
                setattr(self, f.name, "float32")

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Counts parameters, and floating-point operations per token of a forward and its backward, which is twice the forward."""
        num_params = sum(p.numel() for p in model.parameters())
        num_lookup = 0 if self.tie_word_embeddings else model.tok_embeddings.weight.numel()
        return num_params, 6 * (num_params - num_lookup) + 3 * self.inner_flops_per_token(seq_len)


def whole_multiple(name: str, width: float, divisor_name: str = "", divisor: int = 1) -> int:
    """Returns `width` as an int. A product of floating-point numbers may be slightly more than whole: 100 * 1.1 is 110.00000000000001.
    Slightly less is refused, as by flash-linear-attention, which rounds down.

    Raises:
        ValueError: if it is not a whole multiple of `divisor`, naming both.
    """
    whole = int(width)
    if not math.isclose(width, whole, rel_tol=1e-9) or whole % divisor:
        allowed = f"a whole multiple of {divisor_name} ({divisor})" if divisor_name else "a whole number"
        raise ValueError(f"{name} must be {allowed}, got {width!r}")
    return whole


def initialize(parameter: torch.Tensor, fill: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Fills a parameter in place by `fill`, with the same values however it is sharded.

    DTensor's random numbers do not cover CPUs (torch 2.13.0): every rank would draw the same numbers for its own shard. On a CPU each
    rank, seeded like the others, therefore draws the whole parameter and keeps its part.
    """
    if not isinstance(parameter, DTensor) or parameter.device.type != "cpu":
        fill(parameter)
        return
    whole = fill(torch.empty(parameter.shape, dtype=parameter.dtype))
    shard = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(shard.to_local())


class GatedMLP(nn.Module):
    """The feed-forward network `down(silu(gate(x)) * up(x))`."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(gated_silu(self.gate_proj(x), self.up_proj(x)))


# Builds the sequence mixer of a layer.
MixerBuilder = Callable[[DecoderArgs, int], SharedPrefixMixer]


class Block(nn.Module):
    """A mixer, then an MLP, each with a norm before it, or after it where the args say so."""

    def __init__(self, args: DecoderArgs, layer: int, build_mixer: MixerBuilder):
        super().__init__()
        self.norms_follow = args.norms_follow(layer)
        self.mixer_norm = args.build_norm()
        self.mixer = build_mixer(args, layer)
        self.mlp_norm = args.build_norm()
        self.mlp = GatedMLP(args.dim, args.mlp_dim)

    def forward(
        self, x_TD: torch.Tensor, layout: SharedPrefixLayout, initial_state: LayerState | None = None
    ) -> tuple[torch.Tensor, StateTensors]:
        mixed_TD, states = self.mixer(x_TD if self.norms_follow else self.mixer_norm(x_TD), layout, initial_state)
        return self.add_mlp(x_TD, mixed_TD), states

    def add_mlp(self, x_TD: torch.Tensor, mixed_TD: torch.Tensor) -> torch.Tensor:
        """Adds the mixer's output to the residual stream, then the MLP's."""
        if self.norms_follow:
            x_TD = x_TD + self.mixer_norm(mixed_TD)
            return x_TD + self.mlp_norm(self.mlp(x_TD))
        x_TD = x_TD + mixed_TD
        return x_TD + self.mlp(self.mlp_norm(x_TD))


class Head(nn.Linear):
    """The language-model head. It gives losses of the trunk and logits of chosen tokens, never all logits."""

    def forward(
        self,
        hidden_TD: torch.Tensor,
        labels: torch.Tensor | None,
        entropy: bool,
        logit_rows: torch.Tensor | None,
    ) -> tuple[HeadLosses, torch.Tensor | None]:
        """Losses of the first tokens, as many as there are labels, and logits of `logit_rows`; see `FastWeightDecoder.forward`."""
        num_trunk = hidden_TD.shape[0] if labels is None else labels.shape[0]
        # Even a slice of all rows would fill and add them in backward.
        trunk_TD = hidden_TD if num_trunk == hidden_TD.shape[0] else hidden_TD[:num_trunk]
        losses = linear_head_losses(trunk_TD, local(self.weight), labels, entropy=entropy, shard=self._shard())
        logits = None
        if logit_rows is not None:
            rows = hidden_TD.index_select(0, on_device(logit_rows.reshape(-1), hidden_TD.device))
            logits = self.logits(rows).reshape(*logit_rows.shape, -1)
        return losses, logits

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """Logits `[R, V]` of hidden states, at least float32."""
        # Not `hidden @ weight.t()`: autocast keeps its cast of a parameter for the whole context, but casts a view of it every time.
        logits_RV = as_logits(F.linear(hidden_RD, local(self.weight)))
        return whole_columns(logits_RV, self.weight.device_mesh) if isinstance(self.weight, DTensor) else logits_RV

    def _shard(self) -> VocabularyShard | None:
        """This rank's part of the vocabulary under tensor parallelism, else None."""
        if not isinstance(self.weight, DTensor):
            return None
        mesh = self.weight.device_mesh
        return VocabularyShard(mesh.get_group(), mesh.get_local_rank() * self.weight.to_local().shape[0])


class DecoderOutput(NamedTuple):
    """Output of a forward.

    Attributes:
        hidden_TD: output of the final norm for every token of the flat stream.
        losses: sum and terms of the next-token loss, and entropies, of the trunk's tokens, as far as asked for.
        logits: float32 logits of the tokens asked for, `[..., V]`.
        states: one `LayerState` per layer at the layout's `state_positions`; empty ones if the layout asks for none.
    """

    hidden_TD: torch.Tensor
    losses: HeadLosses
    logits: torch.Tensor | None
    states: list[LayerState]


class FastWeightDecoder(ModelProtocol):
    """The decoder over the flat stream of a `SharedPrefixLayout`.

    Args:
        model_args: sizes and options.
        build_mixer: builds a layer's sequence mixer from the args; `refine_titan.models.build_decoder` finds it by the args' family.
    """

    def __init__(self, model_args: DecoderArgs, build_mixer: MixerBuilder):
        super().__init__(model_args)
        self.model_args = model_args
        # The stream is padded to a multiple: sequence parallelism shares its tokens between ranks, float8 sums over them in blocks.
        self.stream_multiple = 1
        self.tok_embeddings = nn.Embedding(model_args.vocab_size, model_args.dim)
        self.layers = nn.ModuleDict({str(i): Block(model_args, i, build_mixer) for i in range(model_args.n_layers)})
        self.norm = model_args.build_norm()
        self.output = Head(model_args.dim, model_args.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Makes the head's weights the embeddings, where the model has them tied: anew after what makes two of a shared parameter."""
        if self.model_args.tie_word_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draws random weights, from torch's default generator."""
        self.tie()  # leaving the meta device has made two of a shared parameter
        std = self.model_args.initializer_range
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                initialize(module.weight, lambda weight: nn.init.normal_(weight, std=std))
                if getattr(module, "bias", None) is not None:
                    initialize(module.bias, nn.init.zeros_)
            elif isinstance(module, nn.RMSNorm):
                initialize(module.weight, nn.init.ones_)
            elif isinstance(module, OffsetRMSNorm):
                initialize(module.weight, nn.init.zeros_)
            elif hasattr(module, "reset_mixer_parameters"):
                module.reset_mixer_parameters()

    def forward(
        self,
        tokens_T: torch.Tensor,
        layout: SharedPrefixLayout,
        *,
        initial_states: list[LayerState] | None = None,
        labels: torch.Tensor | None = None,
        entropy: bool = False,
        logit_rows: torch.Tensor | None = None,
    ) -> DecoderOutput:
        """Runs the flat stream.

        Args:
            tokens_T: the trunk's tokens, then the branches', as `layout` says.
            initial_states: per layer the states that the trunk's sequences go on from; None if they have read nothing.
            labels: next token of each of the trunk's tokens (-100 for none), `[num_trunk_tokens]`; None for no loss.
            entropy: whether to compute the entropy of the next-token distribution of each of the trunk's tokens.
            logit_rows: indices of the tokens in the flat stream whose logits are wanted, of any shape.

        Raises:
            ValueError: if the stream's length is not the layout's.
        """
        if tokens_T.shape != (layout.num_tokens,):
            raise ValueError(f"the layout describes a stream of {layout.num_tokens} tokens, got tokens of shape {tuple(tokens_T.shape)}")
        hidden_TD = self.embed(tokens_T)
        states = []
        for i, layer in enumerate(self.layers.values()):
            hidden_TD, layer_state = layer(hidden_TD, layout, None if initial_states is None else initial_states[i])
            states.append(LayerState(layer_state))
        hidden_TD = self.final_norm(hidden_TD, layout.num_tokens)
        losses, logits = self.output(hidden_TD, labels, entropy, logit_rows)
        return DecoderOutput(hidden_TD, losses, logits, states)

    def embed(self, tokens_T: torch.Tensor) -> torch.Tensor:
        """The embedded tokens that the blocks take, padded; under tensor parallelism this rank's part of them."""
        padding = -tokens_T.shape[0] % self.stream_multiple
        return self.tok_embeddings(F.pad(tokens_T, (0, padding)) if padding else tokens_T)

    def final_norm(self, hidden_TD: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """The hidden states of all `num_tokens` tokens, on every rank and without padding, that the head takes."""
        hidden_TD = whole_rows(self.norm(hidden_TD))
        return hidden_TD if hidden_TD.shape[0] == num_tokens else hidden_TD[:num_tokens]
