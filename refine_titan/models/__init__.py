"""The model zoo: one folder per family, each with `ARGS`, `FLAVORS` and `STATE_DICT_ADAPTER`."""

from refine_titan.models import delta_net

FAMILIES = {"delta_net": delta_net}
