"""The order of events in simulated time: which device trains from which version, and when.

The order in which updates arrive does not depend on what is trained, so it is computed ahead,
by an event queue, and the trainings themselves can run side by side.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from fedge_sim.config import Settings
from fedge_sim.errors import StalledError
from fedge_sim.runtime.clock import Clock
from fedge_sim.runtime.device_pool import DevicePool, seconds_of
from fedge_sim.runtime.rounds import Fate, Job, Round, job_of, simulate_round

__all__ = [
    *("CloudAnswers", "CloudAsks", "Dispatched", "Event", "Fate", "Job", "OutOfDevices", "Round"),
    *("VersionMade", "simulate_round", "timeline"),
]

log = logging.getLogger(__name__)

# Rounds in a row without an update, after which a run is ended as it never would.
ROUNDS_IN_VAIN = 100


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Jobs begin, all of one server and version."""

    time: float
    jobs: tuple[Job, ...]


@dataclass(frozen=True, slots=True)
class VersionMade:
    """A server makes a version of updates that came.

    Attributes
    ----------
    time : float
    server : int
    version : int
        Its new number, from 1.
    made : int
        How many the server has made, this one included; what the cloud handed it does not count.
    jobs : tuple of Job
        Whose updates it is made of, in order of arrival.
    lost : tuple of Job
        Those that this server has given up since the version that it made before.
    active : int
        Jobs of this server under way right after, before new ones are dispatched.
    by_timeout : bool
        Whether it was made early, as ``update_timeout`` had passed.
    last : bool
        Whether the server is done: it has made ``max_model_version`` versions.
    sent : int
        Models that went to devices of this server since the version that it made before.
    """

    time: float
    server: int
    version: int
    made: int
    jobs: tuple[Job, ...]
    lost: tuple[Job, ...]
    active: int
    by_timeout: bool
    last: bool
    sent: int = 0


@dataclass(frozen=True, slots=True)
class CloudAsks:
    """The leaf servers' models of this moment travel to the cloud, for the ``step``-th time."""

    time: float
    step: int


@dataclass(frozen=True, slots=True)
class CloudAnswers:
    """What the cloud made of them is back: a new version of each leaf server, of this number."""

    time: float
    step: int
    versions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OutOfDevices:
    """A server ends early: each device is used once, and too many were lost."""

    time: float
    server: int


Event: TypeAlias = Dispatched | VersionMade | CloudAsks | CloudAnswers | OutOfDevices


def timeline(
    settings: Settings, bytes_down: int, bytes_up: int, steps: Callable[[int], int] | None = None
) -> Iterator[Event]:
    """Return what happens in a run whose servers make versions, in order of time.

    Parameters
    ----------
    settings : Settings
    bytes_down, bytes_up : int
        Size of a model as it is sent to a device, and of an update.
    steps : callable, optional
        The steps of a client's job, for ``device_speed_per = "step"`` where neither
        ``devices.local_iters`` nor ``hierarchy.local_steps`` says how many.

    Raises
    ------
    ConfigError
        If a job's steps are needed and not known.
    StalledError
        If again and again nobody comes (from the iterator).
    """
    return _Timeline(settings, bytes_down, bytes_up, steps).run()


@dataclass(slots=True)
class _Server:
    """Who makes versions, as it is now."""

    index: int
    version: int = 0  # the newest version's number
    made: int = 0  # versions that it made itself; others were made by the cloud
    active: int = 0  # jobs under way
    sent: int = 0  # models, to devices, since its last version
    since: float = 0.0  # when its last version was made, or its wait for an update began
    wakes: float = math.inf  # when it looks again for devices that are online
    in_vain: int = 0  # rounds, or jobs, since an update came
    buffer: list[Job] = field(default_factory=list)
    lost: list[Job] = field(default_factory=list)
    done: bool = False


