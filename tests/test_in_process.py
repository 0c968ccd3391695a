"""The grid of this process: order, failures, time."""

import logging
import signal
import threading
import time

import pytest
from flwr.app import ConfigRecord

from fedge_sim import client, client_app, records
from fedge_sim.config import load_settings
from fedge_sim.errors import ConfigError, StalledError
from fedge_sim.orchestrator import Orchestrator
from fedge_sim.runtime import backend
from fedge_sim.runtime.backend import choose, open_grid
from fedge_sim.runtime.in_process import InProcessGrid
from fedge_sim.training.choice import Choice
from tests import unruly
from tests.conftest import run
from tests.test_drawn_data import DEVICES, first_model, held_out_test, job
from tests.test_ray_command import Command


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
            gate.wait(120)
        return records.reply(message)

    with InProcessGrid(app, 2) as grid:
        messages = [
            records.instruction(2, "query", ConfigRecord(), None, records.Address("a", 0, c))
            for c in range(2)
        ]
        replies = grid.send_and_receive(messages, timeout=3.0)
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
    gate, done = threading.Event(), []

    def hang_here(message, context):
        gate.wait(120)
        done.append(message)
        return records.reply(message)

    with (
        pytest.raises(StalledError, match=r"no client got done for 0.3 s .* 2 wait"),
        InProcessGrid(hang_here, 2, runtime("progress_timeout_s=0.3")) as grid,
    ):
        grid.send_and_receive(questions(2))
    assert not done  # nobody waited for the threads
    assert caplog.text.count("in hang_here") == 2
    gate.set()


PULLS = [("pull_messages", lambda ids: ids), ("wait", lambda _: 0.05)]


def for_ever(call, argument):
    """Do something again and again."""
    while True:
        call(argument)


@pytest.mark.parametrize(("call", "argument"), PULLS)
def test_no_progress_is_noticed_by_who_pulls(call, argument):
    gate = threading.Event()

    def app(message, context):
        gate.wait(120)
        return records.reply(message)

    with InProcessGrid(app, 1, runtime("progress_timeout_s=0.3")) as grid:
        ids = grid.push_messages(questions(1))
        with pytest.raises(StalledError, match=r"no client got done for 0.3 s .* 1 wait"):
            for_ever(getattr(grid, call), argument(ids))
        gate.set()


def test_replies_that_nobody_has_pulled_yet_are_no_standstill():
    with InProcessGrid(lambda m, _: records.reply(m), 1, runtime("progress_timeout_s=0.1")) as grid:
        ids = grid.push_messages(questions(3))
        while grid.waiting:
            grid.wait(1.0)
        time.sleep(0.2)  # whoever pushed is busy with something else
        grid.wait(1.0)
        pull_all(grid, [*ids, *grid.push_messages(questions(1))])


def test_who_waits_is_woken_by_the_first_reply():
    gate = threading.Event()

    def app(message, context):
        if message.metadata.group_id == "a/0/1":
            gate.wait(120)
        return records.reply(message)

    with InProcessGrid(app, 2) as grid:
        assert grid.wait(120) is None  # for nothing
        ids = grid.push_messages(questions(2))
        grid.wait(120)
        assert [records.Address.of(r).client for r in grid.pull_messages(ids)] == [0]
        grid.wait(0.01)
        assert grid.pull_messages(ids) == []
        gate.set()
        grid.wait(120)
        assert [records.Address.of(r).client for r in grid.pull_messages(ids)] == [1]


def test_messages_are_begun_in_the_order_in_which_they_were_pushed():
    order = []

    def app(message, context):
        order.append(records.Address.of(message).client)
        return records.reply(message)

    with InProcessGrid(app, 1) as grid:
        ids = [i for message in questions(20) for i in grid.push_messages([message])]
        pull_all(grid, ids)
    assert order == list(range(20))


def test_small_pieces_give_what_all_at_once_gives(small):
    settings = small(*DEVICES)
    with InProcessGrid(client_app.app, 2, together=client_app.answer_together) as grid:
        assert (grid.at_a_time, grid.cohort_size) == (2, 1)
        assert pieces(grid, settings) == all_at_once(grid, settings)


def test_clients_of_all_threads():
    with InProcessGrid(client_app.app, 3, cohort_size=4) as grid:
        assert (grid.at_a_time, grid.cohort_size) == (12, 4)


def work(settings):
    """Return messages to train ten devices and to evaluate the model that they begin with."""
    model = first_model(settings)
    jobs = [job(settings, number, 100 * number, model) for number in range(10)]
    return [*jobs, *held_out_test(settings, 3, model)]


def pull_all(grid, ids):
    """Return the replies, as they come."""
    replies = []
    while len(replies) < len(ids):
        grid.wait(5.0)
        replies += grid.pull_messages(ids)
    assert grid.waiting == 0
    return replies


def contents(replies):
    """Return what replies say, but for times."""
    found = {}
    for reply in replies:
        metrics = {k: v for k, v in records.metrics_of(reply).items() if k != records.SECONDS}
        arrays = reply.content.array_records.get(records.ARRAYS, {})
        found[reply.metadata.group_id] = (metrics, {n: a.data for n, a in arrays.items()})
    return found


def all_at_once(grid, settings):
    """Send all and wait for all; by group id."""
    return contents(grid.send_and_receive(work(settings)))


def pieces(grid, settings):
    """Push one or two at a time, while others are under way, and pull what is there."""
    messages, ids, replies = work(settings), [], []
    for begin in range(0, len(messages), 2):
        ids += grid.push_messages(messages[begin : begin + 2])
        replies += grid.pull_messages(ids)
    there = {reply.metadata.reply_to_message_id for reply in replies}
    return contents([*replies, *pull_all(grid, [i for i in ids if i not in there])])


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


@pytest.mark.parametrize("what", ["exit", "interrupt"])
def test_a_client_that_would_end_the_run_is_left_out_by_name(small, cohort_run, caplog, what):
    settings = small("hierarchy.global_rounds=2", "runtime.max_retries=1")
    unruly.rule(settings, c4=(what, 99))
    with InProcessGrid(unruly.app, 2, settings.runtime) as grid:
        alone = Orchestrator(settings, grid).run().last
    in_cohort = cohort_run(
        small("hierarchy.global_rounds=2", "runtime.max_retries=1", "runtime.training=cohort"),
        c4=(what, 99),
    )
    for last in (alone, in_cohort):
        assert last.global_round == 2
        assert [c.client for c in last.clients if not c.bytes_up] == [4]
    name = {"exit": "SystemExit: 0", "interrupt": "KeyboardInterrupt"}[what]
    assert caplog.text.count(f"client 4 of leaf server 1 left out: {name}") == 4


def test_ctrl_c_ends_the_run(tmp_path):
    run = Command(tmp_path, "runtime.backend='inprocess'", "hierarchy.global_rounds=100000")
    try:
        run.wait_for("round 2/100000")
        run.process.send_signal(signal.SIGINT)
        assert run.end() == 130
    finally:
        run.process.kill()
        run.process.stdout.close()


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


def test_a_part_of_a_gpu_that_is_not_there_is_refused(small, monkeypatch):
    wants = small("runtime.backend=inprocess", "runtime.num_gpus_per_actor=0.5")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"num_gpus_per_actor = 0.5: there is no GPU here"):  # noqa: SIM117
        with open_grid(wants, print, print):
            pass
    none = small("runtime.backend=inprocess", "runtime.num_gpus_per_actor=0")
    with open_grid(none, print, print):
        pass


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
