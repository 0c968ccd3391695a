"""Which way to train is chosen, from what was measured and what the settings fix."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedge_sim.client import choose
from fedge_sim.config import Runtime
from fedge_sim.data import federated_data
from fedge_sim.data.base import Examples, Standardisation
from fedge_sim.models import build_model
from fedge_sim.randomness import stream
from fedge_sim.training import choice
from fedge_sim.training.base import ClientTask, ClientUpdate, TrainSettings, model_arrays
from fedge_sim.training.choice import (
    COHORTS,
    COMPILE_SAVES,
    COMPILE_SECONDS,
    Measured,
    decide,
    measure,
)

AUTO = 'runtime.training="auto"'
SLOW_COHORT = Measured(single=5.0, cohorts={8: 9.0, 32: 8.0})
FAST_COHORT = Measured(single=5.0, cohorts={8: 2.0, 32: 1.0, 128: 1.5})
NO_COHORT = Measured(single=5.0, cohorts={}, problem="it mixes rows")
# Steps from which compiling pays where one takes 5 ms.
REPAID = math.ceil(COMPILE_SECONDS / COMPILE_SAVES / 0.005)


@pytest.mark.parametrize(
    ("measured", "runtime", "expected"),
    [
        (SLOW_COHORT, {}, ("single", 1)),
        (FAST_COHORT, {}, ("cohort", 32)),
        (NO_COHORT, {}, ("single", 1)),
        (Measured(5.0, {8: 4.9}), {}, ("single", 1)),  # too little for the memory it takes
        (FAST_COHORT, {"cohort_size": 1}, ("cohort", 32)),  # which is never measured so
        (SLOW_COHORT, {"cohort_size": 8}, ("cohort", 32)),  # asked for: the plan takes the 8
        (Measured(5.0, {}), {"cohort_size": 8}, ("cohort", COHORTS[0])),  # asked for
        (NO_COHORT, {"cohort_size": 8}, ("single", 1)),
        (SLOW_COHORT, {"training": "cohort"}, ("cohort", 32)),
        (NO_COHORT, {"training": "cohort"}, ("single", 1)),
        (Measured(5.0, {}), {"training": "cohort"}, ("cohort", COHORTS[0])),  # too slow to try
        (FAST_COHORT, {"training": "single"}, ("single", 1)),
        (FAST_COHORT, {"training": "reference"}, ("reference", 1)),
        (FAST_COHORT, {"compile": True}, ("single", 1)),
    ],
)
def test_the_choice(measured, runtime, expected):
    made = decide(measured, Runtime(**runtime), 100, compilable=True)
    assert (made.training, made.cohort_size) == expected
    assert made.compile == (runtime.get("compile", False))
    assert "5.00 ms" in made.reason
    assert ("as set" in made.reason) == ("training" in runtime)
    assert ("it mixes rows" in made.reason) == (measured is NO_COHORT)


@pytest.mark.parametrize(
    ("steps", "runtime", "compilable", "compiles"),
    [
        (REPAID + 1, {}, True, True),
        (REPAID - 1, {}, True, False),
        (REPAID - 1, {"compile": True}, True, True),
        (REPAID + 1, {"compile": False}, True, False),
        (REPAID + 1, {}, False, False),
        (REPAID + 1, {"training": "reference"}, True, False),
    ],
)
def test_steps_are_compiled_where_that_repays(steps, runtime, compilable, compiles):
    made = decide(SLOW_COHORT, Runtime(**runtime), steps, compilable=compilable)
    assert made.compile == compiles


def examples() -> Examples:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 6, 20)).astype(np.float32)
    return Examples(x, rng.integers(3, size=64), Standardisation.identity(6))


def build() -> nn.Module:
    return build_model("mlp", (6, 20), 3)


def tasks(size: int, steps: int) -> list[ClientTask]:
    settings = TrainSettings(lr=0.01, batch_size=8, local_steps=steps)
    start, rows = model_arrays(build()), np.arange(64)
    return [ClientTask(start, examples(), rows, settings, stream(0, "x")) for _ in range(size)]


def measured_in(folder, **more) -> Measured:
    return measure(build, tasks, **{"most": 8, "classes": 3, "folder": folder, **more})


def test_what_was_measured_holds_for_later_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "PROBE_SECONDS", 1e6)
    first = measured_in(tmp_path / "new")
    assert first.single > 0
    assert set(first.cohorts) == {8}
    assert not first.problem
    [file] = (tmp_path / "new").glob("*.sealed")
    file.unlink()
    choice._write(file, Measured(1.5, {8: 0.5}))
    assert measured_in(tmp_path / "new") == Measured(1.5, {8: 0.5})
    assert measured_in(tmp_path / "new", most=4) != Measured(1.5, {8: 0.5})  # another question
    other = json.dumps({"single": 1, "cohorts": {"8": 0.25}, "problem": ""}).encode()
    whole = file.read_bytes()
    for damage in (b"", b"[]", other, whole.replace(b"1.5", b"1.4"), whole[:-9], bytes(len(whole))):
        assert damage != whole
        file.write_bytes(damage)
        again = measured_in(tmp_path / "new")
        assert again.single not in (1, 1.4, 1.5)
        assert choice._read(file) == again


def test_the_process_that_was_first_is_right(tmp_path):
    file = tmp_path / "speed.sealed"
    for value in (1.0, 2.0):
        choice._write(file, Measured(value, {}))
    assert choice._read(file) == Measured(1.0, {})
    assert {f.name for f in tmp_path.iterdir()} == {"speed.sealed", "speed.lock"}


class MixesRows(nn.Module):
    """Its logits depend on the other rows of the batch."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(120, 3)

    def forward(self, x):
        x = x.flatten(1)
        return self.head(x - x.mean(dim=0))


