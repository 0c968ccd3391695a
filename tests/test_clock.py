"""The virtual clock: events in order of time, and of being put in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge_sim.runtime.clock import Clock


@given(st.lists(st.floats(0, 1e6)))
def test_events_come_in_order_of_time_then_of_being_put_in(times):
    clock = Clock()
    for event in enumerate(times):
        clock.at(event[1], event)
    came = []
    while clock:
        number, time = clock.next()
        assert clock.now == time
        came.append((time, number))
    assert came == sorted(came)
    assert len(came) == len(times)


@pytest.mark.parametrize("time", [1.9, -1.0, float("nan")])
def test_nothing_is_put_in_the_past(time):
    clock = Clock()
    clock.at(2.0, "a")
    clock.next()
    clock.at(2.0, "now")
    with pytest.raises(ValueError, match=r"it is 2\.0 s"):
        clock.at(time, "b")
    assert (clock.next(), bool(clock)) == ("now", False)
