"""Anybody's own arrays: every form that is read, and whatever is refused, in one line."""

import io
import struct
import zipfile

import numpy as np
import pytest
from rich.console import Console

from fedge_sim.config import load_settings
from fedge_sim.data.base import form_of
from fedge_sim.data.partition import PARTITIONS
from fedge_sim.errors import ConfigError
from fedge_sim.reporting.progress import ConsoleReporter
from fedge_sim.reporting.tables import TableWriter
from tests.conftest import OWN, opened, run

# -------------------------------------------------------------------------- arrays


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
        ([2.0, 10.0, 2.0, 10.0, 1.0, 1.0], ("1", "10", "2"), [2, 1, 2, 1, 0, 0]),
        ([2.5, 10.0, 2.5, 10.0, 1.0, 1.0], ("1.0", "10.0", "2.5"), [2, 1, 2, 1, 0, 0]),
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


@pytest.mark.parametrize("name", ["user", "users", "subject"])
def test_users_have_several_names_and_what_is_not_read_is_named(saved, caplog, name):
    users = [2, 10, 2, 10, 1, 1]
    file = saved(OWN | {name: users, "is_test": np.zeros(6), "extra": np.zeros(2)})
    for _ in range(2):  # when the store is made, and when it is opened again
        caplog.clear()
        data = opened("arrays", file)
        assert data.names.users == ("1", "10", "2")
        assert np.array(data.names.users)[data.user].tolist() == [str(u) for u in users]
        [line] = caplog.messages
        assert "not read: is_test, extra; what is read: X, y, user (also named users" in line
    rows = PARTITIONS["user"](
        data, load_settings(assignments=["hierarchy.clients_per_server=[1, 1, 1]"])
    )
    assert [users[own[0]] for own in rows] == [1, 2, 10]


def test_user_goes_before_its_other_names(saved, caplog):
    data = opened("arrays", saved(OWN | {"subject": np.zeros(6), "user": [3, 4, 4, 3, 3, 4]}))
    assert data.names.users == ("3", "4")
    assert "not read: subject;" in caplog.text


def test_nothing_is_said_where_all_is_read(saved, caplog):
    opened("arrays", saved(OWN | {"user": np.arange(6)}))
    assert not caplog.messages


@pytest.mark.parametrize(
    ("shape", "layout", "axes"),
    [
        ((6, 40, 2), "channels-last", (0, 2, 1)),
        ((6, 2, 40), "channels-last", (0, 2, 1)),
        ((6, 40, 2), "channels-first", (0, 1, 2)),
        ((6, 8, 9, 5), "channels-last", (0, 3, 1, 2)),  # more than an image of auto has
        ((6, 3, 8, 4), "channels-last", (0, 3, 1, 2)),
        ((6, 5, 8, 9), "channels-first", (0, 1, 2, 3)),
        ((6, 9, 9, 3), "channels-first", (0, 1, 2, 3)),
    ],
)
def test_the_layout_is_what_is_said(saved, shape, layout, axes):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    data = opened("arrays", saved({"X": x, "y": np.arange(6)}), f"app.config.layout={layout}")
    np.testing.assert_array_equal(data.x, x.transpose(axes))


def test_a_layout_that_makes_no_sense(saved, refused):
    more = ["app.config.layout=channels-last"]
    file = saved({"X": np.zeros((6, 7)), "y": np.arange(6)})
    line = refused("arrays", file, error=ConfigError, more=more)
    assert 'X is (N, features), (6, 7), without channels: must be "auto"' in line
    with pytest.raises(
        ConfigError, match=r'goes with app.config.dataset = "arrays", and dataset is "digits"'
    ):
        opened("digits", "nowhere", *more)


def test_windows_with_more_channels_than_samples_are_told(saved, small, caplog):
    """A person's (N, samples, channels) is trained on as so many channels, and told; said, not."""
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    x = rng.normal(size=(90, 20, 3)) + y[:, None, None]
    file = saved({"X": x, "y": y, "user": np.arange(90) // 10})
    own = ("app.config.dataset=arrays", "app.config.num-classes=0", "hierarchy.global_rounds=1")
    caplog.set_level("INFO", logger="fedge_sim")

    def told(*more):
        caplog.clear()
        output = Console(file=io.StringIO(), width=160)
        settings = small(*own, f"app.config.data-root={file}", *more)
        run(settings, [TableWriter(), ConsoleReporter(output)])
        warnings = [r.message for r in caplog.records if r.levelname == "WARNING"]
        return warnings, caplog.text, output.file.getvalue()

    [warning], log, table = told()
    assert warning == (
        "X is read as windows of 20 channels x 3 samples: if they are 20 samples of 3 channels, "
        'set app.config.layout = "channels-last", and else "channels-first"'
    )
    assert "72 training examples of 20 channels x 3 samples (partition user, split random" in log
    assert "test accuracy after round 1: 20 channels x 3 samples, random split" in table
    for layout, form in (("last", "3 channels x 20 samples"), ("first", "20 channels x 3 samples")):
        warnings, log, table = told(f"app.config.layout=channels-{layout}")
        assert not warnings
        assert f"training examples of {form} (" in log
        assert f"test accuracy after round 1: {form}, random split" in table


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((6, 100), "6 channels x 100 samples"),
        ((1, 1), "1 channel x 1 sample"),
        ((17,), "17 features"),
        ((3, 32, 24), "3 channels x 32 x 24 pixels"),
        ((1, 8, 8), "1 channel x 8 x 8 pixels"),
    ],
)
def test_what_an_example_is_in_words(shape, words):
    assert form_of(shape) == words


