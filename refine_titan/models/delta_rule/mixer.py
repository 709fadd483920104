"""The base of the mixers around the delta rule: short convolutions, normalised heads, decay gate, gated output norm.

Legend: T tokens, D hidden channels, H value heads, K key and V value channels of a head, N sequences.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from refine_kernels.delta_rule import delta_rule, delta_rule_step_
from refine_kernels.l2_norm import l2_normalise
from refine_kernels.packing import on_device
from refine_kernels.short_conv import short_conv, short_conv_step_
from refine_titan.models.context_shard import ContextShard, rows_before
from refine_titan.models.decoder import initialize
from refine_titan.models.decoding import DecodingClock, StateBuffers
from refine_titan.models.delta_rule.shard import delta_rule_of_shard
from refine_titan.models.sharded_tensors import local
from refine_titan.models.shared_prefix import LayerState, SharedPrefixMixer, StateShape

# Its exponential, times what a softplus gives, is a finite float32.
LARGEST_LOG_RATE = 80.0
GATE_ACTIVATIONS = {"swish": F.silu, "silu": F.silu, "sigmoid": torch.sigmoid}


class ShortConv(nn.Module):
    """The weights of a causal depthwise convolution, shaped as in flash-linear-attention: `[channels, 1, width]`."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))

    def reset_mixer_parameters(self) -> None:
        bound = self.weight.shape[-1] ** -0.5
        initialize(self.weight, lambda weight: nn.init.uniform_(weight, -bound, bound))


