"""The datasets: what is read, how it is scaled, and what is refused, in one line."""

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fedge_sim.config import load_settings
from fedge_sim.data import (
    DATASETS,
    base,
    cifar10,
    federate,
    federated_data,
    hhar_synthetic,
    load_dataset,
    uci_har,
)
from fedge_sim.data.base import Dataset, Examples, Standardisation
from fedge_sim.errors import ConfigError, DataError
from tests.conftest import run

UCI_NPZ = "data/uci_har/uci_har_21_subjects.npz"
CIFAR_NPZ = "data/cifar10_jpeg/cifar10_test.npz"

# Of the real data: folder or file, setting, shape of x, classes that occur, users.
REAL = {
    "cifar10": (CIFAR_NPZ, "seed=1", (3000, 3, 32, 32), range(10), 0),
    # nobody rides a bike there
    "hhar": ("data/hhar_schema", "use-watches=false", (2973, 6, 100), [0, 1, 2, 4, 5], 9),
    "uci-har": ("data/uci_har", "seed=1", (7352, 6, 128), range(6), 21),
}
FREE = {  # the same of those that need no file
    "digits": ("seed=1", (1797, 1, 8, 8), range(10), 0),
    "hhar-synthetic": ("synthetic-windows-per-client=7", (63, 6, 100), range(6), 9),
}


def config(dataset, root="nowhere", *more):
    """Return the settings of a dataset whose classes are as many as there are."""
    pairs = [f"app.config.dataset={dataset}", f"app.config.data-root={root}"]
    return load_settings(assignments=[*pairs, "app.config.num-classes=0", *more]).data


def opened(dataset, root="nowhere", *more) -> Dataset:
    return load_dataset(config(dataset, root, *more))


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


# ------------------------------------------------------------------ every dataset


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_every_dataset_is_the_same_whenever_it_is_made(name, request, saved, tmp_path):
    if name in REAL:
        path, setting, shape, classes, users = REAL[name]
        root = request.getfixturevalue("shared") / path
    elif name == "arrays":
        root, setting, shape, classes, users = saved(OWN), "seed=1", (6, 2, 4), range(2), 0
    else:
        root, (setting, shape, classes, users) = "nowhere", FREE[name]
    setting = f"app.config.{setting}"
    first = opened(name, root, setting)
    made_anew = opened(name, root, setting, f"app.config.cache-dir={tmp_path / 'cache'}")
    assert first.x.shape == shape
    assert first.x.dtype == np.float32
    assert first.y.dtype == np.int64
    assert np.isfinite(first.x).all()
    assert first.x.std() > 0
    assert np.unique(first.y).tolist() == list(classes)
    assert len(first.names.classes) == max(classes) + 1
    assert np.unique(first.user).tolist() == (list(range(users)) or [-1])
    assert list(first.names.users) == sorted(set(first.names.users))
    assert len(first.names.users) == users
    assert first.x.tobytes() == made_anew.x.tobytes()
    for array in ("y", "user", "model", "device", "recording", "position"):
        np.testing.assert_array_equal(getattr(first, array), getattr(made_anew, array))
    assert first.content == made_anew.content
    assert first.names == made_anew.names


def test_the_number_of_classes_must_be_that_of_the_dataset():
    with pytest.raises(ConfigError, match="num-classes = 6: dataset 'digits' has 10 classes"):
        opened("digits", "nowhere", "app.config.num-classes=6")
    assert len(opened("digits", "nowhere", "app.config.num-classes=10").names.classes) == 10
    assert len(opened("digits", "nowhere", "app.config.num-classes=0").names.classes) == 10


@pytest.mark.parametrize(
    ("dataset", "needs"),
    [
        ("arrays", "needs an .npz file"),
        ("cifar10", "needs the folder cifar-10-batches-py or the file cifar10_train.npz"),
        ("hhar", "needs the file Phones_accelerometer.csv"),
        ("uci-har", "needs the file uci_har_21_subjects.npz or the folder UCI HAR Dataset"),
        ("digit", "unknown; did you mean 'digits'?"),
    ],
)
def test_a_source_that_is_not_there(refused, tmp_path, dataset, needs):
    names, error = ("digit", ConfigError) if dataset == "digit" else (tmp_path, DataError)
    assert needs in refused(dataset, tmp_path, names, error)


def test_one_copy_is_kept(small):
    first = federated_data(small())
    assert federated_data(small()) is first
    two = small("hierarchy.num_servers=2", "hierarchy.clients_per_server=[2,2]")
    assert len(federated_data(two).clients) == 4
    other = federated_data(small("app.config.seed=1"))
    assert len(other.clients) == 9
    assert other.dataset.content != first.dataset.content


