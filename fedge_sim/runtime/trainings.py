"""Training of a timeline's jobs: in parallel, and ahead of the moment they are needed.

A job can be trained from the moment it is dispatched, as its start version is made by then; its
update is needed when the server takes it in. So a result depends on nothing but the job.
"""

import heapq
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, Self, TypeAlias

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType
from flwr.serverapp import Grid

from fedge_sim import records
from fedge_sim.algorithms import Arrays
from fedge_sim.config import Settings
from fedge_sim.data.base import DataSummary
from fedge_sim.errors import RoundError
from fedge_sim.records import Address
from fedge_sim.runtime.node import LocalGrid
from fedge_sim.runtime.rounds import Job
from fedge_sim.training.local import Evaluation, pool

log = logging.getLogger(__name__)

TURN_SECONDS = 0.5  # longest wait for a reply in one call
POLL_SECONDS = 0.05  # pause between two polls of Flower's grid
WAVES = 4  # jobs trained ahead, in multiples of what all workers train at a time
SHARD = 1024  # held-out examples in one message: workers share an evaluation

Take: TypeAlias = Callable[[Message], None]


class Exchange:
    """Messages on their way over a grid, and who takes the reply to each."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._takers: dict[str, Take] = {}

    def send(self, messages: Sequence[tuple[Message, Take]]) -> None:
        """Send messages, each with what is called with its reply, within :meth:`turn`."""
        ids = self._grid.push_messages([message for message, _ in messages])
        self._takers.update(zip(ids, (take for _, take in messages), strict=True))

    def turn(self, seconds: float = TURN_SECONDS) -> None:
        """Wait a little for replies, and hand out those that came."""
        if self._takers and isinstance(self._grid, LocalGrid):
            self._grid.wait(seconds)
        else:
            time.sleep(min(seconds, POLL_SECONDS))
        for reply in self._grid.pull_messages(list(self._takers)):
            self._takers.pop(reply.metadata.reply_to_message_id)(reply)


@dataclass(frozen=True)
class Start:
    """A version of a server's model: it lives for as long as a job or a server has it."""

    arrays: Arrays

    @cached_property
    def record(self) -> ArrayRecord:
        """As it is sent."""
        return records.to_record(self.arrays)


class Begun(NamedTuple):
    """A job that is trained, its start, and FedProx's mu when it was dispatched."""

    job: Job
    start: Start
    prox_mu: float


@dataclass(frozen=True)
class Trained:
    """What came of a job.

    Attributes
    ----------
    start : Start
        The version that it began with.
    arrays : Arrays
        The client's model; empty if it failed.
    metrics : mapping
        What it says of its training.
    problem : str
        Why it is of no use; empty if it is.
    """

    start: Start
    arrays: Arrays
    metrics: Mapping[str, Any]
    problem: str

    @classmethod
    def of(cls, reply: Message, start: Start) -> Self:
        """Read a reply."""
        if not reply.has_content():
            return cls(start, {}, {}, str(reply.error.reason))
        arrays = records.to_arrays(records.arrays_of(reply))
        return cls(start, arrays, records.metrics_of(reply), records.not_finite(reply))


