"""The paper's comparison at a small scale: one checkpoint, continued by next-token training and by ReFINE over several seeds.

Open `experiment.py` first: it lists the trainings and evaluations of a comparison as stages. `stages.py` runs stages as processes,
`table.py` computes the comparison from their results, `tokenizer.py` makes the tokenizer.
"""
