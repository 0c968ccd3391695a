import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedge_sim.config import Settings
from fedge_sim.errors import ConfigError
from fedge_sim.runtime.gpu import resolve
from fedge_sim.runtime.sizing import (
    MAX_COHORT,
    Machine,
    Need,
    Plan,
    is_open,
    plan,
    settle,
    settle_cohort,
)
from fedge_sim.training.choice import Choice

GIB = 2**30
LAPTOP = Machine(cores=2, memory=16 * GIB)
ONE_GPU = Machine(cores=16, memory=64 * GIB, gpus=1, gpu_memory=80 * GIB)


def settings_of(clients: int = 9, **runtime) -> Settings:
    topology = {"num_servers": 1, "clients_per_server": [clients]}
    return Settings.from_tables({"hierarchy": topology, "runtime": runtime})


def planned(
    machine: Machine, need: Need | None = None, clients: int = 9, best: int = 1, **runtime
) -> Plan:
    settings = settings_of(clients, **runtime)
    return plan(settings, resolve(settings.runtime, machine.gpus), machine, need, best)


def test_a_laptop():
    found = planned(LAPTOP)
    assert found == Plan(
        actors=2,
        threads=1,
        cpus_per_actor=1.0,
        gpus_per_actor=0.0,
        cohort_size=1,
        memory_cap=4 * GIB,
    )
    assert found.describe(9) == (
        "2 actors x 1 thread, GPU fraction 0, cohort size 1; "
        "9 clients on 2 actors: 4.5 -> 5 waves a round"
    )
    assert found.describe(2).endswith("; 2 clients on 2 actors: 1 wave a round")


def test_never_more_actors_than_clients():
    assert planned(ONE_GPU, clients=3, num_gpus_per_actor=0).actors == 3
    assert planned(ONE_GPU, clients=3, num_gpus_per_actor=0, cohort_size=2).actors == 2


def test_threads_and_cpus_of_an_actor():
    machine = Machine(cores=8, memory=16 * GIB)
    assert planned(machine, threads_per_client=3).actors == 2
    cohorts = planned(machine, cohort_size=4)  # three have clients; a cohort takes one thread
    assert (cohorts.actors, cohorts.threads, cohorts.cpus_per_actor) == (3, 1, 1.0)
    assert planned(machine, cohort_size=100).cohort_size == 100  # of more clients than cores
    held = planned(machine, num_cpus_per_actor=2.5)
    assert (held.actors, held.threads, held.cpus_per_actor) == (3, 1, 2.5)
    assert planned(machine, num_cpus_per_actor=0.1).actors == 8  # a core each all the same


def test_memory_of_the_host():
    # half of 16 GiB are allowed; an actor takes 1 + 2 GiB
    need = Need(base=1 * GIB, per_client=2 * GIB)
    machine = Machine(cores=8, memory=16 * GIB)
    assert planned(machine, need).actors == 2
    assert planned(machine, need, memory_share=0.8).actors == 4
    assert planned(machine, need, cohort_size=2).actors == 1


def test_fractions_of_a_gpu():
    half = planned(ONE_GPU)
    assert (half.actors, half.gpus_per_actor, half.memory_cap) == (2, 0.5, 20 * GIB)
    assert planned(ONE_GPU, gpu_profile="high").actors == 1
    assert planned(ONE_GPU, num_gpus_per_actor=0.3).actors == 3
    assert planned(ONE_GPU, num_gpus_per_actor=0.1).actors == 9  # as many as clients
    assert planned(ONE_GPU, clients=20, num_gpus_per_actor=0.1).actors == 10


def test_actors_on_several_gpus():
    four = Machine(cores=16, memory=64 * GIB, gpus=4, gpu_memory=80 * GIB)
    full = planned(four)
    assert full.actors == 8


def test_streams_fill_the_memory_of_their_actor():
    # aggressive: one actor, 0.95 x 0.95 of 80 GiB = 72.2 GiB, four streams
    need = Need(base=1 * GIB, per_client=20 * GIB)
    assert planned(ONE_GPU, need, gpu_profile="aggressive").streams == 3
    small = Need(base=1 * GIB, per_client=1 * GIB)
    four = planned(ONE_GPU, small, gpu_profile="aggressive")
    assert (four.streams, four.cohort_size, four.threads, four.cpus_per_actor) == (4, 1, 4, 4.0)
    assert planned(ONE_GPU, small, gpu_profile="aggressive", streams=9).streams == 9
    assert planned(ONE_GPU, small, clients=2, gpu_profile="aggressive").streams == 2
    assert planned(ONE_GPU, small).streams == 1
    two_cores = Machine(cores=2, memory=64 * GIB, gpus=1, gpu_memory=80 * GIB)
    assert planned(two_cores, small, gpu_profile="aggressive").streams == 2


