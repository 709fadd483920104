"""Estimates what a run needs, without running it: the memory of a rank, and the operations and bytes of a step.

Open memory.py first. It adds up what a rank holds and what rehearsal.py counts: one microbatch on tensors without data, on virtual
ranks. operations.py counts operations and memory traffic in the same way.
"""
