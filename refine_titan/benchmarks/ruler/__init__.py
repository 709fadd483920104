"""RULER's synthetic tasks (arXiv 2404.06654), generated offline at any length.

The task definitions follow RULER; word lists, the stand-in for its essays and the code are this project's own.
"""
