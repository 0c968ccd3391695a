"""A Flower Grid in this process: messages go straight to the ClientApp, on a few threads.

torch releases the interpreter's lock inside its operators, so threads that train one client
each use as many cores.
"""

import logging
import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for

from flwr.app import Message, UserConfig
from flwr.clientapp import ClientApp

from fedge_sim.config import Runtime
from fedge_sim.runtime.node import (
    Done,
    LocalGrid,
    Node,
    OnDone,
    error_reply,
    give_id,
    name_of,
    stacks,
    stalled,
    tell_nobody,
)

log = logging.getLogger(__name__)


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class InProcessGrid(LocalGrid):
    """A Grid with one node that serves every client, on a pool of threads.

    Parameters
    ----------
    client_app : ClientApp
    workers : int
        Messages that are worked on at the same time. Results do not depend on it.
    runtime : Runtime, optional
        How often a client that fails is run again, and how long none may get done.
    node_config : UserConfig, optional
        The node's own configuration, as a SuperNode has one.
    on_done : callable, optional
        Told of every message that was answered for good, on the thread that did.
    """

    def __init__(
        self,
        client_app: ClientApp,
        workers: int,
        runtime: Runtime | None = None,
        node_config: UserConfig | None = None,
        on_done: OnDone = tell_nobody,
    ) -> None:
        super().__init__()
        self._runtime = runtime or Runtime()
        self._node = Node(client_app, self.run.run_id, node_config)
        self._on_done = on_done
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="thread")
        self._pending: dict[str, Future[Message]] = {}
        self._told: set[tuple[str, str]] = set()
        self._progress_at = time.monotonic()
        self._given_up = False  # on threads that hang

    def close(self) -> None:
        """Drop the messages that wait, let those under way end, and stop the threads."""
        self._pool.shutdown(wait=not self._given_up, cancel_futures=True)

    @property
    def waiting(self) -> int:
        """Messages without a reply."""
        return sum(not future.done() for future in list(self._pending.values()))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages, in order, and return their ids."""
        self._progress_at = time.monotonic()
        ids = []
        for message in messages:
            ids.append(give_id(message))
            self._pending[ids[-1]] = self._pool.submit(self._answer, message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are ready, each once."""
        ready = [
            message_id
            for message_id in dict.fromkeys(message_ids)
            if message_id in self._pending and self._pending[message_id].done()
        ]
        return [self._pending.pop(message_id).result() for message_id in ready]

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
            if waiting and self._stalled():
                self._given_up = True
                limit = self._runtime.progress_timeout_s
                raise stalled(limit, len(waiting), "threads", stacks())
        replies = self.pull_messages(ids)
        for message_id in ids:
            if late := self._pending.pop(message_id, None):
                late.cancel()
        return replies

    def _stalled(self) -> bool:
        quiet = time.monotonic() - self._progress_at
        return bool(self._pending) and quiet > self._runtime.progress_timeout_s

    def _answer(self, message: Message) -> Message:
        """Run the ClientApp, again if it fails; in the end the failure is the reply."""
        tries = self._runtime.max_retries + 1
        for number in range(1, tries + 1):
            answer = self._node.answer(message)
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
        return reply
