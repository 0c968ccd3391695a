"""Devices that draw their examples: the same ones always, by class, and never what is held out."""

import tracemalloc

import numpy as np
import pytest
from flwr.app import ConfigRecord, MessageType
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedge_sim import client, records
from fedge_sim.client_app import answer_together
from fedge_sim.client_app import app as client_app
from fedge_sim.data import __main__ as data_command
from fedge_sim.data import federate, federated_data
from fedge_sim.data.drawn import KEPT, class_counts
from fedge_sim.data.split import overlapping
from fedge_sim.errors import ConfigError
from fedge_sim.runtime.in_process import InProcessGrid
from fedge_sim.runtime.node import NODE_ID
from fedge_sim.runtime.roster import call_roster, survey
from fedge_sim.training.base import model_arrays
from fedge_sim.training.local import pool

CLOCK = (
    "devices.enable=true",
    "devices.device_speed={mean = [1.0]}",
    "devices.device_selection_size=9",
)
DEVICES = (
    *CLOCK,
    "devices.devices_per_leaf=700",
    "devices.subset_size=20",
    "app.config.dataset=digits",
    "app.config.num-classes=10",
    "app.config.model=mlp",
    "app.config.partition=dirichlet",
)
PER_LEAF = "devices.devices_per_leaf"


def instruction(settings, kind, number, model, told):
    """Return a message as a run of versions sends it."""
    told = {records.SETTINGS: settings.to_json(), records.CLIENT_ID: number, **told}
    address = records.Address(kind, 0, number)
    return records.instruction(NODE_ID, kind, ConfigRecord(told), model, address)


def first_model(settings):
    data = federated_data(settings)
    network = client.initial_model(settings, data.example_shape, len(data.classes))
    return records.to_record(model_arrays(network))


def job(settings, number, device, model, flat_round=1, classes=0):
    """Return a message to train a device in a job."""
    told = {records.JOB: number, records.ROUND: flat_round, records.LR: 0.05, records.PROX_MU: 0.0}
    told[records.CLASS_COUNTS] = classes
    return instruction(settings, MessageType.TRAIN, device, model, told)


def held_out_test(settings, shards, model):
    """Return the messages that evaluate a model on held-out examples, in shards."""
    told = {records.SHARDS: shards, records.SPLITS: [records.HELD_OUT]}
    told[records.PURPOSE] = records.HELD_OUT
    kind = MessageType.EVALUATE
    return [instruction(settings, kind, shard, model, told) for shard in range(shards)]


# ------------------------------------------------------------------ what a device draws


@pytest.mark.parametrize("partition", ["dirichlet", "iid"])
def test_a_device_draws_the_same_whenever_it_is_asked(small, partition):
    settings = small(*DEVICES, f"app.config.partition={partition}")
    first, again = federate(settings).clients, federate(settings).clients
    assert len(first) == 2100
    numbers = [5, 0, 2099, *range(2 * KEPT)]  # more than are kept
    drawn = {number: first[number].train.tolist() for number in numbers}
    for number in reversed(numbers):
        assert again[number].train.tolist() == first[number].train.tolist() == drawn[number]
    assert len(set(map(tuple, drawn.values()))) == len(drawn)
    assert federate(small(*DEVICES, "app.config.seed=1")).clients[5].train.tolist() != drawn[5]
    assert [own.train.tolist() for own in first[3:5]] == [drawn[3], drawn[4]]
    assert first[-1].train.tolist() == drawn[2099]
    with pytest.raises(IndexError):
        first[2100]


@pytest.mark.parametrize("partition", ["dirichlet", "iid"])
def test_a_device_has_its_examples_once_each_and_none_that_is_held_out(small, partition):
    data = federate(small(*DEVICES, f"app.config.partition={partition}"))
    held_out = data.held_out
    assert len(held_out) == round(0.2 * 1797)
    seen = set()
    for own in data.clients[:300]:
        assert (np.diff(own.train) > 0).all()
        assert (len(own.train), len(own.test)) == (20, 0)
        seen.update(own.train.tolist())
    assert seen.isdisjoint(held_out.tolist())
    assert len(seen) > 0.9 * (1797 - len(held_out))  # and devices share examples


@pytest.mark.parametrize(("alpha", "factor"), [(0.5, 25 / 6), (5.0, 70 / 51)])
def test_mixes_of_classes_are_dirichlet(small, alpha, factor):
    """Of 20 examples; the factor by which shares vary more than at random: (n + A) / (1 + A)."""
    data = federate(small(*DEVICES, f"app.config.partition-alpha={alpha}"))
    counts = [np.bincount(data.dataset.y[own.train], minlength=10) for own in data.clients]
    shares = np.array(counts) / 20
    assert shares.mean(axis=0) == pytest.approx(np.full(10, 0.1), abs=0.015)
    assert shares.var() == pytest.approx(0.1 * 0.9 / 20 * factor, rel=0.06)


