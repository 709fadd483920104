"""Sizes and options of KDA."""

from dataclasses import dataclass, field
from typing import ClassVar

from refine_titan.models.delta_rule.args import GroupedValueArgs, delta_rule_format
from refine_titan.models.hf_format import HFFormat


@dataclass
class KDAArgs(GroupedValueArgs):
    """Kimi Delta Attention (arXiv 2510.26692) as flash-linear-attention implements it."""

    n_heads: int = 16
    head_dim: int = 128
    expand_v: float = 1.0
    safe_gate: bool = False
    """Whether log decays are known to lie in `lower_bound`..0; needs a `lower_bound` of at least -5."""
    lower_bound: float | None = field(default=None, metadata={"may_be_negative": True})
    """Smallest log decay of a token; None for no bound."""

    hf_format: ClassVar[HFFormat] = delta_rule_format(
        model_type="kda",
        architecture="KDAForCausalLM",
        keys={"n_v_heads": "num_v_heads", "safe_gate": "safe_gate", "lower_bound": "lower_bound"},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.lower_bound is not None and not self.lower_bound < 0:
            raise ValueError(f"lower_bound is {self.lower_bound}; allowed: below 0, or None")
        if self.safe_gate and (self.lower_bound is None or self.lower_bound < -5):
            raise ValueError(f"safe_gate needs a lower_bound from -5 to below 0, got {self.lower_bound}")
