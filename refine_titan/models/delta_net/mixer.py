"""DeltaNet's sequence mixer. Legend: T rows, D hidden channels, H heads, K key and V value channels of a head."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from refine_kernels.delta_rule import delta_rule
from refine_kernels.short_conv import short_conv
from refine_titan.models.decoder import initialize
from refine_titan.models.delta_net.args import DeltaNetArgs
from refine_titan.models.shared_prefix import LayerState, SharedPrefixMixer


class ShortConv(nn.Module):
    """Weights of one causal depthwise convolution, shaped as in flash-linear-attention: `[channels, 1, width]`."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))

    def reset_mixer_parameters(self) -> None:
        bound = self.weight.shape[-1] ** -0.5
        initialize(self.weight, lambda weight: nn.init.uniform_(weight, -bound, bound))


class DeltaNetMixer(SharedPrefixMixer):
    """q, k, v by projection and short convolution, beta by projection, the delta rule, a norm per head, a projection."""

    def __init__(self, args: DeltaNetArgs):
        super().__init__()
        self.args = args
        self.head_k_dim = args.key_dim // args.n_heads
        self.head_v_dim = args.value_dim // args.n_heads
        self.q_proj = nn.Linear(args.dim, args.key_dim, bias=False)
        self.k_proj = nn.Linear(args.dim, args.key_dim, bias=False)
        self.v_proj = nn.Linear(args.dim, args.value_dim, bias=False)
        if args.use_beta:
            self.b_proj = nn.Linear(args.dim, args.n_heads, bias=False)
        if args.use_short_conv:
            self.q_conv1d = ShortConv(args.key_dim, args.conv_size)
            self.k_conv1d = ShortConv(args.key_dim, args.conv_size)
            self.v_conv1d = ShortConv(args.value_dim, args.conv_size)
        if args.use_gate:
            self.g_proj = nn.Linear(args.dim, args.value_dim, bias=False)
        self.o_norm = nn.RMSNorm(self.head_v_dim, eps=args.norm_eps)
        self.o_proj = nn.Linear(args.value_dim, args.dim, bias=False)

    def project(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.args.use_beta:
            beta_TH = self.b_proj(x_TD).sigmoid()
        else:
            beta_TH = x_TD.new_ones(x_TD.shape[0], self.args.n_heads)
        if self.args.allow_neg_eigval:
            beta_TH = beta_TH * 2.0
        return self.q_proj(x_TD), self.k_proj(x_TD), self.v_proj(x_TD), beta_TH

    def mix(self, rows, cu_seqlens, initial_state: LayerState | None, state_positions):
        q, k, v, beta_TH = rows
        windows = {}
        if self.args.use_short_conv:
            qk_silu = self.args.qk_activation == "silu"
            convolved = []
            for name, x, silu in (("q", q, qk_silu), ("k", k, qk_silu), ("v", v, True)):
                y, windows[f"{name}_window"] = short_conv(
                    x,
                    getattr(self, f"{name}_conv1d").weight[:, 0],
                    cu_seqlens,
                    silu=silu,
                    initial_window=None if initial_state is None else initial_state[f"{name}_window"],
                    window_positions=state_positions,
                )
                convolved.append(y)
            q, k, v = convolved
        else:
            v = F.silu(v)
            if self.args.qk_activation == "silu":
                q, k = F.silu(q), F.silu(k)
        q_THK, k_THK = (self._normalise(x.unflatten(-1, (-1, self.head_k_dim))) for x in (q, k))
        out_THV, recurrent = delta_rule(
            q_THK,
            k_THK,
            v.unflatten(-1, (-1, self.head_v_dim)),
            beta_TH,
            cu_seqlens,
            initial_state_NHKV=None if initial_state is None else initial_state["recurrent"],
            state_positions=state_positions,
        )
        return out_THV, LayerState({"recurrent": recurrent, **windows})

    def finish(self, mixed: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
        out_THV = self.o_norm(mixed)
        if self.args.use_gate:
            out_THV = out_THV * F.silu(self.g_proj(x_TD)).unflatten(-1, (-1, self.head_v_dim))
        return self.o_proj(out_THV.flatten(-2))

    def _normalise(self, x_THK: torch.Tensor) -> torch.Tensor:
        activation = self.args.qk_activation
        if activation == "relu":
            x_THK = x_THK.relu()
        elif activation == "elu":
            x_THK = F.elu(x_THK) + 1.0
        if self.args.qk_norm == "sum":
            return F.normalize(x_THK, p=1.0, dim=-1, eps=1e-6)
        # In at least float32, the epsilon inside the root, rounded once: as flash-linear-attention's l2norm.
        wide = x_THK.to(torch.promote_types(x_THK.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x_THK.dtype)
