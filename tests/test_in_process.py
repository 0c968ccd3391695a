"""The grid of this process: order, failures, time."""

import threading
import time

import pytest
from flwr.app import ConfigRecord

from fedge_sim import records
from fedge_sim.config import load_settings
from fedge_sim.errors import StalledError
from fedge_sim.runtime.backend import choose
from fedge_sim.runtime.in_process import InProcessGrid


def questions(number):
    return [
        records.instruction(2, "query", ConfigRecord(), None, records.Address("a", 0, c))
        for c in range(number)
    ]


def runtime(*assignments):
    return load_settings(assignments=[f"runtime.{a}" for a in assignments]).runtime


def test_replies_come_in_the_order_of_messages_and_errors_as_replies():
    def app(message, context):
        if message.metadata.group_id == "a/0/1":
            raise RuntimeError("broken")
        return records.reply(message)

    told = []
    with InProcessGrid(app, 2, on_done=told.append) as grid:
        messages = [
            records.instruction(2, "query", ConfigRecord(), None, records.Address("a", 0, c))
            for c in range(3)
        ]
        replies = grid.send_and_receive(messages)
        assert grid.pull_messages(["unknown"]) == []
    assert [records.Address.of(r).client for r in replies] == [0, 1, 2]
    assert [r.has_error() for r in replies] == [False, True, False]
    assert replies[1].error.reason == "RuntimeError: broken"
    assert len(told) == 3
    assert all(r.metadata.message_id for r in replies)


def test_a_timeout_returns_what_is_ready():
    gate = threading.Event()

    def app(message, context):
        if message.metadata.group_id == "a/0/1":
            gate.wait(10)
        return records.reply(message)

    with InProcessGrid(app, 2) as grid:
        messages = [
            records.instruction(2, "query", ConfigRecord(), None, records.Address("a", 0, c))
            for c in range(2)
        ]
        replies = grid.send_and_receive(messages, timeout=0.5)
        gate.set()
    assert [records.Address.of(r).client for r in replies] == [0]


def test_who_fails_is_run_again_and_its_traceback_shown_once(caplog):
    tries = []

    def app(message, context):
        tries.append(message.metadata.group_id)
        if message.metadata.group_id == "a/0/1" and tries.count("a/0/1") < 3:
            raise RuntimeError("broken")
        return records.reply(message)

    with InProcessGrid(app, 2, runtime("max_retries=2")) as grid:
        assert not any(r.has_error() for r in grid.send_and_receive(questions(3)))
    assert sorted(tries) == ["a/0/0", "a/0/1", "a/0/1", "a/0/1", "a/0/2"]
    assert caplog.text.count("Traceback") == 1
    assert "client 1 of leaf server 0 (a) failed, try 2 of 3: RuntimeError: broken" in caplog.text
    tries.clear()
    with InProcessGrid(app, 2, runtime("max_retries=1")) as grid:
        assert [r.has_error() for r in grid.send_and_receive(questions(3))] == [False, True, False]


def test_no_progress_ends_the_run_with_every_stack(caplog):
    gate = threading.Event()

    def hang_here(message, context):
        gate.wait(30)
        return records.reply(message)

    started = time.monotonic()
    with (
        pytest.raises(StalledError, match=r"no client got done for 0.3 s .* 2 wait"),
        InProcessGrid(hang_here, 2, runtime("progress_timeout_s=0.3")) as grid,
    ):
        grid.send_and_receive(questions(2))
    assert time.monotonic() - started < 20  # nobody waited for the threads
    assert caplog.text.count("in hang_here") == 2
    gate.set()


@pytest.mark.parametrize(
    ("assignments", "cores", "gpus", "backend"),
    [
        ([], 2, 0, "inprocess"),
        ([], 16, 0, "ray"),
        (["threads_per_client=8"], 16, 0, "inprocess"),
        ([], 2, 1, "ray"),
        (["dashboard=true"], 2, 0, "ray"),
        (["client_timeout_s=5.0"], 2, 0, "ray"),
        (["ray_address='auto'"], 2, 0, "ray"),
        (["num_workers=2"], 2, 0, "ray"),
        (["backend='inprocess'"], 16, 1, "inprocess"),
        (["backend='ray'"], 1, 0, "ray"),
    ],
)
def test_the_backend_and_why(assignments, cores, gpus, backend):
    chosen, reason = choose(runtime(*assignments), 100, cores, gpus)
    assert chosen == backend
    assert reason
