"""Distributes a model over ranks (tensor parallelism, FSDP2 / HSDP, compile, float8), and starts, stops and reports ranks.

Open parallelize.py first: it applies everything to a model, in order. device.py makes torchtitan run on a CPU. failures.py,
launched_rank.py and stop_request.py belong to launch.py.
"""
