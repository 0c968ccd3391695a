"""Checkpoints: what is saved comes back, damage is told, tables are cut back."""

import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedge_sim import checkpoint
from fedge_sim.checkpoint import csv_sizes, load, save, truncate_csvs
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
    assert not unnoticed


def test_the_checkpoint_of_another_version_is_told(tmp_path, monkeypatch):
    file = tmp_path / checkpoint.NAME
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT - 1)
    save(file, {"x": np.zeros(3)})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="another version of fedge-sim"):
        load(file)


def test_a_pickle_is_not_opened(tmp_path):
    np.save(tmp_path / "state.npy", np.array([print]), allow_pickle=True)
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path / "state.npy")


# ------------------------------------------------------------------ tables


@pytest.fixture
def results(tmp_path):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "a.csv").write_bytes(b"round\n1\n")
    (tmp_path / "b.csv").write_bytes(b"x\n")
    (tmp_path / "c.json").write_bytes(b"{}")
    return tmp_path


def test_tables_are_cut_back_to_what_they_were(results):
    sizes = csv_sizes(results)
    assert sizes == {"metrics/a.csv": 8, "b.csv": 2}
    with (results / "metrics" / "a.csv").open("a") as stream:
        stream.write("2\n")
    (results / "metrics" / "new.csv").write_text("round\n")
    (results / "c.json").write_text("[1]")
    truncate_csvs(results, sizes)
    assert csv_sizes(results) == sizes
    assert (results / "metrics" / "a.csv").read_bytes() == b"round\n1\n"
    assert (results / "c.json").read_text() == "[1]"


def test_tables_that_lost_lines_are_told_and_nothing_is_cut(results):
    sizes = csv_sizes(results)
    (results / "new.csv").touch()
    (results / "metrics" / "a.csv").write_bytes(b"rou")
    with pytest.raises(CheckpointError, match=r"a\.csv: must have 8 bytes .* and has 3"):
        truncate_csvs(results, sizes)
    (results / "metrics" / "a.csv").unlink()
    with pytest.raises(CheckpointError, match=r"a\.csv: .* and is missing"):
        truncate_csvs(results, sizes)
    assert (results / "new.csv").exists()


def test_an_array_in_several_places_is_written_once(tmp_path):
    model = {"w": np.zeros(10_000)}
    save(tmp_path / "once", {"one": model, "other": [model, model]})
    assert (tmp_path / "once").stat().st_size < 2 * model["w"].nbytes
    np.testing.assert_array_equal(load(tmp_path / "once")["other"][1]["w"], model["w"])