class Trainings:
    """The trainings of a run, each begun as early as the grid has room for it.

    Parameters
    ----------
    exchange : Exchange
    settings : Settings
    roster : mapping of int to int
        The node of every client.
    work : callable
        From a client to the examples that it goes through in a job.
    at_a_time : int
        Clients that all workers of the grid train at once.
    ahead : int, optional
        Updates that may be there or under way before they are needed, at most; 0 is strictly
        sequential. None: a few times ``at_a_time``.
    classes : int
        The number of classes, of each of which a client counts its examples; 0: it does not count.
    in_waves : bool
        Whether to begin trainings only when none is under way. Cohorts need it: then who trains
        together, and with it the last bits, do not depend on how fast others were.
    """

    def __init__(
        self,
        exchange: Exchange,
        settings: Settings,
        roster: Mapping[int, int],
        work: Callable[[int], int],
        at_a_time: int,
        ahead: int | None = None,
        classes: int = 0,
        in_waves: bool = False,
    ) -> None:
        self._classes = classes
        self._exchange, self._settings, self._roster, self._work = exchange, settings, roster, work
        self._ahead = WAVES * at_a_time if ahead is None else ahead
        self._in_waves, self._wave = in_waves, at_a_time if ahead is None else max(1, ahead)
        # Jobs whose result was not asked for yet, by number.
        self._begun: dict[int, Begun] = {}
        self._ready: list[tuple[float, int]] = []  # a heap of (arrival, number)
        self._under_way: set[int] = set()
        self._done: dict[int, Trained] = {}

    def begin(self, jobs: Iterable[Job], start: Start, prox_mu: float) -> None:
        """Let jobs be trained whose update will arrive; who is lost costs no real work."""
        for job in jobs:
            if job.fate == "update":
                self._begun[job.number] = Begun(job, start, prox_mu)
                heapq.heappush(self._ready, (job.ended, job.number))
        self._fill()

    def result(self, job: Job) -> Trained:
        """Return what came of a job, once; wait for it if need be."""
        number = job.number
        while number not in self._done:
            if self._in_waves and not self._under_way:
                self._push(self._wave, number)
            elif not self._in_waves and number not in self._under_way:
                self._push(0, number)
            self.go_on(TURN_SECONDS)
        del self._begun[number]
        return self._done.pop(number)

    def go_on(self, seconds: float) -> None:
        """Wait a little for trainings, and begin others in the place of those that are done."""
        self._exchange.turn(seconds)
        self._fill()

    def drop(self, server: int) -> None:
        """Forget the jobs of a server that makes no version any more."""
        for number in [n for n, own in self._begun.items() if own.job.server == server]:
            del self._begun[number]
            self._done.pop(number, None)
        self._ready = [entry for entry in self._ready if entry[1] in self._begun]
        heapq.heapify(self._ready)

    def state(self) -> tuple[dict[int, Begun], dict[int, Trained]]:
        """Return all jobs that are not given out, and what came of some of them.

        A wave is waited for: who trained in it must be known to go on with the same ones.
        """
        while self._in_waves and self._under_way:
            self._exchange.turn()
        return dict(self._begun), dict(self._done)

    def restore(self, begun: Iterable[Begun], done: Mapping[int, Trained]) -> None:
        """Go on from a checkpoint: train again what was not done."""
        self._done.update(done)
        for own in begun:
            self._begun[own.job.number] = own
            if own.job.number not in done:
                heapq.heappush(self._ready, (own.job.ended, own.job.number))
        self._fill()

    def _fill(self) -> None:
        if not self._in_waves:
            self._push(self._ahead - len(self._under_way) - len(self._done))

    def _push(self, most: int, needed: int | None = None) -> None:
        """Begin at most ``most`` trainings: the needed one, and those that arrive first."""
        numbers: list[int] = []
        if needed is not None:
            numbers.append(needed)
            self._ready = [entry for entry in self._ready if entry[1] != needed]
            heapq.heapify(self._ready)
        while self._ready and len(numbers) < most:
            numbers.append(heapq.heappop(self._ready)[1])
        if numbers:
            self._under_way.update(numbers)
            self._exchange.send([(self._message(n), partial(self._take, n)) for n in numbers])

    def _message(self, number: int) -> Message:
        job, start, mu = self._begun[number]
        lr = self._settings.hierarchy.learning_rate(job.version + 1)
        config = records.train_config(self._settings, lr, mu)
        config[records.ROUND] = 1  # the same for all jobs, so that workers keep their networks
        config[records.JOB], config[records.CLIENT_ID] = number, job.client
        config[records.WORK] = self._work(job.client)
        config[records.CLASS_COUNTS] = self._classes
        address = Address(records.TRAIN, job.leaf, job.client)
        node = self._roster[job.client]
        return records.instruction(node, MessageType.TRAIN, config, start.record, address)

    def _take(self, number: int, reply: Message) -> None:
        self._under_way.remove(number)
        if number in self._begun:  # it was not dropped meanwhile
            self._done[number] = Trained.of(reply, self._begun[number].start)


class HeldOutTest:
    """The evaluation of one model on examples that nobody trains on.

    Those are held out for all devices that draw their examples; else each client has its own.

    Parameters
    ----------
    exchange : Exchange
    settings : Settings
    roster : mapping of int to int
        The node of every client.
    data : DataSummary
    model : Start
    leaf : int
        Whose clients; -1: all.
    """

    def __init__(
        self,
        exchange: Exchange,
        settings: Settings,
        roster: Mapping[int, int],
        data: DataSummary,
        model: Start,
        leaf: int,
    ) -> None:
        self._exchange, self._results = exchange, dict[int, Evaluation | None]()
        if data.num_held_out:
            shards = -(-data.num_held_out // SHARD)
            self._split, self._parts = records.HELD_OUT, range(shards)
            work = dict.fromkeys(self._parts, data.num_held_out // shards)
        else:
            h = settings.hierarchy
            self._split, shards = "test", 0
            self._parts = range(h.num_clients) if leaf < 0 else h.leaf_clients[leaf]
            work = {client: data.num_test[client] for client in self._parts}
        common = records.evaluate_config(settings, records.HELD_OUT, [self._split])
        messages: list[tuple[Message, Take]] = []
        for part in self._parts:
            config = ConfigRecord(
                {
                    **common,
                    records.CLIENT_ID: part,
                    records.SHARDS: shards,
                    records.WORK: work[part],
                }
            )
            address = Address(records.HELD_OUT, leaf, part)
            node = roster[part % len(roster)]  # every node has the held-out examples
            message = records.instruction(node, MessageType.EVALUATE, config, model.record, address)
            messages.append((message, partial(self._take, part)))
        exchange.send(messages)

    def result(self) -> Evaluation:
        """Return the evaluation on all of them; wait for it if need be.

        A part that could not be evaluated is left out.

        Raises
        ------
        RoundError
            If none could.
        """
        while len(self._results) < len(self._parts):
            self._exchange.turn()
        if found := [e for part in self._parts if (e := self._results[part]) is not None]:
            return pool(found)
        raise RoundError("no part of the held-out examples could be evaluated: see the log")

    def _take(self, part: int, reply: Message) -> None:
        self._results[part] = None
        if reply.has_content():
            self._results[part] = records.get_evaluations(reply)[self._split]
        else:
            name = "shard" if self._split == records.HELD_OUT else "client"
            log.warning("%s %d left out of an evaluation: %s", name, part, reply.error.reason)
