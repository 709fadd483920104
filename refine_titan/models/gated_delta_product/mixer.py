"""GatedDeltaProduct's sequence mixer. Legend: T tokens, D hidden channels, H heads, K key channels of a head, U updates of a token."""

import torch
import torch.nn as nn

from refine_titan.models.delta_rule.mixer import DecayGate, DeltaRuleMixer, write_strength
from refine_titan.models.gated_delta_product.args import GatedDeltaProductArgs


class GatedDeltaProductMixer(DeltaRuleMixer):
    """GatedDeltaNet with several delta-rule updates a token: its transition is a product of Householder-like factors."""

    tensor_parallel_plan = {}  # a checkpoint's projection holds all heads of one update, then all heads of the next

    def __init__(self, args: GatedDeltaProductArgs):
        super().__init__()
        self.args = args
        self.head_k_dim, self.head_v_dim = args.head_dim, args.head_v_dim
        self.updates_per_token = updates = args.num_householder
        self.q_proj = nn.Linear(args.dim, args.key_dim, bias=False)
        self.k_proj = nn.Linear(args.dim, args.key_dim * updates, bias=False)
        self.v_proj = nn.Linear(args.dim, args.value_dim * updates, bias=False)
        self.b_proj = nn.Linear(args.dim, args.n_heads * updates, bias=False)
        if args.use_forget_gate:
            self.a_proj = nn.Linear(args.dim, args.n_heads, bias=False)
            self.decay = DecayGate(args.n_heads)
        if args.use_short_conv:
            self.add_short_convs(args.key_dim * updates, args.value_dim * updates, args.conv_size, args.key_dim)
        if args.use_output_gate:
            self.g_proj = nn.Linear(args.dim, args.value_dim, bias=False)
        self.o_norm = nn.RMSNorm(self.head_v_dim, eps=args.norm_eps)
        self.o_proj = nn.Linear(args.value_dim, args.dim, bias=False)

    def project(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        beta = write_strength(self.b_proj(x_TD), self.args.allow_neg_eigval)
        rows = self.q_proj(x_TD), self.k_proj(x_TD), self.v_proj(x_TD), beta
        return (*rows, self.decay(self.a_proj(x_TD))) if self.args.use_forget_gate else rows

    def as_updates(self, q_THK, k_THK, v_THV, beta_TH, log_decay):
        """U updates a token: the first decays the state, each of them writes, the last is queried."""
        U, H = self.args.num_householder, self.args.n_heads

        def in_order(x: torch.Tensor) -> torch.Tensor:
            """The updates of `[T, U * H, ...]` one after the other, `[T * U, H, ...]`."""
            return x.unflatten(1, (U, H)).flatten(0, 1)

        def at_update(x: torch.Tensor, update: int) -> torch.Tensor:
            """`[T, H, ...]` at one update of every token and zeros at the others, `[T * U, H, ...]`."""
            rows = x.new_zeros(x.shape[0], U, *x.shape[1:])
            return torch.cat([rows[:, :update], x[:, None], rows[:, update + 1 :]], 1).flatten(0, 1)

        decay = None if log_decay is None else at_update(log_decay, 0)
        return at_update(q_THK, U - 1), in_order(k_THK), in_order(v_THV), in_order(beta_TH), decay
