"""Giving memory back to the system."""

import platform

import numpy as np
import psutil
import pytest

from fedge_sim.memory import trim


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_freed_memory_between_what_is_used_goes_back():
    arrays = [np.ones(12_000) for _ in range(2_000)]  # 183 MiB, each too small for pages of its own
    arrays = arrays[::100]
    kept = psutil.Process().memory_info().rss
    trim()
    assert kept - psutil.Process().memory_info().rss > 100 * 2**20
    assert all(array.sum() == 12_000 for array in arrays)
