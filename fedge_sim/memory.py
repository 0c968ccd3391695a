"""The host's memory."""

import ctypes
import sys


def trim() -> None:
    """Give memory back to the system that was freed and is kept for later, where glibc can."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