# ---------------------------------------------------------------- standardisation


def moments(examples: Examples, rows):
    x = examples.batch(rows)[0].double()
    axes = (0, *range(2, x.ndim))
    return x.mean(axes).numpy(), x.std(axes, correction=0).numpy()


def test_statistics_come_from_the_training_examples_of_all_clients(small):
    data = federate(small())
    train = np.concatenate([own.train for own in data.clients])
    assert len(train) < 0.85 * len(data.dataset)
    for client in range(len(data.clients)):
        mean, std = moments(data.examples(client), train)
        np.testing.assert_allclose(mean, 0, atol=1e-5)
        np.testing.assert_allclose(std, 1, atol=1e-5)
    mean, _ = moments(data.examples(0), np.arange(len(data.dataset)))
    assert abs(mean).max() > 1e-4  # over all examples they are a little off


def test_statistics_come_from_the_training_examples_of_each_client(small):
    data = federate(small("app.config.standardise=client"))
    for client, own in enumerate(data.clients):
        mean, std = moments(data.examples(client), own.train)
        np.testing.assert_allclose(mean, 0, atol=1e-5)
        np.testing.assert_allclose(std, 1, atol=1e-5)
        mean, _ = moments(data.examples(client), own.test)
        assert abs(mean).max() > 1e-3


def test_values_can_be_left_as_they_are(small):
    data = federate(small("app.config.standardise=none"))
    rows = np.array([3, 0, 200])
    for client in (0, 8):
        x, y = data.examples(client).batch(rows)
        np.testing.assert_array_equal(x, data.dataset.x[rows])
        np.testing.assert_array_equal(y, data.dataset.y[rows])


def test_features_are_scaled_one_by_one_by_hand():
    x = np.array([[1, 2, 7], [3, 6, 7], [100, 100, 9]], np.float32)
    scale = Standardisation.of(x, np.array([1, 0]))
    np.testing.assert_allclose(scale.mean, [2, 4, 7])
    np.testing.assert_allclose(scale.std, [1, 2, 1])  # the last never changes in training
    scaled, y = Examples(x, np.array([5, 6, 7]), scale).batch(np.array([2, 0]))
    np.testing.assert_allclose(scaled, [[98, 48, 2], [-1, -1, 0]])
    assert y.tolist() == [7, 5]
    assert x[0].tolist() == [1, 2, 7]  # a batch is a copy


def test_images_are_scaled_by_channel_by_hand():
    x = np.zeros((3, 2, 1, 2), np.float32)
    x[:, 0, 0] = [[1, 3], [5, 7], [50, 50]]  # mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    x[:, 1, 0] = 0.1
    scale = Standardisation.of(np.repeat(x, 1000, axis=0), np.arange(2000))
    np.testing.assert_allclose(scale.mean, [4, 0.1])
    np.testing.assert_allclose(scale.std, [np.sqrt(5), 1])
    scaled = Examples(x, np.zeros(3, np.int64), scale).batch(np.array([0]))[0]
    np.testing.assert_allclose(scaled[0, 0, 0], np.array([-3, -1]) / np.sqrt(5), rtol=1e-6)
    assert scaled[0, 1].tolist() == [[0, 0]]


def test_a_large_offset_costs_no_digits(monkeypatch):
    monkeypatch.setattr(base, "CHUNK_BYTES", 10_000)  # many chunks, the last one short
    noise = np.random.default_rng(0).normal(size=(1003, 2, 50))
    x = (1e6 + noise * [[1.0], [30.0]]).astype(np.float32)
    rows = np.random.default_rng(1).permutation(1003)[:801]
    exact = x[rows].astype(np.float64)
    scale = Standardisation.of(x, rows)
    np.testing.assert_allclose(scale.mean, exact.mean(axis=(0, 2)), rtol=6e-8)  # of float32
    np.testing.assert_allclose(scale.std, exact.std(axis=(0, 2)), rtol=2e-7)
    mean, std = moments(Examples(x, np.zeros(1003, np.int64), scale), rows)
    assert abs(mean).max() < 0.04  # float32 has steps of 1/16 there
    np.testing.assert_allclose(std, 1, atol=1e-3)


# ----------------------------------------------------------------- hhar-synthetic


def synthetic(*more) -> Dataset:
    return opened("hhar-synthetic", "nowhere", *(f"app.config.{pair}" for pair in more))


