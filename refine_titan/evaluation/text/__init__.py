"""Measures a checkpoint on held-out documents by what next-sequence prediction trains: the loss far into a document, and the text that the
model writes in place of what follows.

Open `job.py` first. `sequences.py` draws the documents, `recall.py` finds the tokens that only a memory helps to predict, `reading.py`
reads the sequences and continues them, `sums.py` makes measures of what was counted.
"""
