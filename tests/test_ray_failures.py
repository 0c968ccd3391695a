"""What goes wrong on Ray's actors, for real: clients and actors that fail, hang, or take too much."""

import re
import time
from dataclasses import replace

import pytest
import ray

from fedge_sim.errors import RoundError, StalledError, WorkerError
from fedge_sim.orchestrator import Orchestrator
from tests import unruly
from tests.conftest import Keep, ray_grid, run, run_on_ray, same_models
from tests.test_replies import ONE_LEAF, TRAINED, check_evaluated, check_trained, eights

UNRULY = "tests.unruly:app"


@pytest.fixture(scope="module", autouse=True)
def _ray(start_ray):
    with start_ray(num_cpus=4):
        yield


@pytest.fixture
def two(small):
    """Return a function to the settings of a run on two actors."""
    return lambda *more: small("runtime.num_workers=2", *more)


def test_a_killed_actor_is_replaced_and_nothing_changes(two, caplog):
    settings = two()
    unruly.rule(settings, c4=("die", 1))
    with ray_grid(settings, UNRULY) as grid:
        last = Orchestrator(settings, grid, []).run().last
        assert len(grid.crew.workers) == 2
    assert "died; it is replaced, and its clients are run again" in caplog.text
    assert unruly.tries(settings, 4) == 3  # once more than there are rounds
    assert same_models(last, run(two()).last)


def test_a_client_that_kills_every_actor_is_left_out(two, caplog):
    settings = two("hierarchy.global_rounds=1")
    unruly.rule(settings, c4=("die", 99))
    last = run_on_ray(settings, app=UNRULY).last
    assert unruly.tries(settings, 4) == 4  # the first death may be another's fault
    assert "client 4 of leaf server 1 left out: its actor died" in caplog.text
    assert [c.client for c in last.clients if not c.bytes_up] == [4]


def test_a_client_that_raises_once_is_run_again(two, caplog):
    settings = two()
    unruly.rule(settings, c3=("raise", 1))
    last = run_on_ray(settings, app=UNRULY).last
    assert same_models(last, run(two()).last)
    assert caplog.text.count("Traceback") == 1
    assert "client 3 of leaf server 1 (train) failed, try 1 of 3: RuntimeError" in caplog.text


def test_a_client_that_always_raises_is_left_out_by_name(two, caplog):
    settings = two("runtime.max_retries=1")
    unruly.rule(settings, c3=("raise", 99))
    keep = Keep()
    run_on_ray(settings, [keep], app=UNRULY)
    assert unruly.tries(settings, 3) == 4  # in each of two rounds, twice
    assert caplog.text.count("Traceback") == 1
    assert caplog.text.count("client 3 of leaf server 1 left out: RuntimeError: the battery") == 2
    assert [c.client for c in keep.records[1].clients if not c.bytes_up] == [3]


@pytest.mark.parametrize("cohorts", [(), ("runtime.training=cohort", "runtime.cohort_size=4")])
@pytest.mark.parametrize("what", ["exit", "interrupt"])
def test_a_client_that_would_end_its_process_has_failed(two, caplog, what, cohorts):
    settings = two("runtime.max_retries=1", "hierarchy.global_rounds=1", *cohorts)
    unruly.rule(settings, c3=(what, 99))
    last = run_on_ray(settings, app=UNRULY).last
    name = {"exit": "SystemExit: 0", "interrupt": "KeyboardInterrupt"}[what]
    assert f"client 3 of leaf server 1 left out: {name}" in caplog.text
    assert "died" not in caplog.text
    assert [c.client for c in last.clients if not c.bytes_up] == [3]


@pytest.mark.parametrize("names", eights(TRAINED))
def test_who_replies_in_another_form_is_left_out_of_a_round(two, caplog, names):
    check_trained(two(*ONE_LEAF), caplog, names, TRAINED, run_unruly)


def test_who_evaluates_in_another_form_is_left_out_of_the_evaluation(two, caplog):
    check_evaluated(two(*ONE_LEAF), caplog, run_unruly)


def run_unruly(settings):
    return run_on_ray(settings, app=UNRULY).last


def test_too_few_clients_end_the_run(two):
    settings = two("runtime.max_retries=0", "runtime.min_clients_per_round=3")
    unruly.rule(settings, c3=("raise", 99))
    message = "leaf server 1: usable updates came from 2 of 3 clients in round 1, and must from 3"
    with pytest.raises(RoundError, match=message):
        run_on_ray(settings, app=UNRULY)


