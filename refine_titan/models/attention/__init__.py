"""Softmax attention as the mixer of some layers of a family: hybrids keep most of their layers' memory in fast weights."""