def test_synthetic_is_made_from_the_seed():
    first, other = synthetic(), synthetic("seed=43")
    for user in range(9):  # all of it, not only the first user
        own = first.x[first.user == user]
        assert own[:50].tobytes() != other.x[other.user == user][:50].tobytes()
    assert first.names.users == tuple("abcdefghi")
    counts = np.bincount(first.user * 6 + first.y, minlength=54)
    assert counts.min() >= 59  # every user does every activity for at least a minute
    assert counts.max() <= 99
    assert len(np.unique(counts)) > 10


def test_rate_and_length_of_windows():
    data = synthetic("sample-rate-hz=100", "window-seconds=1.5", "window-stride-seconds=0.25")
    assert data.example_shape == (6, 150)
    goes_on = np.diff(data.recording) == 0
    assert goes_on.sum() == len(data) - 54  # a recording for each user and activity
    assert (np.diff(data.position)[goes_on] == 25).all()
    assert (data.position[1:][~goes_on] == 0).all()
    ours, next_ones = data.x[:-1][goes_on], data.x[1:][goes_on]
    np.testing.assert_array_equal(ours[:, :, 25:], next_ones[:, :, :-25])
    as_long = synthetic("sample-rate-hz=100", "window-seconds=1.0", "window-stride-seconds=0.5")
    assert as_long.example_shape == synthetic().example_shape
    assert as_long.x[0].tobytes() != synthetic().x[0].tobytes()


@pytest.mark.parametrize(("windows", "by_activity"), [(13, [3, 2, 2, 2, 2, 2]), (4, [1] * 4)])
def test_synthetic_grows_to_any_number_of_users(windows, by_activity):
    data = synthetic("synthetic-clients=30", f"synthetic-windows-per-client={windows}")
    assert data.names.users == tuple(f"{user:02d}" for user in range(30))
    np.testing.assert_array_equal(data.user, np.repeat(np.arange(30), windows))
    for user in range(30):
        assert np.bincount(data.y[data.user == user]).tolist() == by_activity
    assert len(np.unique(data.x[:, 0, 0])) == len(data)  # nobody is somebody's copy


@pytest.mark.parametrize("users", [1, 26, 27, 100, 101, 1234])
def test_names_of_users_are_sorted_as_text(users):
    names = hhar_synthetic.user_names(users)
    assert len(set(names)) == users
    assert names == sorted(names)


@pytest.mark.parametrize(("users", "windows"), [(9, 0), (30, 60)])
def test_the_last_third_carries_the_device_the_other_way(users, windows):
    data = synthetic(f"synthetic-clients={users}", f"synthetic-windows-per-client={windows}")
    turned = np.arange(users) >= users * 2 // 3
    gravity = [data.x[data.user == user][:, :3].mean(axis=(0, 2)) for user in range(users)]
    assert np.argmax(gravity, axis=1).tolist() == np.where(turned, 0, 2).tolist()
    # and walking looks like sitting there: it moves less
    walking, sitting = (
        [data.x[(data.user == u) & (data.y == label), :3].std(axis=2).mean() for u in range(users)]
        for label in (0, 1)
    )
    assert (np.less(walking, sitting) == turned).all()


def test_windows_that_cannot_be_made():
    with pytest.raises(ConfigError, match=r"window-seconds = 61.0: .* at most 60 s"):
        synthetic("window-seconds=61.0")
    with pytest.raises(ConfigError, match=r"window-seconds = 0.02: .* at least 2 samples"):
        synthetic("window-seconds=0.02")


# Of this program alone: what getrusage says has the peak of the process that started it, too.
MEMORY = """
import re, sys
from pathlib import Path
from fedge_sim.config import load_settings
from fedge_sim.data import load_dataset
for users in (9, 500):
    pairs = {"cache-dir": sys.argv[1], "synthetic-clients": users}
    pairs["synthetic-windows-per-client"] = 60
    config = load_settings(assignments=[f"app.config.{k}={v}" for k, v in pairs.items()]).data
    data = load_dataset(config)
    status = Path("/proc/self/status").read_text()
    print(data.x.nbytes, int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1]) * 1024)
"""


def test_memory_does_not_grow_with_the_users(tmp_path):
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (_, little), (size, peak) = ([int(n) for n in line.split()] for line in output.splitlines())
    assert size == 72_000_000
    assert peak - little < 30_000_000


# ------------------------------------------------------------------------- uci-har


def test_uci_har_is_read_from_folder_or_file(shared):
    file = shared / UCI_NPZ
    archive = np.load(file)
    for root in (file.parent, file):
        data = opened("uci-har", root)
        np.testing.assert_array_equal(data.x, archive["X"])
        np.testing.assert_array_equal(data.y, archive["y"])
        np.testing.assert_array_equal(data.recording, archive["segment"])
        np.testing.assert_array_equal(data.position, 64 * archive["pos"].astype(int))
        people = np.array(data.names.users)[data.user]
        np.testing.assert_array_equal(people, archive["subject"].astype(str))
        assert data.names.classes == uci_har.CLASSES == tuple(archive["classes"])