def test_a_reply_that_cannot_be_sent(two, caplog):
    settings = two("runtime.max_retries=0")
    with pytest.raises(RoundError, match="leaf server 0: usable updates came from 0 of 3"):
        run_on_ray(settings, app="tests.unruly:unsendable")
    assert "left out: TypeError: cannot pickle" in caplog.text


@pytest.mark.parametrize("how", ["sleep", "hold the interpreter"])
def test_a_client_past_its_time_is_stopped_and_run_again(two, caplog, how):
    settings = two("runtime.client_timeout_s=6.0")
    unruly.rule(settings, c1=(how, 1))
    last = run_on_ray(settings, app=UNRULY).last
    line = r"client 1 of leaf server 0 \(train\) .*: no reply within 6 s \(client_timeout_s\)"
    assert re.search(line, caplog.text)
    assert same_models(last, run(two()).last)


def test_a_client_that_always_hangs_is_left_out(two, caplog):
    settings = two(
        "runtime.client_timeout_s=15.0", "runtime.max_retries=0", "hierarchy.global_rounds=1"
    )
    unruly.rule(settings, c1=("sleep", 99))
    last = run_on_ray(settings, app=UNRULY).last
    assert "client 1 of leaf server 0 left out: no reply within 15 s" in caplog.text
    assert [c.client for c in last.clients if not c.bytes_up] == [1]


def test_no_progress_ends_the_run_with_every_stack(two, caplog):
    settings = two("runtime.progress_timeout_s=5.0")
    unruly.rule(settings, all=("sleep", 99))
    with pytest.raises(StalledError, match=r"no client got done for 5 s .* 9 wait"):
        run_on_ray(settings, app=UNRULY)
    assert "--- trainer-0 cpu 1" in caplog.text
    assert "--- trainer-1 cpu 1" in caplog.text
    assert caplog.text.count("in sleep_for_ever") == 2


# ------------------------------------------------------------------ cohorts

COHORTS = ("runtime.training=cohort", "runtime.cohort_size=4")


def test_a_client_that_fails_in_a_cohort_is_the_only_one_left_out(two, caplog):
    settings = two(*COHORTS, "runtime.max_retries=1", "hierarchy.global_rounds=1")
    unruly.rule(settings, c4=("raise", 99))
    last = run_on_ray(settings, app=UNRULY).last
    assert any(4 in cohort for cohort in unruly.cohorts(settings))
    assert unruly.tries(settings, 4) == 3  # in the cohort, and twice alone
    assert "client 4 of leaf server 1 left out: RuntimeError: the battery is empty" in caplog.text
    assert [c.client for c in last.clients if not c.bytes_up] == [4]


def test_an_actor_that_dies_in_a_cohort_is_replaced_and_all_are_run_alone(two, caplog):
    settings = two(*COHORTS, "hierarchy.global_rounds=1")
    unruly.rule(settings, c4=("die", 1))
    last = run_on_ray(settings, app=UNRULY).last
    (cohort,) = [cohort for cohort in unruly.cohorts(settings) if 4 in cohort]
    assert len(cohort) > 1
    for client in cohort:
        name = f"client {client} of leaf server {client // 3} (train)"
        assert f"{name} is run again, alone: its actor died" in caplog.text
    assert all(client.bytes_up for client in last.clients)


def test_a_client_that_kills_every_cohort_is_left_out_alone(two):
    settings = two(*COHORTS, "runtime.max_retries=0", "hierarchy.global_rounds=1")
    unruly.rule(settings, c4=("die", 99))
    last = run_on_ray(settings, app=UNRULY).last
    assert [c.client for c in last.clients if not c.bytes_up] == [4]


def test_a_cohort_that_hangs_is_given_the_time_of_all_and_run_again_alone(two, caplog):
    settings = two(
        *COHORTS,
        "runtime.client_timeout_s=6.0",
        "runtime.max_retries=0",
        "hierarchy.global_rounds=1",
    )
    unruly.rule(settings, c4=("sleep", 99))
    started = time.monotonic()
    last = run_on_ray(settings, app=UNRULY).last
    (cohort,) = [cohort for cohort in unruly.cohorts(settings) if 4 in cohort]
    assert time.monotonic() - started > 6.0 * (len(cohort) + 1)
    assert "client 4 of leaf server 1 left out: no reply within 6 s" in caplog.text
    assert [c.client for c in last.clients if not c.bytes_up] == [4]


# ------------------------------------------------------------------ memory


