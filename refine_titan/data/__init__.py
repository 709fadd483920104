"""Reads documents (files of text and tables, prepared shards, synthetic) and packs them into batches.

Open dataloader.py first: it makes the batches. sources.py and questions.py read rows, documents.py turns rows into an endless stream of
tokenized documents, whose position can be saved.
"""
