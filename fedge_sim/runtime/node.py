"""What our grids have in common: the node that answers messages, and the grid around it.

Both grids have one node, which serves every client; how many threads or actors stand behind
it is nobody else's business. Messages of several clients may be answered together, as a cohort,
in one vectorised step.
"""

import logging
import sys
import threading
import time
import traceback
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self, TypeAlias

import torch
from flwr.app import ArrayRecord, Context, Error, Message, MessageType, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedge_sim import records
from fedge_sim.errors import FedgeError, StalledError
from fedge_sim.records import Address
from fedge_sim.runtime.state import StateFile

log = logging.getLogger(__name__)

NODE_ID = 2  # the only node; 1 is the server's own
# Clients evaluated together where each trains alone: an evaluation keeps nothing for a step back.
EVALUATED_TOGETHER = 16
# Of a worker's fair share of what is to be evaluated, that one cohort may be.
EVALUATED_SHARE = 0.25


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
    """What became of a message: the reply or the failure, and when (unix seconds).

    Attributes
    ----------
    result : Message or Failure
    started, ended : float
    state : ArrayRecord or None
        The client's new state, if it has one.
    """

    result: Message | Failure
    started: float
    ended: float
    state: ArrayRecord | None = None


@dataclass(frozen=True)
class Done:
    """A message that was answered for good: by whom it was worked on, and when (unix seconds)."""

    reply: Message
    worker: str
    started: float
    ended: float


OnDone = Callable[[Done], None]
Together = Callable[[Sequence[Message], Context], list[Message]]  # the replies in their order
States: TypeAlias = Mapping[int, ArrayRecord]  # by client


def tell_nobody(_: Done) -> None:
    """Ignore the event."""


class Node:
    """Runs the ClientApp on messages.

    Parameters
    ----------
    client_app : ClientApp
    run_id : int
    node_config : UserConfig, optional
        The node's own configuration, as a SuperNode has one.
    together : callable, optional
        Answers messages of several clients in one step; see :func:`cohorts`.
    """

    def __init__(
        self,
        client_app: ClientApp,
        run_id: int,
        node_config: UserConfig | None = None,
        together: Together | None = None,
    ) -> None:
        self._app, self._together = client_app, together
        self._run_id, self._config = run_id, node_config or {}
        self._own_context = self._context(RecordDict())

    def _context(self, state: RecordDict) -> Context:
        return Context(
            run_id=self._run_id,
            node_id=NODE_ID,
            node_config=self._config,
            state=state,
            run_config={},
        )

    def cohorts(
        self, messages: Sequence[Message], size: int, workers: int = 1
    ) -> list[list[Message]]:
        """Split messages as :func:`cohorts` does, or into single ones if none go together."""
        if self._together is None:
            return [[message] for message in messages]
        return cohorts(messages, size, workers)

    def answer(self, message: Message, states: States | None = None) -> Answer:
        """Run the ClientApp; what it raises, and a reply of the wrong form, becomes a failure.

        Parameters
        ----------
        message : Message
        states : mapping from client to ArrayRecord, optional
            The states of clients that have one; without it, the node keeps its own context.
        """
        context = self._context_of([message], states)
        started = time.time()
        try:
            result = self._app(message, context)
        except BaseException as error:  # sys.exit() too: Ctrl-C comes to the main thread alone
            return Answer(_failure(error), started, time.time())
        return _answer(message, result, (started, time.time()), context, states)

    def answer_all(self, messages: Sequence[Message], states: States | None = None) -> list[Answer]:
        """Answer a cohort, in one step if it is more than one message.

        If that runs out of memory, all have; if it fails otherwise, each is answered alone, so
        that only the culprit fails. A reply of the wrong form is its own client's failure.
        ``states`` are those of :meth:`answer`.
        """
        if len(messages) == 1 or self._together is None:
            return [self.answer(message, states) for message in messages]
        context = self._context_of(messages, states)
        started = time.time()
        try:
            results = self._together(messages, context)
            if len(results) != len(messages):
                raise ValueError(f"{len(results)} replies to {len(messages)} messages")
        except BaseException as error:
            failure = _failure(error)
            if not failure.out_of_memory:
                names = ", ".join(map(name_of, messages))
                log.warning("cohort failed, each is run alone: %s; %s", failure.reason, names)
                return [self.answer(message, states) for message in messages]
            return [Answer(failure, started, time.time())] * len(messages)
        spans = _slices(messages, started, time.time())
        return [
            _answer(message, result, span, context, states)
            for message, result, span in zip(messages, results, spans, strict=True)
        ]

    def _context_of(self, messages: Sequence[Message], states: States | None) -> Context:
        """Return the node's own context, or one with the states of just these clients."""
        if states is None:
            return self._own_context
        clients = clients_of(messages) & states.keys()
        return self._context(RecordDict({records.state_key(c): states[c] for c in clients}))


