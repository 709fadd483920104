"""KDA's sequence mixer. Legend: T tokens, D hidden channels."""

import torch
import torch.nn as nn

from refine_titan.models.delta_rule.mixer import DecayGate, DeltaRuleMixer, write_strength
from refine_titan.models.kda.args import KDAArgs


class KDAMixer(DeltaRuleMixer):
    """GatedDeltaNet with a decay per key channel; decay and output gate are low-rank projections."""

    output_gate_activation = "sigmoid"
    tensor_parallel_plan = DeltaRuleMixer.tensor_parallel_plan | {
        "f_proj.0": "whole",
        "f_proj.1": "columns",
        "g_proj": "",
        "g_proj.0": "whole",
        "g_proj.1": "columns",
    }

    high_precision_projections = ("b_proj", "f_proj", "g_proj")

    def __init__(self, args: KDAArgs):
        super().__init__()
        self.args = args
        self.head_k_dim, self.head_v_dim = args.head_dim, args.head_v_dim
        self.q_proj = nn.Linear(args.dim, args.key_dim, bias=False)
        self.k_proj = nn.Linear(args.dim, args.key_dim, bias=False)
        self.v_proj = nn.Linear(args.dim, args.value_dim, bias=False)
        self.f_proj = nn.Sequential(
            nn.Linear(args.dim, self.head_v_dim, bias=False),
            nn.Linear(self.head_v_dim, args.num_value_heads * args.head_dim, bias=False),
        )
        self.b_proj = nn.Linear(args.dim, args.num_value_heads, bias=False)
        max_rate = None if args.safe_gate else 16.0
        self.decay = DecayGate(args.num_value_heads, args.head_dim, args.lower_bound, min_rate=1.0, max_rate=max_rate)
        if args.use_short_conv:
            self.add_short_convs(args.key_dim, args.value_dim, args.conv_size)
        self.g_proj = nn.Sequential(
            nn.Linear(args.dim, self.head_v_dim, bias=False),
            nn.Linear(self.head_v_dim, args.value_dim, bias=True),
        )
        self.o_norm = nn.RMSNorm(self.head_v_dim, eps=args.norm_eps)
        self.o_proj = nn.Linear(args.value_dim, args.dim, bias=False)

    def project(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        beta_TH = write_strength(self.b_proj(x_TD), self.args.allow_neg_eigval)
        log_decay_THK = self.decay(self.f_proj(x_TD))
        return self.q_proj(x_TD), self.k_proj(x_TD), self.v_proj(x_TD), beta_TH, log_decay_THK
