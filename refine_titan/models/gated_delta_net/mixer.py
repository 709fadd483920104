"""GatedDeltaNet's sequence mixer. Legend: T tokens, D hidden channels."""

import torch
import torch.nn as nn

from refine_titan.models.delta_rule.mixer import DecayGate, DeltaRuleMixer, write_strength
from refine_titan.models.gated_delta_net.args import GatedDeltaNetArgs


class GatedDeltaNetMixer(DeltaRuleMixer):
    """DeltaNet with a decay per head and step, grouped value heads and an output gate."""

    def __init__(self, args: GatedDeltaNetArgs):
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
        self.o_norm = nn.RMSNorm(self.head_v_dim, eps=args.norm_eps)
        self.o_proj = nn.Linear(args.value_dim, args.dim, bias=False)

    def project(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        beta_TH = write_strength(self.b_proj(x_TD), self.args.allow_neg_eigval)
        log_decay_TH = self.decay(self.a_proj(x_TD))
        return self.q_proj(x_TD), self.k_proj(x_TD), self.v_proj(x_TD), beta_TH, log_decay_TH
