"""Clients' states: two slots in one file, and what ClientApps see of them on our grids."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import psutil
import pytest
import ray
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedge_sim import checkpoint, records
from fedge_sim.config import load_settings
from fedge_sim.errors import CheckpointError, StateError
from fedge_sim.runtime.in_process import InProcessGrid
from fedge_sim.runtime.state import StateFile
from tests import counting
from tests.conftest import ROOT, ray_grid
from tests.counting import question

MIB = 2**20


def record(value, shape=(3,)):
    return records.to_record(
        {"w": np.full(shape, value, np.float32), "count": np.array(value, np.int64)}
    )


def value(found):
    """Return what a record was made of; None for no record."""
    if found is None:
        return None
    arrays = records.to_arrays(found)
    assert np.all(arrays["w"] == arrays["count"])
    return int(arrays["count"])


@pytest.fixture
def opened(tmp_path):
    """Return a function that opens the states below ``tmp_path``."""
    with ExitStack() as stack:
        yield lambda *a: stack.enter_context(closing(StateFile(tmp_path / "state", *a)))


# ------------------------------------------------------------------ the file


def test_a_record_comes_back_as_it_was(tmp_path, opened):
    states = opened(4)
    assert states.read(3) is None
    assert not (tmp_path / "state").exists()  # a run without states has no folder
    arrays = {
        "b": np.arange(6, dtype=np.float64).reshape(2, 3).T,
        "a": np.array(5, np.int64),
        "none": np.zeros((0, 2), np.float16),
        "flags": np.array([True, False]),
    }
    states.write(3, records.to_record(arrays), 1)
    found = records.to_arrays(states.read(3))
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert np.array_equal(found[name], array)
    assert states.read(2) is None
    assert {file.name for file in (tmp_path / "state").iterdir()} == {"clients.bin", "layout.json"}


def test_what_was_committed_is_kept_until_the_next_commit(opened):
    states = opened(2)
    states.write(0, record(10), 1)
    saved = states.state(1)
    states.commit(1)
    for flat_round in (2, 3, 3):
        states.write(0, record(10 * flat_round), flat_round)
        states.write(1, record(7), flat_round)
    assert [value(states.read(client)) for client in (0, 1)] == [30, 7]
    again = opened(2, saved)  # as after a kill
    assert [value(again.read(client)) for client in (0, 1)] == [10, None]
    again.write(0, record(40), 2)
    saved = again.state(2)
    again.commit(2)
    again.close()
    assert value(opened(2, saved).read(0)) == 40
    with pytest.raises(ValueError, match="round 2 is not after the committed 2"):
        again.write(0, record(50), 2)


def test_another_layout_is_an_error(opened):
    states = opened(2)
    states.write(0, record(1), 1)
    with pytest.raises(StateError, match=r"client 1 has \['w', '<f4', \[4\]\], others .*\[3\]\]"):
        states.write(1, record(1, shape=(4,)), 1)
    with pytest.raises(StateError, match="client 1 has None, others"):
        states.write(1, records.to_record({"w": np.ones(3, np.float32)}), 1)
    with pytest.raises(StateError, match="the state of client 0 has"):
        opened(2, states.state(1)).write(0, record(1, shape=(4,)), 2)


CLIENTS, SIZE = 3, 400_000  # float32 numbers of a record


def overwrite(file, place, data):
    with file.open("r+b") as stream:
        stream.seek(place)
        stream.write(data)


def flip(file, bit):
    byte = file.read_bytes()[bit // 8]
    overwrite(file, bit // 8, bytes([byte ^ 1 << bit % 8]))


def slot_of(client, slot):
    """Return where a slot of :func:`record` begins."""
    return (2 * client + slot) * (4 * SIZE + 8)


def swap_in_the_round_before(folder):
    """Client 1's newest record is in its second slot, the one of the round before in the first."""
    file = folder / "clients.bin"
    data = file.read_bytes()
    overwrite(file, slot_of(1, 1), data[slot_of(1, 0) : slot_of(1, 1)])


