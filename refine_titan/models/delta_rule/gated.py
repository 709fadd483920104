"""The gated delta rule with grouped value heads: the mixer of GatedDeltaNet, Qwen3.5 and OLMo-Hybrid.

Legend: T tokens, D hidden channels.
"""

from typing import Protocol

import torch
import torch.nn as nn

from refine_titan.models.delta_rule.mixer import DecayGate, DeltaRuleMixer, write_strength


class GatedDeltaRuleArgs(Protocol):
    """What the mixer is built from: heads of `head_dim` key channels and `head_v_dim` value channels, all key heads' channels and all
    value heads', and options."""

    dim: int
    head_dim: int
    head_v_dim: int
    key_dim: int
    value_dim: int
    num_value_heads: int
    conv_size: int
    use_short_conv: bool
    use_gate: bool
    output_gate_activation: str
    allow_neg_eigval: bool
    output_norm_eps: float


class GatedDeltaRuleMixer(DeltaRuleMixer):
    """DeltaNet with a decay per head and step, grouped value heads and an output gate."""

    def __init__(self, args: GatedDeltaRuleArgs):
        super().__init__()
        self.args = args
        self.head_k_dim, self.head_v_dim = args.head_dim, args.head_v_dim
        self.output_gate_activation = args.output_gate_activation
        self.q_proj = nn.Linear(args.dim, args.key_dim, bias=False)
        self.k_proj = nn.Linear(args.dim, args.key_dim, bias=False)
        self.v_proj = nn.Linear(args.dim, args.value_dim, bias=False)
        self.a_proj = nn.Linear(args.dim, args.num_value_heads, bias=False)
        self.b_proj = nn.Linear(args.dim, args.num_value_heads, bias=False)
        self.decay = DecayGate(args.num_value_heads)
        if args.use_short_conv:
            self.add_short_convs(args.key_dim, args.value_dim, args.conv_size)
        if args.use_gate:
            self.g_proj = nn.Linear(args.dim, args.value_dim, bias=False)
        self.o_norm = nn.RMSNorm(self.head_v_dim, eps=args.output_norm_eps)
        self.o_proj = nn.Linear(args.value_dim, args.dim, bias=False)

    def project(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        beta_TH = write_strength(self.b_proj(x_TD), self.args.allow_neg_eigval)
        log_decay_TH = self.decay(self.a_proj(x_TD))
        return self.q_proj(x_TD), self.k_proj(x_TD), self.v_proj(x_TD), beta_TH, log_decay_TH
