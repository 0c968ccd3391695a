"""Rules for updates of different ages, by hand; and that nothing of a client's data is in them."""

import ast
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge_sim import cloud
from fedge_sim.algorithms.aggregation import weighted_mean
from fedge_sim.algorithms.asynchronous import (
    Update,
    average,
    beta,
    beta_of,
    fedasync,
    fedavg,
    staleness_weight,
    step,
)
from fedge_sim.algorithms.server_rules import server_rule
from fedge_sim.config import CloudCluster, Hierarchy, load_settings
from fedge_sim.leaf_strategy import LeafRule
from fedge_sim.models.tracker import MEAN, VARIANCE
from tests.conftest import ROOT

TRAINABLE = {"w"}
DEVICES = (
    "devices.enable=true",
    "devices.device_speed.mean=1.0",
    "devices.device_selection_size=6",
)


def model(w, mean=0.0, steps=0):
    """Return a model of one parameter, one buffer and a counter."""
    return {
        "w": np.array(w, np.float32),
        "running_mean": np.array([mean], np.float32),
        "steps": np.array(steps),
    }


def update(arrays, start, staleness=0, examples=1):
    return Update(0, 0, 0, staleness, examples, (examples,), arrays, start)


def settings(*more):
    return load_settings(assignments=[*DEVICES, *more])


# ------------------------------------------------------------------- staleness


@pytest.mark.parametrize(
    ("staleness", "function", "expected"),
    [
        (0, "constant", 1.0),
        (99, "constant", 1.0),
        (0, "polynomial", 1.0),
        (3, "polynomial", 0.5),  # (3 + 1)^-0.5
        (4, "hinge", 1.0),
        (6, "hinge", 0.5),  # 1 / (0.5 (6 - 4) + 1)
    ],
)
def test_staleness_weights_by_hand(staleness, function, expected):
    assert staleness_weight(staleness, function, 0.5, 4.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("staleness", "form", "factor", "expected"),
    [
        (7, "constant", 0.3, 0.3),
        (2, "linear", 0.2, 0.4),
        (9, "linear", 0.2, 1.0),
        (0, "exponential", 0.5, 0.0),
        (2, "exponential", 0.5, 1 - 1 / np.e),
        (0, "cosine", 75, 0.0),
        (50, "cosine", 75, 0.25),  # 1 - (1 + cos(pi / 3)) / 2
        (75, "cosine", 75, 0.5),
        (150, "cosine", 75, 1.0),
        (1000, "cosine", 75, 1.0),  # the wave does not come back
        (0, "sqrt", 0.5, 0.0),
        (1, "sqrt", 0.5, 0.25),
        (9, "sqrt", 2.0, 0.5),
        (1, "sqrt", 3.0, 1.0),
        (0, "stepwise", 2, 0.0),  # quarters of 20
        (4, "stepwise", 2, 0.0),
        (5, "stepwise", 2, 0.25),
        (10, "stepwise", 2, 0.5),
        (19, "stepwise", 2, 0.75),
        (20, "stepwise", 2, 1.0),
        (500, "stepwise", 2, 1.0),
    ],
)
def test_beta_by_hand(staleness, form, factor, expected):
    assert beta(staleness, form, factor, threshold=20.0) == pytest.approx(expected)


FORMS = st.sampled_from(["constant", "linear", "exponential", "stepwise", "cosine", "sqrt"])


@given(FORMS, st.integers(0, 10_000), st.integers(0, 100), st.floats(1e-3, 1.0), st.floats(0.1, 99))
def test_beta_is_a_share_and_goes_one_way(form, staleness, later, factor, threshold):
    now = beta(staleness, form, factor, threshold)
    then = beta(staleness + later, form, factor, threshold)
    assert 0 <= now <= 1
    if form == "sqrt" and staleness == 0:
        assert now == 0
    else:
        assert then <= now if form == "sqrt" else then >= now


@given(st.sampled_from(["constant", "polynomial", "hinge"]), st.integers(0, 10_000))
def test_a_staleness_weight_never_rises(function, staleness):
    now, then = (staleness_weight(s, function, 0.5, 4.0) for s in (staleness, staleness + 1))
    assert 0 < then <= now <= 1


