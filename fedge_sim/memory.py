"""The host's memory."""

import ctypes
import sys


def trim() -> None:
    """Give memory back to the system that was freed and is kept for later, where glibc can."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
