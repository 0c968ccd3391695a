"""The Ray runtime, on real actors: the same bytes whatever their number, and what it costs."""

import logging
import re
import time
from unittest import mock

import psutil
import pytest
import ray
from flwr.app import ConfigRecord

from fedge_sim import records
from fedge_sim.client_app import app as client_app
from fedge_sim.errors import ConfigError, DataError, StalledError, WorkerError
from fedge_sim.orchestrator import Orchestrator
from fedge_sim.runtime.in_process import InProcessGrid
from fedge_sim.runtime.node import NODE_ID
from fedge_sim.runtime.ray_grid import KEPT_MODELS, RayGrid
from tests import unruly
from tests.conftest import Keep, ray_grid, run, run_on_ray, same_models
from tests.test_drawn_data import DEVICES, first_model, held_out_test, job
from tests.test_in_process import PULLS, all_at_once, for_ever, pieces, pull_all


@pytest.fixture(scope="module", autouse=True)
def _ray(start_ray):
    """Four cores, whatever the machine has: four actors must fit."""
    with start_ray(num_cpus=4):
        yield


@pytest.mark.parametrize("actors", [1, 2, 4])
def test_the_same_bytes_on_any_number_of_actors(small, actors):
    settings = small(f"runtime.num_workers={actors}")
    unruly.rule(settings, all=("delay", 100))  # replies come in another order each time
    ours = run_on_ray(settings, app="tests.unruly:app")
    assert same_models(ours.last, run(small()).last)


def test_cohorts_change_nothing_but_the_last_bits(small):
    settings = small(
        "runtime.num_workers=2", "runtime.training=cohort", "hierarchy.global_rounds=1"
    )
    unruly.rule(settings)
    with (
        mock.patch("fedge_sim.runtime.crew.Crew._choose", return_value=16),
        ray_grid(settings, unruly_app) as grid,
    ):
        assert grid.crew.plan.cohort_size == grid.settings.runtime.cohort_size == 5
        last = Orchestrator(grid.settings, grid).run().last
    trained = unruly.cohorts(settings)
    assert sorted(client for cohort in trained for client in cohort) == list(range(9))
    assert [len(cohort) for cohort in trained] == [5, 4]
    ours, theirs = ([c.train_loss for c in r.clients] for r in (last, alone(small)))
    assert ours == pytest.approx(theirs)


def alone(small):
    return run(small("hierarchy.global_rounds=1")).last


def test_the_way_to_train_is_settled_and_memory_is_predicted_and_measured(small, caplog):
    caplog.set_level(logging.INFO, "fedge_sim")
    settings = small("runtime.training=auto", "runtime.cohort_size=3", "hierarchy.global_rounds=2")
    with ray_grid(settings) as grid:
        assert grid.settings.runtime.training == "cohort"
        assert grid.settings.runtime.compile is False
        assert grid.settings.runtime.cohort_size == grid.crew.plan.cohort_size == 3
        Orchestrator(grid.settings, grid).run()
    (chosen,) = [line for line in caplog.messages if line.startswith("training ")]
    assert chosen.startswith("training cohort: ")
    (line,) = [line for line in caplog.messages if line.startswith("cohort of 3: predicted ")]
    predicted, measured = map(int, re.search(r"(\d+) MiB, measured (\d+) MiB", line).groups())
    assert predicted == pytest.approx(measured, rel=0.3)


TINY = (
    "app.config.synthetic-windows-per-client=12",
    "app.config.model=mlp",
    "hierarchy.global_rounds=100",
    "runtime.num_workers=2",
)


def test_a_hundred_rounds_open_the_data_once_and_start_no_process(small):
    class Processes(Keep):
        def on_run_start(self, info):
            self.seen = [processes()]

        def on_round_end(self, record):
            super().on_round_end(record)
            self.seen.append(processes())

    watch = Processes()
    with ray_grid(small(*TINY)) as grid, mock.patch("ray.put", wraps=ray.put) as put:
        Orchestrator(grid.settings, grid, [watch]).run()
        opened = grid.crew.times_opened()
        pids = {worker.introduction.pid for worker in grid.crew.workers}
    assert opened == [1, 1]
    assert len(watch.records) == 100
    assert pids <= watch.seen[0]
    assert all(pids_now <= watch.seen[0] for pids_now in watch.seen[1:])
    # Each round: 3 leaf models to train from, and to evaluate; then the clusters' and the mean.
    clusters = [len(record.cloud.cluster_models) for record in watch.records]
    assert put.call_count == sum(3 + 3 + k + (k > 1) for k in clusters)