def client_of(message: Message) -> int | None:
    """Return the client that a message trains or evaluates; None if it does neither."""
    if message.metadata.message_type not in (MessageType.TRAIN, MessageType.EVALUATE):
        return None
    address = Address.of(message)
    return None if address is None else address.client


def clients_of(messages: Sequence[Message]) -> set[int]:
    """Return the clients that messages train or evaluate."""
    return {client for message in messages if (client := client_of(message)) is not None}


def _answer(
    message: Message,
    result: Message,
    span: tuple[float, float],
    context: Context,
    states: States | None,
) -> Answer:
    """Return the answer that a ClientApp gave, or a failure if its form is wrong."""
    if fault := records.fault_of(message, result):
        return Answer(Failure(fault), *span)
    give_id(result)
    return Answer(result, *span, _new_state(message, context, states))


def _new_state(message: Message, context: Context, states: States | None) -> ArrayRecord | None:
    """Return the state that a client has put in place of the one it was given to train."""
    if states is None or message.metadata.message_type != MessageType.TRAIN:
        return None
    if (client := client_of(message)) is None:
        return None
    state = context.state.array_records.get(records.state_key(client))
    return None if state is states.get(client) else state


def _failure(error: BaseException) -> Failure:
    # A user's mistake needs no traceback.
    details = "" if isinstance(error, FedgeError) else traceback.format_exc()
    return Failure(f"{type(error).__name__}: {error}", details, _is_out_of_memory(error))


def _slices(
    messages: Sequence[Message], started: float, ended: float
) -> Iterator[tuple[float, float]]:
    """Divide the time that a cohort took among its messages, by their work."""
    work = [records.work_of(message) for message in messages]
    total, done, cuts = sum(work) or 1.0, 0.0, [started]
    for amount in work:
        done += amount
        cuts.append(started + (ended - started) * done / total)
    return pairwise([*cuts[:-1], ended])


def cohorts(messages: Sequence[Message], size: int, workers: int = 1) -> list[list[Message]]:
    """Split messages into groups that may each be answered together.

    Messages to train are of a group if their settings are equal; messages to evaluate if they
    also carry the same model and ask for the same of it. All others stay alone.

    Parameters
    ----------
    messages : sequence of Message
        Those with most work first, so that a group's are of similar length.
    size : int
        The most in a group; where it is 1, clients are evaluated together all the same.
    workers : int
        How many share the groups, and are to be busy for equally long.

    Returns
    -------
    list of list of Message
        In the order of their first messages, and these in the order given.
    """
    work = [records.work_of(message) for message in messages]
    trained: dict[object, list[int]] = {}
    evaluated: dict[object, list[int]] = {}
    groups: list[list[int]] = []
    for place, message in enumerate(messages):
        if (kind := _kind(message)) is None:
            groups.append([place])
        else:
            kinds = trained if message.metadata.message_type == MessageType.TRAIN else evaluated
            kinds.setdefault(kind, []).append(place)
    for places in trained.values():
        groups += _even_parts(places, work, size, workers)
    share = sum(work[place] for places in evaluated.values() for place in places) / workers
    largest = share * EVALUATED_SHARE if workers > 1 else share
    for places in evaluated.values():
        groups += _small_parts(places, work, size if size > 1 else EVALUATED_TOGETHER, largest)
    return [[messages[place] for place in group] for group in sorted(groups)]


