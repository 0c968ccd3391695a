"""Simulated devices: who is free, who is online, and how long a job takes.

Everything is drawn when it is first asked for, so that a device that is never used costs
nothing, and each draw comes from a stream that its device or its job names.
"""

import heapq
import math
from bisect import bisect
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import accumulate
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from fedge_sim.config import Settings
from fedge_sim.config_devices import Delay
from fedge_sim.errors import ConfigError
from fedge_sim.randomness import stream

CLASSES_KEPT = 16_384  # devices whose class is cached: drawing it costs as much as a job

Ending: TypeAlias = Literal["update", "dropped out", "went offline", "timed out"]


class Free:
    """Devices 0..number-1 of which one is taken at random: a Fisher-Yates shuffle, virtually.

    Free devices hold the places 0..len-1: each its own, but for those past the end, which hold
    the places of devices that are taken. Only these are kept, so memory grows with the devices
    taken at present, whatever their number in all and whatever was taken and given back before.
    """

    def __init__(self, number: int) -> None:
        self._size = number
        # Place -> the device in it, where that is not device number `place`.
        self._at: dict[int, int] = {}
        self._place: dict[int, int] = {}  # device -> its place, likewise

    def __len__(self) -> int:
        return self._size

    def take(self, rng: np.random.Generator) -> int:
        """Take one of the free devices, each as likely as the others."""
        place = int(rng.integers(self._size))
        self._size -= 1
        device, last = self._remove(place), self._size
        if place != last:
            self._put(self._remove(last), place)
        return device

    def give_back(self, device: int) -> None:
        """Let a device be free again that was taken."""
        place = self._size
        self._size += 1
        guest = self._remove(device) if device < place else device
        if guest != place:  # the device of that number returns to it, and frees its own place
            self._put(guest, self._place.pop(place, place))

    def _remove(self, place: int) -> int:
        device = self._at.pop(place, place)
        self._place.pop(device, None)
        return device

    def _put(self, device: int, place: int) -> None:
        self._at[place] = device
        self._place[device] = place


class Draws:
    """A delay to draw from: its classes of devices, and its distribution in each."""

    def __init__(self, delay: Delay) -> None:
        self.classes = len(delay.mean)
        self._distribution = delay.distribution
        self._of_class = tuple(zip(delay.mean, delay.stds, strict=True))
        shares = delay.shares or (1 / max(1, self.classes),) * self.classes
        self._bounds = tuple(accumulate(shares))[:-1]

    def class_of(self, uniform: float) -> int:
        """Return the class of a device by a number from 0 to 1 that is drawn for it."""
        return bisect(self._bounds, uniform)

    def draw(self, which: int, rng: np.random.Generator) -> float:
        """Draw a duration of a class, in simulated seconds."""
        if not self.classes:
            return 0.0
        mean, std = self._of_class[which]
        match self._distribution:
            case "exponential":
                return mean * rng.standard_exponential()
            case "normal":
                return max(0.0, mean + std * rng.standard_normal())
            case "uniform":
                return max(0.0, mean + std * math.sqrt(3) * (2 * rng.random() - 1))
            case "log-normal":  # mean and std are those of the delay, not of its logarithm
                variance = math.log1p((std / mean) ** 2)
                normal = rng.standard_normal()
                return mean * math.exp(math.sqrt(variance) * normal - variance / 2)
        return mean


class Plan(NamedTuple):
    """How a job goes if its server does not end it before; all in seconds from its start."""

    ending: Ending
    takes: float  # seconds until the update arrives, or the server gives the device up
    download: float
    training: float  # seconds of training, if the device completes it
    stops: float  # seconds until the device stops early; infinite if it does not

    @property
    def begins(self) -> bool:
        """Whether the device is online at the start."""
        return self.stops > 0

    def trained(self, until: float) -> float:
        """Return the seconds of training that were done at a time."""
        return max(0.0, min(self.training, min(self.stops, until) - self.download))


