"""A Ray cluster: two nodes on this machine, which know each other by address alone."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from fedge_sim.errors import ConfigError, DataError
from fedge_sim.orchestrator import Orchestrator
from fedge_sim.runtime.ray_grid import RayGrid
from tests.conftest import CLIENT_APP, run, same_models

RAY = Path(sys.executable).parent / "ray"


@pytest.fixture
def head():
    """A cluster of one node, of one core."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_actors_on_both_nodes_and_the_same_bytes(head, small):
    head.add_node(num_cpus=1)
    settings = small(f"runtime.ray_address={head.address}", "hierarchy.global_rounds=1")
    with RayGrid(CLIENT_APP, settings) as grid:
        grid.prepare()
        assert len({worker.introduction.node_id for worker in grid.crew.workers}) == 2
        last = Orchestrator(settings, grid, []).run().last
    assert same_models(last, run(small("hierarchy.global_rounds=1")).last)


@pytest.fixture
def far_node(head, tmp_path):
    """Add a node that does not see what lies in the folder ``here``; as on another machine.

    What appears in the folder ``there`` it has in its own ``here``.
    """
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    start = f"{RAY} start --address={head.address} --num-cpus=1 --block"
    hide = f"mount -t tmpfs tmpfs {tmp_path / 'here'}"
    copy = f"while sleep 0.2; do cp {tmp_path / 'there'}/* {tmp_path / 'here'} 2>&-; done &"
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("a process may not have file systems of its own here: not root, or not Linux")
    node = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", f"{hide} && {{ {copy} {start}; }}"],
        start_new_session=True,
    )
    try:
        ray.init(address=head.address, logging_level="ERROR")
        deadline = time.monotonic() + 300
        while len(ray.nodes()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ray.shutdown()
        yield tmp_path / "here"
    finally:
        os.killpg(node.pid, signal.SIGTERM)
        node.wait(120)


def test_data_that_is_not_on_the_other_node_or_not_the_same(head, far_node, small):
    rng = np.random.default_rng(0)
    arrays = {"X": rng.normal(size=(90, 2, 20)), "y": rng.integers(3, size=90)}
    np.savez(far_node / "mine.npz", **arrays, user=np.arange(90) // 10)
    settings = small(
        f"runtime.ray_address={head.address}",
        "app.config.dataset=arrays",
        f"app.config.data-root={far_node / 'mine.npz'}",
        "app.config.num-classes=0",
    )
    with pytest.raises(DataError) as caught, RayGrid(CLIENT_APP, settings) as grid:
        grid.prepare()
    assert str(far_node / "mine.npz") in str(caught.value)
    assert "trainer-" in str(caught.value)
    assert ray.util.get_node_ip_address() in str(caught.value)

    arrays["X"] += 1.0
    np.savez(far_node.parent / "there" / "mine.npz", **arrays, user=np.arange(90) // 10)
    time.sleep(2)
    with (
        pytest.raises(DataError, match=r"the data on .* are other than those on"),
        RayGrid(CLIENT_APP, settings) as grid,
    ):
        grid.prepare()


def test_an_address_where_nobody_answers(small):
    for address, problem in {
        "127.0.0.1:1": "no Ray cluster answers there",
        "nowhere": 'must be "auto" or HOST:PORT',
    }.items():
        with pytest.raises(ConfigError, match=f'ray_address = "{address}": {problem}'):
            RayGrid(CLIENT_APP, small(f"runtime.ray_address={address}"))