def _even_parts(
    places: Sequence[int], work: Sequence[float], size: int, workers: int
) -> list[list[int]]:
    """Cut into runs of about equal work, for all workers as many; ``size`` is the most of one."""
    waves = -(-len(places) // (size * workers))
    total = sum(work[place] for place in places) or 1.0
    most = min(size, -(-len(places) // workers))
    groups: list[list[int]] = []
    done, last = 0.0, -1
    for place in places:
        part = int((done + work[place] / 2) / total * waves * workers)
        if part != last or len(groups[-1]) == most:
            groups.append([])
        groups[-1].append(place)
        done, last = done + work[place], part
    return groups


def _small_parts(
    places: Sequence[int], work: Sequence[float], size: int, largest: float
) -> list[list[int]]:
    """Split into consecutive groups of at most ``size`` messages and ``largest`` work.

    A message of more work than ``largest`` is a group of its own.
    """
    groups: list[list[int]] = []
    total = 0.0
    for place in places:
        total += work[place]
        if not groups or len(groups[-1]) == size or total > largest:
            groups.append([])
            total = work[place]
        groups[-1].append(place)
    return groups


def _kind(message: Message) -> object:
    """Return what messages have in common that may be answered together; None if none may."""
    kind = message.metadata.message_type
    config = message.content.config_records.get(records.CONFIG)
    if config is None or kind not in (MessageType.TRAIN, MessageType.EVALUATE):
        return None
    settings = config.get(records.SETTINGS)
    if kind == MessageType.TRAIN:
        return kind, settings
    splits = tuple(config.get(records.SPLITS, ()))  # type: ignore[arg-type]
    model = message.content.array_records.get(records.ARRAYS)
    return kind, settings, config.get(records.PURPOSE), splits, id(model)


def _is_out_of_memory(error: BaseException) -> bool:
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

    _states: StateFile | None = None

    def __init__(self) -> None:
        self.set_run(Run.create_empty(run_id=1))

    def keep_state(self, states: StateFile) -> None:
        """Keep what ClientApps put into ``Context.state`` under :func:`records.state_key`.

        It is read when a client's message is worked on, and written when its reply to a message
        to train is taken. Whoever gives the file also commits and closes it.
        """
        self._states = states

    def _load(self, messages: Sequence[Message]) -> dict[int, ArrayRecord] | None:
        """Return the states that clients have; None if none are kept."""
        if self._states is None:
            return None
        loaded = {client: self._states.read(client) for client in clients_of(messages)}
        return {client: state for client, state in loaded.items() if state is not None}

    def _save(self, message: Message, state: ArrayRecord | None) -> None:
        """Write the state that a client has after a message, if it is a new one."""
        client = client_of(message)
        if self._states is not None and state is not None and client is not None:
            self._states.write(client, state, records.config_of(message)[records.ROUND])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Stop all work and free what it held."""

    @abstractmethod
    def wait(self, timeout: float) -> None:
        """Return when a reply may be there to pull, at the latest after ``seconds``.

        Raises
        ------
        StalledError
            If for ``progress_timeout_s`` no client gets done.
        """

    @property
    @abstractmethod
    def waiting(self) -> int:
        """Messages without a reply."""

    @property
    @abstractmethod
    def cohort_size(self) -> int:
        """Clients that are trained in one step, at most."""

    @property
    @abstractmethod
    def at_a_time(self) -> int:
        """Clients that all workers train at once."""

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
