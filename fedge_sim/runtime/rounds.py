"""Jobs of devices, and the rounds that wait for them all, in simulated seconds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fedge_sim.runtime.device_pool import DevicePool, Plan

Fate: TypeAlias = Literal[
    "update", "dropped out", "went offline", "timed out", "too late", "unused", "under way"
]


@dataclass(frozen=True, slots=True)
class Job:
    """One device's training; all times in simulated seconds.

    Attributes
    ----------
    number : int
        From 0, in the order of dispatch over all servers.
    client : int
        The device.
    server : int
        Who makes the versions: 0 if the cloud does, else the leaf server's index.
    leaf : int
        The leaf server that the device is under.
    version : int
        The server's version that it starts from; 0 is the initial model.
    started, ended : float
        Until its update arrives at the server, or the server gives it up.
    training : float
        Of that, seconds that the device computes; at most, if the run ends before.
    fate : str
        How it ends; when the run ends it can be ``"under way"`` or, if its update had come for no
        version, ``"unused"``.
    was_sent : bool
        Whether the model went to the device, as it does unless that is offline at the start.
    """

    number: int
    client: int
    server: int
    leaf: int
    version: int
    started: float
    ended: float
    training: float
    fate: Fate
    was_sent: bool = True


@dataclass(frozen=True, slots=True)
class Round:
    """What came of one synchronous round.

    Attributes
    ----------
    admitted : tuple of Job
        Jobs whose update is in the round, in order of arrival.
    lost : tuple of Job
        Jobs whose update is not.
    ended : float
        When the round ends, in simulated seconds.
    by_timeout : bool
        Whether it ended because a timeout passed.
    """

    admitted: tuple[Job, ...]
    lost: tuple[Job, ...]
    ended: float
    by_timeout: bool


def simulate_round(
    pool: DevicePool,
    clients: Sequence[int],
    *,
    number: int,
    started: float,
    server: int = 0,
    version: int = 0,
    wanted: int | None = None,
    timeout: float = 0.0,
) -> Round:
    """Simulate one synchronous round, whose clients all begin at once.

    It ends when ``wanted`` updates have come, or all that are missing are given up. A client
    that is offline at the start is lost and not waited for; if all are, the round ends when the
    first is online again.

    Parameters
    ----------
    pool : DevicePool
    clients : sequence of int
        At least one.
    number : int
        Of the first client's job; the others' follow. It names the random streams.
    started : float
        Simulated seconds.
    server, version : int
        What the jobs are to say.
    wanted : int, optional
        Later updates are too late; all are waited for if not given.
    timeout : float
        Simulated seconds after which the round ends; 0: it waits for all.
    """
    plans = [pool.plan(n, client, started) for n, client in enumerate(clients, number)]
    takes = _length(pool, clients, plans, started, wanted)
    by_timeout = 0 < timeout < takes
    end = timeout if by_timeout else takes
    came = [i for i, p in enumerate(plans) if p.ending == "update" and p.takes <= end]
    came = sorted(came, key=lambda i: plans[i].takes)[:wanted]
    others = sorted(set(range(len(plans))) - set(came))

    def job(i: int, end: float) -> Job:
        return job_of(pool, number + i, clients[i], server, version, started, plans[i], end)

    admitted = tuple(job(i, math.inf) for i in came)
    lost = tuple(job(i, end) for i in others)
    for ended in (*admitted, *lost):
        pool.settle(ended.client, ended.ended)
    return Round(admitted, lost, started + end, by_timeout)


def _length(
    pool: DevicePool,
    clients: Sequence[int],
    plans: Sequence[Plan],
    started: float,
    wanted: int | None,
) -> float:
    """Return how long a round goes on if no timeout ends it, in simulated seconds."""
    arrivals = sorted(plan.takes for plan in plans if plan.ending == "update")
    if wanted is not None and len(arrivals) >= wanted:
        return arrivals[wanted - 1]
    longest = max(plan.takes for plan in plans)
    if arrivals or longest:
        return longest
    # By rounding, the time from the start could end just before it: then they were still offline.
    return math.nextafter(min(map(pool.online_from, clients)) - started, math.inf)


def job_of(
    pool: DevicePool,
    number: int,
    client: int,
    server: int,
    version: int,
    started: float,
    plan: Plan,
    end: float = math.inf,
) -> Job:
    """Return a planned job, that its server ends after ``end`` seconds if it is not over."""
    fate: Fate = plan.ending if plan.stops <= end else "too late"
    ended, training = started + min(plan.takes, end), plan.trained(end)
    return Job(
        number=number,
        client=client,
        server=server,
        leaf=pool.leaf_of(client),
        version=version,
        started=started,
        ended=ended,
        training=training,
        fate=fate,
        was_sent=plan.begins,
    )
