import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedge_sim.data
from fedge_sim.config import load_settings
from fedge_sim.data import federate, federated_data, hhar_synthetic, uci_har
from fedge_sim.data.base import WindowDataset
from fedge_sim.data.partition import by_user, split
from fedge_sim.errors import ConfigError, DataError
from tests.conftest import run


def dataset(users: int, windows_each: int = 5) -> WindowDataset:
    n = users * windows_each
    return WindowDataset(
        x=np.zeros((n, 6, 4), np.float32),
        y=np.arange(n) % 6,
        user=np.repeat(np.arange(users), windows_each),
        users=tuple(f"{i:03d}" for i in range(users)),
        classes=tuple("abcdef"),
    )


def test_left_over_users_by_hand():
    # 21 users on 9 clients: two each; users 18, 19, 20 to clients 0 of 0, 1 of 1, 2 of 2
    rows = by_user(dataset(21, 1), [3, 3, 3])
    expected = [[2 * c, 2 * c + 1] for c in range(9)]
    expected[0].append(18)
    expected[4].append(19)
    expected[8].append(20)
    assert [r.tolist() for r in rows] == expected


def test_left_over_users_of_uneven_servers_by_hand():
    # 8 users on [1, 2]: two each, left-overs 6, 7 to server 0 client 0, server 1 client 1
    rows = by_user(dataset(8, 1), [1, 2])
    assert [r.tolist() for r in rows] == [[0, 1, 6], [2, 3], [4, 5, 7]]


@given(st.integers(1, 40), st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_every_window_has_one_owner(users, clients_per_server):
    if sum(clients_per_server) > users:
        with pytest.raises(ConfigError, match=f"the dataset has {users}; allowed: at most {users}"):
            by_user(dataset(users), clients_per_server)
        return
    rows = by_user(dataset(users), clients_per_server)
    assert len(rows) == sum(clients_per_server)
    assert sorted(np.concatenate(rows)) == list(range(users * 5))


@given(st.integers(3, 300), st.integers(0, 99))
def test_split_holds_out_a_fifth(n, seed):
    rows = np.arange(n) * 3
    client = split(rows, seed, 0)
    assert sorted([*client.train, *client.test]) == rows.tolist()
    assert abs(len(client.test) - 0.2 * n) <= 1
    again, other = split(rows, seed, 0), split(np.arange(300), seed, 1)
    np.testing.assert_array_equal(client.test, again.test)
    assert not np.array_equal(split(np.arange(300), seed, 0).test, other.test)


def test_too_few_windows_for_a_batch_of_batchnorm(monkeypatch, small):
    monkeypatch.setitem(fedge_sim.data.DATASETS, "tiny", lambda _: dataset(9, 2))
    problem = (
        r"\[hierarchy\] clients_per_server = \[3, 3, 3\]: client 0 gets 2 windows; allowed: at"
    )
    with pytest.raises(ConfigError, match=problem):
        federate(small("app.config.dataset=tiny"))
    with pytest.raises(DataError, match=problem) as caught:  # and through a node's answer
        run(small("app.config.dataset=tiny"))
    assert caught.value.exit_code == 2
    monkeypatch.setitem(fedge_sim.data.DATASETS, "tiny", lambda _: dataset(9, 3))
    assert np.isfinite(run(small("app.config.dataset=tiny"), []).last.central_test.loss)


def test_statistics_come_from_training_windows():
    data = federate(load_settings())
    train = np.concatenate([c.train for c in data.clients])
    x = data.x.numpy()
    np.testing.assert_allclose(x[train].mean(axis=(0, 2)), 0, atol=1e-3)
    np.testing.assert_allclose(x[train].std(axis=(0, 2)), 1, atol=1e-3)
    assert abs(x.mean(axis=(0, 2))).max() > 1e-4  # over all windows they are a little off


def test_synthetic_is_made_from_the_seed():
    def load(*overrides):
        return hhar_synthetic.load(load_settings(assignments=overrides).data)

    first, again, other = load(), load(), load("app.config.seed=43")
    assert first.x.tobytes() == again.x.tobytes()
    assert first.x[:100].tobytes() != other.x[:100].tobytes()
    assert first.window_shape == (6, 100)
    assert first.x.dtype == np.float32
    assert first.x.flags.c_contiguous
    assert len(first.users) == 9
    counts = np.bincount(first.user * 6 + first.y, minlength=54)
    assert counts.min() >= 59  # every user does every activity for at least a minute
    fast = load("app.config.sample-rate-hz=100", "app.config.window-seconds=1.5")
    assert fast.window_shape == (6, 150)


def test_uci_har_is_read_from_folder_or_file(shared):
    root = shared / "data" / "uci_har"
    for path in (root, root / uci_har.FILE):
        settings = load_settings(assignments=[f"app.config.data-root={path}"])
        data = uci_har.load(settings.data)
        assert data.x.shape == (7352, 6, 128)
        assert len(data.users) == 21
        assert list(data.users) == sorted(data.users)
        assert data.classes[0] == "WALKING"


GOOD = {
    "X": np.zeros((4, 6, 8)),
    "y": np.array([0, 1, 1, 0]),
    "subject": np.array([2, 2, 10, 10]),
    "classes": np.array(["a", "b"]),
}


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ({"X": np.zeros((4, 6))}, "windows must be (windows, channels, samples)"),
        ({"X": np.full((4, 6, 8), np.nan)}, "NaN or infinity"),
        ({"X": np.full((4, 6, 8), "x")}, "not the archive"),
        ({"y": np.zeros(3)}, "4 windows, but labels (3,)"),
        ({"y": np.array([0, 1, 2, 0])}, "labels must be from 0 to 1"),
        ({}, None),
    ],
)
def test_what_an_archive_must_hold(tmp_path, damage, problem):
    file = tmp_path / "x.npz"
    np.savez(file, **GOOD | damage)
    config = load_settings(assignments=[f"app.config.data-root={file}"]).data
    if problem is None:
        assert uci_har.load(config).users == ("10", "2")
        return
    with pytest.raises(DataError) as caught:
        uci_har.load(config)
    assert problem in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04" + bytes(100), "array"])
def test_files_that_are_no_archive(tmp_path, content):
    file = tmp_path / "x.npz"
    if content == "array":
        with file.open("wb") as stream:
            np.save(stream, np.zeros(3))
    else:
        file.write_bytes(content)
    config = load_settings(assignments=[f"app.config.data-root={file}"]).data
    with pytest.raises(DataError, match="not the archive"):
        uci_har.load(config)


def test_one_copy_is_kept(small):
    settings = small()
    assert federated_data(settings) is federated_data(small())
    assert federated_data(small("app.config.seed=1")) is not federated_data(settings)
