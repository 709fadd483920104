"""Sizes and options of GatedDeltaProduct."""

from dataclasses import dataclass
from typing import ClassVar

from refine_titan.models.delta_rule.args import DeltaRuleArgs, delta_rule_format
from refine_titan.models.hf_format import HFFormat


@dataclass
class GatedDeltaProductArgs(DeltaRuleArgs):
    """GatedDeltaProduct (arXiv 2502.10297) as flash-linear-attention implements it."""

    n_layers: int = 21
    use_output_gate: bool = True
    use_forget_gate: bool = False
    num_householder: int = 1
    """Updates of the state per token."""

    hf_format: ClassVar[HFFormat] = delta_rule_format(
        model_type="gated_deltaproduct",
        architecture="GatedDeltaProductForCausalLM",
        keys={
            "use_output_gate": "use_output_gate",
            "use_forget_gate": "use_forget_gate",
            "num_householder": "num_householder",
        },
        tolerated={"num_v_heads": (None,)},
        earlier_keys={"use_gate": "use_output_gate"},
    )

    def mixer_flops_per_token(self) -> int:
        # One decay and query, and a read and a write per update.
        return (3 + 4 * self.num_householder) * self.head_dim * self.value_dim

    def tensor_parallel_sizes(self) -> dict[str, int]:
        return {}
