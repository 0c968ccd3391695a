"""The timeline: small ones by hand, and what holds for all."""

import logging
from itertools import pairwise

import pytest

from fedge_sim.config import Settings
from fedge_sim.errors import ConfigError, StalledError
from fedge_sim.runtime.device_pool import DevicePool
from fedge_sim.runtime.timeline import (
    CloudAnswers,
    CloudAsks,
    Dispatched,
    OutOfDevices,
    VersionMade,
    simulate_round,
    timeline,
)

SECOND = {"distribution": "constant", "mean": 1.0}


def settings_of(rule="fedbuff", clients=1000, servers=1, asynchronous=(), hierarchy=(), **devices):
    """Return settings of devices that train for 1 s a step, but for what is given."""
    return Settings.from_tables(
        {
            "app": {"config": {"partition": "iid"}},
            "hierarchy": {"num_servers": servers, **dict(hierarchy)},
            "devices": {
                "enable": True,
                "devices_per_leaf": clients,
                "device_speed": SECOND,
                "job_timeout": 0.0,
                "update_timeout": 0.0,
                **devices,
            },
            "asynchronous": {"rule": rule, **dict(asynchronous)},
        }
    )


def events_of(seconds, rule="fedbuff", size=(0, 0), **tables):
    """Return the events where device i trains for ``seconds[i]``, all that there are at first."""
    tables.setdefault("device_selection_size", len(seconds) // tables.get("servers", 1))
    tables.setdefault("clients", tables["device_selection_size"])
    run = settings_of(rule, device_speed_per="step", **tables)
    return list(timeline(run, *size, lambda client: seconds[client]))


def versions_of(events):
    """Return each version made as (time, [(client, version it started from), ...], active)."""
    made = [event for event in events if isinstance(event, VersionMade)]
    return [(e.time, [(job.client, job.version) for job in e.jobs], e.active) for e in made]


def dispatched_by(events):
    """Return each dispatch as (time, sorted clients, version)."""
    begun = [event for event in events if isinstance(event, Dispatched)]
    return [(e.time, sorted(job.client for job in e.jobs), e.jobs[0].version) for e in begun]


# By hand: versions of every few updates


def test_a_version_of_each_update():
    events = events_of([2, 3], max_model_version=5)
    assert versions_of(events) == [
        (2, [(0, 0)], 1),
        (3, [(1, 0)], 1),
        (4, [(0, 1)], 1),
        (6, [(1, 2)], 1),  # both arrive at 6: this one was on its way first
        (6, [(0, 3)], 1),
    ]
    assert dispatched_by(events) == [
        *((0, [0, 1], 0), (2, [0], 1), (3, [1], 2), (4, [0], 3), (6, [1], 4))
    ]


def test_a_version_of_two_updates():
    events = events_of([2, 3], num_updates_for_model=2, max_model_version=2)
    assert versions_of(events) == [(3, [(0, 0), (1, 0)], 1), (6, [(0, 0), (1, 1)], 1)]
    # Device 0 does not wait for the version.
    assert dispatched_by(events) == [(0, [0, 1], 0), (2, [0], 0), (3, [1], 1), (4, [0], 1)]


def test_free_places_are_filled_once_they_are_enough():
    events = events_of([1, 2, 5], min_hole_to_fill=2, max_model_version=5)
    assert versions_of(events)[:4] == [
        (1, [(0, 0)], 2),
        (2, [(1, 0)], 1),
        (3, [(0, 2)], 2),
        (4, [(1, 2)], 1),
    ]
    assert versions_of(events)[4] == (5, [(2, 0)], 2)
    assert dispatched_by(events) == [(0, [0, 1, 2], 0), (2, [0, 1], 2), (4, [0, 1], 4)]


def test_free_places_are_filled_where_no_version_could_come_otherwise():
    events = events_of([1, 2, 9], min_hole_to_fill=3, num_updates_for_model=2, max_model_version=2)
    assert versions_of(events) == [(2, [(0, 0), (1, 0)], 1), (4, [(0, 1), (1, 1)], 1)]


def test_a_version_is_made_early_when_the_update_timeout_has_passed():
    tables = {"num_updates_for_model": 3, "update_timeout": 3.0, "max_model_version": 4}
    events = events_of([1, 2, 10], min_hole_to_fill=3, **tables)
    assert versions_of(events) == [
        *((3, [(0, 0), (1, 0)], 1), (6, [(0, 1), (1, 1)], 1), (9, [(0, 2), (1, 2)], 1)),
        (11, [(2, 0), (0, 3), (1, 3)], 0),
    ]
    made = [event for event in events if isinstance(event, VersionMade)]
    assert [event.by_timeout for event in made] == [True, True, True, False]


def test_no_version_is_made_of_nothing():
    tables = {"num_updates_for_model": 2, "update_timeout": 3.0, "max_model_version": 1}
    assert versions_of(events_of([4, 100], **tables)) == [(6, [(0, 0)], 2)]


def test_a_lost_job_frees_its_place():
    tables = {"num_updates_for_model": 2, "job_timeout": 3.0, "max_model_version": 3}
    events = events_of([1, 2, 9], **tables)
    assert versions_of(events) == [
        (2, [(0, 0), (1, 0)], 2),  # device 0 was sent out again at 1
        (3, [(0, 0), (0, 1)], 2),
        (4, [(1, 1), (0, 2)], 2),
    ]
    lost = [[job.client for job in e.lost] for e in events if isinstance(e, VersionMade)]
    assert lost == [[], [2], []]  # given up at 3
    assert (3, [2], 1) in dispatched_by(events)


def test_a_job_says_all_about_itself():
    job = events_of([2, 3], max_model_version=1, upload_delay=SECOND)[1].jobs[0]
    assert (job.client, job.server, job.leaf, job.version) == (0, 0, 0, 0)
    assert (job.started, job.ended, job.training, job.fate) == (0, 3, 2, "update")


# By hand: rounds


def test_a_round_ends_when_enough_have_come():
    tables = {"device_selection_size": 2, "over_selection": 0.5, "max_model_version": 2}
    events = events_of([1, 2, 5], "fedavg", clients=3, **tables)
    assert versions_of(events) == [(2, [(0, 0), (1, 0)], 0), (4, [(0, 1), (1, 1)], 0)]
    assert dispatched_by(events) == [(0, [0, 1, 2], 0), (2, [0, 1, 2], 1)]
    (late,) = events[1].lost
    assert (late.client, late.fate, late.ended, late.training) == (2, "too late", 2, 2)
    assert late in events[0].jobs  # known when it begins


def test_a_round_does_not_wait_for_ever():
    events = events_of([1, 2, 5], "fedavg", job_timeout=3.0, max_model_version=2)
    assert versions_of(events) == [(3, [(0, 0), (1, 0)], 0), (6, [(0, 1), (1, 1)], 0)]
    assert [(job.fate, job.ended, job.training) for job in events[1].lost] == [("timed out", 3, 3)]
    assert not events[1].by_timeout


def test_the_update_timeout_ends_a_round_with_who_came():
    events = events_of([1, 2, 5], "fedavg", update_timeout=1.5, max_model_version=2)
    assert versions_of(events) == [(1.5, [(0, 0)], 0), (3, [(0, 1)], 0)]
    assert {job.fate for job in events[1].lost} == {"too late"}
    assert events[1].by_timeout
    assert not events_of([1, 2], "fedavg", update_timeout=2.0, max_model_version=1)[1].by_timeout


@pytest.mark.parametrize("timeout", ["job_timeout", "update_timeout"])
def test_a_run_to_which_nobody_comes_ends(timeout):
    why = {"job_timeout": "longer than job_timeout", "update_timeout": "later than update_timeout"}
    with pytest.raises(StalledError, match=rf"100 rounds .* up to 50 sim.* {why[timeout]}"):
        events_of([1, 2], "fedavg", **{timeout: 0.5})


def test_updates_that_never_come_end_a_run_too():
    with pytest.raises(StalledError, match=r"to leaf server 0 in 100 rounds .* up to 50 sim"):
        events_of(
            *([1, 2], "fedbuff"),
            servers=2,
            job_timeout=0.5,
            asynchronous={"server": "leaf", "cloud_interval": 1.0},
        )


# By hand: leaf servers that make versions


def test_leaf_servers_meet_at_the_cloud():
    events = events_of(
        *([1, 3], "fedasync", (25, 50)),  # 0.5 s up, 0.25 s down
        servers=2,
        max_model_version=3,
        leaf_cloud_bandwidth={"down": 100.0, "up": 100.0},
        asynchronous={"server": "leaf", "cloud_interval": 2.0},
    )
    seen = [
        (e.time, e.server, e.version, e.jobs[0].version)
        if isinstance(e, VersionMade)
        else e
        for e in events
        if not isinstance(e, Dispatched)
    ]  # fmt: skip
    assert seen == [
        (1, 0, 1, 0),
        CloudAsks(2, 1),
        (2, 0, 2, 1),
        CloudAnswers(2.75, 1, (3, 1)),
        (3, 1, 2, 0),
        (3, 0, 4, 2),  # its third of its own: it is done
        CloudAsks(4, 2),
        CloudAnswers(4.75, 2, (5, 3)),
        (6, 1, 4, 2),
        CloudAsks(6, 3),
        CloudAnswers(6.75, 3, (6, 5)),
        CloudAsks(8, 4),
        CloudAnswers(8.75, 4, (7, 6)),
        (9, 1, 7, 4),
        CloudAsks(9, 5),  # the last time
        CloudAnswers(9.75, 5, (8, 8)),
    ]


def test_the_cloud_asks_after_so_many_versions_of_all():
    events = events_of(
        *([1, 3], "fedasync", (25, 50)),
        servers=2,
        max_model_version=4,
        leaf_cloud_bandwidth={"down": 20.0, "up": 50.0},  # 2.25 s both ways
        asynchronous={"server": "leaf", "cloud_versions": 2},
    )
    meetings = [e for e in events if isinstance(e, CloudAsks | CloudAnswers)]
    assert [(e.time, type(e)) for e in meetings] == [
        *((2, CloudAsks), (4.25, CloudAnswers)),  # versions at 1, 2
        *((4.25, CloudAsks), (6.5, CloudAnswers)),  # at 3, 3, 4, with the answer under way
        *((9, CloudAsks), (11.25, CloudAnswers)),  # at 6, 9
        *((12, CloudAsks), (14.25, CloudAnswers)),  # at 12, the last
    ]


# One round of given clients


def test_a_round_of_given_clients():
    pool = DevicePool(settings_of(device_speed_per="step"), 0, 0, lambda client: client + 1)
    result = simulate_round(pool, [7, 2, 4], number=10, started=5.0, server=3, version=6)
    assert [(job.number, job.client, job.ended) for job in result.admitted] == [
        *((11, 2, 8), (12, 4, 10), (10, 7, 13))
    ]
    assert (result.lost, result.ended, result.by_timeout) == ((), 13, False)
    assert {(job.server, job.version, job.started) for job in result.admitted} == {(3, 6, 5)}
    first = simulate_round(pool, [7, 2, 4], number=10, started=5.0, wanted=1)
    assert [job.client for job in first.admitted] == [2]
    assert [(job.client, job.fate) for job in first.lost] == [(7, "too late"), (4, "too late")]


def test_of_those_that_come_at_once_only_as_many_as_wanted():
    pool = DevicePool(settings_of(), 0, 0)
    result = simulate_round(pool, [5, 3, 4], number=0, started=0.0, wanted=2)
    assert [job.client for job in result.admitted] == [5, 3]
    assert [(job.client, job.fate) for job in result.lost] == [(4, "too late")]


def test_a_client_that_is_offline_is_not_waited_for():
    online = {"online": 0.5, "session": 1e9}
    pool = DevicePool(settings_of(availability=online, job_timeout=60.0), 0, 0)
    result = simulate_round(pool, range(20), number=0, started=0.0)
    assert result.ended == 1
    assert {(job.fate, job.ended, job.training) for job in result.lost} == {("went offline", 0, 0)}
    away = [job.client for job in result.lost]
    again = simulate_round(pool, away, number=20, started=1.0)  # now till one is back
    assert not again.admitted
    assert len(simulate_round(pool, away, number=40, started=again.ended).admitted) == 1


def test_who_went_offline_in_a_round_is_offline_in_the_next():
    online = {"online": 0.5, "session": 100.0}
    pool = DevicePool(settings_of(availability=online, job_timeout=1.0), 0, 0)
    result = simulate_round(pool, range(1000), number=0, started=0.0)
    gone = [job.client for job in result.lost if job.training]
    assert len(gone) == pytest.approx(1000 * 0.5 * 0.01, abs=5)  # half are online, for 100 s
    again = simulate_round(pool, range(1000), number=1000, started=result.ended)
    assert not {job.client for job in again.admitted} & set(gone)


# Too few devices


def test_places_stay_empty_until_devices_wake():
    online = {"online": 0.1, "session": 50.0}
    run = settings_of(clients=40, device_selection_size=20, job_timeout=60.0, availability=online)
    first, *rest = timeline(run, 0, 0)
    assert 0 < len(first.jobs) < 20
    assert any(
        isinstance(event, Dispatched) and isinstance(before, Dispatched)  # nobody had arrived
        for before, event in pairwise(rest)
    )
    assert sum(isinstance(event, VersionMade) for event in rest) == 200


@pytest.mark.parametrize("rule", ["fedavg", "fedbuff"])
def test_a_run_ends_early_when_devices_run_out(rule, caplog):
    with caplog.at_level(logging.WARNING):
        events = list(
            timeline(
                settings_of(
                    *(rule, 6),
                    device_reuse=False,
                    device_selection_size=1,
                    max_model_version=6,
                    job_timeout=5.0,
                    dropout=0.6,
                ),
                *(0, 0),
            )
        )
    made = versions_of(events)
    assert len(made) < 6
    jobs = [job for event in events if isinstance(event, Dispatched) for job in event.jobs]
    assert events[-1] == OutOfDevices(max(job.ended for job in jobs), 0)
    assert f"the cloud ends early, after version {len(made)} of 6" in caplog.text


def test_a_buffer_that_cannot_be_filled_is_a_version_after_the_update_timeout():
    tables = {"device_reuse": False, "job_timeout": 3.0, "max_model_version": 1}
    tables |= {"num_updates_for_model": 2, "device_selection_size": 2}
    assert versions_of(events_of([1, 9], **tables)) == []
    assert versions_of(events_of([1, 9], update_timeout=8.0, **tables)) == [(8, [(0, 0)], 0)]


def test_the_steps_of_a_job_are_needed_at_once():
    with pytest.raises(ConfigError, match="needs the steps"):
        timeline(settings_of(device_speed_per="step"), 0, 0)