def test_any_example_is_drawn_equally_often_in_iid(small):
    data = federate(small(*DEVICES, "app.config.partition=iid"))
    drawn = np.concatenate([own.train for own in data.clients])
    counts = np.bincount(drawn, minlength=1797)[data.whole.train]
    assert counts.mean() == 2100 * 20 / len(data.whole.train)
    assert counts.var() == pytest.approx(counts.mean() * (1 - 20 / len(counts)), rel=0.2)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.floats(0, 1),
    st.floats(1e-3, 10),
    st.integers(0, 2**32),
)
def test_a_class_with_too_few_gives_all_and_others_the_rest(there, part, alpha, seed):
    there, rng = np.array(there), np.random.default_rng(seed)
    size = round(part * there.sum())
    mix = rng.dirichlet(np.full(len(there), alpha))
    counts = class_counts(rng, mix, there, size)
    assert counts.sum() == size
    assert (counts >= 0).all()
    assert (counts <= there).all()


def test_what_is_missing_is_drawn_by_the_shares_of_the_others():
    rng, there = np.random.default_rng(0), np.array([3, 1000, 1000, 1000])
    mix = np.array([0.7, 0.2, 0.1, 0.0])
    counts = np.mean([class_counts(rng, mix, there, 100) for _ in range(300)], axis=0)
    assert counts == pytest.approx([3, 97 * 2 / 3, 97 / 3, 0], abs=1.0)
    assert class_counts(rng, np.array([1.0, 0.0, 0.0]), np.array([1, 3, 0]), 4).tolist() == [
        1,
        3,
        0,
    ]


def test_a_subset_that_is_more_than_there_is(small):
    assert len(federate(small(*DEVICES, "devices.subset_size=1438")).clients[0].train) == 1438
    with pytest.raises(ConfigError, match=r"\[devices\] subset_size = 1439: .* at most 1438"):
        federate(small(*DEVICES, "devices.subset_size=1439"))
    with pytest.raises(ConfigError, match="partition-balanced = true: devices that draw"):
        federate(small(*DEVICES, "app.config.partition-balanced=true"))


@pytest.mark.parametrize(("split", "leaks"), [("blocked", False), ("random", True)])
def test_blocks_that_are_held_out_leak_nothing(small, split, leaks):
    data = federate(
        small(
            *(*CLOCK, "devices.devices_per_leaf=100", "devices.subset_size=30"),
            *("app.config.window-stride-seconds=1.0", f"app.config.split={split}"),
            "app.config.partition=iid",
        )
    )
    seen = overlapping(data.dataset, data.held_out)
    assert any(seen[own.train].any() for own in data.clients) == leaks


@pytest.mark.parametrize("standardise", ["global", "none"])
def test_the_scale_is_that_of_the_pool(small, standardise):
    data = federate(small(*DEVICES, f"app.config.standardise={standardise}"))
    pool_rows = data.whole.train
    x = data.examples(2099).batch(pool_rows)[0].double()
    raw = data.dataset.x[pool_rows]
    expected = (0, 1) if standardise == "global" else (raw.mean(), raw.std())
    assert (float(x.mean()), float(x.std(correction=0))) == pytest.approx(expected, abs=1e-4)


def test_a_million_devices_cost_nothing_until_they_are_used(small):
    settings = small(*DEVICES, f"{PER_LEAF}=1000000", "hierarchy.num_servers=1")
    federate(small(*DEVICES))  # its store is there
    tracemalloc.start()
    data = federated_data(settings)
    with InProcessGrid(client_app, 1) as grid:
        roster = call_roster(grid, 1_000_000, timeout_s=9)
        summary = survey(grid, roster, settings)
    assert len(data.clients[999_999].train) == 20
    assert roster[999_999] == NODE_ID
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert summary.clients == summary.groups == ()
    assert len(summary.scales) == 1  # of all
    assert summary.num_held_out == 359
    assert (summary.example_shape, len(summary.classes)) == ((1, 8, 8), 10)
    assert summary.content == data.dataset.content


def test_data_that_are_kept_are_those_of_the_settings(small):
    first = federated_data(small(*DEVICES))
    assert federated_data(small(*DEVICES, "devices.device_selection_size=7")) is first
    assert len(federated_data(small(*DEVICES, "devices.subset_size=30")).clients[0].train) == 30
    dealt_out = ("devices.devices_per_leaf=0", "hierarchy.clients_per_server=[3,3,3]")
    drawn = federated_data(small(*DEVICES, f"{PER_LEAF}=3", "devices.device_selection_size=3"))
    assert len(drawn.clients[0].test) == 0
    others = [pair for pair in DEVICES if not pair.startswith("devices.subset_size")]
    assert len(federated_data(small(*others, *dealt_out)).clients[0].test) > 0


