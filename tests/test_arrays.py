"""Anybody's own arrays: every form that is read, and whatever is refused, in one line."""

import io
import struct
import zipfile

import numpy as np
import pytest

from tests.conftest import OWN, opened

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
