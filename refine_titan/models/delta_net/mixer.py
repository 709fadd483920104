"""DeltaNet's sequence mixer. Legend: T tokens, D hidden channels, H heads, K key channels of a head."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from refine_titan.models.delta_net.args import DeltaNetArgs
from refine_titan.models.delta_rule.mixer import DeltaRuleMixer, write_strength


class DeltaNetMixer(DeltaRuleMixer):
    """The delta rule with q, k and v from projections and short convolutions, beta from a projection, and a norm per head."""

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
            self.add_short_convs(args.key_dim, args.value_dim, args.conv_size)
        qk_silu = args.qk_activation == "silu"
        self.silu_after_conv = {"q": qk_silu, "k": qk_silu, "v": True}
        if args.use_gate:
            self.g_proj = nn.Linear(args.dim, args.value_dim, bias=False)
        self.o_norm = nn.RMSNorm(self.head_v_dim, eps=args.norm_eps)
        self.o_proj = nn.Linear(args.value_dim, args.dim, bias=False)

    def project(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q = self.q_proj(x_TD)
        if self.args.use_beta:
            beta_TH = write_strength(self.b_proj(x_TD), self.args.allow_neg_eigval)
        else:
            beta_TH = q.new_full((q.shape[0], q.shape[1] // self.head_k_dim), 2.0 if self.args.allow_neg_eigval else 1.0)
        return q, self.k_proj(x_TD), self.v_proj(x_TD), beta_TH

    def normalise(self, x_THK: torch.Tensor) -> torch.Tensor:
        activation = self.args.qk_activation
        if activation == "relu":
            x_THK = x_THK.relu()
        elif activation == "elu":
            x_THK = F.elu(x_THK) + 1.0
        if self.args.qk_norm == "sum":
            return F.normalize(x_THK, p=1.0, dim=-1, eps=1e-6)
        return super().normalise(x_THK)