def test_the_stepwise_beta_counts_in_mean_stalenesses():
    base = ("asynchronous.rule=fedrevive", "asynchronous.beta=stepwise")
    s = settings(*base, "asynchronous.beta_factor=2.0", "devices.num_updates_for_model=3")
    # 6 active jobs of which 3 make a version: 2 * 6 / 3 = 4
    assert [beta_of(s, staleness) for staleness in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]


# ----------------------------------------------------------------------- rules


X = model([0.0, 1.0], mean=1.0, steps=5)
OLD = model([10.0, 10.0], mean=9.0, steps=1)
Y1 = model([12.0, 10.0], mean=3.0, steps=2)  # delta (2, 0), started from OLD
Y2 = model([10.0, 14.0], mean=5.0, steps=3)  # delta (0, 4)


def halved(staleness):
    return 0.5 if staleness else 1.0


def test_fedbuff_by_hand():
    new = average(X, [update(Y1, OLD, 3), update(Y2, OLD, 0)], halved, 0.5, TRAINABLE)
    # x + 0.5 * (0.5 * (2, 0) + 1 * (0, 4)) / 2: by the number of updates, not by their weights
    np.testing.assert_array_equal(new["w"], np.float32([0.25, 2.0]))
    # 1 + 0.5 * (0.5 * (3 - 1) + (5 - 1)) / 2
    assert new["running_mean"] == 2.25
    assert new["steps"] == 3  # the last one's
    assert {n: a.dtype for n, a in new.items()} == {n: a.dtype for n, a in X.items()}
    assert {n: a.shape for n, a in new.items()} == {n: a.shape for n, a in X.items()}


def test_a_buffer_moves_at_most_to_the_clients_mean():
    new = average(X, [update(Y1, OLD), update(Y2, OLD)], halved, 3.0, TRAINABLE)
    np.testing.assert_array_equal(new["w"], np.float32([3.0, 7.0]))  # x + 3 * (1, 2)
    assert new["running_mean"] == 4.0


@given(st.lists(st.floats(0, 1e3, width=32), min_size=3, max_size=3), st.floats(0.01, 10))
def test_a_variance_never_gets_below_zero(variances, lr):
    now, start, trained = (model([0.0], mean=v) for v in variances)
    new = average(now, [update(trained, start, 7)], halved, lr, TRAINABLE)
    assert new["running_mean"] >= 0


def test_fedasync_by_hand():
    new = fedasync(X, [update(Y1, OLD, 3)], halved, 0.5)  # alpha = 0.25
    np.testing.assert_array_equal(new["w"], np.float32([3.0, 3.25]))
    assert new["running_mean"] == 1.5
    assert new["steps"] == 2


def test_fedavg_by_hand():
    new = fedavg(X, [update(Y1, X, examples=1), update(Y2, X, examples=3)], 0.5, TRAINABLE)
    # the mean is (10.5, 13), half way from (0, 1)
    np.testing.assert_array_equal(new["w"], np.float32([5.25, 7.0]))
    assert new["running_mean"] == 4.5


def test_trackers_are_as_new_in_every_average():
    """What one client saw is not what the average of several would have seen (FedRevive)."""
    names = ("w", f"norm.{MEAN}", f"norm.{VARIANCE}")
    start, y1, y2 = ({n: np.float32([v, 2 * v]) for n in names} for v in (3.0, 4.0, 5.0))
    both, w = [update(y1, start, examples=1), update(y2, start, examples=3)], {"w"}
    rule = LeafRule(Hierarchy(leaf_strategy="FedMedian"), w)
    averages = [
        weighted_mean([y1, y2], [1, 3]),
        rule.aggregate(1, start, {0: y1, 1: y2}, {0: 1, 1: 3}, {0: 0.0, 1: 0.0}),
        average(start, both, halved, 1.0, w),
        fedasync(start, both, halved, 0.5),
        fedavg(start, both, 0.5, w),
        fedavg({**start, "w": start["w"] + 1}, both, 0.5, w),
        cloud.step(
            *(cloud.initial_state(start, 2), [y1, y2], [1, 3], CloudCluster(enable=False)),
            global_lr=0.5,
            trainable=w,
        ).global_model,
    ]
    for model_ in averages:
        assert list(model_) == list(names)
        for name, fresh in zip(names[1:], (0, 1), strict=True):
            np.testing.assert_array_equal(model_[name], np.float32([fresh, fresh]))
            assert model_[name].dtype == np.float32
        assert not np.array_equal(model_["w"], start["w"])