EIGHT = Machine(cores=8, memory=16 * GIB)
BIG, LITTLE = Need(GIB, 10 * GIB), Need(GIB, GIB)
COHORTS = [
    # machine, need, clients, best, more settings; actors, cohort size, streams
    (LAPTOP, None, 100, 16, {}, (2, 16, 1)),
    (LAPTOP, None, 9, 16, {}, (2, 5, 1)),  # no more than an actor has clients
    (EIGHT, None, 9, 16, {}, (8, 2, 1)),  # all cores first
    (EIGHT, None, 3, 16, {}, (3, 1, 1)),
    (EIGHT, None, 9000, 1000, {}, (8, MAX_COHORT, 1)),
    (LAPTOP, Need(GIB, GIB), 100, 16, {}, (2, 3, 1)),  # 4 GiB an actor
    (EIGHT, Need(GIB, GIB), 100, 16, {}, (4, 1, 1)),
    (LAPTOP, None, 100, 16, {"training": "cohort"}, (2, 16, 1)),
    (LAPTOP, None, 100, 16, {"training": "single"}, (2, 1, 1)),
    (LAPTOP, None, 100, 16, {"training": "reference"}, (2, 1, 1)),
    (LAPTOP, None, 100, 16, {"training": "reference", "cohort_size": 1}, (2, 1, 1)),
    (LAPTOP, None, 100, 16, {"cohort_size": 24}, (2, 24, 1)),
    (LAPTOP, None, 9, 16, {"cohort_size": 24}, (1, 24, 1)),
    (ONE_GPU, None, 100, 16, {}, (2, 16, 1)),
    (ONE_GPU, BIG, 100, 16, {}, (2, 1, 1)),
    (ONE_GPU, LITTLE, 100, 16, {}, (2, 16, 1)),  # 20 GiB an actor
    (ONE_GPU, LITTLE, 100, 32, {}, (2, 19, 1)),
    (ONE_GPU, LITTLE, 100, 16, {"gpu_profile": "aggressive"}, (1, 16, 4)),  # 72 GiB
    (ONE_GPU, LITTLE, 100, 32, {"gpu_profile": "aggressive"}, (1, 32, 2)),
    (ONE_GPU, LITTLE, 100, 64, {"gpu_profile": "aggressive"}, (1, 64, 1)),
    (ONE_GPU, LITTLE, 40, 16, {"gpu_profile": "aggressive"}, (1, 16, 3)),
    (ONE_GPU, LITTLE, 100, 1, {"gpu_profile": "aggressive", "cohort_size": 30}, (1, 30, 2)),
]


@pytest.mark.parametrize(("machine", "need", "clients", "best", "runtime", "expected"), COHORTS)
def test_the_size_of_cohorts(machine, need, clients, best, runtime, expected):
    found = planned(machine, need, clients, best, **runtime)
    assert (found.actors, found.cohort_size, found.streams) == expected
    assert found.threads == found.streams


def test_cohorts_and_streams_are_described():
    line = planned(ONE_GPU, clients=100, best=16, gpu_profile="aggressive").describe(100)
    assert line == (
        "1 actor x 4 threads, GPU fraction 0.95, cohort size 16 on each of 4 streams; "
        "100 clients on 1 actor: 1.56 -> 2 waves a round"
    )
    assert "cohort size 16; 100" in planned(LAPTOP, clients=100, best=16).describe(100)


SETTLED = [
    ({}, True, ("cohort", False)),
    ({"compile": True}, True, ("cohort", True)),
    ({"training": "cohort"}, True, ("cohort", False)),  # its size is open
    ({"training": "cohort", "cohort_size": 4}, False, None),
    ({"training": "single"}, True, ("single", False)),
    ({"training": "single", "compile": True}, False, None),
    ({"training": "reference"}, False, None),
]


@pytest.mark.parametrize(("runtime", "is_it", "expected"), SETTLED)
def test_what_is_open_is_settled_by_what_was_measured(runtime, is_it, expected):
    settings = settings_of(**runtime)
    assert is_open(settings.runtime) == is_it
    if is_it:
        found = settle(settings, Choice("cohort", compile=False, cohort_size=7, reason="")).runtime
        assert (found.training, found.compile) == expected


def test_a_cohort_size_that_is_settled_is_not_open():
    cohorts = settle_cohort(settings_of(training="cohort"), 7).runtime
    assert cohorts.cohort_size == 7
    assert not is_open(cohorts)
    assert settle_cohort(settings_of(training="reference"), 1).runtime.cohort_size == "auto"