@pytest.fixture(scope="module")
def part(shared):
    """Windows of people 1, 3 and 11, 60 each, in the order of the real data."""
    archive = np.load(shared / UCI_NPZ)
    rows = np.concatenate([np.flatnonzero(archive["subject"] == p)[:60] for p in (1, 3, 11)])
    names = ("X", "y", "subject", "segment", "pos")
    return {name: archive[name][rows] for name in names} | {"classes": archive["classes"]}


@pytest.fixture(scope="module")
def written(part, tmp_path_factory):
    """The part in the original's form of text files."""
    folder = tmp_path_factory.mktemp("uci") / uci_har.FOLDER / "train"
    signals = folder / "Inertial Signals"
    signals.mkdir(parents=True)
    for channel, name in enumerate(f"{s}_{a}" for s in ("total_acc", "body_gyro") for a in "xyz"):
        np.savetxt(signals / f"{name}_train.txt", part["X"][:, channel], "%16.7e", delimiter="")
    np.savetxt(folder / "y_train.txt", part["y"] + 1, "%d")
    np.savetxt(folder / "subject_train.txt", part["subject"], "%d")
    return folder


@pytest.mark.parametrize("above", [0, 1, 2])
def test_uci_har_is_read_from_the_original_text_files(written, part, above):
    root = (written, *written.parents)[above]
    data = opened("uci-har", root)
    np.testing.assert_allclose(data.x, part["X"], rtol=1e-7, atol=1e-12)
    np.testing.assert_array_equal(data.y, part["y"])
    assert data.names.classes == uci_har.CLASSES
    assert data.names.users == ("1", "11", "3")
    np.testing.assert_array_equal(data.user, np.repeat([0, 2, 1], 60))
    # The recordings are found from the samples: the archive has them from elsewhere.
    np.testing.assert_array_equal(np.diff(data.recording) != 0, np.diff(part["segment"]) != 0)
    assert len(np.unique(data.recording)) == len(np.unique(part["segment"])) > 10
    np.testing.assert_array_equal(data.position, 64 * part["pos"].astype(int))


def _drop_last_line(text):
    return "\n".join(text.splitlines()[:-1]) + "\n"


@pytest.mark.parametrize(
    ("name", "damage", "problem"),
    [
        ("body_gyro_y_train.txt", None, "is missing"),
        ("y_train.txt", None, "is missing"),
        ("total_acc_x_train.txt", _drop_last_line, "has 179 lines, expected 180"),
        ("y_train.txt", _drop_last_line, "has 179 lines, expected 180"),
        ("subject_train.txt", _drop_last_line, "has 179 lines, expected 180"),
        ("y_train.txt", lambda text: "7" + text[1:], "labels must be from 1 to 6"),
        ("y_train.txt", lambda text: "1.5" + text[1:], "labels must be whole numbers, not 1.5"),
        ("y_train.txt", lambda text: "", "no data"),
        ("total_acc_z_train.txt", lambda text: "walking up " * 9, "could not convert"),
        ("total_acc_z_train.txt", lambda text: text.replace("e", " ", 1), "columns"),
        ("total_acc_z_train.txt", lambda text: "1.0\n" * 180, "has 1 columns, expected 128"),
        ("body_gyro_x_train.txt", lambda text: "nan" + text[16:], "holds NaN"),
        ("body_gyro_x_train.txt", lambda text: "1e99" + text[16:], "more than float32 can hold"),
    ],
)
def test_damaged_text_files(written, tmp_path, refused, name, damage, problem):
    root = tmp_path / uci_har.FOLDER / "train"
    for file in written.rglob("*.txt"):
        copy = root / file.relative_to(written)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.name != name:
            copy.symlink_to(file)
        elif damage is not None:
            copy.write_text(damage(file.read_text()))
    assert problem in refused("uci-har", tmp_path, names=name)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ({"X": np.zeros((180, 6))}, "windows must be (windows, channels, samples)"),
        ({"X": np.full((180, 6, 8), np.nan)}, "holds NaN"),
        ({"X": np.zeros((0, 6, 128))}, "there is no example in it"),
        ({"y": np.zeros(3)}, "180 examples, but y (3,)"),
        ({"y": np.full(180, 6)}, "y must be from 0 to 5, but are from 6 to 6"),
        ({"subject": np.zeros(3)}, "180 windows, but subject (3,)"),
        ({"segment": np.full(180, "a")}, "segment must be whole numbers"),
        ({"segment": np.full(180, 2**31)}, "segment must be from"),
        ({"pos": np.full(180, 0.5)}, "pos must be whole numbers, not 0.5"),
        ({"pos": np.full(180, 2**26)}, "pos must be from 0"),
    ],
)
def test_damaged_archives_of_uci_har(part, saved, refused, damage, problem):
    assert problem in refused("uci-har", saved(part | damage))


