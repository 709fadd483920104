"""Turns parquet, jsonl and text files into tokenized, filtered shards that training reads.

Open run.py first: it is the whole procedure, top to bottom (inventory, units, layout, shards, manifest). settings.py lists what a user
can choose.
"""