def test_a_network_without_cohorts_says_why():
    def own(size, steps):
        start = model_arrays(MixesRows())
        return [replace(task, start=start) for task in tasks(size, steps)]

    measured = measure(MixesRows, own, most=8, classes=3)
    assert measured.cohorts == {}
    assert measured.problem


def test_a_run_measures_its_own_clients(small, monkeypatch):
    asked = {}

    def spy(build, tasks, **how):
        asked.update(how, task=tasks(12, 3))
        return FAST_COHORT

    monkeypatch.setattr("fedge_sim.client.measure", spy)
    settings = small(AUTO)
    made = choose(settings)
    assert (made.training, made.cohort_size) == ("cohort", 32)
    assert asked["most"] == math.ceil(9 / torch.get_num_threads()) or asked["most"] <= 9
    data = federated_data(settings)
    [sizes] = {(len(task.rows), task.settings.local_steps) for task in asked["task"]}
    assert sizes == (3 * 32, 3)
    assert all(
        set(task.rows) <= set(np.concatenate([c.train for c in data.clients]))
        for task in asked["task"]
    )
    choose(settings, cohorts=False)
    assert asked["most"] == 1
    monkeypatch.setattr("fedge_sim.client.measure", lambda *a, **k: Measured(5.0, {}))
    assert choose(small(AUTO, "runtime.cohort_size=2")).training == "cohort"
    assert choose(small(AUTO, "runtime.cohort_size=2"), cohorts=False).training == "single"
    monkeypatch.setattr("fedge_sim.client.measure", spy)
    choose(small(AUTO, "runtime.cohort_size=2"))
    assert asked["most"] == 2


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way of the folder")
    assert measured_in(tmp_path / "file").single > 0
    assert "speeds cannot be kept" in caplog.text


def test_a_cohort_too_large_for_the_memory_is_not_taken(tmp_path, monkeypatch):
    def trained(path, tasks, size):
        if size > 8:
            raise torch.OutOfMemoryError("too large")
        return 1e-3 / size

    monkeypatch.setattr(choice, "_seconds_a_step", trained)
    assert measured_in(None, most=100).cohorts == {8: 1e-3 / 8 * 1000}


def test_what_is_to_be_compiled_is_compiled_before_the_first_round(small, monkeypatch):
    made = []

    class Path:
        def __init__(self, network, folder=None):
            self.folder = folder

        def train(self, tasks):
            made.append(self.folder)
            return [ClientUpdate({}, 1, 0.0, 0.0, "compiled" if works else "single")]

    monkeypatch.setattr("fedge_sim.client.Single", Path)
    monkeypatch.setattr("fedge_sim.client.measure", lambda *a, **k: SLOW_COHORT)
    long = small(AUTO, "hierarchy.global_rounds=100000", "runtime.num_workers=1")
    for works in (True, False):
        assert choose(long).compile == works
    assert len(made) == 2
    assert "not possible" in choose(long).reason
    assert not choose(long, compiles=False).compile
    assert not choose(
        small(AUTO, "hierarchy.global_rounds=100000", 'runtime.precision="bf16"')
    ).compile
    assert len(made) == 3
