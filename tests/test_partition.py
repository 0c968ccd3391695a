"""Which client holds which examples, and which of them are held out."""

import hashlib
import json
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
from datasets import Dataset as Table
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    PathologicalPartitioner,
    SizePartitioner,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge_sim import orchestrator
from fedge_sim.config import load_settings
from fedge_sim.data import federate, federated_data
from fedge_sim.data.base import ClientData, Dataset, Names
from fedge_sim.data.partition import PARTITIONS, dirichlet_counts, in_order, partition
from fedge_sim.data.split import TEST_SHARE, blocks, random_split, split
from fedge_sim.data.store import canonical
from fedge_sim.errors import CheckpointError, ConfigError, FedgeError
from fedge_sim.randomness import stream
from fedge_sim.reporting.base import Callback
from fedge_sim.reporting.tables import TableWriter
from fedge_sim.reporting.versions import VersionWriter
from fedge_sim.reporting.weights import WeightWriter
from tests.conftest import ROOT, clean_environment, opened, run


def dataset(users: int, each: int = 5, devices: int = 1, overlap: int = 0) -> Dataset:
    """Return users x devices x each windows of 4 samples, classes in turn."""
    n = users * devices * each
    unit = np.repeat(np.arange(users * devices), each)
    position = np.arange(n) % each * (4 - overlap)
    return Dataset(
        x=np.arange(n * 4, dtype=np.float32).reshape(n, 1, 4),
        y=np.arange(n) % 6,
        user=(unit // devices).astype(np.int32),
        model=(unit % devices // 2).astype(np.int32),
        device=(unit % devices).astype(np.int32),
        recording=unit.astype(np.int32),
        position=position.astype(np.int32),
        names=Names(
            classes=tuple("abcdef"),
            users=tuple(f"{i:03d}" for i in range(users)),
            models=tuple(f"m{i}" for i in range((devices + 1) // 2)),
            devices=tuple(f"d{i}" for i in range(devices)),
        ),
        content=f"{users} {each} {devices} {overlap}",
    )


def topology(*clients_per_server, **config):
    pairs = [f"app.config.{key.replace('_', '-')}={value}" for key, value in config.items()]
    clients = [f"hierarchy.num_servers={len(clients_per_server)}"]
    clients.append(f"hierarchy.clients_per_server={list(clients_per_server)}")
    return load_settings(assignments=[*pairs, *clients])


def test_left_over_users_by_hand():
    # 21 users on 9 clients: two each; users 18, 19, 20 to clients 0 of 0, 1 of 1, 2 of 2
    rows = PARTITIONS["user"](dataset(21, 1), topology(3, 3, 3))
    expected = [[2 * c, 2 * c + 1] for c in range(9)]
    expected[0].append(18)
    expected[4].append(19)
    expected[8].append(20)
    assert [r.tolist() for r in rows] == expected


def test_left_over_users_of_uneven_servers_by_hand():
    # 8 users on [1, 2]: two each, left-overs 6, 7 to server 0 client 0, server 1 client 1
    rows = PARTITIONS["user"](dataset(8, 1), topology(1, 2))
    assert [r.tolist() for r in rows] == [[0, 1, 6], [2, 3], [4, 5, 7]]


def test_users_devices_and_models_by_hand():
    data = dataset(2, 2, devices=3)  # devices 0 and 1 are of one model
    pairs = PARTITIONS["user-device"](data, topology(3, 3))
    assert [r.tolist() for r in pairs] == [[2 * i, 2 * i + 1] for i in range(6)]
    models = PARTITIONS["user-model"](data, topology(2, 2))
    assert [r.tolist() for r in models] == [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11]]


def test_pairs_are_dealt_out_in_order_of_their_names():
    data = dataset(2, 3, devices=2)
    names = Names(data.names.classes, data.names.users, data.names.models, ("z", "a"))
    turned = Dataset(**{**vars(data), "names": names})
    rows = PARTITIONS["user-device"](turned, topology(4))
    assert [r[0] for r in rows] == [3, 0, 9, 6]


@pytest.mark.parametrize(
    ("users", "order"),
    [
        (["1", "11", "3"], [0, 2, 1]),
        (["-2", "+1", "10", "9", "007"], [0, 1, 4, 3, 2]),
        (["1.0", "10.0", "2.0"], [0, 2, 1]),
        (["1", "11", "3", "a"], [0, 1, 2, 3]),  # not all are numbers
        (["1.5", "10.0", "2.0"], [0, 1, 2]),
        ([str(10**30 + 1), str(10**30)], [1, 0]),  # more digits than a float has
        (["٣", "1"], [1, 0]),  # another alphabet's digit is text
    ],
)
def test_whole_numbers_are_in_numerical_order(users, order):
    assert in_order(users) == order
    data = dataset(len(users), 3)
    names = Names(data.names.classes, tuple(users))
    rows = partition(Dataset(**{**vars(data), "names": names}), topology(len(users)))
    assert [r[0] // 3 for r in rows] == order


def test_users_of_uci_har_are_dealt_out_as_the_older_program_did(shared):
    golden = np.load(shared / "golden" / "older_program_uci_har.npz")
    expected = np.split(
        golden["numeric_partition"], np.cumsum(golden["numeric_partition_sizes"])[:-1]
    )
    root = f"app.config.data-root={shared / 'data' / 'uci_har'}"
    data = federate(load_settings(assignments=["app.config.dataset=uci-har", root]))
    for own, rows in zip(data.clients, expected, strict=True):
        np.testing.assert_array_equal(own.rows, np.sort(rows))


@given(st.integers(1, 40), st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_every_window_has_one_owner(users, clients_per_server):
    wanted = topology(*clients_per_server)
    if sum(clients_per_server) > users:
        with pytest.raises(ConfigError, match=f"the dataset has {users}; allowed: at most {users}"):
            PARTITIONS["user"](dataset(users), wanted)
        return
    rows = PARTITIONS["user"](dataset(users), wanted)
    assert len(rows) == sum(clients_per_server)
    assert sorted(np.concatenate(rows)) == list(range(users * 5))


def labelled(y) -> Dataset:
    """Return examples of given classes."""
    y = np.asarray(y)
    names = Names(classes=tuple("abcdefghij"))
    few = {**vars(dataset(1)), "names": names, "x": np.zeros((len(y), 1), np.float32), "y": y}
    return Dataset(**few)


@st.composite
def problems(draw, least=300):
    """Return a dataset of classes of unlike sizes, clients of each server, and a seed."""
    n, num_classes = draw(st.integers(least, 900)), draw(st.integers(2, 10))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    y = rng.choice(num_classes, n, p=rng.dirichlet(np.full(num_classes, 2.0)))
    clients = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    return labelled(y), clients, draw(st.integers(0, 99))


@settings(max_examples=25)
@given(st.sampled_from(["iid", "dirichlet", "shards", "quantity"]), problems(), st.integers(1, 4))
def test_partitions_give_every_example_to_one_client(name, problem, wanted):
    data, clients, seed = problem
    own = {"shards": {"partition_shards": wanted}, "iid": {}}
    config = {"partition": name, **own.get(name, {"partition_alpha": 1.0})}
    rows = partition(data, topology(*clients, **config, seed=seed))
    assert len(rows) == sum(clients)
    assert sorted(np.concatenate(rows)) == list(range(len(data)))
    assert all((np.diff(r) > 0).all() for r in rows)
    again = partition(data, topology(*clients, **config, seed=seed))
    other = partition(data, topology(*clients, **config, seed=seed + 1))
    assert all(np.array_equal(a, b) for a, b in zip(rows, again, strict=True))
    if len(rows) > 1:
        assert not all(np.array_equal(a, b) for a, b in zip(rows, other, strict=True))


@settings(max_examples=25)
@given(problems(), st.integers(1, 20))
def test_shards_are_equal_and_sorted_by_label(problem, wanted):
    # McMahan et al. 2017: the sorted examples in clients x k pieces, of which each client has k
    data, clients, seed = problem
    rows = partition(
        data, topology(*clients, partition="shards", partition_shards=wanted, seed=seed)
    )
    order = stream(seed, "partition/order").permutation(len(data))
    by_label = order[np.argsort(data.y[order], kind="stable")]
    owner = np.empty(len(data), int)
    for client, own in enumerate(rows):
        owner[own] = client
    pieces = np.array_split(by_label, wanted * len(rows))
    assert all(len(np.unique(owner[piece])) == 1 for piece in pieces)
    owners = [owner[piece[0]] for piece in pieces]
    assert np.bincount(owners).tolist() == [wanted] * len(rows)


def test_shards_by_hand():
    # Six shards of ten examples, of one class each: two to a client, whatever the classes.
    data = labelled(np.repeat([0, 1, 2, 3, 4, 5], 10)[np.random.default_rng(0).permutation(60)])
    seen = set()
    for seed in range(30):
        rows = partition(data, topology(3, partition="shards", partition_shards=2, seed=seed))
        counts = [np.bincount(data.y[own], minlength=6) for own in rows]
        assert all(sorted(c) == [0, 0, 0, 0, 10, 10] for c in counts)
        seen |= {tuple(np.flatnonzero(c)) for c in counts}
    assert len(seen) == 15  # every pair of shards comes up: they are drawn at random
    # A class of 30 is three shards, and a client can have two of it; 25 and 35 share a shard.
    data = labelled([0] * 25 + [1] * 35)
    rows = partition(data, topology(3, partition="shards", partition_shards=2))
    assert [len(own) for own in rows] == [20, 20, 20]
    mixed = [c for c in (np.bincount(data.y[own], minlength=2) for own in rows) if 5 in c % 10]
    assert len(mixed) == 1


@settings(max_examples=25)
@given(problems(), st.integers(1, 10))
def test_clients_have_so_many_classes(problem, wanted):
    # NIID-Bench's #label = k: client i has class i mod classes, a class is shared evenly
    data, clients, seed = problem
    found, sizes = np.unique(data.y, return_counts=True)
    config = {"partition": "classes", "partition_classes": wanted, "seed": seed}
    if wanted > len(found):
        with pytest.raises(ConfigError, match=f"{len(found)} classes; allowed: 1 to {len(found)}"):
            partition(data, topology(*clients, **config))
        return
    if sizes.min() < 12:
        return
    rows = partition(data, topology(*clients, **config))
    together = np.concatenate(rows)
    assert len(np.unique(together)) == len(together)
    counts = np.array([[sum(data.y[own] == c) for c in found] for own in rows])
    assert ((counts > 0).sum(axis=1) == wanted).all()
    assert all(counts[i, i % len(found)] > 0 for i in range(len(rows)))
    for of_class, size in zip(counts.T, sizes, strict=True):
        own = of_class[of_class > 0]
        assert not len(own) or (np.ptp(own) <= 1 and own.sum() == size)


@settings(max_examples=25)
@given(problems(), st.sampled_from([0.05, 0.3, 1.0, 10.0]))
def test_balanced_clients_get_no_class_beyond_their_share(problem, alpha):
    data, clients, seed = problem
    num_clients, sizes = sum(clients), np.unique(data.y, return_counts=True)[1]
    rng = np.random.default_rng(seed)
    counts = dirichlet_counts(rng, sizes, num_clients, alpha, balanced=True)
    np.testing.assert_array_equal(counts.sum(axis=1), sizes)
    before = np.cumsum(counts, axis=0) - counts
    assert (counts[before * num_clients >= len(data)] == 0).all()
    # So no client is larger than its share and the class with which it came to have that.
    assert counts.sum(axis=0).max() < len(data) / num_clients + sizes.max()


def test_the_balanced_form_is_balanced():
    data = dataset(20, 90)

    def sizes(balanced, seed):
        config = {"partition": "dirichlet", "partition_alpha": 0.1, "seed": seed}
        config["partition_balanced"] = str(balanced).lower()
        return [len(own) for own in partition(data, topology(3, 3, 3, **config))]

    spread = {b: np.mean([np.std(sizes(b, seed)) for seed in range(10)]) for b in (False, True)}
    assert spread[True] < 0.75 * spread[False]


@settings(max_examples=25)
@given(st.sampled_from(["iid", "dirichlet", "classes", "quantity"]), problems(), st.integers(1, 3))
def test_partitions_are_those_of_the_library(name, problem, wanted):
    """Hold these equal to flwr-datasets, from which runs of before have them."""
    data, clients, seed = problem
    if np.bincount(data.y).min() < 30 or wanted > len(np.unique(data.y)):
        return
    own = {"classes": {"partition_classes": wanted}, "iid": {}}
    config = {"partition": name, **own.get(name, {"partition_alpha": 0.5})}
    wanted_settings = topology(*clients, **config, seed=seed)
    rows = partition(data, wanted_settings)
    n, seed_there = sum(clients), int(stream(seed, "partition/library").integers(2**32))
    by_label = {"partition_by": "label", "shuffle": False, "seed": seed_there}
    there = {
        "iid": lambda: IidPartitioner(n),
        "dirichlet": lambda: DirichletPartitioner(n, alpha=0.5, min_partition_size=3, **by_label),
        "classes": lambda: PathologicalPartitioner(
            n,
            num_classes_per_partition=wanted,
            class_assignment_mode="first-deterministic",
            **by_label,
        ),
        "quantity": lambda: SizePartitioner([len(own) for own in rows]),
    }[name]()
    order = stream(seed, "partition/order").permutation(len(data))
    there.dataset = Table.from_dict({"row": order, "label": data.y[order]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tries that are repeated, of classes left out
        for client, own in enumerate(rows):
            assert sorted(there.load_partition(client)["row"]) == own.tolist()


def test_partitions_are_skewed_as_they_say():
    data = dataset(20, 90)
    sizes = {}
    for name in ("iid", "quantity", "dirichlet"):
        rows = partition(data, topology(3, 3, 3, partition=name))
        sizes[name] = np.array([len(r) for r in rows])
    assert np.ptp(sizes["iid"]) <= 1
    assert sizes["quantity"].max() > 3 * sizes["quantity"].min()
    assert sizes["quantity"].sum() == sizes["dirichlet"].sum() == 1800

    def distance(alpha):
        rows = partition(data, topology(3, 3, 3, partition="dirichlet", partition_alpha=alpha))
        shares = [np.bincount(data.y[r], minlength=6) / len(r) for r in rows]
        return np.mean([abs(s - 1 / 6).sum() / 2 for s in shares])

    assert distance(0.3) > 2 * distance(5.0) > 3 * distance(1000.0)
    one_class = partition(data, topology(3, 3, partition="classes", partition_classes=1))
    assert [np.unique(data.y[r]).tolist() for r in one_class] == [[c] for c in range(6)]


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (
            {"partition": "dirichlet", "partition_alpha": 0.001},
            r"partition-alpha = 0\.001: client \d gets 0 examples; allowed: at least 3 each, .* "
            r"\(60 for 9 clients, the best of 7,974 draws\); use a larger partition-alpha, "
            "partition-balanced = true, fewer clients or more data",
        ),
        ({"partition": "classes", "partition_classes": 7}, "has examples of 6 classes; allowed: 1"),
        (
            {"partition": "shards", "partition_shards": 7},
            "9 clients have 63 shards, and there are 60 examples; allowed: at most 6",
        ),
        ({"partition": "file"}, "needs partition-file"),
        ({"partition": "shard"}, "unknown; did you mean 'shards'?"),
    ],
)
def test_partitions_that_cannot_be(config, problem):
    with pytest.raises(ConfigError, match=problem):
        partition(dataset(12), topology(3, 3, 3, **config))


def test_a_class_with_too_few_examples_for_its_clients_is_named():
    data = labelled([0] * 50 + [1] * 2)
    with pytest.raises(ConfigError, match="client 5 gets 0 of 2 examples of class 'b', which 3 "):
        partition(data, topology(6, partition="classes", partition_classes=1))


def test_a_dirichlet_partition_is_tried_often():
    # 11 draws, as many as the library makes, do not do
    data, config = labelled(np.arange(1500) % 10), {"partition": "dirichlet"}
    wanted = topology(30, partition_alpha=0.05, seed=2, **config)
    sizes = np.full(10, 150)
    rng = np.random.default_rng(int(stream(2, "partition/library").integers(2**32)))
    first = [dirichlet_counts(rng, sizes, 30, 0.05, balanced=False) for _ in range(11)]
    assert all(counts.sum(axis=0).min() < 3 for counts in first)
    rows = partition(data, wanted)
    assert min(len(own) for own in rows) >= 3
    assert sum(len(own) for own in rows) == 1500


def test_more_clients_than_examples():
    with pytest.raises(ConfigError, match="cannot share 10 examples; allowed: at least 3"):
        partition(dataset(2), topology(4, partition="quantity"))
    with pytest.raises(ConfigError, match=r"client 1 gets 2 examples; allowed: at least 3"):
        partition(dataset(1), topology(2, partition="iid"))


def test_a_dataset_without_users_says_what_is_possible():
    data = dataset(3)
    anonymous = Dataset(**{**vars(data), "names": Names(data.names.classes)})
    problem = (
        "does not say the user of an example; allowed: iid, dirichlet, shards, classes, quantity"
    )
    with pytest.raises(ConfigError, match=problem):
        partition(anonymous, topology(1))


@pytest.mark.parametrize("split", ["random", "blocked"])
def test_a_run_records_its_partition_and_can_be_given_it_again(small, split):
    how = (f"app.config.split={split}", "app.config.window-stride-seconds=1.0")  # overlapping
    first = small("app.config.partition=dirichlet", "app.config.partition-alpha=5.0", *how)
    result = run(first)
    file = result.folder / "partition.json"
    recorded = json.loads(file.read_text())
    held = federate(first)
    for server, clients in enumerate(first.hierarchy.leaf_clients):
        for client in clients:
            own = held.clients[client]
            assert recorded[str(server)][str(client)] == own.rows.tolist()
    assert any(len(own.left_out) for own in held.clients) == (split == "blocked")
    run_json = json.loads((result.folder / "run.json").read_text())
    assert run_json["settings"]["app"]["config"]["partition-alpha"] == 5.0
    assert run_json["dataset_sha256"] == held.dataset.content
    again = small("app.config.partition=file", f"app.config.partition-file={file}", *how)
    for one, other in zip(held.clients, federate(again).clients, strict=True):
        np.testing.assert_array_equal(one.train, other.train)
        np.testing.assert_array_equal(one.test, other.test)


def test_keys_of_a_file_count_in_numerical_order(tmp_path):
    file = tmp_path / "partition.json"
    content = {
        "server_10": {"client_1": [0, 1, 2]},
        "server_9": {"10": [3, 4, 5], "9": [8, 7, 6]},
    }
    file.write_text(json.dumps(content))
    rows = partition(dataset(2), topology(2, 1, partition="file", partition_file=file))
    assert [r.tolist() for r in rows] == [[6, 7, 8], [3, 4, 5], [0, 1, 2]]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot read the partition"),
        ("{", "no JSON file"),
        ("[1]", "must be {server: {client: [rows]}}"),
        ('{"a": {"0": [1]}}', "must be {server: {client: [rows]}}"),
        ('{"0": {"0": [0, 1, 2]}}', "has [1] clients per server"),
        (
            '{"0": {"0": [0, 1, 2], "1": [2, 3, 4]}}',
            "row 2 is given to a client more than once: server 0, client 0 and server 0, client 1",
        ),
        (
            '{"0": {"0": [0, 1, 2], "1": [3, 4, 10]}}',
            "server 0, client 1 has row 10; rows must be whole numbers from 0 to 9",
        ),
        ('{"s2": {"c7": [0, 1, -1], "c8": [3, 4, 5]}}', "server 2, client 7 has row -1; rows"),
        ('{"0": {"0": [0, 1, 2], "1": [3, 4, 5.5]}}', "server 0, client 1 has row 5.5; rows"),
        ('{"0": {"0": [0, 1, 2], "1": [3, 4, "5"]}}', 'client 1 has row "5"; rows must be'),
        ('{"0": {"0": [0, 1, true], "1": [3, 4, 5]}}', "client 0 has row true; rows must be"),
        ('{"0": {"0": [0, 1, NaN], "1": [3, 4, 5]}}', "client 0 has row NaN; rows must be"),
        ('{"0": {"0": [0, 1, 2], "1": "345"}}', 'client 1 has "345"; must be a list of whole'),
        ('{"0": {"0": [0, 1, 2], "1": null}}', "client 1 has null; must be a list of whole"),
        ('{"0": {"0": [0, 1, 2], "1": {"train": [3, 4]}}}', "client 1 has 'train'; allowed:"),
        (
            '{"0": {"0": [0, 1, 2], "1": {"train": [3, 4], "val": [5], "test": [6]}}}',
            "client 1 has 'train', 'val', 'test'; allowed:",
        ),
        (
            '{"0": {"0": [0, 1, 2], "1": {"train": [3, 4], "test": [5]}}}',
            "server 0, client 0 has one list, and server 0, client 1 has train and test",
        ),
        (
            '{"0": {"train": [0, 1], "test": [2]}, "1": {"train": [3, 4], "test": [10]}}',
            "server 0, client 1 test has row 10",
        ),
        (
            '{"0": {"train": [0, 1], "test": [2]}, "1": {"train": [3, 4], "test": []}}',
            "server 0, client 1 gets 2 and 0 examples; allowed: at least 3 each",
        ),
        (
            '{"0": {"train": [0, 1], "test": [2]}, "1": {"train": [3], "test": [4, 5]}}',
            "server 0, client 1 gets 1 and 2 examples; allowed: at least 3 each",
        ),
        (
            '{"0": {"train": [0, 1], "test": [2]}, "1": {"train": [3, 4], "test": [3]}}',
            "row 3 is given to a client more than once: server 0, client 1 and server 0, client 1",
        ),
        ('{"0": {"0": [0, 1, 2], "1": []}}', "client 1 gets 0 examples"),
        (f'{{"0": {{"0": [0, 1, 2], "1": [{2**70}]}}}}', "whole numbers from 0 to 9"),
        ('{"0": {"0": [0, 1, 2], "0": [3, 4, 5]}}', "key '0' stands twice"),
        ("[" * 100_000, "no JSON file"),
    ],
)
def test_files_that_are_no_partition(tmp_path, content, problem):
    file = tmp_path / "partition.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(FedgeError) as caught:
        partition(dataset(2), topology(2, partition="file", partition_file=file))
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def in_a_file(tmp_path, content, *clients, **config):
    file = tmp_path / "partition.json"
    file.write_text(json.dumps(content))
    return topology(*clients, partition="file", partition_file=file, **config)


def test_a_file_of_clients_does_for_one_server(tmp_path):
    content = {"client_10": [3, 4, 5], "client_9": [8, 7, 6]}
    rows = partition(dataset(2), in_a_file(tmp_path, content, 2))
    assert [r.tolist() for r in rows] == [[6, 7, 8], [3, 4, 5]]
    with pytest.raises(FedgeError, match=r"does for one server, but \[hierarchy\] num_servers = 2"):
        partition(dataset(2), in_a_file(tmp_path, content, 1, 1))


@pytest.mark.parametrize("nested", [True, False])
def test_train_and_test_lists_are_taken(tmp_path, small, nested):
    sides = {
        "0": {"train": [9, 30, 4, 7], "test": [40, 2]},
        "1": {"test": [0, 1, 5], "train": [50, 60]},
    }
    content = {"0": sides} if nested else sides
    own = in_a_file(tmp_path, content, 2)
    file = f"app.config.partition-file={own.data.partition_file}"
    first = small(
        *("app.config.partition=file", file, "hierarchy.num_servers=1"),
        *("hierarchy.clients_per_server=[2]", "hierarchy.global_rounds=1"),
    )
    held = federate(first)
    assert [c.train.tolist() for c in held.clients] == [[4, 7, 9, 30], [50, 60]]
    assert [c.test.tolist() for c in held.clients] == [[2, 40], [0, 1, 5]]
    # A run writes them down as they are given, so that its partition.json is the same again.
    recorded = run(first).folder / "partition.json"
    again = small(
        *("app.config.partition=file", f"app.config.partition-file={recorded}"),
        *("hierarchy.num_servers=1", "hierarchy.clients_per_server=[2]"),
    )
    for one, other in zip(held.clients, federate(again).clients, strict=True):
        np.testing.assert_array_equal(one.train, other.train)
        np.testing.assert_array_equal(one.test, other.test)
    blocked = small(
        *("app.config.partition=file", file, "app.config.split=blocked"),
        *("hierarchy.num_servers=1", "hierarchy.clients_per_server=[2]"),
    )
    with pytest.raises(ConfigError, match=r'split = "blocked": .* says itself what is held out'):
        federate(blocked)


@given(st.integers(3, 300), st.integers(0, 99))
def test_the_random_split_holds_out_a_fifth(n, seed):
    rows = np.arange(n) * 3
    client = random_split(rows, seed, 0)
    assert sorted([*client.train, *client.test]) == rows.tolist()
    assert abs(len(client.test) - 0.2 * n) <= 1
    again = random_split(rows, seed, 0)
    np.testing.assert_array_equal(client.test, again.test)
    one, other = (random_split(np.arange(300), seed, client) for client in (0, 1))
    assert not np.array_equal(one.test, other.test)


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 3), st.integers(0, 99))
def test_the_blocked_split_shares_no_sample(users, each, overlap, seed):
    data = dataset(users, each, overlap=overlap)
    rows = np.random.default_rng(seed).permutation(len(data))[: 1 + len(data) * 3 // 4]
    rows = np.sort(rows)
    owner = np.random.default_rng(seed + 1).integers(1 + (len(rows) > 9), size=len(rows))
    owners = [own for own in (rows[owner == 0], rows[owner == 1]) if len(own)]
    clients = split(data, owners, "blocked", seed)
    for own, client in zip(owners, clients, strict=True):
        assert client.rows.tolist() == own.tolist()
        assert len(client.test) > 0
        y = data.y[own]
        assert all(abs(sum(data.y[client.test] == c) - sum(y == c) / 5) <= 1 for c in set(y))
    client = ClientData(
        *(np.concatenate([getattr(c, side) for c in clients]) for side in ("train", "test"))
    )
    assert len(client.test) > 0
    assert set(client.train).isdisjoint(client.test)
    assert {*client.train, *client.test} <= set(rows.tolist())

    def samples(of):
        starts = zip(data.recording[of], data.position[of], strict=True)
        return {(r, p + k) for r, p in starts for k in range(4)}

    assert samples(client.train).isdisjoint(samples(client.test))
    if overlap == 0:
        assert len(client.train) + len(client.test) == len(rows)


def test_the_blocked_split_is_seeded_by_run_and_client():
    data = dataset(1, 300)
    again, first, seed, client = (
        blocks(data, np.arange(300), *key) for key in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, seed)
    assert not np.array_equal(first, client)


def test_positions_may_begin_anywhere():
    data = dataset(1, 40, overlap=2)
    moved = Dataset(**{**vars(data), "position": data.position - 10_000})
    for side in ("train", "test"):
        one, other = (split(d, [np.arange(40)], "blocked", 3)[0] for d in (data, moved))
        np.testing.assert_array_equal(getattr(one, side), getattr(other, side))


def test_windows_whose_recording_is_not_known_cannot_be_held_out_in_blocks(saved):
    """Half-overlapping windows of one recording, in a file that does not say so."""
    n = 60
    samples = np.arange(4 * (n + 1), dtype=float).reshape(1, -1)
    x = np.stack([samples[:, 4 * i : 4 * i + 8] for i in range(n)])
    arrays = {"X": x, "y": np.arange(n) // 20}
    own = ["app.config.dataset=arrays", "app.config.num-classes=0", "app.config.partition=iid"]

    def sides(arrays, split):
        root = f"app.config.data-root={saved(arrays)}"
        return federate(load_settings(assignments=[*own, root, f"app.config.split={split}"]))

    with pytest.raises(ConfigError, match=r'split = "blocked": .* arrays recording and position'):
        sides(arrays, "blocked")
    sides(arrays, "random")
    said = arrays | {"recording": np.zeros(n), "position": 4 * np.arange(n)}
    held_out = np.concatenate([c.test for c in sides(said, "blocked").clients])
    trained = np.concatenate([c.train for c in sides(said, "blocked").clients])
    assert (abs(trained[:, None] - held_out) > 1).all()
    # Recordings of one window each are said, too; whatever the store's codes look like.
    sides(arrays | {"recording": np.arange(n), "position": np.zeros(n)}, "blocked")


def test_stores_of_before_that_was_written_down_know_it_too(saved, tmp_path):
    n = 30
    arrays = {"X": np.random.default_rng(0).normal(size=(n, 1, 4)), "y": np.arange(n) % 2}
    said = arrays | {"recording": np.arange(n) // 3, "position": np.arange(n) % 3}
    for name, content, known in (("not", arrays, False), ("said", said, True)):
        file = saved(content, name)
        cache = f"app.config.cache-dir={tmp_path / name}"
        assert opened("arrays", file, cache).recorded == known
        [manifest] = (tmp_path / name).glob("*/manifest.json")
        of_before = json.loads(manifest.read_text())
        del of_before["recorded"], of_before["seal"]
        of_before["seal"] = hashlib.sha256(canonical(of_before)).hexdigest()
        manifest.write_text(json.dumps(of_before))
        assert opened("arrays", file, cache).recorded == known
        assert manifest.read_text() == json.dumps(of_before)  # opened, not made anew


@pytest.mark.parametrize(
    ("name", "seed", "kept"), [("user", 42, 0.95), ("user", 43, 0.95), ("dirichlet", 42, 0.7)]
)
def test_no_window_of_uci_har_is_shared_between_the_sides(shared, name, seed, kept):
    archive = np.load(shared / "data" / "uci_har" / "uci_har_21_subjects.npz")
    segment, pos = archive["segment"].astype(int), archive["pos"].astype(int)
    root = f"app.config.data-root={shared / 'data' / 'uci_har'}"
    assignments = ["app.config.dataset=uci-har", root, f"app.config.seed={seed}"]
    assignments.append(f"app.config.partition={name}")

    def shared_windows(split):
        data = federate(load_settings(assignments=[*assignments, f"app.config.split={split}"]))
        leaks = test = used = 0
        # of any client: they train one model together
        held_out = {(segment[row], pos[row]) for own in data.clients for row in own.test}
        for own in data.clients:
            leaks += sum(
                (segment[row], pos[row] + step) in held_out
                for row in own.train
                for step in (-1, 0, 1)  # windows overlap by half with their neighbours
            )
            test, used = test + len(own.test), used + len(own.test) + len(own.train)
        return leaks, test / used, used

    leaks, share, used = shared_windows("blocked")
    assert leaks == 0
    assert used > kept * len(pos)
    assert abs(share * used / len(pos) - TEST_SHARE) < 0.02
    assert shared_windows("random")[0] > 1000


def test_a_client_that_the_gaps_leave_without_training_is_named(tmp_path):
    file = tmp_path / "partition.json"
    file.write_text('{"0": {"0": [0, 1, 2], "1": [40, 100, 160, 220]}}')
    settings = topology(2, partition="file", partition_file=file, split="blocked")
    with pytest.raises(
        ConfigError, match=r'split = "blocked": client 0 keeps 0 examples .* at least 2;'
    ):
        federate(settings)  # windows 0, 1 and 2 overlap


RULES = {
    "rounds": ("hierarchy.global_rounds=3",),
    "versions": (
        *("devices.enable=true", "devices.device_speed={mean = [1.0], std = 0.3}"),
        *("devices.device_selection_size=4", "devices.max_model_version=6"),
        *("asynchronous.rule=fedbuff", "devices.num_updates_for_model=2"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *(("rounds", "meaning"), ("rounds", "lost"), ("rounds", "damaged")),
        *(("versions", "meaning"), ("versions", "file")),
    ],
)
def test_a_run_is_resumed_with_the_examples_that_it_began_with(
    small, tmp_path, monkeypatch, caplog, kind, change
):
    """Whatever its partition means since, or its file says, while the run was not at work."""
    module = sys.modules["fedge_sim.data.partition"]
    own = [*RULES[kind], "runtime.backend=inprocess"]
    if change in ("file", "gone"):
        file = tmp_path / "own.json"
        rows = np.arange(360).reshape(9, 40)
        servers = {s: {c: rows[3 * s + c].tolist() for c in range(3)} for s in range(3)}
        file.write_text(json.dumps(servers))
        own += ["app.config.partition=file", f"app.config.partition-file={file}"]
    else:  # users in the order that an older version had
        monkeypatch.setattr(module, "in_order", lambda names: list(range(len(names)))[::-1])
        monkeypatch.setattr(federated_data, "_key", None)

    def models(folder):
        files = sorted((folder / "models").glob("*.safetensors"))
        return {file.name: file.read_bytes() for file in files}

    def callbacks(*more):
        return [VersionWriter() if kind == "versions" else TableWriter(), *more]

    monkeypatch.setattr("fedge_sim.device_run.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("fedge_sim.device_run.SAVE_SHARE", math.inf)
    whole = orchestrator.run(small(*own), callbacks(WeightWriter())).folder
    stopped = small(*own, f"app.config.output-dir={tmp_path / 'stopped'}")
    with pytest.raises(KeyboardInterrupt):
        orchestrator.run(stopped, callbacks(WeightWriter(), Stopped()))
    [folder] = (tmp_path / "stopped").iterdir()
    # The run is gone on with where users have another order, or the file other rows.
    monkeypatch.setattr(module, "in_order", in_order)
    monkeypatch.setattr(federated_data, "_key", None)
    if change == "file":
        servers[0][0], servers[2][2] = servers[2][2], servers[0][0]
        file.write_text(json.dumps(servers))
    if change == "gone":
        file.unlink()
    kept = folder / "partition.json"
    if change == "lost":
        kept.unlink()
    if change == "damaged":
        clients = json.loads(kept.read_text())
        clients["0"]["0"], clients["0"]["1"] = clients["0"]["1"], clients["0"]["0"]
        kept.write_text(json.dumps(clients))
    caplog.set_level("INFO", logger="fedge_sim")
    if change in ("lost", "damaged"):
        with pytest.raises(CheckpointError):
            orchestrator.resume(folder, lambda _: callbacks(WeightWriter()))
        return
    orchestrator.resume(folder, lambda _: callbacks(WeightWriter()))
    if change == "meaning":
        assert f"clients keep the examples that they began with: {kept}" in caplog.text
    assert models(folder) == models(whole)
    assert kept.read_bytes() == (whole / "partition.json").read_bytes()
    recorded = json.loads((folder / "run.json").read_text())["settings"]["app"]["config"]
    assert recorded["partition"] == stopped.data.partition


class Stopped(Callback):
    """Stops a run when it has a checkpoint to go on from."""

    def __init__(self):
        self.ends = 0

    def on_round_end(self, record):
        self.on_version(record)

    def on_version(self, record):
        self.ends += 1
        if self.ends == 3 or (self.ends == 2 and not hasattr(record, "event")):
            raise KeyboardInterrupt


LOADS = """
import sys
from fedge_sim.config import load_settings
from fedge_sim import orchestrator
from fedge_sim.data import federate, federated_data
data = federate(load_settings(assignments=["app.config.partition=dirichlet"]))
print([own.rows.sum() for own in data.clients], "datasets" in sys.modules)
"""


def test_a_partition_is_the_same_in_all_processes(tmp_path):
    def look():
        environment = clean_environment(XDG_CACHE_HOME=str(tmp_path))
        command = [sys.executable, "-c", LOADS]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, check=True)
        return done.stdout.decode()

    first = look()
    assert first == look()
    assert first.endswith("] False\n")  # nor does it need a library of seconds and 100 MB
    # Nothing is kept beside the store that could be damaged, or be of other settings.
    assert not list((tmp_path / "fedge-sim").glob("partition*"))
