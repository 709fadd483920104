"""Generates RULER's synthetic tasks (arXiv 2404.06654) offline and at any length; `generate.py` is the file to open first.

The task definitions follow RULER. The word lists, the substitute for its essays and the code are this project's own.
"""
