"""Files on disks that fail: whole or not there, appended to without half a line, and errors that name the file."""
