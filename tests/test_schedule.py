"""Longest expected work first: on a virtual clock, how close to the shortest time possible."""

import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge_sim.runtime.schedule import HAND_SECONDS, HAND_SIZE, Estimates, Schedule

SECONDS = st.floats(0.001, 100, allow_nan=False)


def simulate(jobs, workers, known=True, cohort=1):
    """Return when the last worker ends, on a virtual clock, and the hands in order."""
    schedule = Schedule()
    for number, seconds in enumerate(jobs):
        schedule.add((number, seconds), work=seconds, seconds=seconds if known else None)
    idle, hands = [(0.0, worker) for worker in range(workers)], []
    end = 0.0
    while schedule:
        now, worker = heapq.heappop(idle)
        hand = schedule.deal(workers, cohort)
        hands.append([number for number, _ in hand])
        end = max(end, now := now + sum(seconds for _, seconds in hand))
        heapq.heappush(idle, (now, worker))
    return end, hands


def ideal(jobs, workers):
    """Return a bound that no schedule beats."""
    return max(sum(jobs) / workers, max(jobs))


@pytest.mark.parametrize("place", range(9))
@pytest.mark.parametrize("known", [True, False])
def test_one_client_five_times_the_others(place, known):
    jobs = [1.0] * 9
    jobs[place] = 5.0
    assert simulate(jobs, 2, known)[0] <= 1.1 * ideal(jobs, 2)


@given(st.lists(SECONDS, min_size=1, max_size=60), st.integers(1, 5), st.booleans())
def test_every_job_once_and_never_far_from_ideal(jobs, workers, known):
    end, hands = simulate(jobs, workers, known)
    assert sorted(number for hand in hands for number in hand) == list(range(len(jobs)))
    # Graham's bound for any list, whose last hand is one job or a few short ones
    assert end <= sum(jobs) / workers + (1 - 1 / workers) * max(*jobs, HAND_SECONDS) + 1e-6


@given(st.integers(1, 3000), st.integers(1, 8))
def test_short_jobs_share_hands_and_all_workers_get_some(number, workers):
    _, hands = simulate([0.0001] * number, workers)
    assert max(map(len, hands)) <= min(HAND_SIZE, max(50, number / (2 * workers)))  # 5 ms
    assert len(hands) <= 12 * workers + number / 40


def test_a_cohort_is_shared_out_too():
    assert [len(hand) for hand in simulate([1.0] * 9, 2, cohort=4)[1]] == [4, 3, 1, 1]


def waiting(jobs, known=True):
    schedule = Schedule()
    for seconds in jobs:
        schedule.add(seconds, work=seconds, seconds=seconds if known else None)
    return schedule


@pytest.mark.parametrize("known", [True, False])
def test_at_the_start_all_workers_share_what_waits(known):
    schedule = waiting([1.0] * 9, known)
    assert [len(schedule.deal(2, 16, sharing=left)) for left in (2, 1)] == [5, 4]


@pytest.mark.parametrize("known", [True, False])
def test_a_cohort_is_no_more_than_a_fair_share_of_the_work(known):
    schedule = waiting([5.0] * 3 + [1.0] * 6, known)
    assert schedule.deal(2, 16, sharing=2) == [5.0] * 2
    assert schedule.deal(2, 16, sharing=1) == [5.0] + [1.0] * 6


def test_as_many_cohorts_as_streams():
    assert len(waiting([1.0] * 9).deal(1, 2, streams=3)) == 6


def test_cohorts_of_short_jobs_leave_some_to_the_others():
    schedule = waiting([0.002] * 100)  # 50 ms for each of four workers
    assert len(schedule.deal(4, 16)) == 16
    assert len(schedule.deal(4, 1)) == 10  # half of 42 ms


@given(
    st.lists(SECONDS, min_size=1, max_size=60),
    st.integers(1, 5),
    st.integers(1, 20),
    st.booleans(),
)
def test_every_job_once_in_cohorts_too(jobs, workers, cohort, known):
    end, hands = simulate(jobs, workers, known, cohort)
    assert sorted(number for hand in hands for number in hand) == list(range(len(jobs)))
    assert all(len(hand) <= cohort or sum(jobs[n] for n in hand) <= HAND_SECONDS for hand in hands)
    # a fair share, and as much again as half of the job that goes beyond it
    assert end <= sum(jobs) / workers * 2 + 1.5 * max(*jobs, HAND_SECONDS)


def test_alone_is_alone():
    schedule = Schedule()
    for name in "abcd":
        schedule.add(name, 1, 0.001, alone=name == "b")
    hands = []
    while schedule:
        foretold = schedule.next_is_alone
        hands.append(schedule.deal(1, 4))
        assert foretold == (hands[-1] == ["b"])
    assert ["b"] in hands
    assert not schedule.next_is_alone
    assert sorted(name for hand in hands for name in hand) == list("abcd")


def test_estimates():
    estimates = Estimates()
    assert estimates.expect("train", 1, 100) is None
    estimates.learn("train", 1, 100, 2.0)
    assert estimates.expect("train", 1, 100) == 2.0  # as last time
    assert estimates.expect("train", 2, 50) == pytest.approx(1.0)  # by its work
    assert estimates.expect("train", 1, 50) == pytest.approx(1.0)  # it has less to do now
    assert estimates.expect("evaluate", 1, 100) is None