class DevicePool:
    """The devices under all leaf servers, numbered in leaf order as clients are.

    Parameters
    ----------
    settings : Settings
    bytes_down, bytes_up : int
        What a device downloads before it trains, and uploads after.
    steps : callable, optional
        The steps of a client's job, where ``device_speed_per = "step"``; needed if neither
        ``devices.local_iters`` nor ``hierarchy.local_steps`` says how many.

    Raises
    ------
    ConfigError
        If a job's steps are needed and not known.
    """

    def __init__(
        self,
        settings: Settings,
        bytes_down: int,
        bytes_up: int,
        steps: Callable[[int], int] | None = None,
    ) -> None:
        devices, hierarchy, seed = settings.devices, settings.hierarchy, settings.seed
        self.devices = devices
        self._seed = seed
        # One past the last device of each leaf.
        self._ends = list(accumulate(hierarchy.clients_per_server))
        at_cloud = settings.by_versions and settings.asynchronous.server == "cloud"
        self.at_leaves = settings.by_versions and not at_cloud
        sizes = hierarchy.clients_per_server if self.at_leaves else (hierarchy.num_clients,)
        self._free = [Free(size) for size in sizes]
        self._selection = [stream(seed, "device/selection", n) for n in range(len(sizes))]

        links = [devices.client_leaf_bandwidth, *[devices.leaf_cloud_bandwidth] * at_cloud]
        self._down = sum(seconds_of(bytes_down, link.down) for link in links)
        self._up = sum(seconds_of(bytes_up, link.up) for link in links)
        self._speed, self._both_ways, self._download, self._upload = self._delays = tuple(
            Draws(delay)
            for delay in (
                *(devices.device_speed, devices.communication_delay),
                *(devices.download_delay, devices.upload_delay),
            )
        )
        self._several = any(delay.classes > 1 for delay in self._delays)
        self._classes_of = lru_cache(CLASSES_KEPT)(self._draw_classes)
        self._steps = _steps_of_a_job(settings, steps)

        online = devices.availability.online
        self._share, self._session = online, devices.availability.session
        self._away = self._session * (1 - online) / online
        # (when it is online again, device).
        self._asleep: list[list[tuple[float, int]]] = [[] for _ in sizes]
        # When a device was last known to be online; in the future, it is offline until then.
        self._online: dict[int, float] = {}
        # For each device at work: when its session ends, and when the next one begins.
        self._sessions: dict[int, tuple[float, float]] = {}

    def state(self) -> dict[str, float]:
        """Return what is known of who is online, between rounds, for :meth:`restore`."""
        return {str(client): seen for client, seen in self._online.items()}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint."""
        self._online = {int(client): seen for client, seen in state.items()}

    def leaf_of(self, client: int) -> int:
        """Return the leaf server that a device is under."""
        return bisect(self._ends, client)

    def select(self, server: int, now: float, number: int) -> list[int]:
        """Take devices of a server that are free and online, each as likely as the others.

        Returns
        -------
        list of int
            In the order drawn; less than ``number`` if no more are free and online.
        """
        free, asleep, rng = self._free[server], self._asleep[server], self._selection[server]
        first = self._first_of(server)
        while asleep and asleep[0][0] <= now:
            free.give_back(heapq.heappop(asleep)[1] - first)
        chosen: list[int] = []
        while len(chosen) < number and len(free):
            client = first + free.take(rng)
            if self._is_online(client, now, rng):
                chosen.append(client)
            else:
                heapq.heappush(asleep, (self._online[client], client))
        return chosen

    def next_wake(self, server: int) -> float | None:
        """Return when the first device that was found offline is online again; None if none is."""
        asleep = self._asleep[server]
        return asleep[0][0] if asleep else None

    def has_free(self, server: int) -> bool:
        """Whether a server has devices that it could select, now or once they are online."""
        return bool(self._free[server] or self._asleep[server])

    def give_back(self, client: int, now: float) -> None:
        """End a selected device's job: it is free again, unless devices are used only once."""
        self.settle(client, now)
        if not self.devices.device_reuse:
            self._online.pop(client, None)
            return
        server = self.leaf_of(client) if self.at_leaves else 0
        if (wakes := self._online.get(client, now)) > now:
            heapq.heappush(self._asleep[server], (wakes, client))
        else:
            self._free[server].give_back(client - self._first_of(server))

    def online_from(self, client: int) -> float:
        """Return when a device is online again that is offline; else when it was seen to be."""
        return self._online[client]

    def settle(self, client: int, now: float) -> None:
        """Note that a device's job is over, and whether it is online; once done, do nothing."""
        if session := self._sessions.pop(client, None):
            ends, next_begins = session
            self._online[client] = now if ends > now else next_begins

    def plan(self, number: int, client: int, started: float) -> Plan:
        """Draw how a job goes, from the stream that its number names.

        Parameters
        ----------
        number, client : int
            The job, and the device.
        started : float
            Simulated seconds. A device that is offline then does not begin: ``takes`` is 0.
        """
        rng = stream(self._seed, "device/job", number)
        if self._share < 1 and not self._is_online(client, started, rng):
            return Plan("went offline", 0.0, 0.0, 0.0, 0.0)
        speed, both_ways, down, up = self._delays
        classes = self._classes_of(client) if self._several else (0, 0, 0, 0)
        training = speed.draw(classes[0], rng) * self._steps(client)
        one_way = both_ways.draw(classes[1], rng) / 2
        download = down.draw(classes[2], rng) + one_way + self._down
        upload = up.draw(classes[3], rng) + one_way + self._up
        takes, limit = download + training + upload, self.devices.job_timeout or math.inf
        stops, ending = self._vanishes(client, started, takes, rng)
        if takes <= min(stops, limit):
            return Plan("update", takes, download, training, math.inf)
        if stops >= limit:
            stops, ending = limit, "timed out"
        return Plan(ending, limit, download, training, stops)

    def _vanishes(
        self, client: int, started: float, takes: float, rng: np.random.Generator
    ) -> tuple[float, Ending]:
        """Draw when a device is gone, in seconds from the start of its job, and how."""
        stops = math.inf
        ending: Ending = "update"
        if self._share < 1:
            # Sessions are exponential: how long the present one has lasted says nothing.
            stops, ending = self._session * rng.standard_exponential(), "went offline"
            ends = started + stops
            self._sessions[client] = (ends, ends + self._away * rng.standard_exponential())
        if (dropout := self.devices.dropout) and (uniform := rng.random()) < dropout:
            drops = takes * uniform / dropout  # uniform over the job's duration
            if drops < stops:
                stops, ending = drops, "dropped out"
        return stops, ending

    def _is_online(self, client: int, now: float, rng: np.random.Generator) -> bool:
        """Look whether a device is online; if not, draw when it is again.

        P(online) goes from 1 when it was last known to be, to the share that is online, as the
        two-state Markov process does: with the sum of both rates.
        """
        seen = self._online.get(client)
        if self._share == 1 or seen == now:
            return True
        if seen is not None and seen > now:
            return False
        chance = self._share
        if seen is not None:
            rate = 1 / self._session + 1 / self._away
            chance += (1 - self._share) * math.exp(-rate * (now - seen))
        online = rng.random() < chance
        self._online[client] = now if online else now + self._away * rng.standard_exponential()
        return online

    def _draw_classes(self, client: int) -> tuple[int, ...]:
        uniform = stream(self._seed, "device/class", client).random(len(self._delays)).tolist()
        return tuple(d.class_of(u) for d, u in zip(self._delays, uniform, strict=True))

    def _first_of(self, server: int) -> int:
        return self._ends[server - 1] if server else 0


def seconds_of(size: int, bandwidth: float) -> float:
    """Return the seconds that ``size`` bytes take over a link; 0 without a limit."""
    return size / bandwidth if bandwidth else 0.0


def _steps_of_a_job(settings: Settings, steps: Callable[[int], int] | None) -> Callable[[int], int]:
    """Return what a device's speed is multiplied by in a job."""
    if settings.devices.device_speed_per == "job":
        return lambda _: 1
    if steps is None and (fixed := settings.local_steps):
        return lambda _: fixed
    if steps is None:
        problem = 'needs the steps of a job: set devices.local_iters, or use "job"'
        raise ConfigError.at("devices", "device_speed_per", "step", problem)
    return steps
