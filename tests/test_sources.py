"""UCI HAR and CIFAR-10 from their archives and original files, and what is refused of these."""

import pickle
import struct

import numpy as np
import pytest

from fedge_sim.data import (
    cifar10,
    uci_har,
)
from fedge_sim.errors import ConfigError
from tests.conftest import CIFAR_NPZ, UCI_NPZ, data_config, opened

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
    assert cifar10.recipe(data_config("cifar10", file)).files == (file,)
    folder = cifar10.recipe(data_config("cifar10", file.parent))
    assert folder.files == (file.parent / "cifar10_train.npz",)
    archive, data = np.load(file), opened("cifar10", file)
    np.testing.assert_array_equal(data.x[:500].transpose(0, 2, 3, 1), archive["x"][:500])
    np.testing.assert_array_equal(data.y, archive["y"])
    assert data.names.classes == tuple(archive["classes"])


def test_cifar10_is_averaged_down_to_a_size(shared, saved):
    file = shared / CIFAR_NPZ
    whole, half = (opened("cifar10", file, f"app.config.image-size={s}") for s in (0, 16))
    assert half.x.shape == (3000, 3, 16, 16)
    assert half.content != whole.content
    assert half.x[7, 2, 3, 15] == whole.x[7, 2, 6:8, 30:32].mean()
    np.testing.assert_allclose(half.x.mean((0, 2, 3)), whole.x.mean((0, 2, 3)), rtol=1e-4)
    one = opened("cifar10", file, "app.config.image-size=1")
    np.testing.assert_allclose(one.x[:, :, 0, 0], whole.x.mean((2, 3)), rtol=1e-4)
    as_it_is = cifar10.recipe(data_config("cifar10", file, "app.config.image-size=32"))
    assert as_it_is.settings == cifar10.recipe(data_config("cifar10", file)).settings


def test_original_batches_are_averaged_down_too(batches):
    small = opened("cifar10", batches(python3(batch(3, n=3))), "app.config.image-size=8")
    first = batch(1, n=1)[b"data"].reshape(3, 32, 32)
    assert small.x.shape == (15, 3, 8, 8)
    assert small.x[0, 1, 2, 3] == first[1, 8:12, 12:16].mean()


def test_sizes_that_images_cannot_have(shared, refused):
    file, odd = shared / CIFAR_NPZ, ("app.config.image-size=12",)
    line = refused("cifar10", file, "image-size = 12", ConfigError, odd)
    assert "must be 0 (as they are), 1, 2, 4, 8, 16, 32" in line
    line = refused("digits", "nowhere", "image-size = 12", ConfigError, odd)
    assert 'goes with app.config.dataset = "cifar10", and dataset is "digits"' in line


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