def changed(value, dtype=np.float64):
    """Return the good examples with one value changed."""
    x = OWN["X"].astype(dtype)
    x[5, 1, 3] = value
    return x


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"X": changed(np.nan)}, "X holds NaN, infinity, or more than float32 can hold: nan in ex"),
        (
            {"X": changed(-np.inf)},
            "-inf in example 5, the first of 1 such; leave them out, or fill",
        ),
        ({"X": changed(1e300)}, "more than float32 can hold: 1e+300 in example 5"),
        ({"X": np.float64(np.nan)}, "nan in example 0, the first of 1 such"),
        ({"X": np.full((6, 2), "a")}, "X must be real numbers, not <U1"),
        ({"X": changed(1j, complex)}, "X must be real numbers, not complex128"),
        ({"X": changed(None, object)}, "array X holds Python objects, which only a pickle could"),
        ({"y": np.array([0, 1, 0, 1, 0, None])}, "array y holds Python objects"),
        ({"y": np.array(list("ababab"), object)}, "as text or numbers: y.astype(str) for names"),
        ({"user": np.array(list("ababab"), object)}, "array user holds Python objects"),
        ({"subject": np.array(list("ababab"), object)}, "array subject holds Python objects"),
        ({"classes": np.array(["a", "b"], object)}, "array classes holds Python objects"),
        ({"X": np.float64(3)}, "X must be (N, features)"),
        ({"X": np.zeros(6)}, "X must be (N, features)"),
        ({"X": np.zeros((6, 1, 2, 3, 4))}, "X must be (N, features)"),
        ({"X": np.zeros((0, 3)), "y": np.zeros(0)}, "there is no example in it"),
        ({"X": np.zeros((6, 2, 0))}, "none has values"),
        ({"X": np.zeros((6, 5, 8, 5))}, "at most 4 channels"),
        ({"y": np.zeros(5)}, "6 examples, but y (5,); one for each is needed"),
        ({"y": np.zeros((6, 1))}, "6 examples, but y (6, 1); one for each is needed: y[:, 0]"),
        ({"y": np.full((6, 1), "a")}, "6 examples, but y (6, 1); one for each is needed: y[:, 0]"),
        ({"y": np.eye(3)[[0, 1, 2, 0, 1, 2]]}, "y (6, 3); it is one-hot, and one class number for"),
        (
            {"y": np.eye(2, dtype=bool)[[0, 1] * 3]},
            "one-hot, and one class number for each is need",
        ),
        ({"y": np.eye(6)[:5]}, "6 examples, but y (5, 6); one for each is needed"),
        ({"y": np.full((6, 2), 0.5)}, "6 examples, but y (6, 2); one for each is needed"),
        ({"y": np.full((6, 2), "a")}, "6 examples, but y (6, 2); one for each is needed"),
        ({"y": np.full(6, 0.5)}, "y must be whole numbers, not 0.5 (example 0, the first of 6"),
        ({"y": np.array([0, 1, np.nan] * 2)}, "y must be whole numbers, not nan (example 2, the f"),
        ({"y": np.full(6, np.inf)}, "y must be whole numbers, not inf"),
        ({"y": np.full(6, 2**64 - 1, np.uint64)}, "y must be from"),
        ({"y": np.full(6, b"\xe9")}, "y cannot be read as text"),
        ({"classes": ["a"]}, "y must be from 0 to 0, but are from 0 to 1"),
        ({"classes": ["a", "b"], "y": -OWN["y"]}, "y must be from 0 to 1, but are from -1"),
        ({"classes": ["a", "b"], "y": list("aabbab")}, "y holds names, and classes has the names"),
        ({"classes": []}, "classes must be a list of names"),
        ({"classes": [["a", "b"]]}, "classes must be a list of names"),
        ({"user": np.zeros(5)}, "6 examples, but user (5,); one for each is needed"),
        ({"users": np.zeros((6, 1))}, "6 examples, but users (6, 1); one for each is needed"),
        ({"user": np.full(6, b"\xe9")}, "user cannot be read as text"),
        (
            {"user": np.array([1, np.nan] * 3)},
            "user must be names or numbers, not nan (example 1, ",
        ),
        ({"subject": np.array([1, np.inf] * 3)}, "subject must be names or numbers, not inf"),
        ({"recording": np.zeros(5), "position": np.zeros(6)}, "6 examples, but recording (5,)"),
        ({"recording": np.zeros(6), "position": np.zeros(5)}, "6 examples, but position (5,)"),
        (
            {"recording": np.array([0, np.nan] * 3), "position": np.arange(6)},
            "recording must be names or numbers, not nan",
        ),
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


def test_a_single_array_says_what_it_is(tmp_path, refused):
    file = tmp_path / "X.npy"
    np.save(file, OWN["X"])
    line = refused("arrays", file)
    assert "it is one array alone (.npy); save it with numpy.savez(file, X=..., y=...)" in line


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_files_that_are_no_archive(saved, refused, damage):
    file = saved(OWN)
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    assert "not an .npz file that can be read" in refused("arrays", file)
