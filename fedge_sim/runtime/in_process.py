"""A Flower Grid in this process: messages go straight to the ClientApp, on a few threads.

torch releases the interpreter's lock inside its operators, so threads that train one client
each use as many cores.
"""

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Self

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedge_sim.errors import FedgeError

log = logging.getLogger(__name__)

NODE_ID = 2  # the only node; 1 is the server's own


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class InProcessGrid(Grid):
    """A Grid with one node that serves every client, on a pool of threads.

    Use it as a context manager, or call :meth:`close`.

    Parameters
    ----------
    client_app : ClientApp
    workers : int
        Messages that are worked on at the same time. Results do not depend on it.
    node_config : UserConfig, optional
        The node's own configuration, as a SuperNode has one.
    on_reply : callable, optional
        Called with every reply as it is made, on the thread that made it.
    """

    def __init__(
        self,
        client_app: ClientApp,
        workers: int,
        node_config: UserConfig | None = None,
        on_reply: Callable[[Message], None] = lambda _: None,
    ) -> None:
        self._app = client_app
        self._on_reply = on_reply
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="client")
        self._pending: dict[str, Future[Message]] = {}
        self.set_run(Run.create_empty(run_id=1))
        self._context = Context(
            run_id=self._run.run_id,
            node_id=NODE_ID,
            node_config=node_config or {},
            state=RecordDict(),
            run_config={},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the messages that wait, let those under way end, and stop the threads."""
        self._pool.shutdown(cancel_futures=True)

    def set_run(self, run: Run) -> None:
        """Set the run; a message made in this process belongs to it."""
        self._run = run
        TaskIdentity.run_id = run.run_id
        TaskIdentity.task_id = run.primary_task_id or 1
        TaskIdentity.node_id = SUPERLINK_NODE_ID

    @property
    def run(self) -> Run:
        """The run that the messages belong to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message; the same as calling ``Message``."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> list[int]:
        """Return the id of the one node."""
        return [NODE_ID]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages, in order, and return their ids."""
        ids = []
        for message in messages:
            message_id = str(uuid.uuid4())
            message.metadata.__dict__["_message_id"] = message_id
            self._pending[message_id] = self._pool.submit(self._answer, message)
            ids.append(message_id)
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
        """
        ids = self.push_messages(messages)
        deadline = None if timeout is None else time.monotonic() + timeout
        for message_id in ids:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            wait_for([self._pending[message_id]], timeout=left)
        replies = self.pull_messages(ids)
        for message_id in ids:
            if late := self._pending.pop(message_id, None):
                late.cancel()
        return replies

    def _answer(self, message: Message) -> Message:
        """Run the ClientApp; what it raises becomes an error reply, as in Flower."""
        try:
            answer = self._app(message, self._context)
        except Exception as error:
            # A user's mistake needs no traceback.
            log.error(
                "%s failed: %s",
                message.metadata.group_id or message.metadata.message_type,
                error,
                exc_info=not isinstance(error, FedgeError),
            )
            reason = f"{type(error).__name__}: {error}"
            answer = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        answer.metadata.__dict__["_message_id"] = str(uuid.uuid4())
        self._on_reply(answer)
        return answer