def processes() -> set[int]:
    """Return all processes of this test's own Ray."""
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_a_short_hand_carries_many_messages(small):
    with ray_grid(small("runtime.num_workers=2"), prepare=False) as grid:
        calls = []
        for worker in grid.crew.workers:
            real = worker.actor.work.remote
            worker.actor.work = mock.Mock(remote=lambda *a, real=real: calls.append(a) or real(*a))
        for _ in range(2):  # the first time, nothing is known of how long one takes
            calls.clear()
            replies = grid.send_and_receive([question(c) for c in range(300)])
    assert [records.Address.of(reply).client for reply in replies] == list(range(300))
    assert len(calls) < 100


def question(client: int, purpose: str = "query"):
    address = records.Address(purpose, 0, client)
    return records.instruction(NODE_ID, "query", ConfigRecord(), None, address)


def test_push_and_pull(small):
    with ray_grid(small("runtime.num_workers=2"), prepare=False) as grid:
        ids = grid.push_messages([question(c) for c in range(5)])
        replies = []
        while len(replies) < 5:
            replies += grid.pull_messages(ids)
            time.sleep(0.01)
        assert grid.pull_messages(ids) == []
    assert {reply.metadata.reply_to_message_id for reply in replies} == set(ids)


def test_small_pieces_give_what_all_at_once_gives(small):
    settings = small(*DEVICES, "runtime.num_workers=2")
    with ray_grid(settings) as grid, mock.patch("ray.put", wraps=ray.put) as put:
        assert (grid.at_a_time, grid.cohort_size) == (2, 1)
        in_pieces = pieces(grid, settings)
        assert put.call_count <= 2  # all begin with one model; the grid may rest in between
        assert in_pieces == all_at_once(grid, settings)
    with InProcessGrid(client_app, 2) as grid:
        assert in_pieces == all_at_once(grid, settings)


def test_a_model_is_put_once_for_the_messages_of_several_pushes(small):
    settings = small(*DEVICES, "runtime.num_workers=1")
    unruly.rule(settings, all=("delay", 100))
    with ray_grid(settings, unruly_app) as grid, mock.patch("ray.put", wraps=ray.put) as put:
        models = [first_model(settings) for _ in range(KEPT_MODELS + 1)]
        pushed = [0, 1, 0, *range(KEPT_MODELS + 1), 0]
        ids = [i for n, m in enumerate(pushed) for i in push(grid, job(settings, n, n, models[m]))]
        assert put.call_count == KEPT_MODELS + 2  # the first was let go, and is put again
        assert len(grid._models) == KEPT_MODELS
        pull_all(grid, ids)
        assert not grid._models
        put.reset_mock()
        grid.send_and_receive([job(settings, 0, n, m) for n in range(2) for m in models])
        assert put.call_count == KEPT_MODELS + 1  # in one push, any number is put once


def push(grid, *messages):
    return grid.push_messages(messages)


def test_earlier_messages_go_first_and_evaluations_before_all_trainings(small):
    """Trainings all take about as long; a device's time before does not let it overtake."""
    settings = small(*DEVICES, "runtime.num_workers=1")
    unruly.rule(settings, all=("delay", 60))
    done = []
    tell = {"on_done": lambda done_: done.append(done_.reply.metadata.group_id)}
    with ray_grid(settings, unruly_app, **tell) as grid:
        model = first_model(settings)
        grid.send_and_receive([job(settings, n, n, model) for n in range(12)])
        done.clear()
        ids = [i for n in range(12) for i in push(grid, job(settings, 99, (7 * n) % 12, model))]
        grid.wait(120)  # and what is known of times has changed
        ids += push(grid, *(job(settings, 99, n, model) for n in range(20, 24)))
        ids += push(grid, *held_out_test(settings, 2, model))
        pull_all(grid, ids)
    trained = [int(name.split("/")[2]) for name in done if name.startswith("train")]
    assert trained == [*((7 * n) % 12 for n in range(12)), 20, 21, 22, 23]
    last_evaluated = max(place for place, name in enumerate(done) if name.startswith("evaluate"))
    assert last_evaluated < 8  # and so before most trainings, which were pushed earlier


