"""Virtual time: a clock that jumps from one event to the next; nothing ever sleeps."""

import heapq
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")


class Clock(Generic[T]):
    """Simulated seconds since the start, and the events to come; true while there are any.

    Attributes
    ----------
    now : float
        The time of the last event taken, in simulated seconds.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, T]] = []
        self._order = count()  # decides between events of the same time

    def __bool__(self) -> bool:
        return bool(self._events)

    def at(self, time: float, event: T) -> None:
        """Let an event come at a time, after those of the same time that were put in before.

        Raises
        ------
        ValueError
            If the time is past, or not a number.
        """
        if not time >= self.now:
            raise ValueError(f"an event at {time} s would be in the past: it is {self.now} s")
        heapq.heappush(self._events, (time, next(self._order), event))

    def next(self) -> T:
        """Go to the time of the next event and return it; IndexError if there is none."""
        self.now, _, event = heapq.heappop(self._events)
        return event
