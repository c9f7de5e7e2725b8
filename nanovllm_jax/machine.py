"""This machine's memory."""

import os

GIB = 1 << 30


def host_memory() -> int:
    """Bytes in all."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
