"""Checkpoints between Hugging Face's folders and torch's DCP, one tensor in memory at a time."""