class DecayGate(nn.Module):
    """The log decay `-exp(A_log) softplus(x + dt_bias)`, or `lower_bound * sigmoid(exp(A_log) (x + dt_bias))`.

    A decay is a product over thousands of tokens: parameters and arithmetic are float32 whatever the model computes in. What is left of a
    state after a decay below the square of the machine precision is less than rounding leaves, so log decays end there: the operators
    add them up, and differences of large sums would be inexact, of infinite ones NaN.

    Args:
        n_heads: value heads, H; one `A_log` each.
        channels: decays of a head: 1, or one per key channel.
        lower_bound: smallest log decay; None for the unbounded form.
        max_rate: initial `exp(A_log)` are drawn from `min_rate` to this; None starts them all at 1.
    """

    keeps_float32 = True

    def __init__(
        self,
        n_heads: int,
        channels: int = 1,
        lower_bound: float | None = None,
        min_rate: float = 0.0,
        max_rate: float | None = 16.0,
    ):
        super().__init__()
        self.channels, self.lower_bound, self.min_rate, self.max_rate = channels, lower_bound, min_rate, max_rate
        self.A_log = nn.Parameter(torch.empty(n_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(n_heads * channels, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Log decays of `x` `[T, H * channels]`: `[T, H]` with one channel, else `[T, H, channels]`; at least float32."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        x = (x.to(dtype) + local(self.dt_bias).to(dtype)).unflatten(-1, (-1, self.channels))
        rate = local(self.A_log).to(dtype).clamp(max=LARGEST_LOG_RATE).exp()[:, None]
        log_decay = -rate * F.softplus(x) if self.lower_bound is None else self.lower_bound * torch.sigmoid(rate * x)
        log_decay = log_decay.clamp(min=2 * math.log(torch.finfo(dtype).eps))
        return log_decay.squeeze(-1) if self.channels == 1 else log_decay

    def reset_mixer_parameters(self) -> None:
        def fill_rates(A_log: torch.Tensor) -> torch.Tensor:
            if self.max_rate is None:
                return A_log.zero_()
            return A_log.uniform_(self.min_rate, self.max_rate).clamp_(min=1e-6).log_()

        def fill_steps(dt_bias: torch.Tensor) -> torch.Tensor:
            # softplus(dt_bias) is log-uniform in 0.001..0.1
            step = dt_bias.uniform_(math.log(0.001), math.log(0.1)).exp_()
            return dt_bias.copy_(step + torch.log(-torch.expm1(-step)))

        with torch.no_grad():
            initialize(self.A_log, fill_rates)
            initialize(self.dt_bias, fill_steps)


class DeltaRuleMixer(SharedPrefixMixer):
    """Base of mixers whose inner operator is the delta rule over convolved q, k and v.

    A family sets `head_k_dim`, `head_v_dim`, `o_norm`, `o_proj` and, by `add_short_convs`, the convolutions. Its `project` gives q, k, v,
    beta and, if it has one, the log decay.
    """

    tensor_parallel_plan = {
        "q_proj": "columns",
        "k_proj": "columns",
        "v_proj": "columns",
        "a_proj": "columns",
        "b_proj": "columns",
        "g_proj": "columns",
        "q_conv1d": "first_dim",
        "k_conv1d": "first_dim",
        "v_conv1d": "first_dim",
        "decay": "first_dim",
        "o_norm": "heads",
        "o_proj": "rows",
    }
    step_can_be_recorded = True
    is_one_kernel = True
    high_precision_projections = ("a_proj", "b_proj")
    silu_after_conv = {"q": True, "k": True, "v": True}
    output_gate_activation = "swish"
    has_short_convs = False
    updates_per_token = 1

    def add_short_convs(self, key_channels: int, value_channels: int, width: int, query_channels: int | None = None) -> None:
        """Adds convolutions of q, k and v; q has as many channels as k if it is not said."""
        self.has_short_convs = True
        self.q_conv1d = ShortConv(key_channels if query_channels is None else query_channels, width)
        self.k_conv1d = ShortConv(key_channels, width)
        self.v_conv1d = ShortConv(value_channels, width)

    def state_shapes(self, compute_dtype: torch.dtype) -> dict[str, StateShape]:
        heads = local(self.o_proj.weight).shape[1] // self.head_v_dim
        wide = torch.promote_types(compute_dtype, torch.float32)
        shapes = {"recurrent": StateShape((heads, self.head_k_dim, self.head_v_dim), wide)}
        if self.has_short_convs:
            for name in ("q", "k", "v"):
                channels, _, width = local(getattr(self, f"{name}_conv1d").weight).shape
                shapes[f"{name}_window"] = StateShape((width - 1, channels), compute_dtype)
        return shapes

    def mix(self, rows, cu_seqlens, initial_state: LayerState | None, state_positions):
        inputs = dict(zip("qkv", rows))
        arrived = {} if initial_state is None else {name: initial_state[f"{name}_window"] for name in self._convolved()}
        convolved, windows = self._convolve(inputs, cu_seqlens, arrived, state_positions)
        recurrent = None if initial_state is None else initial_state["recurrent"]
        out_THV, states = self.run_delta_rule(*self._heads(*convolved, *rows[3:]), cu_seqlens, recurrent, state_positions)
        return (out_THV,), LayerState({"recurrent": states, **windows})

    def mix_shard(self, rows, cu_seqlens, shard: ContextShard, state_positions):
        inputs = dict(zip("qkv", rows))
        arrived = self._arriving_windows(inputs, shard)
        others = len(cu_seqlens) - 2
        initial = {name: F.pad(window[None], (0, 0, 0, 0, 0, others)) for name, window in arrived.items()}
        inside = [r for r in state_positions if r > 0]
        convolved, windows = self._convolve(inputs, cu_seqlens, initial, tuple(inside))
        order = torch.tensor([0 if r == 0 else 1 + inside.index(r) for r in state_positions], dtype=torch.long)
        order = on_device(order, rows[0].device)
        for name, window in arrived.items():
            windows[f"{name}_window"] = torch.cat([window[None], windows[f"{name}_window"]]).index_select(0, order)
        shape = self.state_shapes(rows[0].dtype)["recurrent"].shape
        heads = self._heads(*convolved, *rows[3:])
        out_THV, states = delta_rule_of_shard(self.run_delta_rule, heads, cu_seqlens, shard, state_positions, shape)
        return (out_THV,), LayerState({"recurrent": states, **windows})

    def _heads(self, q, k, v, beta_TH, log_decay=None) -> tuple[torch.Tensor | None, ...]:
        """The same with the channels of q, k and v in heads."""
        q, k = q.unflatten(-1, (-1, self.head_k_dim)), k.unflatten(-1, (-1, self.head_k_dim))
        return q, k, v.unflatten(-1, (-1, self.head_v_dim)), beta_TH, log_decay

    def as_updates(self, q_THK, k_THK, v_THV, beta_TH, log_decay) -> tuple[torch.Tensor | None, ...]:
        """The delta rule's updates, `updates_per_token` for each token, one after the other; the last one's output is the token's."""
        return q_THK, k_THK, v_THV, beta_TH, log_decay

    def run_delta_rule(self, q_THK, k_THK, v_THV, beta_TH, log_decay, cu_seqlens, initial_state_NHKV, state_positions):
        """The inner operator: outputs `[T, H, V]` and states at the positions. q and k are not normalised yet."""
        q, k, v, beta, log_decay = self.as_updates(q_THK, k_THK, v_THV, beta_TH, log_decay)
        U = self.updates_per_token
        if U > 1:
            cu_seqlens, state_positions = (tuple(U * r for r in positions) for positions in (cu_seqlens, state_positions))
        out, states = delta_rule(
            self.normalise(q),
            self.normalise(k),
            v,
            beta,
            cu_seqlens,
            log_decay=log_decay,
            initial_state_NHKV=initial_state_NHKV,
            state_positions=state_positions,
        )
        return out if U == 1 else out[U - 1 :: U], states

    def step(self, rows, decoding: StateBuffers, clock: DecodingClock) -> tuple[torch.Tensor, ...]:
        inputs = dict(zip("qkv", rows))
        if self.has_short_convs:
            convolved = [
                short_conv_step_(decoding.tensors[f"{name}_window"], x, self._taps(name), silu=self.silu_after_conv[name])
                for name, x in inputs.items()
            ]
        else:
            convolved = self._without_convs(inputs)
        q, k, *others = self.as_updates(*self._heads(*convolved, *rows[3:]))
        updates = [
            None if x is None else x.unflatten(0, (-1, self.updates_per_token)) for x in (self.normalise(q), self.normalise(k), *others)
        ]
        return (delta_rule_step_(decoding.tensors["recurrent"], *updates)[:, -1],)

    def normalise(self, x_THK: torch.Tensor) -> torch.Tensor:
        """Normalises q or k, head by head."""
        return l2_normalise(x_THK)

    def finish(self, mixed: tuple[torch.Tensor, ...], x_TD: torch.Tensor) -> torch.Tensor:
        out_THV = self.o_norm(mixed[0])
        if hasattr(self, "g_proj"):
            gate = GATE_ACTIVATIONS[self.output_gate_activation](self.g_proj(x_TD))
            out_THV = out_THV * gate.unflatten(-1, (-1, self.head_v_dim))
        return self.o_proj(out_THV.flatten(-2))

    def _convolved(self) -> str:
        """The names of the inputs that a short convolution runs over, a letter each."""
        return "qkv" if self.has_short_convs else ""

    def _convolve(self, inputs: dict[str, torch.Tensor], cu_seqlens, initial_windows: dict[str, torch.Tensor], state_positions):
        """Convolved q, k and v, and by name the windows of inputs before the positions."""
        if not self.has_short_convs:
            return self._without_convs(inputs), {}
        outputs, windows = [], {}
        for name, x in inputs.items():
            y, windows[f"{name}_window"] = short_conv(
                x,
                self._taps(name),
                cu_seqlens,
                silu=self.silu_after_conv[name],
                initial_window=initial_windows.get(name),
                window_positions=state_positions,
            )
            outputs.append(y)
        return outputs, windows

    def _without_convs(self, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [F.silu(x) if self.silu_after_conv[name] else x for name, x in inputs.items()]

    def _taps(self, name: str) -> torch.Tensor:
        """The filters of a convolution, `[channels, width]`."""
        return local(getattr(self, f"{name}_conv1d").weight).squeeze(1)

    def _arriving_windows(self, inputs: dict[str, torch.Tensor], shard: ContextShard) -> dict[str, torch.Tensor]:
        """The inputs of the convolutions before the shard's first token, `[width - 1, channels]` each; zeros before its document."""
        if not self.has_short_convs:
            return {}
        reach = self.q_conv1d.weight.shape[-1] - 1
        arrived = rows_before(torch.cat([x[x.shape[0] - reach :] for x in inputs.values()], -1), shard)
        in_document = torch.arange(reach, device=arrived.device) >= reach - shard.seen
        parts = (arrived * in_document[:, None]).split([x.shape[-1] for x in inputs.values()], -1)
        return dict(zip(inputs, parts))


def write_strength(logits_TH: torch.Tensor, allow_neg_eigval: bool) -> torch.Tensor:
    """beta, the strength of a token's write: a sigmoid, doubled where eigenvalues of the transition down to -1 are allowed."""
    beta_TH = logits_TH.sigmoid()
    return beta_TH * 2.0 if allow_neg_eigval else beta_TH