# ------------------------------------------------------------------------- cifar10


def test_cifar10_is_read_from_folder_or_file(shared):
    file = shared / CIFAR_NPZ
    assert cifar10.recipe(config("cifar10", file)).files == (file,)
    folder = cifar10.recipe(config("cifar10", file.parent))
    assert folder.files == (file.parent / "cifar10_train.npz",)
    archive, data = np.load(file), opened("cifar10", file)
    np.testing.assert_array_equal(data.x[:500].transpose(0, 2, 3, 1), archive["x"][:500])
    np.testing.assert_array_equal(data.y, archive["y"])
    assert data.names.classes == tuple(archive["classes"])


def batch(number=0, n=4):
    """Return what one of the original files holds, with keys in bytes."""
    data = np.random.default_rng(number).integers(0, 256, (n, 3072), dtype=np.uint8)
    labels = [(number + k) % 10 for k in range(n)]
    names = [b"a_%d.png" % k for k in range(n)]
    return {b"batch_label": b"batch", b"labels": labels, b"data": data, b"filenames": names}


def python3(content) -> bytes:
    return pickle.dumps(content, protocol=2)


def python2(content) -> bytes:
    """Return the pickle that the original's Python 2 would write: text is bytes."""
    data = content[b"data"]

    def text(value):
        return b"U" + bytes([len(value)]) + value

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN"
    dtype += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"M" + struct.pack("<H", data.shape[0]) + b"M" + struct.pack("<H", data.shape[1])
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b")
    array += b"\x87R(K\x01" + shape + b"\x86" + dtype + b"\x89"
    array += b"T" + struct.pack("<I", data.nbytes) + data.tobytes() + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in content[b"labels"]) + b"e"
    names = b"](" + b"".join(text(name) for name in content[b"filenames"]) + b"e"
    items = text(b"batch_label") + text(content[b"batch_label"]) + text(b"labels") + labels
    items += text(b"data") + array + text(b"filenames") + names
    return b"\x80\x02}(" + items + b"u."


@pytest.fixture
def batches(tmp_path):
    """Return a function from the bytes of file 3 to the folder around all five files."""

    def write(third, dumps=python3):
        folder = tmp_path / cifar10.FOLDER
        folder.mkdir()
        for number in range(1, 6):
            content = third if number == 3 else dumps(batch(number, n=number))
            if content is not None:
                (folder / f"data_batch_{number}").write_bytes(content)
        return tmp_path

    return write


@pytest.mark.parametrize("dumps", [python3, python2])
def test_cifar10_is_read_from_the_original_batches(batches, dumps):
    root = batches(dumps(batch(3, n=3)), dumps)
    for folder in (root, root / cifar10.FOLDER):
        data = opened("cifar10", folder)
        parts = [batch(number, n=number) for number in range(1, 6)]
        x = np.concatenate([part[b"data"] for part in parts]).reshape(-1, 3, 32, 32)
        np.testing.assert_array_equal(data.x, x)
        assert data.y.tolist() == [label for part in parts for label in part[b"labels"]]
        assert data.names.classes == cifar10.CLASSES