class _Timeline:
    """Servers, devices and the events that they wait for."""

    def __init__(
        self,
        settings: Settings,
        bytes_down: int,
        bytes_up: int,
        steps: Callable[[int], int] | None,
    ) -> None:
        self._settings, self._devices = settings, settings.devices
        self._pool = DevicePool(settings, bytes_down, bytes_up, steps)
        self._clock: Clock[Callable[[], Iterator[Event]]] = Clock()
        self._in_rounds = settings.asynchronous.rule == "fedavg"
        self._select = self._begin_round if self._in_rounds else self._fill
        self._number = 0  # the next job's number
        number = settings.hierarchy.num_servers if self._pool.at_leaves else 1
        self._servers = [_Server(index) for index in range(number)]
        link = self._devices.leaf_cloud_bandwidth
        self._trip = seconds_of(bytes_up, link.up) + seconds_of(bytes_down, link.down)
        self._step = 0  # how often the cloud has asked
        self._answer_due = False
        self._new_versions = 0  # versions that all leaf servers made since the cloud asked

    def run(self) -> Iterator[Event]:
        """Take one event after the other until all servers are done, and the cloud has been."""
        for server in self._servers:
            self._clock.at(0.0, partial(self._select, server))
            if self._devices.update_timeout and not self._in_rounds:
                self._clock.at(0.0, partial(self._watch, server))
        if interval := self._settings.asynchronous.cloud_interval:
            self._clock.at(interval, partial(self._tick, 1))
        while self._answer_due or not self._all_done:
            yield from self._clock.next()()
            yield from self._ask_if_due()

    @property
    def _all_done(self) -> bool:
        return all(server.done for server in self._servers)

    # Rules that make a version of every few updates

    def _fill(self, server: _Server) -> Iterator[Event]:
        """Select devices for the free places, if they are enough."""
        places = self._devices.device_selection_size - server.active
        on_the_way = server.active + len(server.buffer)
        # Devices are selected for fewer free places, too, if no version could be made otherwise.
        if (
            places < self._devices.min_hole_to_fill
            and on_the_way >= self._settings.updates_for_model
        ):
            return
        now, pool, first = self._clock.now, self._pool, self._number
        clients = pool.select(server.index, now, places)
        jobs = tuple(
            job_of(pool, n, client, server.index, server.version, now, pool.plan(n, client, now))
            for n, client in enumerate(clients, first)
        )
        if jobs:
            yield self._dispatched(server, jobs)
        for job in jobs:
            self._clock.at(job.ended, partial(self._arrived, server, job))
        if len(jobs) < places:
            self._look_again(server)

    def _arrived(self, server: _Server, job: Job) -> Iterator[Event]:
        """Take an update, or give a job up."""
        if server.done:
            return
        self._pool.give_back(job.client, self._clock.now)
        server.active -= 1
        if job.fate == "update":
            server.buffer.append(job)
            server.in_vain = 0
            if len(server.buffer) == self._settings.updates_for_model:
                yield from self._make(server)
            else:
                yield from self._fill(server)
        else:
            server.lost.append(job)
            self._was_in_vain(server, job, ROUNDS_IN_VAIN * self._devices.device_selection_size)
            yield from self._fill(server)
        yield from self._end_if_exhausted(server)

    def _watch(self, server: _Server) -> Iterator[Event]:
        """Make a version of what there is, once the update timeout has passed."""
        if server.done:
            return
        if self._clock.now >= server.since + self._devices.update_timeout:
            server.since = self._clock.now
            if server.buffer:
                yield from self._make(server, by_timeout=True)
                yield from self._end_if_exhausted(server)
        # Each server has one watch, which is set anew with each version.
        self._clock.at(server.since + self._devices.update_timeout, partial(self._watch, server))

    # FedAvg, whose versions are rounds

    def _begin_round(self, server: _Server) -> Iterator[Event]:
        """Select the devices of a round, as many as are online."""
        devices, now = self._devices, self._clock.now
        wanted = devices.device_selection_size
        clients = self._pool.select(server.index, now, devices.selected_for(wanted))
        if not clients:
            self._look_again(server)
            return
        result = simulate_round(
            self._pool,
            clients,
            number=self._number,
            started=now,
            server=server.index,
            version=server.version,
            wanted=wanted,
            timeout=devices.update_timeout,
        )
        jobs = sorted(result.admitted + result.lost, key=lambda job: job.number)
        yield self._dispatched(server, tuple(jobs))
        self._clock.at(result.ended, partial(self._end_round, server, result))

    def _end_round(self, server: _Server, result: Round) -> Iterator[Event]:
        """Make a version of who came, and begin the next round."""
        for job in result.admitted + result.lost:
            self._pool.give_back(job.client, self._clock.now)
        server.active = 0
        server.lost += result.lost
        if result.admitted:
            server.in_vain = 0
            server.buffer += result.admitted
            yield from self._make(server, result.by_timeout)
        else:
            self._was_in_vain(server, result.lost[-1], ROUNDS_IN_VAIN)
            yield from self._begin_round(server)
        yield from self._end_if_exhausted(server)

    # All rules

    def _dispatched(self, server: _Server, jobs: tuple[Job, ...]) -> Dispatched:
        server.active += len(jobs)
        server.sent += sum(job.was_sent for job in jobs)
        self._number += len(jobs)
        return Dispatched(self._clock.now, jobs)

    def _make(self, server: _Server, by_timeout: bool = False) -> Iterator[Event]:
        """Make a version of the buffer, and select devices to go on with."""
        now = self._clock.now
        server.version += 1
        server.made += 1
        server.since = now
        server.done = server.made == self._devices.max_model_version
        self._new_versions += 1
        yield VersionMade(
            time=now,
            server=server.index,
            version=server.version,
            made=server.made,
            jobs=tuple(server.buffer),
            lost=tuple(server.lost),
            active=server.active,
            by_timeout=by_timeout,
            last=server.done,
            sent=server.sent,
        )
        server.buffer, server.lost, server.sent = [], [], 0
        if not server.done:
            yield from self._select(server)

    def _look_again(self, server: _Server) -> None:
        """Select devices again when the first of those found offline is online."""
        wakes = self._pool.next_wake(server.index)
        if wakes is not None and wakes < server.wakes:
            server.wakes = wakes
            self._clock.at(wakes, partial(self._woken, server))

    def _woken(self, server: _Server) -> Iterator[Event]:
        if server.wakes == self._clock.now:
            server.wakes = math.inf
            if not server.done:
                yield from self._select(server)

    def _was_in_vain(self, server: _Server, job: Job, limit: int) -> None:
        """Count what brought no update; too much of it ends the run."""
        server.in_vain += 1
        if server.in_vain == limit:
            raise StalledError(
                f"no update came to {self._name(server)} in {ROUNDS_IN_VAIN} rounds of devices in "
                f"a row, up to {self._clock.now:g} simulated seconds (version {server.version}); "
                f"the last device {_HOW[job.fate]}: raise devices.job_timeout or "
                "update_timeout, or lose fewer devices (dropout, availability)"
            )

    def _end_if_exhausted(self, server: _Server) -> Iterator[Event]:
        """End a server that has nothing under way and no device left to select."""
        can_wait = server.buffer and self._devices.update_timeout
        if server.done or server.active or can_wait or self._pool.has_free(server.index):
            return
        server.done = True
        log.warning(
            "%s ends early, after version %d of %d (devices.max_model_version): no device is left,"
            " as each is used once (devices.device_reuse = false) and some were lost",
            self._name(server),
            server.made,
            self._devices.max_model_version,
        )
        yield OutOfDevices(self._clock.now, server.index)

    def _name(self, server: _Server) -> str:
        return f"leaf server {server.index}" if self._pool.at_leaves else "the cloud"

    # The cloud, where leaf servers make the versions

    def _tick(self, number: int) -> Iterator[Event]:
        """Ask every ``cloud_interval`` simulated seconds, unless the last answer is still due."""
        if not self._answer_due:
            yield self._ask()
        interval = self._settings.asynchronous.cloud_interval
        self._clock.at((number + 1) * interval, partial(self._tick, number + 1))

    def _ask_if_due(self) -> Iterator[Event]:
        """Ask after ``cloud_versions`` versions, and once more when all leaf servers are done."""
        if not self._pool.at_leaves or self._answer_due or not self._new_versions:
            return
        enough = self._settings.asynchronous.cloud_versions
        if self._all_done or 0 < enough <= self._new_versions:
            yield self._ask()

    def _ask(self) -> CloudAsks:
        self._step += 1
        self._answer_due, self._new_versions = True, 0
        self._clock.at(self._clock.now + self._trip, self._answer)
        return CloudAsks(self._clock.now, self._step)

    def _answer(self) -> Iterator[Event]:
        self._answer_due = False
        for server in self._servers:
            server.version += 1
        versions = tuple(server.version for server in self._servers)
        yield CloudAnswers(self._clock.now, self._step, versions)


_HOW: dict[Fate, str] = {
    "dropped out": "dropped out",
    "went offline": "went offline",
    "timed out": "took longer than job_timeout",
    "too late": "was later than update_timeout",
}
