"""Numbers of bytes in readable units."""

GIB = 2**30


def readable_size(num_bytes: int) -> str:
    """Returns the number in GiB, or in MiB if it is small."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.2f} MiB"