def of_another_run(folder):
    """What another run wrote, with as many clients and the same layout."""
    with closing(StateFile(folder, CLIENTS)) as states:
        for flat_round in (1, 2, 3):
            for client in range(CLIENTS):
                states.write(client, record(10 * flat_round + client + 1, (SIZE,)), flat_round)
            states.commit(flat_round)


def written_again(file):
    layout = file.read_text()
    file.write_text(layout.replace("<f4", "<i4"))


DAMAGES = {
    "no folder": (shutil.rmtree, "No such file"),
    "no layout": (lambda f: (f / "layout.json").unlink(), r"No such file .*layout\.json"),
    "half a layout": (lambda f: os.truncate(f / "layout.json", 20), r"layout\.json: is not what"),
    "empty layout": (lambda f: os.truncate(f / "layout.json", 0), r"layout\.json: is not what"),
    "another type": (lambda f: (f / "layout.json").write_text("7"), r"layout\.json: is not what"),
    "no UTF-8": (lambda f: (f / "layout.json").write_bytes(b"\xff"), r"layout\.json: is not what"),
    "deep": (lambda f: (f / "layout.json").write_text("[" * 10**5), r"layout\.json: is not what"),
    "other layout": (lambda f: written_again(f / "layout.json"), r"layout\.json: is not what"),
    "no file": (lambda f: (f / "clients.bin").unlink(), r"No such file .*clients\.bin"),
    "cut short": (
        lambda f: os.truncate(f / "clients.bin", slot_of(3, 0) - 1),
        r"clients\.bin: the state of client 2 is not what was written in round 3",
    ),
    "empty": (lambda f: os.truncate(f / "clients.bin", 0), "the state of client 0 is not"),
    "zeros": (
        lambda f: overwrite(f / "clients.bin", 0, bytes(slot_of(CLIENTS, 0))),
        "the state of client 0 is not",
    ),
    "one bit": (
        lambda f: flip(f / "clients.bin", 8 * slot_of(1, 1) + 12_345_678),
        "the state of client 1 is not",
    ),
    "round before": (swap_in_the_round_before, "the state of client 1 is not"),
    "another run": (of_another_run, "the state of client 0 is not"),
}


@pytest.fixture
def kept(tmp_path, opened):
    """The states of three rounds, and what the last one's checkpoint knows of them."""
    states = opened(CLIENTS)
    for flat_round in (1, 2, 3):
        for client in range(CLIENTS):
            states.write(client, record(10 * flat_round + client, (SIZE,)), flat_round)
        saved = states.state(flat_round)
        states.commit(flat_round)
    return states, saved


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_lost_or_damaged_is_not_gone_on_from(tmp_path, opened, kept, damage):
    (tmp_path / "state").rename(tmp_path / "before")
    shutil.copytree(tmp_path / "before", tmp_path / "state")
    assert [value(opened(CLIENTS, kept[1]).read(c)) for c in range(CLIENTS)] == [30, 31, 32]
    damaging, message = DAMAGES[damage]
    damaging(tmp_path / "state")
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(CLIENTS, kept[1])
    assert "\n" not in str(caught.value)
    assert "put it back, or start a new run" in str(caught.value)


def test_other_numbers_of_clients(opened, kept):
    with pytest.raises(CheckpointError, match=r"layout\.json: is not what the run wrote"):
        opened(CLIENTS + 1, kept[1])


@given(st.integers(0, CLIENTS - 1), st.integers(0, 32 * SIZE + 63))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_one_wrong_bit_is_found_where_a_state_is_read(tmp_path, kept, client, bit):
    """While the run goes on; bits of the slots that are nobody's newest do not matter."""
    states, file = kept[0], tmp_path / "state" / "clients.bin"
    message = rf"clients\.bin: the state of client {client} is not what was written in round 3"
    flip(file, 8 * slot_of(client, 1) + bit)
    with pytest.raises(StateError, match=message):
        states.read(client)
    flip(file, 8 * slot_of(client, 1) + bit)
    flip(file, 8 * slot_of(client, 0) + bit)
    assert value(states.read(client)) == 30 + client
    flip(file, 8 * slot_of(client, 0) + bit)


