"""Flower's grid, with what our own grids promise: each message gets a reply of the right form.

That may be an error, which says why there is no other: the client failed, its node is gone or does
not reply, Flower did not take the message.
"""

import time
from collections.abc import Iterable, Sequence

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedge_sim import records
from fedge_sim.config import Runtime
from fedge_sim.errors import StalledError
from fedge_sim.runtime.node import client_of, error_reply, give_id

SHORTEST_WAIT, LONGEST_WAIT = 0.05, 1.0  # seconds between two looks for replies
REFUSED = "Flower did not take its message: its node is gone, or the message is too large"


class FlowerGrid(Grid):
    """Passes messages on to a grid of Flower's.

    A message does not say when a node began with it, as it waits there for others. So time is kept
    for all together: of clients who are waited for, none replied for ``client_timeout_s``.

    Parameters
    ----------
    grid : Grid
    runtime : Runtime
        How long no reply may come until clients are left out, or the run ends.
    """

    def __init__(self, grid: Grid, runtime: Runtime) -> None:
        self._grid, self._runtime = grid, runtime
        self._open: dict[str, Message] = {}  # that Flower has taken and not answered, by id
        self._refused: dict[str, Message] = {}  # error replies that nobody has pulled yet, by id
        self._heard_at = time.monotonic()

    def set_run(self, run: Run) -> None:
        """Set the run that the messages belong to."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run that the messages belong to."""
        return self._grid.run

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

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes that Flower takes to be alive."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages and return their ids; Flower's grid leaves out those that it refuses."""
        messages = list(messages)
        taken = self._push(messages)
        if not taken and len(messages) > 1:  # too large together
            taken = {i for message in messages for i in self._push([message])}
        for message in messages:
            if (message_id := message.metadata.message_id) in taken:
                self._open[message_id] = message
            else:
                message_id = give_id(message)
                self._refused[message_id] = error_reply(message, REFUSED)
        self._heard_at = time.monotonic()
        return [message.metadata.message_id for message in messages]

    def _push(self, messages: Sequence[Message]) -> set[str]:
        return set(filter(None, self._grid.push_messages(messages)))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are ready, each once.

        Raises
        ------
        StalledError
            If for ``progress_timeout_s`` none came.
        """
        ids = list(dict.fromkeys(message_ids))
        replies = [self._refused.pop(i) for i in ids if i in self._refused]
        if not (waiting := [i for i in ids if i in self._open]):
            return replies
        for reply in self._grid.pull_messages(waiting):
            message = self._open.pop(reply.metadata.reply_to_message_id)
            self._heard_at = time.monotonic()
            replies.append(_checked(message, reply))
        return replies + self._overdue([i for i in waiting if i in self._open])

    def _overdue(self, waiting: Sequence[str]) -> list[Message]:
        """Give up clients of whom none has replied for too long, and a run that does not go on."""
        silent, runtime = time.monotonic() - self._heard_at, self._runtime
        limit, most = runtime.client_timeout_s, runtime.progress_timeout_s
        clients = [i for i in waiting if client_of(self._open[i]) is not None]
        if limit and silent > limit and clients:
            reason = f"no reply within {limit:g} s (client_timeout_s)"
            return [error_reply(self._open.pop(i), reason) for i in clients]
        if waiting and silent > most:
            raise StalledError(
                f"no client got done for {most:g} s (runtime.progress_timeout_s), "
                f"{len(waiting)} wait"
            )
        return []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages and return the replies, as they came.

        After ``timeout`` seconds the replies that are ready are returned, the others dropped.

        Raises
        ------
        StalledError
            If for ``progress_timeout_s`` none came.
        """
        ids = self.push_messages(messages)
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        wait = SHORTEST_WAIT
        while True:
            new = self.pull_messages(ids)
            replies += new
            late = deadline is not None and time.monotonic() > deadline
            if len(replies) == len(ids) or late:
                break
            wait = SHORTEST_WAIT if new else min(2 * wait, LONGEST_WAIT)
            time.sleep(wait)
        for message_id in ids:
            self._open.pop(message_id, None)
        return replies


def _checked(message: Message, reply: Message) -> Message:
    """Return a reply; an error in its place if its form is wrong.

    Some of Flower's own errors do not say whose message they answer.
    """
    if reply.has_error():
        return error_reply(message, reply.error.reason or "it replied with an error")
    fault = records.fault_of(message, reply)
    return error_reply(message, fault) if fault else reply
