"""Reads files that may be damaged, or that somebody else wrote: within limits, line by line, and no further than their own folder."""