def test_describe_looks_at_some_devices():
    sets = [word for pair in DEVICES for word in ("--set", pair)]
    done = CliRunner().invoke(data_command.app, ["describe", "digits", *sets])
    assert done.exit_code == 0, done.output
    assert "examples of a client: 20 to 20, a factor of 1.0; drawn from 1,438" in done.output
    assert "359 held out; these are the first 1,000 of 2,100 devices" in done.output


# ------------------------------------------------------------------ training and evaluating


def test_a_job_is_its_own_random_stream_whatever_the_round(small):
    settings = small(*DEVICES, "asynchronous.rule=fedrevive", "devices.local_iters=2")
    model, data = first_model(settings), federated_data(settings)
    with InProcessGrid(client_app, 1) as grid:
        asked = [(3, 8, 1), (3, 8, 1), (3, 8, 2), (4, 8, 1), (3, 9, 1)]
        replies = grid.send_and_receive([job(settings, *j[:2], model, j[2], 10) for j in asked])
    same = [records.arrays_of(r) == records.arrays_of(replies[0]) for r in replies]
    assert same == [True, True, True, False, False]
    counts = records.metrics_of(replies[0])[records.CLASS_COUNTS]
    own = data.dataset.y[data.clients[8].train]
    assert counts == np.bincount(own, minlength=10).tolist()


def test_only_fedrevive_asks_for_counts_of_classes(small):
    settings = small(*DEVICES)
    with InProcessGrid(client_app, 1) as grid:
        [reply] = grid.send_and_receive([job(settings, 0, 0, first_model(settings))])
    assert records.CLASS_COUNTS not in records.metrics_of(reply)


@pytest.mark.parametrize("cohort_size", [1, 4])
def test_shards_of_held_out_examples_pool_to_the_whole(small, cohort_size):
    settings = small(*DEVICES)
    model, data = first_model(settings), federated_data(settings)
    with InProcessGrid(client_app, 2, together=answer_together, cohort_size=cohort_size) as grid:
        [whole], parts = (
            [
                records.get_evaluations(reply)[records.HELD_OUT]
                for reply in grid.send_and_receive(held_out_test(settings, shards, model))
            ]
            for shards in (1, 7)
        )
    pooled = pool(parts)
    assert whole.num_examples == len(data.held_out)
    assert (pooled.num_examples, pooled.accuracy) == (whole.num_examples, whole.accuracy)
    assert pooled.loss == pytest.approx(whole.loss, rel=1e-5)


# ------------------------------------------------------------------ how to train them


def test_local_iters_are_steps_of_devices_alone(small):
    devices = small(*DEVICES, "devices.local_iters=25", "hierarchy.optimizer=adam")
    how = client.train_settings(devices, 0.1, 0.0)
    assert (how.local_steps, how.optimizer) == (25, "adam")
    assert client.train_settings(small("devices.local_iters=25"), 0.1, 0.0).local_steps == 0
    assert client.train_settings(small("hierarchy.local_steps=7"), 0.1, 0.0).local_steps == 7


def test_to_find_the_way_to_train_few_devices_are_looked_at(small):
    more = (f"{PER_LEAF}=1000000", "devices.max_model_version=50", "hierarchy.batch_size=8")
    settings = small(*DEVICES, *more, "asynchronous.rule=fedbuff")
    data = federate(settings)
    tasks = client._trial(settings, data, 12, 2)
    assert len(tasks) == 12
    assert all(len(task.rows) == 16 for task in tasks)
    assert client._steps(settings, data) == 50 * 1 * 3  # an epoch of 20 examples
    by_steps = small(*DEVICES, *more, "devices.local_iters=25")
    assert client._steps(by_steps, data) == 50 * 9 * 25
    of_leaves = ("asynchronous.server=leaf", "asynchronous.cloud_versions=5")
    at_leaves = small(*DEVICES, *more, *of_leaves, "devices.local_iters=25")
    assert client._steps(at_leaves, data) == 3 * 50 * 9 * 25
    assert data.clients._client.cache_info().misses == 12


def test_clients_at_a_time(small):
    assert small().clients_at_a_time == 9
    assert small(*DEVICES).clients_at_a_time == 9
    leaf = ("asynchronous.server=leaf", "asynchronous.cloud_versions=5")
    assert small(*DEVICES, *leaf, "asynchronous.rule=fedbuff").clients_at_a_time == 27
    assert small(*DEVICES, "devices.device_selection_size=300").clients_at_a_time == 300
    assert small(*CLOCK).clients_at_a_time == 9  # rounds of all
