"""Converts checkpoints between Hugging Face folders and torch's DCP.

from_hf.py and to_hf.py are the two directions; open them first. inspection.py says what a checkpoint holds. DCP's metadata, which is
a pickle, is read only by dcp_metadata.py.
"""
