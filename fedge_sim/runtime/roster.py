"""The roster: which node serves which client, and what data each client holds.

A client is not a node. The topology names clients 0..N-1; nodes say which of them they
serve. A node of a simulation serves any, and clients are dealt out to those in turn, always
the same client to the same node. A SuperNode that is started anew is another node, and takes the
clients over that it names.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from fedge_sim import checkpoint, records
from fedge_sim.config import Settings
from fedge_sim.data.base import DataSummary, Standardisation, warn_of_form
from fedge_sim.data.drawn import are_drawn
from fedge_sim.errors import DataError, RosterError
from fedge_sim.runtime import sizing
from fedge_sim.training.choice import Choice

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
LOOK_SECONDS = 1.0  # between two looks for new nodes
MOST_NAMED = 20  # clients in an error message


@dataclass(eq=False)
class Roster(Mapping[int, int]):
    """The node of every client that can be served, worked out when it is asked for.

    A client goes to the node that names it, else to one of those that serve any, in turn.

    Attributes
    ----------
    named : dict of int to int
        The node of each client of the topology that is named by one.
    anywhere : list of int
        The nodes that serve any client.
    num_clients : int
        Of the topology.
    """

    named: dict[int, int]
    anywhere: list[int]
    num_clients: int
    _known: set[int] = field(default_factory=set)  # nodes that have been asked
    _asked: dict[str, int] = field(default_factory=dict)  # nodes still to answer, by message id
    _spare: list[int] = field(default_factory=list)  # new ones that serve any client
    _looked_at: float = field(default_factory=time.monotonic)

    def __getitem__(self, client: int) -> int:
        if client in self.named:
            return self.named[client]
        if not self.anywhere or client not in range(self.num_clients):
            raise KeyError(client)
        return self.anywhere[client % len(self.anywhere)]

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.num_clients) if self.anywhere else sorted(self.named))

    def __len__(self) -> int:
        return self.num_clients if self.anywhere else len(self.named)

    @property
    def missing(self) -> Iterator[int]:
        """The clients that no node serves."""
        return (c for c in range(self.num_clients) if c not in self)

    @property
    def nodes(self) -> list[int]:
        """The nodes that serve a client, in ascending order."""
        turns = range(self.num_clients)
        some = {
            node
            for place, node in enumerate(self.anywhere)
            if any(c not in self.named for c in turns[place :: len(self.anywhere)])
        }
        return sorted(some | {*self.named.values()})

    def look_for_new_nodes(self, grid: Grid) -> None:
        """Ask new nodes which clients they serve, and take in those that have answered by now.

        Nobody waits for an answer. The newest node that names a client gets it: the one before may
        be dead, and the SuperLink not know it yet. One that serves any client takes the place of
        such a node that is gone.
        """
        if time.monotonic() - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = time.monotonic()
        present = set(grid.get_node_ids())
        if new := sorted(present - self._known):
            self._known.update(new)
            ids = grid.push_messages([_question(node) for node in new])
            self._asked.update(zip(ids, new, strict=True))
        for reply in grid.pull_messages(list(self._asked)) if self._asked else ():
            node = self._asked.pop(reply.metadata.reply_to_message_id)
            if answer := _answer(node, reply):
                self._take(node, answer)
        for place, node in enumerate(self.anywhere):
            if node not in present and self._spare:
                self.anywhere[place] = self._spare.pop(0)
                log.info("node %d takes the place of node %d", self.anywhere[place], node)

    def _take(self, node: int, answer: Mapping[str, Any]) -> None:
        if answer[records.SERVES_ANY]:
            self._spare.append(node)
        for client in answer[records.CLIENT_IDS]:
            if client in range(self.num_clients):
                log.info("client %d is served by node %d from now on", client, node)
                self.named[client] = node


def call_roster(grid: Grid, num_clients: int, timeout_s: float) -> Roster:
    """Ask the nodes which clients they serve until every client has one.

    Parameters
    ----------
    grid : Grid
    num_clients : int
    timeout_s : float
        How long to wait for nodes to connect.

    Returns
    -------
    Roster
        The node of every client.

    Raises
    ------
    RosterError
        If after that time a client is served by no node: it names the clients.
    """
    deadline = time.monotonic() + timeout_s
    answers: dict[int, dict[str, Any]] = {}
    failed: set[int] = set()
    while True:
        new = [node for node in grid.get_node_ids() if node not in answers and node not in failed]
        for message in grid.send_and_receive(
            list(map(_question, new)), timeout=max(1.0, deadline - time.monotonic())
        ):
            node = message.metadata.src_node_id
            if answer := _answer(node, message):
                answers[node] = answer
            else:
                failed.add(node)
        expected = max((a[records.NUM_NODES] for a in answers.values()), default=1)
        roster = assign(answers, num_clients)
        roster._known |= answers.keys() | failed
        missing = num_clients - len(roster)
        if not missing and len(answers) >= expected:
            log.info("%d clients, nodes that serve them: %d", num_clients, len(roster.nodes))
            return roster
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    if missing:
        names = ", ".join(map(str, islice(roster.missing, MOST_NAMED)))
        names += f" and {missing - MOST_NAMED} more" if missing > MOST_NAMED else ""
        raise RosterError(
            f"no node serves client {names}: {len(answers)} nodes answered within {timeout_s:g} s, "
            f"{len(failed)} failed; "
            "start SuperNodes with --node-config 'client-ids=\"...\"' that names them"
        )
    log.warning("%d of %d nodes answered within %g s", len(answers), expected, timeout_s)
    return roster


def _question(node: int) -> Message:
    return records.instruction(node, records.ASK_CLIENTS, ConfigRecord())


def _answer(node: int, reply: Message) -> dict[str, Any] | None:
    """Return which clients a node serves; None, and a warning, if it cannot say."""
    if reply.has_content():
        return records.config_of(reply)
    reason = reply.error.reason
    log.warning("node %d cannot say which clients it serves: %s", node, reason)
    return None


def assign(answers: Mapping[int, Mapping[str, Any]], num_clients: int) -> Roster:
    """Return the node of each client that can be served: the first, by id, that names it.

    Else it is one of the nodes that serve any, in turn by client id.
    """
    named: dict[int, int] = {}
    for node in sorted(answers):
        for client in answers[node][records.CLIENT_IDS]:
            if client in range(num_clients):
                named.setdefault(client, node)
    anywhere = sorted(node for node, answer in answers.items() if answer[records.SERVES_ANY])
    return Roster(named, anywhere, num_clients)


def survey(grid: Grid, roster: Roster, settings: Settings) -> DataSummary:
    """Ask every node about the data of its clients; of devices that draw theirs, the form alone.

    Raises
    ------
    DataError
        What a node found wrong with its data, or that nodes differ in the form of theirs.
    RosterError
        If a node does not answer.
    """
    clients_of: dict[int, list[int]] = {}
    if are_drawn(settings):
        clients_of = {node: [] for node in roster.nodes}
    else:
        for client, node in sorted(roster.items()):
            clients_of.setdefault(node, []).append(client)
    questions = [
        records.instruction(
            node,
            records.ASK_DATA,
            ConfigRecord({records.SETTINGS: settings.to_json(), records.CLIENT_IDS: clients}),
        )
        for node, clients in clients_of.items()
    ]
    answers = _contents(grid.send_and_receive(questions), clients_of)
    parts: dict[int, DataSummary] = {}
    for node in clients_of:
        if records.ERROR in answers[node]:
            raise DataError(answers[node][records.ERROR])
        parts[node] = records.description(answers[node])
    forms = {(part.example_shape, part.classes, part.num_held_out) for part in parts.values()}
    if len(forms) > 1:
        raise DataError(f"nodes hold data of different forms: {sorted(forms)}")
    by_client = {
        client: (
            parts[node].clients[place],
            parts[node].scales[place],
            parts[node].groups[place : place + 1],
        )
        for node, clients in clients_of.items()
        for place, client in enumerate(clients)
    }
    example_shape, classes, num_held_out = forms.pop()
    scales: Sequence[Standardisation] = [by_client[client][1] for client in sorted(by_client)]
    if are_drawn(settings):
        scales = parts[min(parts)].scales
    warn_of_form(settings.data, example_shape)
    groups = tuple(g for client in sorted(by_client) for g in by_client[client][2])
    return DataSummary(
        clients=tuple(by_client[client][0] for client in sorted(by_client)),
        example_shape=example_shape,
        classes=classes,
        scales=tuple(scales),
        content=" ".join(dict.fromkeys(part.content for part in parts.values())),
        groups=groups if len(groups) == len(by_client) else (),  # or some node plants none
        num_held_out=num_held_out,
        sides_given=parts[min(parts)].sides_given,
    )


def survey_again(
    grid: Grid, roster: Roster, settings: Settings, folder: Path
) -> tuple[Settings, DataSummary]:
    """Ask as :func:`survey` does in a run that is resumed: clients keep what they began with.

    They are dealt the same examples as then. Where the partition means something else now, or its
    file has changed, they come from the ``partition.json`` that the run wrote down.

    Parameters
    ----------
    folder : Path
        The run's results folder.

    Returns
    -------
    settings : Settings
        With that file, if it is needed.
    data : DataSummary
        What its checkpoint says of it is not checked here.
    """
    data = survey(grid, roster, settings)
    began = checkpoint.load(folder / checkpoint.NAME, arrays=False)["began"]
    file = folder / "partition.json"
    if data.content != began["data"] or not file.exists():  # is refused, by its own name
        return settings, data
    if checkpoint.digest_of_clients(data.clients) == began["clients"]:
        return settings, data
    log.info("clients keep the examples that they began with: %s", file)
    settings = settings.with_data(partition="file", partition_file=str(file.resolve()))
    return settings, survey(grid, roster, settings)


def settle_training(grid: Grid, roster: Mapping[int, int], settings: Settings) -> Settings:
    """Have a node measure how to train, where the settings leave it open; all do the same then.

    Raises
    ------
    RosterError
        If the node does not answer.
    """
    if not sizing.is_open(settings.runtime):
        return settings
    client, node = next(iter(roster.items()))  # the first
    config = ConfigRecord({records.SETTINGS: settings.to_json()})
    question = records.instruction(node, records.ASK_TRAINING, config)
    answer = _contents(grid.send_and_receive([question]), {node: [client]})[node]
    choice = Choice(**answer)
    log.info("training %s: %s", choice.training, choice.reason)
    return sizing.settle(settings, choice)


def _contents(
    replies: Iterable[Message], clients_of: Mapping[int, Sequence[int]]
) -> dict[int, dict[str, Any]]:
    """Return what each node answered."""
    answers, reasons = {}, {}
    for message in replies:
        node = message.metadata.src_node_id
        if message.has_content():
            answers[node] = records.config_of(message)
        else:
            reasons[node] = message.error.reason
    for node, clients in clients_of.items():
        if node not in answers:
            which = f"client {', '.join(map(str, clients))}" if clients else "devices"
            reason = reasons.get(node, "nothing came")
            raise RosterError(f"node {node}, which serves {which}, did not answer: {reason}")
    return answers
