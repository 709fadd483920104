"""Files on disks that fail, in places that vanish, and from strangers: whole or not there, within limits, line by line."""
