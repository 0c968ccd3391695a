"""A Flower Grid in this process: messages go straight to the ClientApp, on a few threads.

torch releases the interpreter's lock inside its operators, so threads that each train a client,
or a cohort of clients, use as many cores.
"""

import logging
import os
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import TypeAlias

from flwr.app import ArrayRecord, Message, UserConfig
from flwr.clientapp import ClientApp

from fedge_sim.config import Runtime
from fedge_sim.runtime.node import (
    Answer,
    Done,
    Failure,
    LocalGrid,
    Node,
    OnDone,
    Together,
    error_reply,
    give_id,
    name_of,
    stacks,
    stalled,
    tell_nobody,
)

log = logging.getLogger(__name__)

Taken: TypeAlias = dict[str, tuple[Message, ArrayRecord | None]]  # reply, new state, by message id


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class InProcessGrid(LocalGrid):
    """A Grid with one node that serves every client, on a pool of threads.

    Parameters
    ----------
    client_app : ClientApp
    workers : int
        Cohorts that are worked on at the same time.
    runtime : Runtime, optional
        How often a client that fails is run again, and how long none may get done.
    node_config : UserConfig, optional
        The node's own configuration, as a SuperNode has one.
    on_done : callable, optional
        Told of every message that was answered for good, on the thread that did.
    together : callable, optional
        Answers messages of several clients in one step.
    cohort_size : int
        Clients that are trained in one such step, at most; halved if memory runs out.
    """

    def __init__(
        self,
        client_app: ClientApp,
        workers: int,
        runtime: Runtime | None = None,
        node_config: UserConfig | None = None,
        on_done: OnDone = tell_nobody,
        together: Together | None = None,
        cohort_size: int = 1,
    ) -> None:
        super().__init__()
        self._runtime = runtime or Runtime()
        self._node = Node(client_app, self.run.run_id, node_config, together)
        self._on_done = on_done
        self._workers, self._cohort_size = workers, cohort_size
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="thread")
        self._pending: dict[str, Future[dict[str, Message]]] = {}  # a cohort's replies, by id
        self._awaited: set[str] = set()  # ids of messages whose reply is not taken yet
        self._taking = threading.Lock()  # a reply is taken with its state, or dropped with it
        self._told: set[tuple[str, str]] = set()
        self._progress_at = time.monotonic()
        self._given_up = False  # on threads that hang

    def close(self) -> None:
        """Drop the messages that wait, let those under way end, and stop the threads."""
        with self._taking:
            self._awaited.clear()
        self._pool.shutdown(wait=not self._given_up, cancel_futures=True)

    @property
    def waiting(self) -> int:
        """Messages without a reply."""
        return sum(not future.done() for future in list(self._pending.values()))

    @property
    def cohort_size(self) -> int:
        """Clients that are trained in one step, at most."""
        return self._cohort_size

    @property
    def at_a_time(self) -> int:
        """Clients that all threads train at once."""
        return self._workers * self._cohort_size

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages, in order and in cohorts, and return their ids."""
        if not self.waiting:
            self._progress_at = time.monotonic()
        messages = list(messages)
        ids = [give_id(message) for message in messages]
        with self._taking:
            self._awaited.update(ids)
        for cohort in self._node.cohorts(messages, self._cohort_size, self._workers):
            future = self._pool.submit(self._work, cohort)
            self._pending.update({message.metadata.message_id: future for message in cohort})
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are ready, each once.

        Raises
        ------
        StalledError
            If for ``progress_timeout_s`` no client gets done.
        """
        self._check_progress()
        ready = [
            message_id
            for message_id in dict.fromkeys(message_ids)
            if message_id in self._pending and self._pending[message_id].done()
        ]
        return [self._pending.pop(message_id).result()[message_id] for message_id in ready]

    def wait(self, timeout: float) -> None:
        """Return when a reply is there to pull, at the latest after ``seconds``."""
        left = self._progress_at + self._runtime.progress_timeout_s - time.monotonic()
        pending = set(self._pending.values())
        wait_for(pending, max(0.0, min(timeout, left)), return_when=FIRST_COMPLETED)
        self._check_progress()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages and return the replies, in the messages' order.

        After ``timeout`` seconds the replies that are ready are returned, the others dropped.

        Raises
        ------
        StalledError
            If for ``progress_timeout_s`` no client gets done.
        """
        ids = self.push_messages(messages)
        deadline = None if timeout is None else time.monotonic() + timeout
        waiting = {self._pending[message_id] for message_id in ids}
        while waiting:
            now = time.monotonic()
            left = self._progress_at + self._runtime.progress_timeout_s - now
            if deadline is not None:
                if deadline <= now:
                    break
                left = min(left, deadline - now)
            waiting = wait_for(waiting, timeout=max(0.0, left)).not_done
            self._check_progress()
        with self._taking:
            late = {i for i in ids if i in self._awaited and not self._pending[i].done()}
            self._awaited -= late
        for message_id in late:
            self._pending.pop(message_id).cancel()
        taken = [message_id for message_id in ids if message_id not in late]
        wait_for({self._pending[message_id] for message_id in taken})
        return self.pull_messages(taken)

    def _check_progress(self) -> None:
        """Give up if messages wait, and none was worked off for too long."""
        limit = self._runtime.progress_timeout_s
        if time.monotonic() - self._progress_at > limit and self.waiting:
            self._given_up = True
            raise stalled(limit, self.waiting, "threads", stacks())

    def _work(self, cohort: Sequence[Message]) -> dict[str, Message]:
        """Answer a cohort, write its clients' states if it is waited for; return replies by id."""
        answered = self._answer(cohort)
        with self._taking:
            for message in cohort:
                if (message_id := message.metadata.message_id) in self._awaited:
                    self._save(message, answered[message_id][1])
                    self._awaited.remove(message_id)
        return {message_id: reply for message_id, (reply, _) in answered.items()}

    def _answer(self, cohort: Sequence[Message]) -> Taken:
        """Run the ClientApp on a cohort, and again on each that fails."""
        answers = self._node.answer_all(cohort, self._load(cohort))
        self._progress_at = time.monotonic()
        if len(cohort) > 1 and all(_out_of_memory(answer) for answer in answers):
            return self._halve(cohort)
        return {
            message.metadata.message_id: self._finish(message, answer)
            for message, answer in zip(cohort, answers, strict=True)
        }

    def _halve(self, cohort: Sequence[Message]) -> Taken:
        half, hint = len(cohort) // 2, ""
        if half < self._cohort_size:
            self._cohort_size = half
            hint = f"; next time set runtime.cohort_size = {half}"
        log.warning("a cohort of %d ran out of memory, and is halved%s", len(cohort), hint)
        return self._answer(cohort[:half]) | self._answer(cohort[half:])

    def _finish(self, message: Message, answer: Answer) -> tuple[Message, ArrayRecord | None]:
        """Return the reply and state of an answer; try again if there is none, and then say so."""
        tries = self._runtime.max_retries + 1
        for number in range(1, tries + 1):
            if number > 1:
                answer = self._node.answer(message, self._load([message]))
                self._progress_at = time.monotonic()
            if isinstance(answer.result, Message):
                reply = answer.result
                break
            name, reason = name_of(message), answer.result.reason
            kind = reason.partition(":")[0]
            if answer.result.details and (name, kind) not in self._told:
                self._told.add((name, kind))
                log.error("%s failed\n%s", name, answer.result.details.rstrip())
            if number < tries:
                log.warning("%s failed, try %d of %d: %s", name, number, tries, reason)
            else:
                reply = error_reply(message, reason)
        worker = threading.current_thread().name.replace("_", "-")
        self._on_done(Done(reply, worker, answer.started, answer.ended))
        return reply, answer.state


def _out_of_memory(answer: Answer) -> bool:
    return isinstance(answer.result, Failure) and answer.result.out_of_memory