def test_records_of_nothing(opened):
    states = opened(2)
    states.write(1, records.to_record({}), 1)
    assert len(states.read(1)) == 0
    assert opened(2, states.state(1)).read(0) is None


@contextmanager
def no_file_above(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_grow_is_an_error(opened):
    states, full = opened(2), r"clients\.bin: cannot be written: File too large"
    with no_file_above(MIB), pytest.raises(StateError, match=full):
        states.write(0, record(1, (MIB,)), 1)
    states.write(0, record(2, (MIB,)), 1)
    with no_file_above(13 * MIB), pytest.raises(StateError, match=full):
        states.write(1, record(3, (MIB,)), 1)  # half of it, in the file's last quarter
    assert [value(states.read(client)) for client in (0, 1)] == [2, None]


client = st.integers(0, 2)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), client),
        st.tuples(st.sampled_from(["commit", "next round", "kill"]), st.none()),
        st.tuples(st.just("kill while it writes"), client),
    ),
    max_size=25,
)


@given(steps)
def test_a_kill_goes_back_to_the_last_commit_and_nothing_else_does(steps):
    with TemporaryDirectory() as folder, ExitStack() as stack:

        def opened(saved=None):
            return stack.enter_context(closing(StateFile(Path(folder), 3, saved)))

        states = opened()
        saved, flat_round, kept, now = None, 1, {}, {}
        for number, (step, who) in enumerate(steps):
            if step == "write":
                states.write(who, record(number), flat_round)
                now[who] = number
            elif step == "commit":
                saved, kept = states.state(flat_round), dict(now)
                states.commit(flat_round)
            if step in ("commit", "next round"):
                flat_round += 1
            if step == "kill while it writes":
                with pytest.raises(StateError), mock.patch("os.pwrite", write_half):
                    states.write(who, record(-number), flat_round)
            if step.startswith("kill"):
                states = opened(saved)
                flat_round, now = (saved["round"] if saved else 0) + 1, dict(kept)
            assert [value(states.read(c)) for c in range(3)] == [now.get(c) for c in range(3)]


