"""ReFINE training of fast-weight language models on torchtitan."""

# torchtitan picks its device when it is imported, so the CPU has to be announced before anything imports it.
from refine_titan.distributed.device import announce_device

announce_device()
