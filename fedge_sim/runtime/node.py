"""What our grids have in common: the node that answers messages, and the grid around it.

Both grids have one node, which serves every client; how many threads or actors stand behind
it is nobody else's business.
"""

import logging
import sys
import threading
import time
import traceback
import uuid
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedge_sim.errors import FedgeError, StalledError
from fedge_sim.records import Address

log = logging.getLogger(__name__)

NODE_ID = 2  # the only node; 1 is the server's own


@dataclass(frozen=True)
class Failure:
    """Why a message was not answered.

    Attributes
    ----------
    reason : str
        One line.
    details : str
        The traceback; empty where it would tell a user nothing.
    out_of_memory : bool
    """

    reason: str
    details: str = ""
    out_of_memory: bool = False

    @property
    def breaks_the_gpu(self) -> bool:
        """Whether no more work can be done on a GPU in this process."""
        return "CUDA error" in self.reason and not self.out_of_memory


@dataclass(frozen=True)
class Answer:
    """What became of a message: the reply or the failure, and when (unix seconds)."""

    result: Message | Failure
    started: float
    ended: float


@dataclass(frozen=True)
class Done:
    """A message that was answered for good: by whom it was worked on, and when (unix seconds)."""

    reply: Message
    worker: str
    started: float
    ended: float


OnDone = Callable[[Done], None]


def tell_nobody(_: Done) -> None:
    """Keep it to oneself."""


class Node:
    """Runs the ClientApp on messages.

    Parameters
    ----------
    client_app : ClientApp
    run_id : int
    node_config : UserConfig, optional
        The node's own configuration, as a SuperNode has one.
    """

    def __init__(
        self, client_app: ClientApp, run_id: int, node_config: UserConfig | None = None
    ) -> None:
        self._app = client_app
        self._context = Context(
            run_id=run_id,
            node_id=NODE_ID,
            node_config=node_config or {},
            state=RecordDict(),
            run_config={},
        )

    def answer(self, message: Message) -> Answer:
        """Run the ClientApp; what it raises becomes a failure."""
        started = time.time()
        result: Message | Failure
        try:
            result = self._app(message, self._context)
            give_id(result)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            # A user's mistake needs no traceback.
            details = "" if isinstance(error, FedgeError) else traceback.format_exc()
            result = Failure(reason, details, _is_out_of_memory(error))
        return Answer(result, started, time.time())


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # Plain RuntimeErrors of torch's: on the host, of the driver, of its libraries.
    signs = ("DefaultCPUAllocator", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
    return any(sign in str(error) for sign in signs)


def give_id(message: Message) -> str:
    """Give a message an id of its own, as the SuperLink does, and return it."""
    message.metadata.__dict__["_message_id"] = message_id = str(uuid.uuid4())
    return message_id


def error_reply(message: Message, reason: str) -> Message:
    """Return the reply of a client that failed for good, as Flower has it."""
    reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
    give_id(reply)
    return reply


def name_of(message: Message) -> str:
    """Return what a person calls a message: its client and leaf server."""
    if address := Address.of(message):
        return f"client {address.client} of leaf server {address.leaf} ({address.purpose})"
    return f"{message.metadata.message_type} of node {message.metadata.dst_node_id}"


def identify(run: Run) -> None:
    """Make this process one of a run: the messages that it makes belong to it."""
    TaskIdentity.run_id = run.run_id
    TaskIdentity.task_id = run.primary_task_id or 1
    TaskIdentity.node_id = SUPERLINK_NODE_ID


def stacks() -> str:
    """Return what every thread of this process is doing."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )


def stalled(limit_s: float, waiting: int, who: str, dump: str) -> StalledError:
    """Log what ``who`` is doing, and return the error that ends a run in which nobody gets done."""
    log.error("no progress; what the %s are doing:\n%s", who, dump)
    return StalledError(
        f"no client got done for {limit_s:g} s (runtime.progress_timeout_s), {waiting} wait"
    )


class LocalGrid(Grid):
    """A Grid whose only node is our own. Use it as a context manager, or call :meth:`close`."""

    def __init__(self) -> None:
        self.set_run(Run.create_empty(run_id=1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Stop all work and free what it held."""

    @property
    @abstractmethod
    def waiting(self) -> int:
        """Messages without a reply."""

    def set_run(self, run: Run) -> None:
        """Set the run; a message made in this process belongs to it."""
        self._run = run
        identify(run)

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
