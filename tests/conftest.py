"""Shared by all tests: settings, the real data, datasets that are opened or refused, a run."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import ray
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from fedge_sim.client_app import app as client_app
from fedge_sim.config import Settings, load_settings
from fedge_sim.data import load_dataset
from fedge_sim.data.base import Dataset
from fedge_sim.errors import DataError
from fedge_sim.orchestrator import Orchestrator, Result
from fedge_sim.reporting.base import Callback, RoundRecord
from fedge_sim.reporting.tables import TableWriter
from fedge_sim.reporting.timeline import TimelineWriter
from fedge_sim.reporting.weights import WeightWriter
from fedge_sim.runtime.backend import CLIENT_APP
from fedge_sim.runtime.in_process import InProcessGrid
from fedge_sim.runtime.ray_grid import RayGrid

# No deadline and no complaint of slowness: a busy machine is no fault of the code.
hypothesis_settings.register_profile(
    "project", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
hypothesis_settings.load_profile("project")

# Files of tests that start Flower, Ray, compilers or many commands, or train for long: longest
# first, so that the last one to end is short. ``make test-fast`` leaves them out.
SLOW = (
    *("flower", "deployment", "methods", "device_run", "ray_failures", "ray_command", "science"),
    *("ray", "ray_cluster", "ray_gpu", "state", "compiled", "paths", "hhar", "jobs", "compare"),
    *("golden", "damage", "scaffold", "hierarchy", "comparison", "pfedme", "results", "store"),
    *("bench", "replies", "rounds", "hhar_scripts", "readme", "earlier"),
)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

# Of the real data, below ``shared``.
UCI_NPZ = "data/uci_har/uci_har_21_subjects.npz"
CIFAR_NPZ = "data/cifar10_jpeg/cifar10_test.npz"

# What a person's own .npz file may hold at the least.
OWN = {"X": np.arange(48.0).reshape(6, 2, 4) - 20, "y": np.array([0, 1, 1, 0, 1, 0])}

# A tenth of the default's work: short windows of slow sensors, one epoch. The way to train is the
# one that gives the same bytes however clients are dealt out.
SMALL = (
    "runtime.training=reference",
    "app.config.sample-rate-hz=20",
    "app.config.window-stride-seconds=4.0",
    "hierarchy.local_epochs=1",
    "hierarchy.global_rounds=2",
)

# TOML 1.1: an inline table over several lines, with a comment and a trailing comma.
OVER_SEVERAL_LINES = """
[tool.flwr.devices]
enable = true
device_speed = {
    distribution = "normal",  # of a job
    mean = [1.0, 1.3, 1.6],
    std = 0.2,
}
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow files' tests, and put them first."""
    place = {f"test_{name}": number for number, name in enumerate(SLOW)}
    for item in items:
        if item.path.stem in place:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))  # stable


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory) -> Iterator[None]:
    """Keep the stores of this session apart from the user's, also in processes it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data; absent only where the project stands alone."""
    if not SHARED.exists():
        pytest.skip("no ../shared folder beside the project: the real data is not here")
    return SHARED


@pytest.fixture
def small(tmp_path: Path):
    """Return a function from overrides to settings of a run of a few seconds."""

    def settings(*assignments: str) -> Settings:
        output = f"app.config.output-dir={tmp_path / 'results'}"
        has_data = any(text.startswith("app.config.dataset=") for text in assignments)
        shorter = [text for text in SMALL if not (has_data and text.startswith("app.config."))]
        return load_settings(assignments=[*shorter, output, *assignments])

    return settings


def run(
    settings: Settings, callbacks: Sequence[Callback] | None = None, workers: int = 2
) -> Result:
    """Run in this process, with the standard result files."""
    if callbacks is None:
        callbacks = [TableWriter(), WeightWriter(), TimelineWriter()]
    with InProcessGrid(client_app, workers) as grid:
        return Orchestrator(settings, grid, callbacks).run()


@pytest.fixture(scope="session")
def start_ray():
    """Return a context manager that starts Ray with what a machine is to seem to have."""

    @contextmanager
    def session(**resources):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init("local", include_dashboard=False, logging_level=logging.ERROR, **resources)
        try:
            yield
        finally:
            ray.shutdown()

    return session


@contextmanager
def ray_grid(settings: Settings, app: str = CLIENT_APP, prepare: bool = True, **tell):
    """Open a grid on the actors of the Ray that has been started."""
    with RayGrid(app, settings, **tell) as grid:
        if prepare:
            grid.prepare()
        yield grid


def run_on_ray(
    settings: Settings, callbacks: Sequence[Callback] = (), app: str = CLIENT_APP
) -> Result:
    """Run on the actors of the Ray that has been started."""
    with ray_grid(settings, app) as grid:
        return Orchestrator(grid.settings, grid, callbacks).run()


def same_models(a: RoundRecord, b: RoundRecord) -> bool:
    """Whether two runs ended with the same models, byte for byte."""

    def models(record: RoundRecord):
        all_models = (record.cloud.global_model, *record.cloud.cluster_models)
        return [{name: array.tobytes() for name, array in m.items()} for m in all_models]

    return models(a) == models(b)


class Keep(Callback):
    """Keeps the record of every round."""

    def __init__(self) -> None:
        self.records = []

    def on_round_end(self, record) -> None:
        self.records.append(record)


def command_line(*args: str) -> list[str]:
    """Return the command that a user types, for subprocess."""
    return [sys.executable, "-m", "fedge_sim.orchestrator", *args]


def clean_environment(**more: str) -> dict[str, str]:
    """Return this environment without SEED."""
    return {**{k: v for k, v in os.environ.items() if k != "SEED"}, **more}


def data_config(dataset, root="nowhere", *more):
    """Return the settings of a dataset whose classes are as many as there are."""
    pairs = [f"app.config.dataset={dataset}"]
    if dataset not in ("hhar-synthetic", "digits"):  # which read no files
        pairs.append(f"app.config.data-root={root}")
    return load_settings(assignments=[*pairs, "app.config.num-classes=0", *more]).data


def opened(dataset, root="nowhere", *more) -> Dataset:
    return load_dataset(data_config(dataset, root, *more))


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Return a function that gives the one line with which a source is refused."""
    cache = tmp_path / "own cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))

    def message(dataset, root, names=None, error=DataError, more=()):
        with pytest.raises(error) as caught:
            opened(dataset, root, *more)
        line = str(caught.value)
        assert "\n" not in line
        assert str(names or root) in line
        left = [p for p in (cache / "fedge-sim").glob("*") if p.suffix != ".lock"]
        assert left == []
        return line

    return message


@pytest.fixture
def saved(tmp_path):
    """Return a function from arrays to an .npz file of them."""

    def save(arrays, name="my data") -> Path:
        file = tmp_path / f"{name}.npz"
        np.savez(file, **arrays)
        return file

    return save
