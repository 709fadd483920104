"""Parameter names of flash-linear-attention's KDA."""

from refine_titan.models.state_dict_adapter import DecoderStateDictAdapter


class KDAStateDictAdapter(DecoderStateDictAdapter):
    renames = (("decay.A_log", "A_log"), ("decay.dt_bias", "dt_bias"))