def test_changes_are_added_in_float64_in_order_of_arrival():
    zero = {"w": np.zeros(1, np.float32)}
    far = [{"w": np.float32([value])} for value in (1e8, 3.0, -1e8)]
    new = average(zero, [update(y, zero) for y in far], halved, 1.0, TRAINABLE)
    assert new["w"] == 1.0  # float32 would lose the 3
    far = [{"w": np.float32([value])} for value in (1e30, 3.0, -1e30)]
    new = average(zero, [update(y, zero) for y in far], halved, 1.0, TRAINABLE)
    assert new["w"] == 0.0  # and float64 this one: the sum is not reordered


def test_one_change_of_weight_one_is_that_change():
    assert step(X, [{"w": np.array([1.0, 2.0])}], Y1, 1.0, TRAINABLE)["w"].tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # Y1 is of staleness 0, Y2 of 2; alone for FedAsync
        (("fedavg", "devices.num_updates_for_model=0"), [1.0, 3.0]),  # x has moved since
        (("fedbuff", "asynchronous.staleness=constant"), [1.0, 3.0]),
        (("fedbuff", "asynchronous.staleness=hinge", "asynchronous.staleness_b=0.0"), [1.0, 2.0]),
        (("downweight", "asynchronous.beta=linear", "asynchronous.beta_factor=0.25"), [1.0, 2.0]),
        (("fedasync", "asynchronous.mixing=0.5"), [5.0, 7.5]),
    ],
)
def test_each_rule_has_its_settings(rule, expected):
    name, *more = rule
    pair = [update(Y1, OLD, 0), update(Y2, OLD, 2)]
    updates = pair[1:] if name == "fedasync" else pair
    number = f"devices.num_updates_for_model={len(updates)}"
    s = settings(f"asynchronous.rule={name}", number, *more)
    rule = server_rule(s, TRAINABLE, 0, (6, 100), 6)
    np.testing.assert_allclose(rule.make_version(X, updates, 1)["w"], expected)
    assert rule.state() == {}
    rule.restore({})


def test_server_lr_is_the_rules():
    s = settings("asynchronous.rule=fedbuff", "hierarchy.server_lr=0.5")
    new = server_rule(s, TRAINABLE, 0, (6, 100), 6).make_version(X, [update(Y1, OLD)], 1)
    np.testing.assert_array_equal(new["w"], np.float32([1.0, 1.0]))


# ------------------------------------------------- no real data at the server


def imports_of(module):
    """Return the modules of this package that one imports, at any place in its code."""
    file = ROOT.joinpath(*module.split("."))
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {
        name
        for name in found
        if name.startswith("fedge_sim.")
        and (ROOT.joinpath(*name.split(".")).is_dir() or ROOT.joinpath(*name.split(".")).with_suffix(".py").exists())
    }  # fmt: skip


ALGORITHMS = sorted(f"fedge_sim.algorithms.{f.stem}" for f in (ROOT / "fedge_sim/algorithms").glob("[!_]*.py"))  # fmt: skip


def test_no_server_rule_can_come_upon_the_data():
    seen, left = set(), set(ALGORITHMS)
    while left:
        module = left.pop()
        seen.add(module)
        left |= imports_of(module) - seen
    assert "fedge_sim.algorithms.fedrevive" in seen
    assert "fedge_sim.models.cnn1d" in seen  # the walk goes on from what is imported
    rooms = {name.split(".")[1] for name in seen}
    assert rooms.isdisjoint({"data", "client", "client_app", "training", "runtime"})


def test_importing_all_rules_loads_no_data_module():
    lines = [f"import {name}" for name in ALGORITHMS]
    lines += ["import sys", "print([m for m in sys.modules if m.startswith('fedge_sim.data')])"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True, check=True
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_an_update_holds_models_and_counts_only():
    hints = {f.name: str(f.type) for f in fields(Update)}
    arrays = {name for name, hint in hints.items() if "Mapping" in hint}
    assert arrays == {"arrays", "start"}
    assert {hints[name] for name in hints.keys() - arrays} == {"<class 'int'>", "tuple[int, ...]"}
    one = update(Y1, OLD)
    assert {n: a.shape for n, a in one.arrays.items()} == {n: a.shape for n, a in X.items()}
    assert {n: a.shape for n, a in one.delta.items()} == {"w": (2,), "running_mean": (1,)}
