"""The grid of this process: order, failures, time."""

import logging
import threading
import time

import pytest
from flwr.app import ConfigRecord

from fedge_sim import client, records
from fedge_sim.config import load_settings
from fedge_sim.errors import ConfigError, StalledError
from fedge_sim.orchestrator import Orchestrator
from fedge_sim.runtime import backend
from fedge_sim.runtime.backend import choose, open_grid
from fedge_sim.runtime.in_process import InProcessGrid
from fedge_sim.training.choice import Choice
from tests import unruly
from tests.conftest import run


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


AUTO = 'runtime.training="auto"'


@pytest.fixture
def cohort_run(small):
    """Return a function that runs a round of cohorts of three, with clients that misbehave."""

    def round_of(settings, **rules):
        unruly.rule(settings, **rules)
        with InProcessGrid(
            unruly.app,
            2,
            settings.runtime,
            together=unruly.answer_together,
            cohort_size=3,
        ) as grid:
            return Orchestrator(settings, grid).run().last

    return round_of


def losses(record):
    return [client.train_loss for client in record.clients]


def test_cohorts_of_all_clients(small, cohort_run):
    settings = small("hierarchy.global_rounds=1", "runtime.training=cohort")
    last = cohort_run(settings)
    trained = unruly.cohorts(settings)
    assert sorted(client for cohort in trained for client in cohort) == list(range(9))
    assert all(2 <= len(cohort) <= 3 for cohort in trained)
    assert losses(last) == pytest.approx(losses(run(small("hierarchy.global_rounds=1"), []).last))


def test_a_client_that_fails_in_a_cohort_is_the_only_one_left_out(small, cohort_run, caplog):
    settings = small(
        "hierarchy.global_rounds=1", "runtime.training=cohort", "runtime.max_retries=1"
    )
    last = cohort_run(settings, c4=("raise", 99))
    assert [c.client for c in last.clients if not c.bytes_up] == [4]
    assert caplog.text.count("cohort failed, each is run alone: RuntimeError") == 1
    assert "client 4 of leaf server 1 left out: RuntimeError: the battery is empty" in caplog.text
    assert unruly.tries(settings, 4) == 3  # in the cohort, and twice alone


def test_a_client_that_fails_in_a_cohort_once_is_not_left_out(small, cohort_run, caplog):
    settings = small("hierarchy.global_rounds=1", "runtime.training=cohort")
    last = cohort_run(settings, c4=("raise", 1))
    assert all(client.bytes_up for client in last.clients)
    assert "failed, try" not in caplog.text


def test_a_cohort_without_memory_is_halved(small, cohort_run, caplog):
    settings = small("runtime.training=cohort", "runtime.max_retries=0")
    last = cohort_run(settings, c4=("gpu memory", 1))
    assert all(client.bytes_up for client in last.clients)
    assert "ran out of memory, and is halved; next time set runtime.cohort_size = 1" in caplog.text
    assert len(caplog.messages) == 1  # the second round has no cohorts any more
    assert sum(map(len, unruly.cohorts(settings))) <= 9


@pytest.fixture
def opened(small, monkeypatch):
    """Return a function to the cohort size and the settings that a run gets in this process."""

    def size_and_settings(*assignments):
        made = []
        monkeypatch.setattr(
            backend, "InProcessGrid", lambda *a, **k: made.append(k) or InProcessGrid(*a, **k)
        )
        monkeypatch.setattr(backend, "available_cores", lambda: 2)
        monkeypatch.setattr(
            client, "choose", lambda _, compiles: Choice("cohort", compiles, 4, "4/s")
        )
        settings = small("runtime.backend=inprocess", *assignments)
        with open_grid(settings, print, print) as (_, settled):
            return made[0]["cohort_size"], settled.runtime

    return size_and_settings


def test_a_cohort_size_of_a_network_without_cohorts_is_done_without(small, monkeypatch):
    monkeypatch.setattr(client, "choose", lambda _, compiles: Choice("single", False, 1, "why"))
    settings = small(AUTO, "runtime.backend=inprocess", "runtime.cohort_size=3")
    with open_grid(settings, print, print) as (_, settled):
        assert (settled.runtime.training, settled.runtime.cohort_size) == ("single", "auto")


def test_compiled_steps_are_for_actors(small, monkeypatch, caplog):
    """A compiled step does not let go of the interpreter: two threads would take turns."""
    asked = []
    monkeypatch.setattr(backend, "available_cores", lambda: 2)
    monkeypatch.setattr(client, "choose", lambda _, compiles: Choice("single", compiles, 1, "5 ms"))
    monkeypatch.setattr(
        "fedge_sim.runtime.ray_grid.RayGrid", lambda *a: asked.append(a[1]) or stop()
    )

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), open_grid(small(AUTO), print, print):
        pass
    assert (asked[0].runtime.training, asked[0].runtime.compile) == ("single", True)
    with open_grid(small(AUTO, "runtime.backend=inprocess"), print, print) as (_, settled):
        assert settled.runtime.compile is False
    fixed = small("runtime.backend=inprocess", "runtime.training=single", "runtime.compile=true")
    with open_grid(fixed, print, print) as (_, settled):
        assert settled.runtime.compile is True
    assert "threads would wait for each other" in caplog.text


def test_the_way_to_train_is_settled(opened, caplog):
    caplog.set_level(logging.INFO, "fedge_sim")
    size, runtime = opened("runtime.training=auto")
    assert (size, runtime.training, runtime.compile) == (4, "cohort", False)
    assert runtime.cohort_size == 4
    assert opened("runtime.training=auto", "runtime.num_workers=1")[1].compile  # nobody waits
    assert "training cohort: 4/s" in caplog.text
    size, runtime = opened("runtime.training=cohort", "runtime.compile=false")
    assert (size, runtime.training, runtime.compile) == (4, "cohort", False)
    size, runtime = opened("runtime.training=cohort", "runtime.cohort_size=7")
    assert (size, runtime.training, runtime.compile) == (7, "cohort", "auto")
    size, runtime = opened("runtime.training=reference")
    assert (size, runtime.training) == (1, "reference")
    few = ("hierarchy.num_servers=1", "hierarchy.clients_per_server=[3]")
    assert opened("runtime.training=auto", *few)[0] == 2  # two threads are to be busy
    with pytest.raises(ConfigError, match=r'cohort_size = 2: .* training = "single"'):
        opened("runtime.training=single", "runtime.cohort_size=2")
