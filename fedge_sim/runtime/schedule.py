"""Which messages an actor gets next: longest expected work first.

Graham 1969: handing out jobs longest first ends within 4/3 of the shortest time possible;
here the last jobs are small ones, and it ends closer. Pure: no clock, no Ray.
"""

import heapq
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")

HAND_SECONDS = 0.05  # seconds of expected work in one call to an actor: a call costs about 1 ms
LEAST_SECONDS = 0.005  # seconds below which a call would cost as much as its work
HAND_SIZE = 128  # most messages in one call: their replies come back together


class Estimates:
    """How long messages will take: as long as last time, else by their amount of work.

    The kind of a message (train, evaluate) decides the seconds that a unit of work takes; they
    are learnt from all messages of the kind.
    """

    def __init__(self) -> None:
        self._last: dict[Hashable, tuple[float, float]] = {}
        self._pace: dict[str, float] = {}

    def learn(self, kind: str, key: Hashable, work: float, seconds: float) -> None:
        """Note how long a message took."""
        self._last[kind, key] = (work, seconds)
        pace, before = seconds / max(work, 1e-9), self._pace.get(kind)
        self._pace[kind] = pace if before is None else 0.9 * before + 0.1 * pace

    def expect(self, kind: str, key: Hashable, work: float) -> float | None:
        """Return the expected seconds; None before any message of the kind is known."""
        if (last := self._last.get((kind, key))) and last[0] == work:
            return last[1]
        pace = self._pace.get(kind)
        return None if pace is None else work * pace


@dataclass(order=True)
class _Entry:
    priority: float
    place: int
    job: object = field(compare=False)
    work: float = field(compare=False)
    seconds: float | None = field(compare=False)
    alone: bool = field(compare=False)


class Schedule(Generic[T]):
    """Jobs that wait, and the hands that they are dealt out in."""

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._places = count()
        self._waiting = self._work = 0.0  # expected seconds, and work, of all waiting jobs

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def next_is_alone(self) -> bool:
        """Whether the next hand is of a job that must not share one."""
        return bool(self._heap) and self._heap[0].alone

    def add(self, job: T, work: float, seconds: float | None, *, alone: bool = False) -> None:
        """Let a job wait.

        Parameters
        ----------
        job : T
        work : float
            Its amount of work, which orders jobs as long as their seconds are unknown.
        seconds : float or None
            How long it is expected to take.
        alone : bool
            Whether it must not share a hand.
        """
        priority = -(work if seconds is None else seconds)
        heapq.heappush(self._heap, _Entry(priority, next(self._places), job, work, seconds, alone))
        self._waiting += seconds or 0.0
        self._work += work

    def deal(
        self, workers: int, cohort: int = 1, streams: int = 1, sharing: int | None = None
    ) -> list[T]:
        """Take out the next hand: the longest job, and more while all are short.

        Parameters
        ----------
        workers : int
            Actors that share what waits: no hand is more than half of one's fair share, but
            for what is short anyway, and what is done at a time.
        cohort, streams : int
            Jobs that an actor does together, and cohorts that it does side by side: those are in
            a hand, however long, up to a fair share.
        sharing : int, optional
            Actors that this share is for; ``workers`` if not given.

        Returns
        -------
        list of T
            Empty if nothing waits.
        """
        least, most = LEAST_SECONDS * streams, HAND_SECONDS * streams
        short = min(most, max(least, self._waiting / (2 * workers)))
        sharing = sharing or workers
        at_a_time = min(cohort * streams, -(-len(self._heap) // sharing))
        share = self._work / sharing
        hand: list[T] = []
        seconds: float = 0.0
        work: float = 0.0
        while self._heap and len(hand) < max(HAND_SIZE, at_a_time):
            entry = self._heap[0]
            is_short = entry.seconds is not None and seconds + entry.seconds <= short
            at_once = len(hand) < at_a_time and work + entry.work / 2 <= share
            if hand and (entry.alone or not (is_short or at_once)):
                break
            self._take()
            hand.append(entry.job)  # type: ignore[arg-type]
            seconds += entry.seconds or 0.0
            work += entry.work
            if entry.alone:
                break
        return hand

    def _take(self) -> None:
        entry = heapq.heappop(self._heap)
        self._waiting -= entry.seconds or 0.0
        self._work -= entry.work
        if not self._heap:
            self._waiting = self._work = 0.0  # rounding errors do not add up

    def drop(self) -> list[T]:
        """Take out all that waits."""
        jobs = [entry.job for entry in sorted(self._heap)]
        self._heap.clear()
        self._waiting = self._work = 0.0
        return jobs  # type: ignore[return-value]
