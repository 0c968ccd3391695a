"""Which client holds which examples, and which of them are held out."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge_sim.config import load_settings
from fedge_sim.data import federate
from fedge_sim.data.base import ClientData, Dataset, Names
from fedge_sim.data.partition import PARTITIONS, partition
from fedge_sim.data.split import TEST_SHARE, blocks, random_split, split
from fedge_sim.errors import ConfigError, FedgeError
from tests.conftest import ROOT, clean_environment, run


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


@settings(max_examples=15)
@given(
    st.sampled_from(["iid", "dirichlet", "shards", "quantity"]),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(0, 99),
)
def test_partitions_of_the_library(name, clients, seed):
    data = dataset(20, 30)
    wanted = topology(*clients, partition=name, partition_alpha=1.0, seed=seed)
    rows = partition(data, wanted)
    assert len(rows) == sum(clients)
    together = np.concatenate(rows)
    assert len(np.unique(together)) == len(together)
    assert all((np.diff(r) > 0).all() for r in rows)
    again = partition(data, wanted)
    other = partition(data, topology(*clients, partition=name, partition_alpha=1.0, seed=seed + 1))
    assert all(np.array_equal(a, b) for a, b in zip(rows, again, strict=True))
    if len(rows) > 1:
        assert not all(np.array_equal(a, b) for a, b in zip(rows, other, strict=True))
    if name == "shards":
        assert {len(np.unique(data.y[r])) for r in rows} == {2}
    else:
        assert len(together) == 600


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
    one_class = partition(data, topology(3, 3, partition="shards", partition_classes=1))
    assert [np.unique(data.y[r]).tolist() for r in one_class] == [[c] for c in range(6)]


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"partition": "dirichlet", "partition_alpha": 0.001}, "cannot deal 60 examples out"),
        ({"partition": "shards", "partition_classes": 7}, "has examples of 6 classes; allowed: 1"),
        ({"partition": "file"}, "needs partition-file"),
        ({"partition": "shard"}, "unknown; did you mean 'shards'?"),
    ],
)
def test_partitions_that_cannot_be(config, problem):
    with pytest.raises(ConfigError, match=problem):
        partition(dataset(12), topology(3, 3, 3, **config))


def test_more_clients_than_examples():
    with pytest.raises(ConfigError, match="cannot share 10 examples"):
        partition(dataset(2), topology(4, partition="quantity"))
    with pytest.raises(ConfigError, match=r"client 1 gets 2 examples; allowed: at least 3"):
        partition(dataset(1), topology(2, partition="iid"))


def test_a_dataset_without_users_says_what_is_possible():
    data = dataset(3)
    anonymous = Dataset(**{**vars(data), "names": Names(data.names.classes)})
    problem = "does not say the user of an example; allowed: iid, dirichlet, shards, quantity, file"
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
        ('{"0": {"0": [0, 1, 2], "1": [2, 3, 4]}}', "row 2 is given"),
        ('{"0": {"0": [0, 1, 2], "1": [3, 4, 10]}}', "whole numbers from 0 to 9"),
        ('{"0": {"0": [0, 1, 2], "1": [3, 4, -1]}}', "whole numbers from 0 to 9"),
        ('{"0": {"0": [0, 1, 2], "1": [3, 4, 5.5]}}', "whole numbers from 0 to 9"),
        ('{"0": {"0": [0, 1, 2], "1": "345"}}', "whole numbers from 0 to 9"),
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
    with pytest.raises(ConfigError, match=r'split = "blocked": client 0 keeps 0 examples'):
        federate(settings)  # windows 0, 1 and 2 overlap


LOADS = """
import sys
from fedge_sim.config import load_settings
from fedge_sim.data import federate
data = federate(load_settings(assignments=["app.config.partition=iid"]))
print("datasets" in sys.modules, [own.rows.sum() for own in data.clients])
"""


def test_a_partition_of_the_library_is_made_once_for_all_processes(tmp_path):
    def look():
        environment = clean_environment(XDG_CACHE_HOME=str(tmp_path))
        command = [sys.executable, "-c", LOADS]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, check=True)
        return done.stdout.decode().split(maxsplit=1)

    first, again = look(), look()
    assert (first[0], again[0]) == ("True", "False")
    assert first[1] == again[1]
    (file,) = (tmp_path / "fedge-sim").glob("partition-*.npy")
    for damaged in (b"", b"no array", file.read_bytes()[:-80]):
        file.write_bytes(damaged)
        assert look() == first
