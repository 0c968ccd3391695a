"""Checkpoints: what is saved comes back, damage is told, files are cut back."""

import json
import os
import re
import struct
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

from fedge_sim import checkpoint
from fedge_sim.checkpoint import PATHS, Checkpoints, load, save, settings_to_go_on_with
from fedge_sim.config import load_settings
from fedge_sim.data.base import ClientData, DataSummary
from fedge_sim.errors import CheckpointError

DTYPES = ("f2", "f4", "f8", "i1", "i4", "i8", "u1", "u8", "?")
arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0))
)
plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text())
trees = st.recursive(
    plain | arrays,
    lambda parts: (
        st.lists(parts, max_size=4)
        | st.lists(parts, max_size=4).map(tuple)
        | st.dictionaries(
            st.text() | st.sampled_from(["array", "tuple", "dict"]), parts, max_size=4
        )
    ),
    max_leaves=12,
)
STATE = {
    "round": 3,
    "model": {"w": np.arange(6.0).reshape(2, 3), "steps": np.array(7)},
    "labels": (0, 1, 1),
    "losses": [1.5, float("nan"), float("inf")],
}


def same(a, b) -> bool:
    """Whether two trees are equal to the last bit, the order of keys included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return a != a if b != b else struct.pack("d", a) == struct.pack("d", b)
    return a == b


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoint") / "state.safetensors"


@given(trees)
def test_what_is_saved_comes_back(file, tree):
    save(file, tree)
    assert same(load(file), tree)


def test_arrays_in_other_orders_come_back_by_value(file):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    save(file, {"turned": array.T, "part": array[::2, 1:], "big": array.astype(">f4")})
    loaded = load(file)
    assert same(loaded["turned"], array.T.copy())
    assert same(loaded["part"], array[::2, 1:].copy())
    assert same(loaded["big"], array)
    assert all(part.flags.writeable for part in loaded.values())


def test_scalars_of_numpy_come_back_as_arrays(file):
    save(file, {"steps": np.array(7) + 1, "mean": np.float32(0.5)})  # arithmetic makes them
    assert same(load(file), {"steps": np.array(8), "mean": np.array(0.5, np.float32)})


def test_a_checkpoint_is_replaced_whole(file):
    save(file, {"round": 1})
    with pytest.raises(TypeError, match=r"1j \(complex\) can be no part of a state"):
        save(file, {"round": 2, "wrong": 1j})
    with pytest.raises(TypeError, match="keys of a state are str, not 7"):
        save(file, {"round": 2, "wrong": {7: 0}})
    assert load(file) == {"round": 1}
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_checkpoint_that_is_missing_or_cannot_be_written(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load(tmp_path / "state.safetensors")
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path / "no such folder" / "state.safetensors", STATE)


def test_a_checkpoint_cut_short_anywhere_is_damaged(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    save(whole, STATE)
    data = whole.read_bytes()
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            load(cut)


@pytest.mark.parametrize("bit", [0, 5, 7])
def test_one_wrong_bit_anywhere_is_told(tmp_path, bit):
    whole, wrong = tmp_path / "whole", tmp_path / "wrong"
    save(whole, STATE)
    data = whole.read_bytes()
    unnoticed = []
    for place in range(len(data)):
        wrong.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        with suppress(CheckpointError):  # blanks of the header may change
            if not same(load(wrong), STATE):
                unnoticed.append(place)
            if load(wrong, arrays=False)["losses"][0] != 1.5:
                unnoticed.append(place)
    assert not unnoticed


def test_a_checkpoint_is_read_without_its_arrays(file):
    save(file, STATE)
    found = load(file, arrays=False)
    assert found["model"] == {"w": None, "steps": None}
    assert (found["round"], found["labels"]) == (3, (0, 1, 1))


def test_the_checkpoint_of_another_version_is_told(tmp_path, monkeypatch):
    file = tmp_path / checkpoint.NAME
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT - 1)
    save(file, {"x": np.zeros(3)})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="another version of fedge-sim"):
        load(file)
    # As format 3 was written: one digest of all.
    save_file({"0": np.zeros(3)}, file, {"tree": '[3, {"array": "0"}]', "sha256": "f00d"})
    with pytest.raises(CheckpointError, match=r"another version of fedge-sim .* start a new run"):
        load(file)


def test_a_pickle_is_not_opened(tmp_path):
    np.save(tmp_path / "state.npy", np.array([print]), allow_pickle=True)
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path / "state.npy")


def test_an_array_in_several_places_is_written_once(tmp_path):
    model = {"w": np.zeros(10_000)}
    save(tmp_path / "once", {"one": model, "other": [model, model]})
    assert (tmp_path / "once").stat().st_size < 2 * model["w"].nbytes
    np.testing.assert_array_equal(load(tmp_path / "once")["other"][1]["w"], model["w"])


# ------------------------------------------------------------------ of a run

CLIENTS = (ClientData(np.arange(3), np.array([3])), ClientData(np.arange(5, 7), np.array([4])))
DATA = DataSummary(CLIENTS, (6, 100), ("a", "b"), (), "f00d")
SETTINGS = load_settings()
METRICS = Path("metrics/seed_42")


@pytest.fixture
def results(tmp_path):
    """A results folder, as a run has it after a round."""
    metrics, clusters = tmp_path / "metrics" / "seed_42", tmp_path / "clusters"
    metrics.mkdir(parents=True)
    clusters.mkdir()
    (metrics / "a.csv").write_bytes(b"round\n1\n")
    (tmp_path / "timeline.csv").write_bytes(b"x\n")
    (clusters / "clusters_g1.json").write_bytes(b"[0]")
    (metrics / "cluster_history.json").write_bytes(b"[[0]]")
    run = {"settings": SETTINGS.model_dump(mode="json", by_alias=True), "classes": ["a", "b"]}
    (tmp_path / "run.json").write_text(json.dumps(run))
    return tmp_path


def checkpoints(folder, settings=SETTINGS, data=DATA):
    return Checkpoints(folder, settings, data.content, data.clients)


def test_files_are_cut_back_to_what_they_were(results):
    first = checkpoints(results)
    first.save({"round": 1}, ended=False)
    files = [
        results / METRICS / "a.csv",
        results / "timeline.csv",
        results / "clusters" / "clusters_g1.json",
    ]
    before = {file: file.read_bytes() for file in files}
    for file in files[:2]:
        with file.open("a") as stream:
            stream.write("2\n")
    (results / METRICS / "new.csv").write_text("round\n")
    (results / "clusters" / "clusters_g2.json").write_text("[0]")
    (results / METRICS / "cluster_history.json").write_text("[1]")
    (results / "my own.csv").write_text("of no concern")
    after = checkpoints(results)
    tree = after.restore()
    assert tree["round"] == 1
    assert files[1].read_bytes() == b"x\n2\n"  # nothing is changed yet
    after.cut_back(tree)
    assert {file: file.read_bytes() for file in files} == before
    assert not (results / METRICS / "new.csv").exists()
    assert not (results / "clusters" / "clusters_g2.json").exists()
    assert (results / METRICS / "cluster_history.json").read_text() == "[1]"
    assert (results / "my own.csv").exists()


def test_only_what_was_added_is_read_for_a_checkpoint(results, monkeypatch):
    both = checkpoints(results)
    both.save({}, ended=False)
    table = results / METRICS / "a.csv"
    summed = []
    monkeypatch.setattr(zlib, "crc32", lambda data, *a, real=zlib.crc32: (
        summed.append(data), real(data, *a)
    )[1])  # fmt: skip
    for number in (2, 3):
        with table.open("a") as stream:
            stream.write(f"{number}\n")
        both.save({}, ended=False)
    assert summed == [b"2\n", b"3\n"]
    monkeypatch.undo()
    assert checkpoints(results).restore()["files"]["metrics/seed_42/a.csv"] == (
        12,
        zlib.crc32(b"round\n1\n2\n3\n"),
    )


def test_a_file_that_is_written_anew_is_read_anew(results):
    both = checkpoints(results)
    both.save({}, ended=False)
    for text in ("round\n9\n", "r\n", ""):
        (results / METRICS / "a.csv").write_text(text)
        os.utime(results / METRICS / "a.csv", ns=(1, len(text)))
        both.save({}, ended=False)
        assert checkpoints(results).restore()["files"]["metrics/seed_42/a.csv"][0] == len(text)


def test_what_replaces_itself_is_known_at_the_end(results):
    both = checkpoints(results)
    both.save({}, ended=True)
    assert both.restore()["ended"]
    (results / METRICS / "cluster_history.json").write_bytes(b"[[1]]")
    with pytest.raises(CheckpointError, match=r"cluster_history\.json: is not what the run has"):
        both.restore()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "metrics/seed_42/a.csv").unlink(), r"metrics/seed_42/a\.csv: No such file"),
        (lambda f: (f / "metrics/seed_42/a.csv").write_bytes(b"rou"), r"a\.csv: has 3 bytes, and .* 8;"),
        (lambda f: (f / "metrics/seed_42/a.csv").write_bytes(b"round\n2\n"), r"a\.csv: is not what"),
        (lambda f: (f / "clusters/clusters_g1.json").unlink(), r"clusters_g1\.json: No such file"),
        (lambda f: (f / "run.json").unlink(), r"run\.json: cannot be read: .*No such file"),
        (lambda f: (f / "run.json").write_text("{"), r"run\.json: cannot be read: "),
        (lambda f: (f / "run.json").write_text("[" * 10**5), r"run\.json: cannot be read: "),
        (lambda f: (f / "run.json").write_bytes(b"\xff"), r"run\.json: cannot be read: "),
        (lambda f: (f / "run.json").write_text("[]"), r"run\.json: .* it holds no table"),
        (lambda f: edit(f, "settings", 3), r"run\.json: the run began with settings = \{.* now 3;"),
        (lambda f: edit(f, "settings", None), r"run\.json: the run began with settings"),
        (lambda f: edit(f, "settings.app", []), r"run\.json: the run began with app = .* now \[\];"),
        (
            lambda f: edit(f, "settings.hierarchy.momentum", 0.8),
            r"run\.json: the run began with hierarchy\.momentum = 0\.9, now 0\.8; put it back",
        ),
        (
            lambda f: edit(f, "settings.hierarchy.num_servers", True),
            r"hierarchy\.num_servers = 3, now true;",
        ),
        (lambda f: edit(f, "settings.hierarchy.mine", 1), r"hierarchy\.mine = null, now 1;"),
        (lambda f: edit(f, "settings.app.config.data-root", 1), r"run\.json: \[app\.config\] data-root"),
        (lambda f: edit(f, "classes", ["a", "c"]), r"run\.json: classes is not what the run wrote"),
    ],
)  # fmt: skip
def test_what_is_not_as_the_run_left_it_is_named_and_nothing_is_cut(results, damage, message):
    checkpoints(results).save({}, ended=False)
    damage(results)
    (results / METRICS / "new.csv").touch()
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoints(results).restore()
    assert "\n" not in str(caught.value)
    assert (results / METRICS / "new.csv").exists()


def leaves_of(table, path=()):
    """Yield the path of each value of nested tables."""
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from leaves_of(value, (*path, key))
        else:
            yield (*path, key), value


def test_every_setting_that_is_changed_is_named(results):
    """One digit, one letter, another type, or none: whatever the setting."""
    checkpoints(results).save({}, ended=False)
    tree = load(results / checkpoint.NAME, arrays=False)
    whole = (results / "run.json").read_text()
    leaves = [leaf for leaf in leaves_of(tree["began"]["settings"]) if leaf[0][-1] not in PATHS]
    assert len(leaves) > 100
    for path, value in leaves:
        for other in (f"{value}1", 987_654, not value, None, [value], {"a": value}):
            if other == value and type(other) is type(value):
                continue
            edit(results, ".".join(("settings", *path)), other)
            with pytest.raises(CheckpointError, match=re.escape(f"began with {'.'.join(path)}")):
                settings_to_go_on_with(results, tree)
            (results / "run.json").write_text(whole)


def edit(folder, path, value):
    """Change one value in a run.json."""
    run = json.loads((folder / "run.json").read_text())
    *tables, key = path.split(".")
    table = run
    for name in tables:
        table = table[name]
    table[key] = value
    (folder / "run.json").write_text(json.dumps(run))


def test_files_may_have_moved(results):
    checkpoints(results).save({}, ended=False)
    edit(results, "settings.app.config.data-root", "/elsewhere")
    tree = load(results / checkpoint.NAME, arrays=False)
    moved = settings_to_go_on_with(results, tree)
    assert moved.data.data_root == "/elsewhere"
    assert moved == SETTINGS.with_data_root("/elsewhere")
    checkpoints(results, moved).restore()


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        (load_settings(assignments=["hierarchy.lr_init=0.06"]), DATA, "lr_init = 0.05, now 0.06"),
        (SETTINGS, replace(DATA, content="beef"), "the data are not those that the run began with"),
        (SETTINGS, replace(DATA, clients=CLIENTS[::-1]), "clients have other examples"),
        (SETTINGS, replace(DATA, clients=CLIENTS[:1]), "clients have other examples"),
    ],
)
def test_a_run_goes_on_as_it_began(results, settings, data, message):
    checkpoints(results).save({}, ended=False)
    with pytest.raises(CheckpointError, match=message):
        checkpoints(results, settings, data).restore()
    assert checkpoints(results).restore()["ended"] is False


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(CheckpointError, match="cannot be written to"), checkpoint.at_work(tmp_path):
        pass