def test_actors_clean_up_when_nothing_is_left_to_do(small):
    settings = small(*DEVICES, "runtime.num_workers=1")
    with ray_grid(settings, prepare=False) as grid, mock.patch.object(grid.crew, "clean") as clean:
        ids = [i for client in range(3) for i in push(grid, question(client))]
        assert not clean.called
        pull_all(grid, ids)
        assert clean.call_count == 1
        grid.send_and_receive([question(client) for client in range(3)])
        assert clean.call_count == 2


@pytest.mark.parametrize(("call", "argument"), PULLS)
def test_no_progress_is_noticed_by_who_pulls(small, call, argument):
    settings = small(*DEVICES, "runtime.num_workers=1", "runtime.progress_timeout_s=3.0")
    unruly.rule(settings, c1=("sleep", 60))
    with ray_grid(settings, unruly_app) as grid:
        ids = push(grid, job(settings, 0, 1, first_model(settings)))
        with pytest.raises(StalledError, match=r"no client got done for 3 s .* 1 wait"):
            for_ever(getattr(grid, call), argument(ids))


def test_a_timeout_returns_what_is_there_and_drops_the_rest(small):
    settings = small("runtime.num_workers=2")
    unruly.rule(settings, c1=("sleep", 9))
    with ray_grid(settings, app="tests.unruly:app") as grid:
        model = records.to_record({})
        messages = [
            records.instruction(
                NODE_ID,
                "train",
                ConfigRecord({records.SETTINGS: settings.to_json(), records.CLIENT_ID: 1}),
                model,
                records.Address("train", 0, 1),
            ),
            question(2),
        ]
        replies = grid.send_and_receive(messages, timeout=10)
        assert [records.Address.of(reply).client for reply in replies] == [2]
        assert grid.waiting == 0
        # the other actor goes on
        assert len(grid.send_and_receive([question(3)], timeout=60)) == 1


def test_the_plan_is_printed_and_what_does_not_fit_is_refused(small, caplog):
    caplog.set_level(logging.INFO, "fedge_sim")
    with ray_grid(small("runtime.num_workers=2")) as grid:
        names = [worker.name for worker in grid.crew.workers]
    assert names == ["trainer-0 cpu 1", "trainer-1 cpu 1"]
    assert "2 actors x 1 thread" in caplog.text
    assert "9 clients on 2 actors: 4.5 -> 5 waves a round" in caplog.text
    assert "no GPU here: CPU settings" in caplog.text
    with pytest.raises(ConfigError, match=r"num_workers = 5: must be at most 4"):
        RayGrid(unruly_app, small("runtime.num_workers=5"))
    with pytest.raises(ConfigError, match=r"memory_share .*no room for one client"):
        run_on_ray(small("runtime.memory_share=0.001"))


unruly_app = "tests.unruly:app"


def test_memory_decides_the_number_of_actors(small):
    with ray_grid(small()) as grid:
        assert len(grid.crew.workers) == 4
    share = 0.8 * 2**30 / ray.cluster_resources()["memory"]  # for two or three actors
    with ray_grid(small(f"runtime.memory_share={share}")) as grid:
        assert 1 <= len(grid.crew.workers) < 4
        assert grid.crew.plan.actors == len(grid.crew.workers)


def test_a_model_that_does_not_suit_the_data(small):
    with pytest.raises(DataError, match=r'\[app.config\] model = "cnn2d"'):
        run_on_ray(small("app.config.model=cnn2d"))


def test_an_app_that_cannot_be_imported(small):
    with pytest.raises(WorkerError, match=r"no actor can be started: .*no_such_module"):
        RayGrid("no_such_module:app", small("runtime.num_workers=1"))
