"""Sizes and options of GatedDeltaNet."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from refine_titan.models.delta_rule.args import GroupedValueArgs, delta_rule_format
from refine_titan.models.hf_format import HFFormat


@dataclass
class GatedDeltaNetArgs(GroupedValueArgs):
    """GatedDeltaNet (arXiv 2412.06464) as flash-linear-attention implements it."""

    n_layers: int = 21
    use_gate: bool = True
    output_gate_activation: Literal["swish", "silu", "sigmoid"] = "swish"

    hf_format: ClassVar[HFFormat] = delta_rule_format(
        model_type="gated_deltanet",
        architecture="GatedDeltaNetForCausalLM",
        keys={
            "n_v_heads": "num_v_heads",
            "use_gate": "use_gate",
            "output_gate_activation": "output_gate_activation",
        },
        tolerated={"use_mamba_gate": (True,)},
        unread=("D",),  # until March 2025
    )

    @property
    def output_norm_eps(self) -> float:
        return self.norm_eps
