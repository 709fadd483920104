"""Operators of fast-weight models: for each a plain-torch reference, a GPU path, and a dispatch between them."""
