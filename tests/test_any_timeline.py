"""What holds for every timeline, and what thousands of devices cost."""

import tracemalloc
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge_sim.config import Settings
from fedge_sim.runtime.timeline import CloudAnswers, Dispatched, VersionMade, timeline
from tests.test_timeline import settings_of


@st.composite
def runs(draw):
    """Return the settings of a run of uneven devices, as tables."""
    rule = draw(st.sampled_from(["fedavg", "fedbuff", "fedasync", "fedrevive"]))
    server = draw(st.sampled_from(["cloud", "leaf"]))
    meet = draw(st.sampled_from([{"cloud_interval": 3.0}, {"cloud_versions": 2}]))
    selected, versions = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    updates = 0 if rule in ("fedavg", "fedasync") else draw(st.integers(1, selected))
    reuse = draw(st.booleans())
    distribution = draw(st.sampled_from(["exponential", "constant", "log-normal"]))
    return {
        "rule": rule,
        "servers": draw(st.integers(1, 3)),
        "asynchronous": {"server": server} | (meet if server == "leaf" else {}),
        "clients": draw(st.integers(2 * selected, 20)) if reuse else 2 * selected * (versions + 1),
        "device_selection_size": selected,
        "device_reuse": reuse,
        "max_model_version": versions,
        "num_updates_for_model": updates,
        "min_hole_to_fill": draw(st.integers(1, selected)),
        "over_selection": draw(st.sampled_from([0.0, 0.5])) if rule == "fedavg" else 0.0,
        "job_timeout": draw(st.sampled_from([3.0, 30.0])),
        "update_timeout": draw(st.sampled_from([0.0, 4.0])),
        "dropout": draw(st.sampled_from([0.0, 0.2])),
        "availability": {
            "online": draw(st.sampled_from([1.0, 0.5])),
            "session": draw(st.sampled_from([2.0, 20.0])),
        },
        "device_speed": {"distribution": distribution, "mean": [1.0, 2.0]}
        | ({"std": 1.5} if distribution == "log-normal" else {}),
        "communication_delay": {"mean": 0.2, "std": 0.1},
        "client_leaf_bandwidth": {"down": 100.0, "up": 50.0},
        "leaf_cloud_bandwidth": {"down": 1000.0, "up": 0.0},
    }


@settings(max_examples=150)
@given(runs())
def test_what_holds_for_every_timeline(tables):
    run = settings_of(**tables)
    events = list(timeline(run, 10, 20))
    assert events == list(timeline(run, 10, 20))
    assert all(one.time <= other.time for one, other in pairwise(events))
    at_leaf = tables["asynchronous"]["server"] == "leaf"
    newest = [0] * (tables["servers"] if at_leaf else 1)
    made, under_way = list(newest), [{} for _ in newest]
    jobs = []
    for event in events:
        match event:
            case Dispatched():
                server = event.jobs[0].server
                for job in event.jobs:
                    assert (job.number, job.started) == (len(jobs), event.time)
                    assert (job.server, job.version) == (server, newest[server])
                    jobs.append(job)
                    under_way[server][job.number] = job
                active = [job for job in under_way[server].values() if job.ended > event.time]
                most = run.devices.device_selection_size * (1 + run.devices.over_selection)
                assert len(active) < most + 1
            case VersionMade():
                made[event.server] += 1
                newest[event.server] += 1
                assert event.version == newest[event.server]
                assert event.last == (made[event.server] == run.devices.max_model_version)
                assert {job.fate for job in event.jobs} == {"update"}
                assert "update" not in {job.fate for job in event.lost}
                for job in event.jobs + event.lost:
                    assert under_way[event.server].pop(job.number) == job
                    assert job.ended <= event.time
                    assert job.version < event.version
                assert event.active == len(under_way[event.server])
                assert sorted(event.jobs, key=lambda job: job.ended) == list(event.jobs)
                few = event.by_timeout or tables["rule"] == "fedavg"
                assert few or len(event.jobs) == run.updates_for_model
                assert len(event.jobs) <= run.updates_for_model
            case CloudAnswers():
                newest = [version + 1 for version in newest]
                assert event.versions == tuple(newest)
    assert max(made) <= run.devices.max_model_version
    assert not tables["device_reuse"] or set(made) == {run.devices.max_model_version}
    kinds = [type(e) for e in events if isinstance(e, VersionMade | CloudAnswers)]
    assert not at_leaf or kinds[-1:] in ([], [CloudAnswers])  # no version is left alone
    free_from = {}
    for job in jobs:
        assert job.leaf == job.client // tables["clients"]
        assert job.server == (job.leaf if at_leaf else 0)
        assert 0 <= job.training <= job.ended - job.started + 1e-9
        assert job.started >= free_from.get(job.client, 0)
        assert tables["device_reuse"] or job.client not in free_from
        free_from[job.client] = job.ended