def test_where_no_client_fits_actors_get_more_of_a_gpu():
    # conservative: half of 80 GiB for all actors
    assert planned(ONE_GPU, Need(GIB, 18 * GIB)).actors == 2
    alone = planned(ONE_GPU, Need(GIB, 22 * GIB))
    assert (alone.actors, alone.gpus_per_actor, alone.memory_cap) == (1, 1.0, 40 * GIB)
    high = planned(ONE_GPU, Need(GIB, 70 * GIB), gpu_profile="high")
    assert (high.actors, high.gpus_per_actor) == (1, 1.0)
    fixed = planned(ONE_GPU, Need(GIB, 22 * GIB), num_workers=1)
    assert (fixed.actors, fixed.gpus_per_actor) == (1, 1.0)


def test_a_fixed_number_of_workers_is_honoured():
    assert planned(ONE_GPU, num_gpus_per_actor=0, num_workers=12).actors == 12
    one = planned(ONE_GPU, num_workers=1)
    assert (one.actors, one.gpus_per_actor) == (1, 0.5)


TOO_MUCH = [
    (
        LAPTOP,
        None,
        {"num_workers": 4},
        "num_workers = 4: must be at most 2: 1 compute thread and CPUs 1 an actor, on 2 cores",
    ),
    (
        LAPTOP,
        None,
        {"num_workers": 2, "num_cpus_per_actor": 1.5},
        "num_workers = 2: must be at most 1: 1 compute thread and CPUs 1.5 an actor, on 2 cores",
    ),
    (
        LAPTOP,
        None,
        {"num_workers": 2, "threads_per_client": 2},
        "num_workers = 2: must be at most 1: 2 compute threads and CPUs 2 an actor, on 2 cores",
    ),
    (
        LAPTOP,
        None,
        {"cohort_size": 257},
        "cohort_size = 257: must be at most 256",
    ),
    (
        LAPTOP,
        None,
        {"cohort_size": 2, "training": "single"},
        'cohort_size = 2: must be 1 or "auto" with training = "single": it trains clients one by '
        "one",
    ),
    (
        LAPTOP,
        None,
        {"cohort_size": 8, "training": "reference"},
        'cohort_size = 8: must be 1 or "auto" with training = "reference": it trains clients one '
        "by one",
    ),
    (
        LAPTOP,
        None,
        {"threads_per_client": 3},
        "threads_per_client = 3: must be at most 2: there are 2 cores here",
    ),
    (
        Machine(cores=1, memory=16 * GIB),
        None,
        {"num_cpus_per_actor": 1.5},
        "num_cpus_per_actor = 1.5: must be at most 1: there is 1 core here",
    ),
    (
        LAPTOP,
        None,
        {"num_gpus_per_actor": 0.5},
        'num_gpus_per_actor = 0.5: there is no GPU here; set 0 or "auto"',
    ),
    (
        ONE_GPU,
        None,
        {"num_workers": 3},
        "num_workers = 3: must be at most 2: a GPU fraction of 0.5 an actor, on 1 GPU",
    ),
    (
        LAPTOP,
        Need(GIB, 5 * GIB),
        {"num_workers": 2},
        "num_workers = 2: must be at most 1: 6.00 GiB an actor, measured, of 8.00 GiB allowed "
        "(memory_share 0.5)",
    ),
    (
        LAPTOP,
        Need(GIB, 8 * GIB),
        {},
        'memory_share = "profile": 0.5 has no room for one client: an actor takes 1.00 GiB and '
        "8.00 GiB for each client that it trains at a time, measured; allowed are 8.00 GiB; "
        "set a larger memory_share, or a smaller hierarchy.batch_size",
    ),
    (
        LAPTOP,
        Need(GIB, 4 * GIB),
        {"cohort_size": 2},
        "cohort_size = 2: must be at most 1: an actor takes 1.00 GiB and 4.00 GiB for each client "
        "that it trains at a time, measured; allowed are 8.00 GiB",
    ),
    (
        ONE_GPU,
        Need(GIB, 20 * GIB),
        {"cohort_size": 2},
        "cohort_size = 2: must be at most 1: an actor takes 1.00 GiB and 20.00 GiB for each client "
        "that it trains at a time, measured; allowed are 40.00 GiB",
    ),
    (
        ONE_GPU,
        Need(GIB, 22 * GIB),
        {"num_workers": 2, "num_gpus_per_actor": 0.25, "memory_share": 0.9},
        "memory_share = 0.9: 0.9 has no room for one client: an actor takes 1.00 GiB and 22.00 GiB "
        "for each client that it trains at a time, measured; allowed are 18.00 GiB; set a "
        "larger memory_share or num_gpus_per_actor, or a smaller hierarchy.batch_size or "
        "num_workers",
    ),
]


