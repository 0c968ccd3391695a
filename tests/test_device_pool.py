"""Simulated devices: who is free, who is online, how long a job takes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedge_sim.config import Settings
from fedge_sim.config_devices import Delay
from fedge_sim.errors import ConfigError
from fedge_sim.runtime.device_pool import DevicePool, Draws, Free

CONSTANT = {"distribution": "constant", "mean": 2.0}


def pool_of(clients=(100,), steps=None, size=(0, 0), asynchronous=(), **devices):
    """Return devices that train for 2 s, but for what is given."""
    tables = {
        "hierarchy": {"num_servers": len(clients), "clients_per_server": clients},
        "devices": {
            "enable": True,
            "device_selection_size": 1,
            "device_speed": CONSTANT,
            "job_timeout": 0.0,
            **devices,
        },
        "asynchronous": {"rule": "fedasync", **dict(asynchronous)},
    }
    return DevicePool(Settings.from_tables(tables), *size, steps)


@given(st.integers(1, 12), st.lists(st.integers(0, 11), max_size=60), st.randoms())
def test_a_device_is_taken_only_while_it_is_free(number, moves, random):
    free, rng, taken = Free(number), np.random.default_rng(0), []
    for move in moves:
        if taken and (move % 2 or not len(free)):
            free.give_back(taken.pop(random.randrange(len(taken))))
        else:
            taken.append(free.take(rng))
        assert len(set(taken)) == len(taken) == number - len(free)
        assert len(free._at) <= len(taken)  # memory follows those that are taken
    rest = [free.take(rng) for _ in range(len(free))]
    assert sorted(rest + taken) == list(range(number))


def test_selection_is_uniform():
    free, rng, taken = Free(40), np.random.default_rng(1), []
    counts = np.zeros(40)
    for _ in range(40_000):
        if len(taken) == 15:
            free.give_back(taken.pop(int(rng.integers(15))))
        taken.append(free.take(rng))
        counts[taken[-1]] += 1
    assert stats.chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize(
    ("distribution", "mean", "std"),
    [
        ("constant", 2.0, ()),
        ("normal", 2.0, 0.3),
        ("uniform", 2.0, 0.5),
        ("exponential", 2.0, ()),
        ("log-normal", 2.0, 1.5),
    ],
)
def test_each_distribution_has_its_mean_and_standard_deviation(distribution, mean, std):
    draws = Draws(Delay(distribution=distribution, mean=mean, std=std))
    rng = np.random.default_rng(2)
    values = np.array([draws.draw(0, rng) for _ in range(40_000)])
    expected = std or {"constant": 0.0, "exponential": mean}[distribution]
    assert values.min() >= 0
    assert values.mean() == pytest.approx(mean, abs=4 * expected / 200 + 1e-12)
    assert values.std() == pytest.approx(expected, rel=0.05, abs=1e-12)


def test_a_distribution_has_its_form():
    rng = np.random.default_rng(3)

    def values(**delay):
        draws = Draws(Delay(**delay))
        return [draws.draw(0, rng) for _ in range(5000)]

    uniform = values(distribution="uniform", mean=2.0, std=1 / math.sqrt(3))
    assert stats.kstest(uniform, "uniform", (1, 2)).pvalue > 0.01
    lognormal = np.log(values(distribution="log-normal", mean=2.0, std=1.5))
    assert stats.kstest(stats.zscore(lognormal), "norm").pvalue > 0.01
    normal = np.array(values(distribution="normal", mean=1.0, std=1.0))
    assert np.mean(normal == 0) == pytest.approx(stats.norm.cdf(-1), abs=0.02)  # cut at 0


def test_a_device_keeps_its_class_and_classes_have_their_shares():
    speed = {"distribution": "constant", "mean": [1.0, 2.0, 3.0], "shares": [0.5, 0.3, 0.2]}
    pool = pool_of((3000,), device_speed=speed)
    first = [pool.plan(client, client, 0.0).training for client in range(3000)]
    again = [pool.plan(3000 + client, client, 9.0).training for client in range(3000)]
    assert first == again
    observed = [first.count(mean) for mean in (1.0, 2.0, 3.0)]
    assert stats.chisquare(observed, [1500, 900, 600]).pvalue > 0.01


def test_classes_of_one_delay_say_nothing_about_another():
    two = {"distribution": "constant", "mean": [1.0, 2.0]}
    pool = pool_of((2000,), device_speed=two, upload_delay=two)
    plans = [pool.plan(client, client, 0.0) for client in range(2000)]
    both = [plan.training == plan.takes - plan.training for plan in plans]
    assert np.mean(both) == pytest.approx(0.5, abs=0.05)


def test_a_job_is_download_training_and_upload():
    def constant(mean):
        return {"distribution": "constant", "mean": mean}

    pool = pool_of(
        size=(100, 30),
        communication_delay=constant(1.0),  # both ways: half of it each
        download_delay=constant(0.25),
        upload_delay=constant(0.125),
        client_leaf_bandwidth={"down": 200.0, "up": 40.0},  # 0.5 s and 0.75 s
        leaf_cloud_bandwidth={"down": 100.0, "up": 120.0},  # 1 s and 0.25 s
    )
    assert pool.plan(0, 0, 10.0) == ("update", 5.875, 2.25, 2.0, math.inf)


def test_the_link_to_the_cloud_is_of_a_job_only_if_the_cloud_makes_the_versions():
    links = {"leaf_cloud_bandwidth": {"down": 1.0, "up": 1.0}}
    at_leaves = {"server": "leaf", "cloud_interval": 1.0}
    assert pool_of(size=(3, 4), **links).plan(0, 0, 0.0).takes == 9
    assert pool_of(size=(3, 4), asynchronous=at_leaves, **links).plan(0, 0, 0.0).takes == 2
    assert pool_of(size=(3, 4), asynchronous={"rule": "fedavg"}, **links).plan(0, 0, 0.0).takes == 2


def test_a_speed_for_each_step():
    assert pool_of(device_speed_per="step", local_iters=5).plan(0, 0, 0.0).training == 10
    pool = pool_of(device_speed_per="step", steps=lambda client: client + 1)
    assert [pool.plan(n, n, 0.0).training for n in range(3)] == [2, 4, 6]
    with pytest.raises(ConfigError, match=r"device_speed_per = \"step\": needs the steps"):
        pool_of(device_speed_per="step")


def test_a_slow_device_is_given_up():
    plan = pool_of(job_timeout=1.5).plan(0, 0, 0.0)
    assert (plan.ending, plan.takes, plan.trained(math.inf), plan.trained(1.0)) == (
        *("timed out", 1.5),
        *(1.5, 1.0),
    )
    assert pool_of(job_timeout=2.0).plan(0, 0, 0.0).ending == "update"  # in time to the second


def test_the_share_of_dropouts_and_that_they_are_noticed_at_the_timeout():
    pool = pool_of(dropout=0.3, job_timeout=60.0)
    plans = [pool.plan(n, 0, 0.0) for n in range(4000)]
    lost = [plan for plan in plans if plan.ending == "dropped out"]
    assert len(lost) / 4000 == pytest.approx(0.3, abs=0.025)
    assert {plan.takes for plan in lost} == {60.0}
    stopped = [plan.trained(math.inf) for plan in lost]  # at any moment of the 2 s
    assert stats.kstest(stopped, "uniform", (0, 2)).pvalue > 0.01


def test_a_session_ends_during_a_job_as_often_as_it_must():
    pool = pool_of((4000,), availability={"online": 0.5, "session": 4.0}, job_timeout=60.0)
    chosen = pool.select(0, 0.0, 4000)
    gone = [pool.plan(n, client, 0.0).ending == "went offline" for n, client in enumerate(chosen)]
    assert np.mean(gone) == pytest.approx(1 - math.exp(-2 / 4), abs=0.03)


@pytest.mark.parametrize("online", [0.2, 0.7])
def test_the_long_run_share_of_devices_that_are_online(online):
    pool = pool_of((200,), availability={"online": online, "session": 20.0}, job_timeout=5.0)
    found, number = [], 0
    for now in np.arange(0.0, 2400.0, 6.0):
        chosen = pool.select(0, now, 200)
        found.append(len(chosen))
        for client in chosen:
            plan = pool.plan(number := number + 1, client, now)
            pool.give_back(client, now + plan.takes)
    assert np.mean(found) / 200 == pytest.approx(online, abs=0.015)


def test_an_online_device_is_online_later_as_often_as_the_process_says():
    share, session, later = 0.4, 10.0, 5.0
    pool = pool_of((6000,), availability={"online": share, "session": session}, job_timeout=9.0)
    chosen = pool.select(0, 0.0, 6000)
    for client in chosen:
        pool.give_back(client, 0.0)
    again = set(pool.select(0, later, 6000))
    rate = 1 / session + share / (session * (1 - share))
    stays = share + (1 - share) * math.exp(-rate * later)
    assert np.mean([client in again for client in chosen]) == pytest.approx(stays, abs=0.03)
    others = set(range(6000)) - set(chosen)
    comes = share * (1 - math.exp(-rate * later))
    assert np.mean([client in again for client in others]) == pytest.approx(comes, abs=0.03)


def test_an_offline_device_cannot_be_selected_until_it_wakes():
    pool = pool_of((1,), availability={"online": 0.01, "session": 1.0}, job_timeout=9.0)
    assert pool.select(0, 0.0, 1) == []
    wakes = pool.next_wake(0)
    assert pool.select(0, wakes * 0.999, 1) == []
    assert pool.has_free(0)
    assert pool.select(0, wakes, 1) == [0]
    assert (pool.next_wake(0), pool.has_free(0)) == (None, False)


def test_a_device_that_went_offline_at_work_is_offline_after_it():
    pool = pool_of((1000,), availability={"online": 0.5, "session": 100.0}, job_timeout=2.0)
    chosen = pool.select(0, 0.0, 1000)
    gone = [c for n, c in enumerate(chosen) if pool.plan(n, c, 0.0).ending == "went offline"]
    for client in chosen:
        pool.give_back(client, 2.0)
    assert len(gone) > 5
    assert not set(pool.select(0, 2.0, 1000)) & set(gone)


def test_devices_of_leaf_servers_are_apart_and_numbered_as_clients():
    at_leaves = {"server": "leaf", "cloud_interval": 1.0}
    pool = pool_of((2, 3, 1), asynchronous=at_leaves)
    assert [sorted(pool.select(leaf, 0.0, 9)) for leaf in range(3)] == [[0, 1], [2, 3, 4], [5]]
    assert [pool.leaf_of(client) for client in range(6)] == [0, 0, 1, 1, 1, 2]
    pool.give_back(3, 1.0)
    assert pool.select(1, 1.0, 9) == [3]


def test_a_device_is_used_once_where_it_must_be():
    pool = pool_of((2,), device_reuse=False, max_model_version=1)
    for client in pool.select(0, 0.0, 2):
        pool.give_back(client, 1.0)
    assert pool.select(0, 2.0, 1) == []
    assert not pool.has_free(0)