def write_half(file, data, start, pwrite=os.pwrite):
    pwrite(file, data[: len(data) // 2], start)
    raise OSError(28, "No space left on device")


WRITER = """
import sys
from pathlib import Path
from fedge_sim import checkpoint
from fedge_sim.runtime.state import StateFile
from tests.test_state import record

states = StateFile(Path(sys.argv[1]), 20)
for flat_round in range(1, 10**6):
    for client in range(20):
        states.write(client, record(100 * flat_round + client, (5000,)), flat_round)
    checkpoint.save(Path(sys.argv[1]) / "saved", states.state(flat_round))
    states.commit(flat_round)
    print(flat_round, flush=True)
"""


def test_a_process_that_is_killed_leaves_the_committed_round(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        lines = [process.stdout.readline() for _ in range(50)]
        process.send_signal(signal.SIGKILL)
        committed = int((lines + process.stdout.read().split())[-1])
    saved = checkpoint.load(tmp_path / "saved")
    assert saved["round"] in (committed, committed + 1)  # it may have died before it said so
    with closing(StateFile(tmp_path, 20, saved)) as states:
        found = [value(states.read(client)) for client in range(20)]
    assert found == [100 * saved["round"] + client for client in range(20)]


def test_many_states_stay_out_of_memory(tmp_path, opened):
    """10,000 clients with a state of 23,174 parameters each: 0.9 GB in the file."""
    states = opened(10_000)
    before = psutil.Process().memory_full_info().uss
    for client in range(10_000):
        states.write(client, record(client, (23_174,)), 1)
    grown = [psutil.Process().memory_full_info().uss - before]
    assert all(value(states.read(client)) == client for client in range(10_000))
    grown.append(psutil.Process().memory_full_info().uss - before)
    file = tmp_path / "state" / "clients.bin"
    assert file.stat().st_blocks * 512 < 1000 * MIB < file.stat().st_size  # sparse
    file.unlink()
    assert max(grown) < 50 * MIB


def test_threads_write_different_clients(opened):
    states = opened(200)

    def count_on(client):
        before = value(states.read(client)) or 0
        states.write(client, record(before + client), flat_round)

    with ThreadPoolExecutor(8) as pool:
        for flat_round in (1, 2, 3):
            list(pool.map(count_on, range(200)))
            assert [value(states.read(c)) for c in range(200)] == [
                c * flat_round for c in range(200)
            ]
            states.commit(flat_round)


# ------------------------------------------------------------------ on the grids


@pytest.fixture
def states(opened):
    return opened(60)


@pytest.fixture
def in_process(states):
    """Return a function that opens a grid of this process, which keeps states."""

    def grid(*assignments, app=counting.app, **more):
        runtime = load_settings(assignments=[f"runtime.{a}" for a in assignments]).runtime
        grid = InProcessGrid(app, 2, runtime, **more)
        grid.keep_state(states)
        return grid

    return grid


def asked(grid, kind, clients, flat_round=1, **more):
    """Return what each client replied."""
    messages = [question(kind, client, flat_round, **more) for client in clients]
    return [records.metrics_of(reply) for reply in grid.send_and_receive(messages)]


def seen(grid, kind, clients, flat_round=1, **more):
    """Return what each client found in its state."""
    return [metrics["seen"] for metrics in asked(grid, kind, clients, flat_round, **more)]


def test_a_client_finds_the_state_that_it_left(in_process, states):
    with in_process() as grid:
        assert seen(grid, "train", range(6)) == [0] * 6
        states.commit(1)
        assert seen(grid, "train", range(3), 2) == [1] * 3
        assert seen(grid, "evaluate", range(6)) == [2, 2, 2, 1, 1, 1]
        assert seen(grid, "evaluate", range(6)) == [2, 2, 2, 1, 1, 1]  # which changes nothing
        replies = asked(grid, "train", range(7), 3)
        assert [reply["there"] for reply in replies] == [1] * 6 + [0]  # no other client's


def test_a_state_that_is_left_alone_is_not_written(in_process, states):
    states.write(0, record(1), 1)
    with (
        in_process(app=lambda message, context: counting.replied(message)) as grid,
        mock.patch.object(states, "write") as write,
    ):
        assert len(grid.send_and_receive([question("train", client) for client in (0, 1)])) == 2
    assert not write.called


def test_without_a_file_the_node_keeps_its_context():
    with InProcessGrid(counting.app, 1) as grid:
        assert seen(grid, "train", range(3)) == [0] * 3
        assert [(m["seen"], m["there"]) for m in asked(grid, "train", range(3))] == [(1, 3)] * 3


def test_who_fails_is_run_again_from_the_state_before(in_process, tmp_path):
    with in_process("max_retries=2") as grid:
        assert seen(grid, "train", range(2)) == [0, 0]
        wrong = {"what": "raise", "folder": str(tmp_path)}
        assert seen(grid, "train", range(2), 2, times=2, **wrong) == [1, 1]
        [reply] = grid.send_and_receive([question("train", 0, 3, times=99, **wrong)])
        assert reply.has_error()
        assert seen(grid, "evaluate", range(2)) == [2, 2]


@pytest.mark.parametrize(("what", "cohorts"), [("raise", [1, 1, 1]), ("host memory", [1, 2, 2])])
def test_cohorts_keep_the_states_of_their_clients(in_process, tmp_path, what, cohorts):
    with in_process(together=counting.answer_together, cohort_size=3) as grid:
        replies = asked(grid, "train", range(6))
        assert [(reply["seen"], reply["cohort"]) for reply in replies] == [(0, 3)] * 6
        replies = asked(grid, "train", range(6), 2)
        assert [(reply["seen"], reply["there"]) for reply in replies] == [(1, 3)] * 6
        messages = [question("train", client, 3) for client in range(6)]
        messages[4] = question("train", 4, 3, what=what, times=1, folder=str(tmp_path))
        found = [records.metrics_of(reply) for reply in grid.send_and_receive(messages)]
        assert [reply["seen"] for reply in found] == [2] * 6
        assert [reply["cohort"] for reply in found[3:]] == cohorts
        assert seen(grid, "evaluate", range(6)) == [3] * 6


def test_a_reply_that_comes_too_late_changes_no_state(in_process, states):
    gate, late = threading.Event(), threading.Event()

    def app(message, context):
        if records.config_of(message)["client-id"] == 1:
            gate.wait(120)
        reply = counting.app(message, context)
        late.set()
        return reply

    with in_process(app=app) as grid:
        messages = [question("train", client) for client in range(2)]
        assert len(grid.send_and_receive(messages, timeout=3.0)) == 1
        late.clear()
        gate.set()
        assert late.wait(120)
    assert states.read(1) is None
    assert states.read(0) is not None


def test_states_are_read_when_a_worker_begins(in_process, states):
    gate = threading.Event()
    with mock.patch.object(states, "read", wraps=states.read) as read:

        def wait(message, context):
            gate.wait(120)
            return counting.app(message, context)

        with in_process(app=wait) as grid:
            ids = grid.push_messages([question("train", client) for client in range(60)])
            assert read.call_count <= 2
            gate.set()
            while grid.waiting:
                time.sleep(0.01)
            assert len(grid.pull_messages(ids)) == read.call_count == 60


def test_a_state_that_cannot_be_kept_ends_the_run(in_process, states):
    states.write(0, record(1), 1)
    with in_process() as grid, pytest.raises(StateError, match="the state of client 1 has"):
        grid.send_and_receive([question("train", 1)])


def test_states_on_ray(small, start_ray, states, tmp_path):
    wrong = {"folder": str(tmp_path), "times": 1}
    cohorts = ("runtime.training=cohort", "runtime.cohort_size=3")
    with start_ray(num_cpus=2):
        with ray_grid(small("runtime.num_workers=2"), "tests.counting:app", False) as grid:
            grid.keep_state(states)
            with mock.patch.object(states, "read", wraps=states.read) as read:
                ids = grid.push_messages([question("train", client) for client in range(60)])
                assert read.call_count < 10
                replies = []
                while grid.waiting:
                    replies += grid.pull_messages(ids)
                replies += grid.pull_messages(ids)
            assert [records.metrics_of(reply)["seen"] for reply in replies] == [0] * 60
            first = {records.Address.of(r).client: records.metrics_of(r)["pid"] for r in replies}
            ray.kill(grid.crew.workers[0].actor)  # whose clients go on elsewhere
            replies = asked(grid, "train", range(60), 2)
            assert [reply["seen"] for reply in replies] == [1] * 60
            assert {reply["there"] for reply in replies} == {1}  # also where a hand has many
            assert any(reply["pid"] != first[client] for client, reply in enumerate(replies))
            assert max(reply["there"] for reply in asked(grid, "evaluate", range(60))) > 1
            assert seen(grid, "evaluate", range(60)) == [2] * 60
            assert seen(grid, "train", range(2), 3, what="raise", **wrong) == [2, 2]
            assert seen(grid, "train", [2, 3], 3, what="die", **wrong) == [2, 2]
            late = [question("train", client, 3) for client in range(5)]
            assert grid.send_and_receive(late, timeout=0.0) == []  # which changes no state
            assert seen(grid, "evaluate", range(5)) == [3, 3, 3, 3, 2]
        states.commit(3)
        with ray_grid(small("runtime.num_workers=2", *cohorts), "tests.counting:app") as grid:
            grid.keep_state(states)
            replies = asked(grid, "train", range(6), 4)
            assert [reply["seen"] for reply in replies] == [3, 3, 3, 3, 2, 2]
            assert {reply["cohort"] for reply in replies} == {3}
            assert seen(grid, "evaluate", range(6)) == [4, 4, 4, 4, 3, 3]
