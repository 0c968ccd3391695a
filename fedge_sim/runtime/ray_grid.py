"""A Flower Grid on Ray actors that live for the whole run.

A leaf's model is put into Ray's object store once; messages travel without it, several to a call
where clients are short. A client's result depends on nothing but its message, so what was lost
with an actor is run again, with the same bytes.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from ray.exceptions import OutOfMemoryError, RayActorError, RayError

from fedge_sim import records
from fedge_sim.config import Settings
from fedge_sim.runtime.crew import CONTROL_SECONDS, Crew, Worker
from fedge_sim.runtime.node import (
    Answer,
    Done,
    Failure,
    LocalGrid,
    OnDone,
    error_reply,
    give_id,
    name_of,
    stalled,
    tell_nobody,
)
from fedge_sim.runtime.schedule import HAND_SECONDS, Estimates, Schedule
from fedge_sim.runtime.trainer import Job

log = logging.getLogger(__name__)

WATCH_SECONDS = 0.5  # between two looks at what hangs
KEPT_MODELS = 16  # of those put last, that messages of later pushes may share


@dataclass(eq=False)
class _Task:
    """A message on its way to an answer."""

    message: Message
    light: Message  # the same without its models
    models: dict[str, Any]  # refs of those, by record name
    work: float
    failures: int = 0
    alone: bool = False  # after a failure: it takes no other with it, and is the one to blame

    @property
    def id(self) -> str:
        return self.message.metadata.message_id

    @property
    def kind(self) -> str:
        return self.message.metadata.message_type

    @property
    def key(self) -> tuple[str, ...] | None:
        """As what the time that it takes is remembered; None for a job, which comes once."""
        config = self.message.content.config_records.get(records.CONFIG)
        if config is not None and records.JOB in config:
            return None
        return tuple(self.message.metadata.group_id.split("/")[::2])  # purpose and client


@dataclass(eq=False)
class _Hand:
    """The tasks of one call to an actor."""

    worker: Worker
    tasks: list[_Task]
    reliefs: int  # that memory had had when it was dealt


class RayGrid(LocalGrid):
    """A Grid with one node that serves every client, on Ray actors.

    Parameters
    ----------
    client_app : str
        ``"module:attribute"`` of the ClientApp; the actors import it.
    settings : Settings
        Its table ``runtime`` says how many actors, and what becomes of clients that fail.
    on_done : callable, optional
        Told of every message that was answered for good.
    on_workers : callable, optional
        Told the names of the actors when they change.

    Raises
    ------
    ConfigError
        If the settings do not fit the machine.
    WorkerError
        If no actor can be started.
    """

    def __init__(
        self,
        client_app: str,
        settings: Settings,
        on_done: OnDone = tell_nobody,
        on_workers: Callable[[Sequence[str]], None] = lambda _: None,
    ) -> None:
        super().__init__()
        self._runtime = settings.runtime
        self._on_done = on_done
        # Evaluations go first: they are short, and would wait for all trainings to come.
        self._evaluations: Schedule[_Task] = Schedule()
        self._others: Schedule[_Task] = Schedule()
        self._estimates = Estimates()
        self._running: dict[Any, _Hand] = {}  # by the call's ObjectRef
        self._models: OrderedDict[int, tuple[ArrayRecord, Any]] = OrderedDict()  # refs, by id
        self._replies: dict[str, Message] = {}  # that nobody has pulled yet
        self._open: set[str] = set()  # ids without a reply
        self._told: set[tuple[str, str]] = set()  # client and kind of the tracebacks shown
        self._watched_at = self._progress_at = time.monotonic()
        self.crew = Crew(client_app, settings, self.run, on_workers)

    @property
    def settings(self) -> Settings:
        """The settings given, with the way to train settled by :meth:`prepare`."""
        return self.crew.settings

    def prepare(self) -> None:
        """Open the data in every actor, settle how to train, and fit the actors to the memory.

        Raises
        ------
        DataError, ConfigError
            See :meth:`Crew.prepare`.
        """
        self.crew.prepare()

    @property
    def waiting(self) -> int:
        """Messages without a reply."""
        return len(self._open)

    @property
    def cohort_size(self) -> int:
        """Clients that are trained in one step, at most."""
        return self.crew.plan.cohort_size

    @property
    def at_a_time(self) -> int:
        """Clients that all actors train at once."""
        return len(self.crew.workers) * self.crew.plan.at_a_time

    def close(self) -> None:
        """Drop all work, stop the actors, and Ray if it was started here."""
        self._open.clear()
        self.crew.close()

    # ------------------------------------------------------------------ Flower's interface

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages and return their ids."""
        if not self._open:
            self._progress_at = time.monotonic()
        tasks = [self._task(message) for message in messages]
        while len(self._models) > KEPT_MODELS:
            self._models.popitem(last=False)
        self._open.update(task.id for task in tasks)
        self._estimate_anew()  # with what is known now, as the new ones are
        for task in tasks:
            self._queue(task)
        self._deal()
        return [task.id for task in tasks]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are ready, each once.

        Raises
        ------
        StalledError
            If for ``progress_timeout_s`` no client gets done.
        WorkerError
            If no actor is left.
        """
        self._turn(0.0)
        ready = [i for i in dict.fromkeys(message_ids) if i in self._replies]
        return [self._replies.pop(message_id) for message_id in ready]

    def wait(self, timeout: float) -> None:
        """Return when a reply may be there to pull, at the latest after ``seconds``."""
        deadline = time.monotonic() + timeout
        self._turn(0.0)
        while not self._replies and self._open and (left := deadline - time.monotonic()) > 0:
            self._turn(min(left, WATCH_SECONDS))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages and return the replies, in the messages' order.

        After ``timeout`` seconds the replies that are ready are returned, the others dropped.

        Raises
        ------
        StalledError
            If for ``progress_timeout_s`` no client gets done.
        WorkerError
            If no actor is left.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        ids = self.push_messages(messages)
        mine = set(ids)
        while not mine.isdisjoint(self._open):
            left = WATCH_SECONDS if deadline is None else deadline - time.monotonic()
            if left <= 0:
                break
            self._turn(min(left, WATCH_SECONDS))
        replies = [self._replies.pop(i) for i in ids if i in self._replies]
        if late := mine & self._open:
            self._open -= late
            self._rest()
        return replies

    # ------------------------------------------------------------------ there

    def _task(self, message: Message) -> _Task:
        give_id(message)
        light, models = RecordDict(), {}
        for name, record in message.content.items():
            if isinstance(record, ArrayRecord):
                models[name] = self._put(record)
            else:
                light[name] = record
        work = records.work_of(message)
        same = Message(light, metadata=message.metadata)  # type: ignore[call-overload]
        return _Task(message, same, models, work)

    def _put(self, model: ArrayRecord) -> Any:
        """Put a model into Ray's store, once for the many messages that share it."""
        known = self._models.pop(id(model), None)  # which is alive, so its id is no other's
        self._models[id(model)] = known or (model, ray.put(model))
        return self._models[id(model)][1]

    def _queue(self, task: _Task) -> None:
        schedule = self._evaluations if task.kind == MessageType.EVALUATE else self._others
        schedule.add(task, task.work, self._expect(task), alone=task.alone)

    def _expect(self, task: _Task) -> float | None:
        return self._estimates.expect(task.kind, task.key or (), task.work)

    def _estimate_anew(self) -> None:
        """Queue again what waits: of messages that take equally long, earlier ones stay first."""
        for task in (*self._evaluations.drop(), *self._others.drop()):
            self._queue(task)

    @property
    def _next(self) -> Schedule[_Task]:
        return self._evaluations or self._others

    def _deal(self) -> None:
        """Give every actor a hand, and a second one where hands are short."""
        ready = [worker for worker in self.crew.workers if worker.introduction]
        idle = [worker for worker in ready if not worker.calls]
        for place, worker in enumerate(idle):
            # At the start all share what waits; later what waits is for those at work, too.
            sharing = len(idle) - place if len(idle) == len(ready) else len(ready)
            self._hand_out(worker, len(ready), sharing)
        for worker in ready:
            # An actor that dies loses the replies of all its calls, so a client that is run alone
            # (because its actor died before) shares an actor with no other call.
            if len(worker.calls) == 1 and not self._next.next_is_alone and self._is_short(worker):
                self._hand_out(worker, len(ready), len(ready))

    def _is_short(self, worker: Worker) -> bool:
        tasks = self._running[worker.calls[0]].tasks
        seconds = [self._expect(task) for task in tasks]
        if None in seconds or any(task.alone for task in tasks):
            return False
        return sum(s or 0.0 for s in seconds) <= 2 * HAND_SECONDS

    def _hand_out(self, worker: Worker, num_workers: int, sharing: int) -> None:
        tasks: list[_Task] = []
        plan = self.crew.plan
        while not tasks and self._next:
            dealt = self._next.deal(num_workers, plan.cohort_size, plan.streams, sharing)
            tasks = [task for task in dealt if task.id in self._open]  # the others were dropped
        if not tasks:
            return
        refs = list(dict.fromkeys(ref for task in tasks for ref in task.models.values()))
        place = {ref: i for i, ref in enumerate(refs)}
        jobs = [Job(t.light, {n: place[ref] for n, ref in t.models.items()}) for t in tasks]
        states = self._load([task.message for task in tasks])
        call = worker.actor.work.remote(jobs, refs, states)
        if not worker.calls:
            worker.busy_since = time.monotonic()
        worker.calls.append(call)
        self._running[call] = _Hand(worker, tasks, self.crew.reliefs)

    # ------------------------------------------------------------------ and back

    def _turn(self, seconds: float) -> None:
        """Deal, wait for one hand to come back, and look after those that do not."""
        self._deal()
        if self._running:
            calls = list(self._running)
            done, others = ray.wait(calls, timeout=seconds)
            if done and others:
                done += ray.wait(others, num_returns=len(others), timeout=0)[0]
            for call in done:
                if call in self._running:  # not lost with its actor meanwhile
                    self._collect(call)
        elif self._open:
            time.sleep(min(seconds, 0.05))  # an actor is starting
        if time.monotonic() - self._watched_at >= WATCH_SECONDS:
            self._watch()

    def _collect(self, call: Any) -> None:
        hand = self._running[call]
        try:
            answers: list[Answer] = ray.get(call)
        except (RayActorError, OutOfMemoryError) as error:
            self._lost(hand.worker, error)
            return
        except RayError as error:  # for example a reply that cannot be sent
            self._take_back(call)
            failure = Failure(str(error).strip().splitlines()[-1], str(error))
            self._blame(hand.tasks, failure, hand.worker.name)
            return
        self._take_back(call)
        self._take_in(hand, answers)

    def _take_in(self, hand: _Hand, answers: Sequence[Answer]) -> None:
        hungry, trained = [], 0
        for task, answer in zip(hand.tasks, answers, strict=True):
            if isinstance(answer.result, Message):
                trained += task.kind == MessageType.TRAIN
                new = self._estimates.expect(task.kind, None, 1.0) is None
                self._estimates.learn(task.kind, task.key, task.work, answer.ended - answer.started)
                if new:  # now it is known how long those that wait will take
                    self._estimate_anew()
                self._finish(task, answer.result, hand.worker.name, answer)
            elif answer.result.out_of_memory:
                hungry.append(task)
            else:
                self._failed(task, answer.result, hand.worker.name, answer)
        if hungry and self._relieve(hand):
            for task in hungry:
                self._queue(task)
        else:
            for task in hungry:
                hint = ", alone on the only actor: use a smaller batch_size" if task.alone else ""
                self._blame([task], Failure(f"out of memory{hint}"), hand.worker.name)
        if trained >= self.crew.plan.at_a_time:
            self.crew.compare_memory(hand.worker)

    def _take_back(self, call: Any) -> None:
        worker = self._running.pop(call).worker
        worker.calls.remove(call)
        worker.busy_since = self._progress_at = time.monotonic()

    def _finish(self, task: _Task, reply: Message, worker: str, answer: Answer | None) -> None:
        if task.id not in self._open:
            return  # nobody waits for it any more
        self._save(task.message, answer.state if answer else None)
        self._open.remove(task.id)
        self._replies[task.id] = reply
        now = time.time()
        started, ended = (answer.started, answer.ended) if answer else (now, now)
        self._on_done(Done(reply, worker, started, ended))
        if not self._open:
            self._rest()

    def _rest(self) -> None:
        """Let go of what is not needed as long as nobody trains."""
        if not self._open:
            self._models.clear()
            self.crew.clean()

    # ------------------------------------------------------------------ what goes wrong

    def _failed(
        self, task: _Task, failure: Failure, worker: str, answer: Answer | None = None
    ) -> None:
        """Run a client again that failed, or leave it out."""
        task.failures += 1
        task.alone = True  # so that it takes no other with it
        name, tries = name_of(task.message), self._runtime.max_retries + 1
        kind = failure.reason.partition(":")[0]
        if failure.details and (name, kind) not in self._told:
            self._told.add((name, kind))
            log.error("%s failed on %s\n%s", name, worker, failure.details.rstrip())
        if task.failures < tries:
            log.warning("%s failed, try %d of %d: %s", name, task.failures, tries, failure.reason)
            self._queue(task)
        else:
            reply = error_reply(task.message, failure.reason)
            self._finish(task, reply, worker, answer)

    def _blame(self, tasks: Sequence[_Task], failure: Failure, worker: str) -> None:
        """Count a failure of several against the task that was to be alone, else against none.

        A cohort may hang, and an actor die, of one client's fault, or while it has nothing to do.
        """
        for task in tasks:
            if task.alone:
                self._failed(task, failure, worker)
            else:
                task.alone = True
                log.warning("%s is run again, alone: %s", name_of(task.message), failure.reason)
                self._queue(task)

    def _lost(self, worker: Worker, error: Exception) -> None:
        """Replace an actor that died; what it was given is run again."""
        saved: list[tuple[_Hand, list[Answer]]] = []  # done just before
        lost: list[_Hand] = []
        for call in list(worker.calls):
            hand = self._running[call]
            self._take_back(call)
            try:
                saved.append((hand, ray.get(call, timeout=CONTROL_SECONDS)))
            except RayError:
                lost.append(hand)
        for hand, answers in saved:
            self._take_in(hand, answers)
        first = lost[0].tasks if lost else []  # what it was working on
        # Ray kills an actor for the sake of the host's memory.
        if isinstance(error, OutOfMemoryError) and lost and self._relieve(lost[0]):
            for task in first:
                self._queue(task)
        else:
            self._blame(first, Failure("its actor died"), worker.name)
        for task in (task for hand in lost[1:] for task in hand.tasks):
            self._queue(task)
        if worker in self.crew.workers:
            log.warning("%s died; it is replaced, and its clients are run again", worker.name)
            self.crew.replace(worker)

    def _relieve(self, hand: _Hand) -> bool:
        """After a hand ran out of memory: whether there will be more if it is run again."""
        if hand.reliefs < self.crew.reliefs:
            return True  # another ran out at the same time
        worker = hand.worker
        if not self.crew.relieve(worker):
            return False
        if worker not in self.crew.workers:  # it was one too many
            for call in list(worker.calls):
                tasks = self._running[call].tasks
                self._take_back(call)
                for task in tasks:
                    self._queue(task)
        return True

    def _watch(self) -> None:
        """Take in new actors; stop clients past their time, and a run that does not go on."""
        self._watched_at = now = time.monotonic()
        if self.crew.welcome():
            self._progress_at = now
        if client_limit := self._runtime.client_timeout_s:
            for worker in list(self.crew.workers):
                if worker.calls and now - worker.busy_since > client_limit:
                    self._overdue(worker, client_limit)
        if self._open and now - self._progress_at > self._runtime.progress_timeout_s:
            limit, dump = self._runtime.progress_timeout_s, self.crew.stacks()
            raise stalled(limit, len(self._open), "actors", dump)

    def _overdue(self, worker: Worker, limit: float) -> None:
        """Stop an actor if a client of its first hand is past the limit; else wait on."""
        hand = self._running[worker.calls[0]].tasks
        try:
            at_work = ray.get(worker.actor.at_work.remote(), timeout=CONTROL_SECONDS)
            late = [task for task in hand if at_work.get(task.id, 0.0) > limit]
        except RayError:  # it holds the interpreter, or is dead
            at_work, late = {}, hand
        if not late:
            longest = max(at_work.values(), default=0.0)
            worker.busy_since = time.monotonic() - longest
            return
        hands = [self._running.pop(call).tasks for call in worker.calls]
        worker.calls.clear()
        self._progress_at = time.monotonic()
        self.crew.replace(worker)
        failure = Failure(f"no reply within {limit:g} s (client_timeout_s)")
        if at_work and len(late) == 1:
            self._failed(late[0], failure, worker.name)
        else:
            self._blame(late, failure, worker.name)
        for task in (task for tasks in hands for task in tasks if task not in late):
            self._queue(task)