def scaled(tables, factor):
    """Return the tables with all times so many times as long."""

    def times(table, *names):
        return {n: [v * factor for v in x] if isinstance(x, list) else x * factor
                if n in names else x for n, x in table.items()}  # fmt: skip

    changed = {
        name: {key: value / factor for key, value in tables[name].items()}
        for name in ("client_leaf_bandwidth", "leaf_cloud_bandwidth")
    }
    for name in ("asynchronous", "availability", "device_speed", "communication_delay"):
        changed[name] = times(tables[name], "cloud_interval", "session", "mean", "std")
    return times(tables, "job_timeout", "update_timeout") | changed


@settings(max_examples=60)
@given(runs())
def test_all_delays_eight_times_as_long_change_only_the_times(tables):
    # A power of two: floating point scales by it without rounding.
    def longer(job):
        return replace(job, started=job.started * 8, ended=job.ended * 8, training=job.training * 8)

    def all_longer(event):
        parts = {"time": event.time * 8}
        for name in ("jobs", "lost"):
            if hasattr(event, name):
                parts[name] = tuple(map(longer, getattr(event, name)))
        return replace(event, **parts)

    events = timeline(settings_of(**tables), 10, 20)
    assert list(timeline(settings_of(**scaled(tables, 8)), 10, 20)) == list(map(all_longer, events))


def test_all_delays_ten_times_as_long():
    tables = {
        "device_speed": {"distribution": "exponential", "mean": 1.0},
        "communication_delay": {"mean": 0.2, "std": 0.1},
        "job_timeout": 3.0,
    }
    ten = {
        "device_speed": {"distribution": "exponential", "mean": 10.0},
        "communication_delay": {"mean": 2.0, "std": 1.0},
        "job_timeout": 30.0,
    }
    events, longer = ([*timeline(settings_of(**t), 0, 0)] for t in (tables, ten))
    assert [e.time for e in longer] == pytest.approx([e.time * 10 for e in events])
    assert [[j.client for j in e.jobs] for e in longer] == [
        [j.client for j in e.jobs] for e in events
    ]


def test_another_seed_is_another_timeline():
    run = settings_of(device_speed={"distribution": "exponential", "mean": 1.0})
    other = Settings.from_tables(
        run.model_dump(by_alias=True) | {"app": {"config": {"partition": "iid", "seed": 43}}}
    )
    first, second = (next(timeline(each, 0, 0)).jobs for each in (run, other))
    assert {job.client for job in first} != {job.client for job in second}
    assert {job.ended for job in first} & {job.ended for job in second} == set()


# Thousands of devices


def test_memory_does_not_grow_with_versions():
    run = settings_of(
        device_speed={"distribution": "exponential", "mean": [1.0, 2.0]},
        job_timeout=5.0,
        dropout=0.1,
        update_timeout=500.0,
        max_model_version=10_000,
    )
    sizes = []
    tracemalloc.start()
    for event in timeline(run, 0, 0):
        if isinstance(event, VersionMade) and event.version % 2500 == 0:
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert len(sizes) == 4
    assert max(sizes) - sizes[0] < 60_000  # bytes


def test_a_million_devices_cost_nothing_until_they_are_used():
    tracemalloc.start()
    run = settings_of(clients=1_000_000, device_selection_size=1000, max_model_version=100)
    events = list(timeline(run, 0, 0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(events[0].jobs) == 1000
    assert peak < 1_500_000  # bytes