@pytest.mark.parametrize(("machine", "need", "runtime", "message"), TOO_MUCH)
def test_what_does_not_fit_is_refused(machine, need, runtime, message):
    with pytest.raises(ConfigError) as caught:
        planned(machine, need, **runtime)
    assert str(caught.value) == f"[runtime] {message}"


def test_a_fixed_number_of_workers_is_not_lowered_for_memory_of_a_gpu():
    with pytest.raises(ConfigError, match=r"or a smaller hierarchy\.batch_size or num_workers"):
        planned(ONE_GPU, Need(GIB, 22 * GIB), num_workers=2)


machines = st.builds(
    Machine,
    cores=st.integers(4, 64),
    memory=st.integers(8 * GIB, 256 * GIB),
    gpus=st.integers(0, 4),
    gpu_memory=st.integers(8 * GIB, 80 * GIB),
)
needs = st.none() | st.builds(Need, st.integers(0, GIB), st.integers(0, 4 * GIB))
wishes = st.fixed_dictionaries(
    {
        "gpu_profile": st.sampled_from(["conservative", "high", "aggressive"]),
        "threads_per_client": st.integers(1, 2),
    },
    optional={
        "num_workers": st.integers(1, 4),
        "num_cpus_per_actor": st.floats(0.01, 4),
        "num_gpus_per_actor": st.floats(0.01, 1) | st.just(0.0),
        "cohort_size": st.integers(1, 100),
        "memory_share": st.floats(0.2, 1),
        "streams": st.integers(1, 8),
    },
)


@given(machines, needs, wishes, st.integers(1, 100), st.integers(1, 300))
def test_a_plan_fits_the_machine_and_keeps_what_is_fixed(machine, need, wish, clients, best):
    settings = settings_of(clients, **wish)
    profile = resolve(settings.runtime, machine.gpus)
    try:
        found = plan(settings, profile, machine, need, best)
    except ConfigError:
        assume(False)
    threads = found.streams * settings.runtime.threads_per_client
    assert 1 <= found.streams <= profile.streams
    if "cohort_size" not in wish:
        assert 1 <= found.cohort_size <= min(best, math.ceil(clients / found.actors), MAX_COHORT)
    assert found.threads == threads
    assert found.actors * threads <= machine.cores
    assert found.actors * found.cpus_per_actor <= machine.cores + 1e-6
    memory = found.memory_cap if found.gpus_per_actor else machine.memory * profile.memory_share
    together = 1 if found.gpus_per_actor else found.actors
    if need is not None:
        assert together * (need.base + found.at_a_time * need.per_client) <= memory
    if found.gpus_per_actor:
        per_gpu = math.floor(1 / found.gpus_per_actor + 1e-9)
        assert found.actors <= per_gpu * machine.gpus
        share = per_gpu * found.memory_cap / machine.gpu_memory
        assert share <= profile.memory_share * (1 + 1e-6)
    else:
        assert machine.gpus == 0 or wish["num_gpus_per_actor"] == 0
        assert found.actors * found.memory_cap <= memory
    if "num_workers" not in wish:
        assert (found.actors - 1) * (wish.get("cohort_size", 1)) < clients
    fixed = {
        "num_workers": found.actors,
        "num_cpus_per_actor": found.cpus_per_actor,
        "num_gpus_per_actor": found.gpus_per_actor,
        "cohort_size": found.cohort_size,
    }
    assert {key: fixed[key] for key in wish if key in fixed} == {
        key: value for key, value in wish.items() if key in fixed
    }


@given(machines, needs, st.integers(1, 3), st.integers(1, 100), st.integers(1, 300))
def test_no_larger_number_of_actors_would_fit(machine, need, threads, clients, best):
    """What "auto" chose is the most: one actor more, fixed by hand, is refused or has no client."""
    try:
        found = planned(machine, need, clients, best, threads_per_client=threads)
    except ConfigError:
        assume(False)
    assume(found.actors < clients)
    more = found.actors + 1
    with pytest.raises(ConfigError):
        planned(machine, need, clients, best, threads_per_client=threads, num_workers=more)


@given(machines, wishes, st.integers(1, 100), st.integers(1, 300))
def test_measured_memory_only_ever_lowers_the_bound(machine, wish, clients, best):
    try:
        bound = planned(machine, None, clients, best, **wish)
        found = planned(machine, Need(GIB // 4, GIB // 4), clients, best, **wish)
    except ConfigError:
        assume(False)
    assert found.actors <= bound.actors
