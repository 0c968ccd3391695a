"""The host's memory."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def trim() -> None:
    """Give memory back to the system that was freed and is kept for later, where glibc can."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def freeze() -> None:
    """Keep all objects that are there now out of the collector's passes; garbage goes first."""
    gc.collect()
    gc.freeze()


@contextmanager
def frozen() -> Iterator[None]:
    """Freeze what is there now until the end; the collector knows no parts, so do not nest it."""
    freeze()
    try:
        yield
    finally:
        gc.unfreeze()
