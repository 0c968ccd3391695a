"""Actors on GPUs that Ray takes for real: it hands out their shares as it would."""

from collections import Counter

import pytest
import ray

from fedge_sim.orchestrator import Orchestrator
from fedge_sim.runtime.ray_grid import RayGrid
from tests.conftest import CLIENT_APP, ray_grid, run, same_models


@pytest.fixture(scope="module", autouse=True)
def _ray(start_ray):
    with start_ray(num_cpus=8, num_gpus=2):
        yield


def names(grid: RayGrid) -> list[str]:
    return [worker.name for worker in grid.crew.workers]


def free_gpus() -> float:
    return ray.available_resources().get("GPU", 0.0)


def test_fractions_are_placed_as_asked_and_named(small):
    with ray_grid(small("runtime.num_gpus_per_actor=0.25"), prepare=False) as grid:
        assert len(names(grid)) == 8
        devices = Counter(name.split(" ", 1)[1] for name in names(grid))
        assert devices == {"cuda:0 0.25": 4, "cuda:1 0.25": 4}
        assert free_gpus() == 0.0


@pytest.mark.parametrize(
    ("profile", "actors", "share"),
    [("conservative", 4, "0.5"), ("high", 2, "0.9"), ("aggressive", 2, "0.95")],
)
def test_a_profile_says_how_large_a_share_is(small, profile, actors, share):
    with ray_grid(small(f"runtime.gpu_profile={profile}"), prepare=False) as grid:
        assert Counter(names(grid)) == Counter(
            f"trainer-{i} cuda:{n.split(':')[1][0]} {share}" for i, n in enumerate(names(grid))
        )
        assert Counter(name.split()[1] for name in names(grid)) == {
            "cuda:0": actors // 2,
            "cuda:1": actors // 2,
        }


def test_few_actors_are_spread_over_the_gpus_all_the_same(small):
    """Ray alone would put both on the first GPU."""
    small_share = small("runtime.num_workers=2", "runtime.num_gpus_per_actor=0.25")
    with ray_grid(small_share, prepare=False) as grid:
        assert {name.split(" ", 1)[1] for name in names(grid)} == {"cuda:0 0.25", "cuda:1 0.25"}


def test_an_odd_number_of_actors_on_two_gpus(small):
    settings = small("runtime.num_workers=5", "runtime.num_gpus_per_actor=0.25")
    with ray_grid(settings, prepare=False) as grid:
        assert Counter(name.split()[1] for name in names(grid)) == {"cuda:0": 3, "cuda:1": 2}


def test_gpus_are_given_back(small):
    for _ in range(2):  # the second would wait for ever
        with RayGrid(CLIENT_APP, small("runtime.num_workers=2", "runtime.node_timeout_s=60")):
            pass


def test_a_gpu_that_nobody_uses_is_warned_of(small, caplog):
    with ray_grid(small("runtime.num_gpus_per_actor=0.0"), prepare=False) as grid:
        assert names(grid)[0] == "trainer-0 cpu 1"
    assert "2 GPUs are there and none is used" in caplog.text


@pytest.mark.parametrize(("profile", "streams"), [("conservative", 1), ("aggressive", 4)])
def test_a_run_with_shares_of_gpus_that_torch_cannot_use(small, caplog, profile, streams):
    settings = small("hierarchy.global_rounds=1", f"runtime.gpu_profile={profile}")
    with ray_grid(settings) as grid:
        assert (grid.crew.plan.streams, grid.crew.plan.threads) == (streams, streams)
        last = Orchestrator(grid.settings, grid, []).run().last
    assert "torch sees none: clients train on the CPU" in caplog.text
    assert same_models(last, run(small("hierarchy.global_rounds=1")).last)


def test_without_memory_there_are_fewer_streams_then_fewer_actors(small, caplog):
    with ray_grid(small("runtime.gpu_profile=aggressive"), prepare=False) as grid:
        sizes = []
        while grid.crew.relieve(grid.crew.workers[0]):
            sizes.append((grid.crew.plan.streams, len(grid.crew.workers)))
    assert sizes == [(2, 2), (1, 2), (1, 1)]
    assert "next time set runtime.streams = 2" in caplog.text
