"""Parameter names of LaCT's published code."""

from refine_titan.models.state_dict_adapter import DecoderStateDictAdapter


class LaCTStateDictAdapter(DecoderStateDictAdapter):
    renames = (("fast_weights.w0", "w0"), ("fast_weights.w1", "w1"), ("fast_weights.w2", "w2"))
    fused = (("qkv", ("q_proj", "k_proj", "v_proj")),)