def test_out_of_memory_halves_the_cohort(two, caplog):
    settings = two(*COHORTS)
    unruly.rule(settings, c0=("gpu memory", 1))
    with ray_grid(settings, UNRULY) as grid:
        last = Orchestrator(grid.settings, grid, []).run().last
        assert grid.crew.plan.cohort_size == 2
        assert len(grid.crew.workers) == 2
    assert "cohort size 2; next time set runtime.cohort_size = 2" in caplog.text
    assert all(client.bytes_up for client in last.clients)
    assert [len(cohort) for cohort in unruly.cohorts(settings)].count(4) <= 2  # those dealt before


@pytest.mark.parametrize("kind", ["gpu memory", "host memory"])
def test_then_it_moves_to_fewer_actors(two, caplog, kind):
    settings = two()
    unruly.rule(settings, c0=(kind, 1))
    names = []
    with ray_grid(settings, UNRULY, on_workers=names.append) as grid:
        last = Orchestrator(settings, grid, []).run().last
        assert len(grid.crew.workers) == 1
    assert [len(told) for told in names] == [2, 2, 1]  # started, sized, one less
    assert "actors now 1, cohort size 1; next time set runtime.num_workers = 1" in caplog.text
    assert same_models(last, run(two()).last)


def test_at_last_the_client_is_left_out(two, caplog):
    settings = two("hierarchy.global_rounds=1")
    unruly.rule(settings, c0=("gpu memory", 99))
    last = run_on_ray(settings, app=UNRULY).last
    assert (
        "client 0 of leaf server 0 left out: out of memory, alone on the only actor" in caplog.text
    )
    assert [c.client for c in last.clients if not c.bytes_up] == [0]


def test_all_out_of_memory_at_once_count_once(two, caplog):
    settings = two("runtime.num_workers=4", "hierarchy.global_rounds=1")
    unruly.rule(settings, all=("gpu memory", 1))
    with ray_grid(settings, UNRULY) as grid:
        last = Orchestrator(settings, grid, []).run().last
        assert 1 <= len(grid.crew.workers) <= 3
    assert "left out" not in caplog.text
    assert same_models(last, run(two("hierarchy.global_rounds=1")).last)


def test_a_new_actor_is_of_the_same_size(two):
    settings = two(*COHORTS, "hierarchy.global_rounds=1")
    unruly.rule(settings, c0=("die", 1))
    with ray_grid(settings, UNRULY) as grid:
        first = {worker.introduction.pid for worker in grid.crew.workers}
        Orchestrator(settings, grid, []).run()
        deadline = time.monotonic() + 300
        while not all(worker.introduction for worker in grid.crew.workers):
            assert time.monotonic() < deadline
            time.sleep(0.1)
            grid.crew.welcome()
        assert {worker.introduction.pid for worker in grid.crew.workers} - first
        sizes = ray.get([worker.actor.cohort_size.remote() for worker in grid.crew.workers])
    assert sizes == [4, 4]


def test_a_new_actor_that_has_no_place_is_given_up(two):
    settings = two("runtime.num_workers=1", "runtime.node_timeout_s=20.0")
    unruly.rule(settings, c0=("die", 99))
    with ray_grid(settings, UNRULY) as grid:
        start = grid.crew._start

        def far_away(index):
            grid.crew.plan = replace(grid.crew.plan, cpus_per_actor=99.0)
            return start(index)

        grid.crew._start = far_away
        with pytest.raises(WorkerError, match=r"none did within 20 s \(node_timeout_s\)"):
            Orchestrator(settings, grid, []).run()


@pytest.mark.parametrize("actors", [1, 2])
def test_an_actor_that_ray_killed_for_memory(two, caplog, actors):
    """As Ray's memory monitor does it; its error is made here, where the reply is fetched."""
    settings = two(f"runtime.num_workers={actors}")
    unruly.rule(settings)
    killed = []
    real = ray.get

    def get(refs, **kwargs):
        if not killed and refs in grid._running and time_to_die():
            killed.extend(grid._running[refs].worker.calls)
        if refs in killed:
            raise ray.exceptions.OutOfMemoryError("Task was killed due to the node running low")
        return real(refs, **kwargs)

    def time_to_die():
        return any(t.kind == "train" for hand in grid._running.values() for t in hand.tasks)

    with ray_grid(settings, UNRULY) as grid, pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedge_sim.runtime.ray_grid.ray.get", get)
        last = Orchestrator(settings, grid, []).run().last
        assert len(grid.crew.workers) == 1
    assert killed
    assert ("next time set runtime.num_workers = 1" in caplog.text) == (actors == 2)
    assert "left out" not in caplog.text
    assert same_models(last, run(two()).last)