class Calls:
    """Pickled, it asks the reader to call a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", ["os.system", "exec", "dict.update"])
def test_a_pickle_cannot_run_code(batches, refused, tmp_path, function):
    import os

    victim = tmp_path / "victim"
    calls = {
        "os.system": Calls(os.system, f"touch '{victim}'"),
        "exec": Calls(exec, f"open({str(victim)!r}, 'w')"),
        "dict.update": Calls(getattr, dict, "update"),
    }
    bad = python3(batch() | {b"filenames": calls[function]})
    if function == "os.system":  # it would work
        pickle.loads(bad)
        victim.unlink()
    line = refused("cifar10", batches(bad), names="data_batch_3")
    assert "which no batch needs" in line
    assert not victim.exists()


def _with(**changes):
    return python3(batch() | {key.encode(): value for key, value in changes.items()})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file"),
        (b"", "is no batch of CIFAR-10"),
        (b"no pickle", "is no batch of CIFAR-10"),
        (python3(batch())[:5000], "is no batch of CIFAR-10"),
        (b"\x80\x04\x95" + b"\xff" * 8, "is no batch of CIFAR-10: FRAME length"),
        (b"\x80\x02Px\n.", "is no batch of CIFAR-10"),  # an error of two lines
        (b"\x80\x04\x8c\x03a\nb\x8c\x01c\x93.", "it asks for a b.c"),
        (python3([1, 2]), "but a list"),
        (python3({"data": 1}), "has no images of 3072 values"),
        (_with(data=np.full((4, 3072), None, object)), "not of bytes"),
        (_with(data=np.full((4, 3072), 1, ">i4")), "not of bytes"),
        (_with(data=batch()[b"data"][:, 1:]), "has no images of 3072 values"),
        (_with(labels=[1, 2, 3]), "4 examples, but labels (3,)"),
        (_with(labels=None), "has no list of labels"),
        (_with(labels=[1, [2], 3, 4]), "has no list of labels"),
        (_with(labels=[1, 2, 3, 10]), "labels must be from 0 to 9"),
        (_with(labels=[1, 2, 3, -1]), "labels must be from 0 to 9"),
        (_with(labels=[1, 2, 3, 10**30]), "labels must be whole numbers"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value),
)
def test_damaged_batches(batches, refused, content, problem):
    assert problem in refused("cifar10", batches(content), names="data_batch_3")


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"x": np.zeros((2, 3, 32, 32)), "y": np.zeros(2)}, "images must be (N, 32, 32, 3)"),
        ({"x": np.zeros((2, 32, 32, 3)), "y": np.zeros(3)}, "2 examples, but labels (3,)"),
        ({"x": np.zeros((2, 32, 32, 3)), "y": np.array([0, 10])}, "labels must be from 0 to 9"),
        ({"X": np.zeros((2, 32, 32, 3)), "y": np.zeros(2)}, "has no array x, only X, y"),
    ],
)
def test_damaged_archives_of_cifar10(saved, refused, arrays, problem):
    assert problem in refused("cifar10", saved(arrays))


# -------------------------------------------------------------------------- arrays

OWN = {"X": np.arange(48.0).reshape(6, 2, 4) - 20, "y": np.array([0, 1, 1, 0, 1, 0])}


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((6, 2, 40), None),
        ((6, 17), None),
        ((6, 3, 8, 9), None),
        ((6, 1, 8, 9), None),
        ((6, 8, 9, 3), (0, 3, 1, 2)),
        ((6, 8, 9, 4), (0, 3, 1, 2)),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float64, np.float16])
def test_forms_of_examples(saved, shape, axes, dtype):
    x = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    data = opened("arrays", saved({"X": x, "y": np.arange(6)}))
    np.testing.assert_array_equal(data.x, x if axes is None else x.transpose(axes))
    assert data.recording.tolist() == list(range(6))  # independent of each other
    assert data.position.tolist() == [0] * 6
    assert data.user.tolist() == [-1] * 6


@pytest.mark.parametrize(
    ("arrays", "classes", "codes"),
    [
        ({"y": [0, 2, 1, 2, 0, 1]}, "0 1 2", [0, 2, 1, 2, 0, 1]),
        ({"y": [7, -3, 100, 7, 7, -3]}, "-3 7 100", [1, 0, 2, 1, 1, 0]),
        ({"y": np.array([7.0, -3.0, 100.0, 7.0, 7.0, -3.0])}, "-3 7 100", [1, 0, 2, 1, 1, 0]),
        ({"y": ["run", "sit", "run", "é", "sit", "run"]}, "run sit é", [0, 1, 0, 2, 1, 0]),
        ({"y": [s.encode() for s in ("é", "b", "b", "a", "a", "a")]}, "a b é", [2, 1, 1, 0, 0, 0]),
        ({"y": [True, False, True, True, False, True]}, "False True", [1, 0, 1, 1, 0, 1]),
        ({"y": [2, 0, 2, 0, 0, 0], "classes": ["c", "b", "a"]}, "c b a", [2, 0, 2, 0, 0, 0]),
        ({"y": [1, 0, 1, 0, 0, 0], "classes": [b"no", b"yes"]}, "no yes", [1, 0, 1, 0, 0, 0]),
    ],
)
def test_forms_of_labels(saved, arrays, classes, codes):
    data = opened("arrays", saved(OWN | arrays))
    assert data.names.classes == tuple(classes.split())
    assert data.y.tolist() == codes


@pytest.mark.parametrize(
    ("user", "names", "codes"),
    [
        ([2, 10, 2, 10, 1, 1], ("1", "10", "2"), [2, 1, 2, 1, 0, 0]),
        (["zoe", "al", "al", "al", "al", "zoe"], ("al", "zoe"), [1, 0, 0, 0, 0, 1]),
        ([s.encode() for s in "bbaaéé"], ("a", "b", "é"), [1, 1, 0, 0, 2, 2]),
    ],
)
def test_users_and_recordings(saved, user, names, codes):
    recording, position = ["b", "b", "a", "a", "c", "c"], [0, 4, 0, 8, -3, 2**31 - 1]
    more = {"user": user, "recording": recording, "position": position}
    data = opened("arrays", saved(OWN | more))
    assert data.names.users == names
    assert data.user.tolist() == codes
    assert data.recording.tolist() == [1, 1, 0, 0, 2, 2]
    assert data.position.tolist() == position


def changed(value, dtype=np.float64):
    """Return the good examples with one value changed."""
    x = OWN["X"].astype(dtype)
    x[5, 1, 3] = value
    return x


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"X": changed(np.nan)}, "holds NaN"),
        ({"X": changed(-np.inf)}, "holds NaN, infinity"),
        ({"X": changed(1e300)}, "more than float32 can hold"),
        ({"X": np.full((6, 2), "a")}, "must be real numbers, not <U1"),
        ({"X": changed(1j, complex)}, "must be real numbers, not complex128"),
        ({"X": changed(None, object)}, "Object arrays cannot be loaded"),
        ({"y": np.array([0, 1, 0, 1, 0, None])}, "Object arrays cannot be loaded"),
        ({"user": np.array([0, 1, 0, 1, 0, None])}, "Object arrays cannot be loaded"),
        ({"X": np.float64(3)}, "X must be (N, features)"),
        ({"X": np.zeros(6)}, "X must be (N, features)"),
        ({"X": np.zeros((6, 1, 2, 3, 4))}, "X must be (N, features)"),
        ({"X": np.zeros((0, 3)), "y": np.zeros(0)}, "there is no example in it"),
        ({"X": np.zeros((6, 2, 0))}, "none has values"),
        ({"X": np.zeros((6, 5, 8, 5))}, "at most 4 channels"),
        ({"y": np.zeros(5)}, "6 examples, but labels (5,)"),
        ({"y": np.zeros((6, 1))}, "6 examples, but labels (6, 1)"),
        ({"y": np.full((6, 1), "a")}, "6 examples, but labels (6, 1)"),
        ({"y": np.full(6, 0.5)}, "labels must be whole numbers, not 0.5"),
        ({"y": np.full(6, np.nan)}, "labels must be whole numbers, not nan"),
        ({"y": np.full(6, np.inf)}, "labels must be whole numbers, not inf"),
        ({"y": np.full(6, 2**64 - 1, np.uint64)}, "labels must be from"),
        ({"y": np.full(6, b"\xe9")}, "y cannot be read as text"),
        ({"classes": ["a"]}, "labels must be from 0 to 0, but are from 0 to 1"),
        ({"classes": ["a", "b"], "y": -OWN["y"]}, "labels must be from 0 to 1, but are from -1"),
        ({"classes": ["a", "b"], "y": list("aabbab")}, "labels must be whole numbers"),
        ({"classes": []}, "classes must be a list of names"),
        ({"classes": [["a", "b"]]}, "classes must be a list of names"),
        ({"user": np.zeros(5)}, "6 examples, but user (5,)"),
        ({"user": np.full(6, b"\xe9")}, "user cannot be read as text"),
        ({"recording": np.zeros(5), "position": np.zeros(6)}, "6 examples, but recording (5,)"),
        ({"recording": np.zeros(6), "position": np.zeros(5)}, "6 examples, but position (5,)"),
        ({"recording": np.zeros(6)}, "recording and position belong together"),
        ({"position": np.zeros(6)}, "recording and position belong together"),
        ({"recording": np.zeros(6), "position": np.full(6, 0.5)}, "position must be whole"),
        ({"recording": np.zeros(6), "position": np.full(6, 2**31)}, "position must be from"),
    ],
)
def test_arrays_that_are_refused(saved, refused, arrays, problem):
    assert problem in refused("arrays", saved(OWN | arrays))


def test_an_array_that_is_missing(saved, refused):
    line = refused("arrays", saved({"X": OWN["X"], "labels": OWN["y"]}))
    assert "has no array y, only X, labels;" in line
    assert "has no array X, y, only nothing;" in refused("arrays", saved({}))


def header(shape: str) -> bytes:
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def zipped(x: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return an archive whose X.npy holds some bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("X.npy", x)
        archive.writestr("y.npy", b"")
    return stream.getvalue()


def encrypted(whole: bytes) -> bytes:
    """Return an archive that says that its first file is encrypted."""
    changed = bytearray(whole)
    changed[6] |= 1
    changed[whole.index(b"PK\x01\x02") + 8] |= 1
    return bytes(changed)


def overwritten(whole: bytes) -> bytes:
    """Return an archive with wrong bytes in its first file."""
    return whole[:60] + b"\xff" * 15 + whole[75:]


DAMAGE = {
    "empty": lambda whole: b"",
    "text": lambda whole: b"no archive",
    "only a beginning": lambda whole: b"PK\x03\x04" + bytes(100),
    "truncated": lambda whole: whole[: len(whole) // 2],
    "a plain .npy": lambda whole: header("(1,)") + bytes(8),
    "encrypted": encrypted,
    **{
        f"overwritten, compression {method}": lambda whole, method=method: overwritten(
            zipped(header("(9,)") + bytes(72), method)
        )
        for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    },
    "no array in it": lambda whole: zipped(b"no array"),
    "73 TiB": lambda whole: zipped(header("(10000000000000,)")),
    "too large a number": lambda whole: zipped(header(f"({10**30},)")),
    "a header cut off": lambda whole: zipped(header("(1,")),
    "a long header": lambda whole: zipped(header("(1,)" + 20_000 * " ")),  # three lines of error
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_files_that_are_no_archive(saved, refused, damage):
    file = saved(OWN)
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    assert "not an .npz file that can be read" in refused("arrays", file)


# ---------------------------------------------------------------------------- runs


def test_digits_are_learnt(small):
    settings = small(
        "app.config.dataset=digits",
        "app.config.num-classes=0",
        "app.config.model=mlp",
        "app.config.partition=iid",
        "hierarchy.global_rounds=4",
        "hierarchy.local_epochs=3",
    )
    last = run(settings, []).last
    assert len(last.clients) == 9
    assert last.mean_client_accuracy > 0.8


@pytest.mark.parametrize(("model", "n"), [("cnn2d", 300), ("resnet18", 9)])
def test_a_round_on_images(small, shared, saved, model, n):
    images = np.load(shared / CIFAR_NPZ)
    file = saved({"X": images["x"][:n], "y": images["y"][:n], "classes": images["classes"]})
    settings = small(
        "app.config.dataset=arrays",
        f"app.config.data-root={file}",
        "app.config.num-classes=10",
        f"app.config.model={model}",
        "app.config.partition=iid",
        "hierarchy.clients_per_server=[1, 1, 1]",
        "hierarchy.global_rounds=1",
    )
    last = run(settings, []).last
    assert last.central_test.num_examples + last.central_train.num_examples == n
    losses = [last.central_test.loss, *(client.train_loss for client in last.clients)]
    assert len(losses) == 4
    assert np.isfinite(losses).all()


def test_a_run_with_a_scale_for_each_client_says_them(small):
    settings = small("app.config.standardise=client", "hierarchy.global_rounds=1")
    folder = run(settings).folder / "models"
    note = json.loads((folder / "models.json").read_text())
    data = federated_data(settings)
    assert list(note["mean"]) == list(note["std"]) == [str(client) for client in range(9)]
    client = 7
    mean, std = note["mean"][str(client)], note["std"][str(client)]
    code = note["load"]
    for word, value in {
        "NAME": note["name"],
        "EXAMPLE_SHAPE": note["example_shape"],
        "NUM_CLASSES": note["num_classes"],
        "FILE": str(folder / "global.safetensors"),
        "MEAN": mean,
        "STD": std,
    }.items():
        code = code.replace(word, repr(value))
    rows = data.clients[client].test
    scope = {"x": torch.tensor(data.dataset.x[rows])}
    exec(code, scope)
    with torch.inference_mode():
        logits = scope["model"](data.examples(client).batch(rows)[0])
    torch.testing.assert_close(scope["logits"].detach(), logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(np.float32(mean), data.scales[client].mean)
    assert not np.array_equal(data.scales[client].mean, data.scales[0].mean)


def test_the_smallest_clients_and_smaller_ones(small, saved):
    def settings(n):
        arrays = {"X": np.eye(n), "y": np.arange(n) % 3}
        root = f"app.config.data-root={saved(arrays, f'{n} examples')}"
        more = ("app.config.partition=iid", "app.config.num-classes=3", "app.config.model=mlp")
        return small("app.config.dataset=arrays", root, *more, "hierarchy.global_rounds=1")

    assert np.isfinite(run(settings(27), []).last.central_test.loss)
    with pytest.raises(DataError, match=r"client 8 gets 2 examples") as caught:
        run(settings(26), [])  # found by a node, which answers so
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
