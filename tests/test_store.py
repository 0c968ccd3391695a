"""The store: made once, mapped by all, never half-written, and repaired when damaged."""

import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fedge_sim.data import store
from fedge_sim.data.base import Names
from fedge_sim.data.store import FORMAT, Recipe, cache_folder, open_dataset
from fedge_sim.errors import DataError
from tests.conftest import ROOT, clean_environment

NAMES = Names(classes=("a", "b"), users=("u", "v"))


def recipe(n: int = 10, files: tuple[Path, ...] = (), made: list | None = None, **settings):
    """Return a recipe for n windows (2, 3), which notes in ``made`` that it was carried out."""

    def write(writer):
        if made is not None:
            made.append(n)
        half = n // 2
        x = np.arange(n * 6, dtype=np.float64).reshape(n, 2, 3)
        writer.add(x[:half], np.zeros(half), user=0, recording=7, position=np.arange(half))
        writer.add(x[half:], np.ones(n - half), user=1)
        return NAMES, {"read": n}

    return Recipe("test", settings, files, write)


@pytest.fixture
def warnings(caplog):
    logging.getLogger("fedge_sim").propagate = True
    caplog.set_level(logging.WARNING, "fedge_sim")
    return lambda: [record.getMessage() for record in caplog.records]


def folders(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


def test_what_is_written_is_read(tmp_path):
    made = []
    for _ in range(3):
        data = open_dataset(recipe(made=made), tmp_path)
        assert data.x.dtype == np.float32
        np.testing.assert_array_equal(data.x, np.arange(60).reshape(10, 2, 3))
        assert data.y.tolist() == [0] * 5 + [1] * 5
        assert data.y.dtype == np.int64
        assert data.user.tolist() == [0] * 5 + [1] * 5
        assert data.recording.tolist() == [7] * 5 + [5, 6, 7, 8, 9]
        assert data.position.tolist() == [0, 1, 2, 3, 4] + [0] * 5
        assert data.device.tolist() == [-1] * 10
        assert data.names == NAMES
        assert data.report == {"read": 10}
        with pytest.raises(ValueError, match="read-only"):
            data.x[0] = 1
    assert made == [10]
    assert len(folders(tmp_path)) == 1
    plain = np.load(tmp_path / folders(tmp_path)[0] / "X.npy")  # numpy's own reader
    np.testing.assert_array_equal(plain, data.x)


def test_a_changed_setting_or_file_makes_a_new_store(tmp_path):
    cache, source, made = tmp_path / "cache", tmp_path / "source.csv", []
    source.write_text("1")

    def make(**settings):
        return open_dataset(recipe(files=(source,), made=made, **settings), cache)

    make(rate=50)
    make(rate=50)
    assert len(made) == 1
    make(rate=100)
    assert len(made) == 2
    source.write_text("22")
    make(rate=50)
    assert len(made) == 3
    os.utime(source, ns=(1, 1))  # the same size, written again
    make(rate=50)
    assert len(made) == 4
    make(rate=100)
    assert len(made) == 5
    source = source.rename(cache / "other.csv")
    make(rate=100)
    assert len(made) == 6


def test_the_content_hash_is_of_the_content(tmp_path):
    one = open_dataset(recipe(rate=1), tmp_path)
    same = open_dataset(recipe(rate=2), tmp_path)
    other = open_dataset(recipe(n=11), tmp_path)
    assert one.content == same.content != other.content
    assert len(one.content) == 64


def damage_nothing(folder):
    pass


def truncate(folder):
    os.truncate(folder / "X.npy", 200)


def flip_a_byte(folder):
    with (folder / "X.npy").open("r+b") as file:
        file.seek(140)
        file.write(b"\xff")


def other_version(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["format"] = FORMAT + 1
    (folder / "manifest.json").write_text(json.dumps(manifest))


def other_names(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"u"', '"w"'))


def no_manifest(folder):
    (folder / "manifest.json").unlink()


def half_a_manifest(folder):
    os.truncate(folder / "manifest.json", 50)


def list_as_manifest(folder):
    (folder / "manifest.json").write_text("[1]")


def no_labels(folder):
    (folder / "y.npy").unlink()


def other_arrays(folder):
    """A manifest that is whole, but speaks of other arrays."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["seal"]
    del manifest["arrays"]["y"]
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["seal"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_nothing, None),
        (truncate, "X.npy has 200 bytes, expected 368"),
        (flip_a_byte, "X.npy has another hash than when it was written"),
        (other_version, f"it is of format {FORMAT + 1}, this version writes {FORMAT}"),
        (other_names, "manifest.json was changed"),
        (no_manifest, "manifest.json cannot be read"),
        (half_a_manifest, "manifest.json cannot be read"),
        (list_as_manifest, "manifest.json cannot be read"),
        (no_labels, "y.npy is missing"),
        (other_arrays, "manifest.json and arrays do not fit"),
    ],
)
def test_a_damaged_store_is_made_anew_and_that_is_said(tmp_path, warnings, damage, said):
    made = []
    before = open_dataset(recipe(made=made), tmp_path).x.copy()
    folder = tmp_path / folders(tmp_path)[0]
    damage(folder)
    after = open_dataset(recipe(made=made), tmp_path)
    np.testing.assert_array_equal(after.x, before)
    assert len(made) == (1 if said is None else 2)
    assert [said in w and "it is made anew" in w for w in warnings()] == [True] * (len(made) - 1)
    open_dataset(recipe(made=made), tmp_path)
    assert len(made) == (1 if said is None else 2)
    assert folders(tmp_path) == [folder.name]


def test_whatever_is_damaged_the_same_examples_are_opened(tmp_path):
    def found():
        data = open_dataset(recipe(), tmp_path)
        arrays = (data.x, data.y, data.user, data.recording, data.position)
        return [array.tolist() for array in arrays], data.names, data.content, dict(data.report)

    expected = found()
    folder = tmp_path / folders(tmp_path)[0]
    rng = np.random.default_rng(0)
    for number in range(150):
        file = sorted(folder.iterdir())[int(rng.integers(8))]
        content = bytearray(file.read_bytes())
        begin, end = sorted(rng.choice(len(content) + 1, 2, replace=False).tolist())
        if number % 3 == 0:
            content[begin] ^= 1 << int(rng.integers(8))
        elif number % 3 == 1:
            del content[begin:end]
        else:
            content[begin:end] = bytes(end - begin)
        file.write_bytes(content)
        assert found() == expected
        assert len(list(folder.iterdir())) == 8


def test_a_copied_store_is_hashed_once_and_taken(tmp_path, monkeypatch):
    made, hashed = [], []
    open_dataset(recipe(made=made), tmp_path / "one")
    # copytree gives files other times of change
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    monkeypatch.setattr(
        store, "_hash", lambda file, own=store._hash: hashed.append(file.name) or own(file)
    )
    for _ in range(2):
        open_dataset(recipe(made=made), tmp_path / "two")
    assert len(made) == 1
    assert len(hashed) == len(set(hashed)) == 7


def test_an_open_store_outlives_its_replacement(tmp_path):
    old = open_dataset(recipe(), tmp_path)
    flip_a_byte(tmp_path / folders(tmp_path)[0])
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(old.x, open_dataset(recipe(), tmp_path).x)
    assert old.x[3, 1, 2] == 23


class BugError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "expected", "problem"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DataError, "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), DataError, "cannot be used"),
        (DataError("no good"), DataError, "^no good$"),
        (BugError("a bug"), BugError, "a bug"),
    ],
)
def test_a_failure_leaves_nothing(tmp_path, error, expected, problem):
    def write(writer):
        writer.add(np.zeros((5, 2, 3)), np.zeros(5))
        (writer.scratch / "rows").write_text("much")
        raise error

    with pytest.raises(expected, match=problem):
        open_dataset(Recipe("test", {}, (), write), tmp_path)
    assert folders(tmp_path) == []


def test_a_store_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    def forbidden(folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(store, "_open", forbidden)  # root may read everything
    with pytest.raises(DataError, match=r"cannot be used \(Permission denied\); set .* cache-dir"):
        open_dataset(recipe(), tmp_path)


def test_a_disk_that_is_truly_full(tmp_path):
    """On a small file system of its own, where this user may make one."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a small file system")
    try:

        def write(writer):
            writer.add(np.zeros((1000, 6, 100)), np.zeros(1000))
            return NAMES, {}

        with pytest.raises(DataError, match=r"the disk is full.*set .* cache-dir to another"):
            open_dataset(Recipe("test", {}, (), write), small)
        assert folders(small) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(
    ("added", "problem"),
    [
        ([], "there is no example"),
        ([(np.zeros((2, 3)), [0, 1, 1])], "2 examples, but labels"),
        ([(np.full((2, 3), np.nan), [0, 1])], "NaN or infinity"),
        ([(np.full((2, 3), 1e39), [0, 1])], "NaN or infinity"),  # beyond float32
        ([(np.zeros((2, 3)), [0, 2])], "y must be from 0 to 1, but is from 0 to 2"),
        ([(np.zeros((2, 3)), [-1, 0])], "y must be from 0 to 1, but is from -1 to 0"),
        ([(np.zeros((2, 0)), [0, 1])], "examples must have values"),
        ([(np.zeros(2), [0, 1])], "examples must have values"),
        ([(np.zeros((2, 3)), [0, 1]), (np.zeros((2, 4)), [0, 1])], "of shapes (3,) and (4,)"),
        ([(np.zeros((2, 3)), [0, 1], 5)], "user must be from 0 to 1"),
        ([(np.zeros((2, 3)), [0, 1], -1)], "user must be from 0 to 1"),
    ],
)
def test_what_a_writer_refuses(tmp_path, added, problem):
    def write(writer):
        for x, y, *user in added:
            writer.add(x, y, user=user[0] if user else 0)
        return NAMES, {}

    with pytest.raises(DataError) as caught:
        open_dataset(Recipe("test", {}, (), write), tmp_path)
    assert problem in str(caught.value)
    assert folders(tmp_path) == []


def test_the_cache_is_this_users_or_the_one_that_is_set(monkeypatch):
    from fedge_sim.config import load_settings

    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder(load_settings().data) == Path("/somewhere/fedge-sim")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(load_settings().data) == Path.home() / ".cache" / "fedge-sim"
    own = load_settings(assignments=["app.config.cache-dir=/own"]).data
    assert cache_folder(own) == Path("/own")


SLOW_BUILD = """
import sys, time
from pathlib import Path
import numpy as np
from fedge_sim.data.base import Names
from fedge_sim.data.store import Recipe, open_dataset

cache, log = Path(sys.argv[1]), Path(sys.argv[2])

def write(writer):
    with log.open("a") as file:
        file.write("build\\n")
    for part in range(20):
        writer.add(np.full((50, 6, 100), part), np.zeros(50))
        time.sleep(float(sys.argv[3]))
    return Names(("a",)), {}

data = open_dataset(Recipe("slow", {}, (), write), cache)
assert data.x[:, 0, 0].tolist() == [part for part in range(20) for _ in range(50)]
print("opened")
"""


def start_build(cache: Path, log: Path, pause: float) -> subprocess.Popen:
    command = [sys.executable, "-c", SLOW_BUILD, str(cache), str(log), str(pause)]
    return subprocess.Popen(
        command, cwd=ROOT, env=clean_environment(), stdout=subprocess.PIPE, text=True
    )


def test_processes_that_build_at_once_share_one_build(tmp_path):
    log = tmp_path / "log"
    builds = [start_build(tmp_path / "cache", log, 0.05) for _ in range(3)]
    assert [b.communicate(timeout=300)[0] for b in builds] == ["opened\n"] * 3
    assert log.read_text() == "build\n"
    assert len(folders(tmp_path / "cache")) == 1


def test_a_killed_build_is_never_used_and_is_cleared_away(tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    killed = start_build(cache, log, 30)
    deadline = time.monotonic() + 300
    while not (log.exists() and folders(cache)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    killed.kill()
    killed.communicate()
    assert [Path(name).suffix for name in folders(cache)] == [".tmp"]
    again = start_build(cache, log, 0)
    assert again.communicate(timeout=300)[0] == "opened\n"
    assert log.read_text() == "build\nbuild\n"
    assert [Path(name).suffix for name in folders(cache)] == [""]


OPEN_AND_READ = """
import sys
from pathlib import Path
import numpy as np
from fedge_sim.data.base import Names
from fedge_sim.data.store import Recipe, open_dataset

def write(writer):
    for part in range(200):
        writer.add(np.full((1000, 6, 100), part % 7), np.zeros(1000))
    return Names(("a",)), {}

def private():  # clean pages of the file belong to the page cache, which all share
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous"))

before = private()
data = open_dataset(Recipe("large", {}, (), write), Path(sys.argv[1]))
opened = private()
total = sum(float(data.x[i : i + 1000].sum()) for i in range(0, len(data), 1000))
print(opened - before, private() - before, data.x.nbytes)
"""


def test_an_open_store_is_not_private_memory(tmp_path):
    """However large it is: 480 MB here, which a copy would show."""

    def look():
        command = [sys.executable, "-c", OPEN_AND_READ, str(tmp_path)]
        done = subprocess.run(
            command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=True
        )
        return [int(number) for number in done.stdout.split()]

    look()  # makes it
    opened, read, size = look()
    assert size == 480_000_000
    assert opened < 20e6
    assert read < 50e6
