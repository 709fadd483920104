"""Numbers of bytes in words."""

GIB = 2**30


def readable_size(num_bytes: int) -> str:
    """The number in GiB, or in MiB where it is small."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.2f} MiB"
