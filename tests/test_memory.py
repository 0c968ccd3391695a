"""Giving memory back to the system, and what the garbage collector need not look at."""

import gc
import platform
import re
import weakref

import numpy as np
import psutil
import pytest

from fedge_sim import orchestrator
from fedge_sim.memory import frozen, trim
from fedge_sim.reporting.base import Callback
from tests.conftest import ROOT


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_freed_memory_between_what_is_used_goes_back():
    arrays = [np.ones(12_000) for _ in range(2_000)]  # 183 MiB, each too small for pages of its own
    arrays = arrays[::100]
    kept = psutil.Process().memory_info().rss
    trim()
    assert kept - psutil.Process().memory_info().rss > 100 * 2**20
    assert all(array.sum() == 12_000 for array in arrays)


class Loop:
    """Garbage that only the collector finds."""

    def __init__(self):
        self.me = self


@pytest.fixture
def lost():
    """A reference to garbage, and no collection but where one is asked for."""
    gc.collect()
    gc.disable()
    yield weakref.ref(Loop())
    gc.enable()


def test_what_is_frozen_is_no_garbage_and_is_let_go_at_the_end(lost):
    assert lost() is not None
    with frozen():
        assert lost() is None
        assert gc.get_freeze_count() > 10_000
    assert gc.get_freeze_count() == 0
    with pytest.raises(ValueError, match="ends all the same"), frozen():
        raise ValueError("ends all the same")
    assert gc.get_freeze_count() == 0


class Watch(Callback):
    """Looks at the collector at each round's end."""

    def __init__(self, lost):
        self.lost, self.seen = lost, []

    def on_round_end(self, record):
        self.seen.append((gc.get_freeze_count() > 10_000, self.lost() is None))


def test_a_run_freezes_once_and_a_leaf_strategy_leaves_it_so(small, lost):
    watch = Watch(lost)
    conducted = small("hierarchy.leaf_strategy=QFedAvg", "runtime.backend=inprocess")
    orchestrator.run(conducted, [watch])
    assert watch.seen == [(True, True)] * 2
    assert gc.get_freeze_count() == 0


def test_nobody_else_freezes():
    files = (ROOT / "fedge_sim").rglob("*.py")
    assert [f.name for f in files if re.search(r"gc\.(un)?freeze", f.read_text())] == ["memory.py"]
