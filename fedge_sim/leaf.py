"""A leaf server: a Flower Strategy over its own clients, with the accuracy gate."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedge_sim import records
from fedge_sim.algorithms import Arrays
from fedge_sim.algorithms.aggregation import step_towards, weighted_mean
from fedge_sim.algorithms.scaffold import server_variate
from fedge_sim.client import work_of_a_job
from fedge_sim.config import Settings
from fedge_sim.data.base import DataSummary
from fedge_sim.errors import RoundError, StalledError
from fedge_sim.leaf_strategy import LeafRule
from fedge_sim.randomness import stream
from fedge_sim.records import Address
from fedge_sim.runtime.device_pool import DevicePool
from fedge_sim.runtime.rounds import Fate, simulate_round
from fedge_sim.runtime.timeline import ROUNDS_IN_VAIN
from fedge_sim.training.local import Evaluation, pool

log = logging.getLogger(__name__)


@dataclass
class ClientWork:
    """What a client did in one global round, summed over its server rounds.

    Attributes
    ----------
    loss : float
        Mean training loss of the last epoch, of the last server round.
    seconds : float
        Of computation.
    bytes_up, bytes_down : int
        Of model that the client sent, and that was sent to it, for training.
    simulated_seconds : float
        That its leaf server waited for it at most, on the virtual clock.
    fate : str
        How the device's last job ended; empty where there is no clock, or it was not selected.
    lost : int
        Its jobs that gave no update.
    """

    loss: float = float("nan")
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    simulated_seconds: float = 0.0
    fate: Fate | Literal[""] = ""
    lost: int = 0


@dataclass(frozen=True)
class Gate:
    """A decision of the accuracy gate.

    Attributes
    ----------
    accepted : bool
        Whether the cloud's model was taken.
    acc_old, acc_new : float
        Accuracy of the leaf's own latest model and of the cloud's, on the test windows of the
        leaf's clients; nan where there was nothing to compare, or there is no gate.
    """

    accepted: bool
    acc_old: float
    acc_new: float

    @property
    def judged(self) -> bool:
        """Whether the two were compared."""
        return not (math.isnan(self.acc_old) or math.isnan(self.acc_new))


@dataclass
class LeafServer(Strategy):
    """One leaf server.

    Parameters
    ----------
    index : int
        Its place in the topology.
    clients : tuple of int
        The clients under it.
    roster : mapping of int to int
        The node of every client.
    settings : Settings
    trainable : set of str
        Names of the model's trainable arrays; ``server_lr`` scales only their step.
    data : DataSummary
        Of all clients.
    personal : set of str
        Names of the arrays that stay with the clients, and are never sent.
    rule : LeafRule, optional
        Averages in the place of the weighted mean.
    pool : DevicePool, optional
        Says how long clients take, and which are lost; none: nobody is.

    Attributes
    ----------
    model : Arrays
        Its own latest model.
    variate : Arrays
        SCAFFOLD's c, by the names of the trainable arrays; empty in other methods.
    started_from : Arrays
        The model with which the last global round began in which it trained.
    num_examples : int
        Training windows behind the model.
    work : dict of int to ClientWork
        What each client did in this global round.
    evaluations : dict of str to dict of int to dict of str to Evaluation
        By purpose, client and split.
    now : float
        Simulated seconds at which its last server round ended.
    """

    index: int
    clients: Sequence[int]
    roster: Mapping[int, int]
    settings: Settings
    trainable: Set[str]
    data: DataSummary
    personal: Set[str] = frozenset()
    rule: LeafRule | None = None
    pool: DevicePool | None = None
    model: Arrays = field(default_factory=dict)
    variate: Arrays = field(default_factory=dict)
    started_from: Arrays = field(default_factory=dict)
    num_examples: int = 0
    work: dict[int, ClientWork] = field(default_factory=dict)
    evaluations: dict[str, dict[int, dict[str, Evaluation]]] = field(default_factory=dict)
    now: float = 0.0
    _start: ArrayRecord = field(default_factory=ArrayRecord)
    _asked: Sequence[int] = ()
    _told: bool = False

    def __post_init__(self) -> None:
        self._asked = self.clients

    def begin(self, cloud_model: Arrays, now: float = 0.0) -> Gate:
        """Start a global round: take the cloud's model, or keep the own (the accuracy gate).

        The own latest model is kept if the cloud's is less accurate than it plus
        ``cluster_better_delta``, both on the test windows of the leaf's clients, as evaluated
        at the end of the round before. In the first round the cloud's is taken, and with -1,
        where there is no gate, in all.

        Parameters
        ----------
        cloud_model : Arrays
        now : float
            Simulated seconds.

        Returns
        -------
        Gate
            The decision, and what it was made from.
        """
        both = [self.evaluations.get(purpose, {}) for purpose in (records.LEAF, records.CLOUD)]
        same = both[0].keys() & both[1].keys()  # clients that answered for both models
        delta = self.settings.hierarchy.cluster_better_delta
        if delta <= -1:
            same = set()
        acc_old, acc_new = (pool(e[c]["test"] for c in sorted(same)).accuracy for e in both)
        # Not a number, and so not rejected, where there is nothing to compare.
        rejected = acc_new < acc_old + delta
        if not rejected:
            self.model = cloud_model
        self.started_from, self.now = self.model, now
        self.work = {}
        self.evaluations = {}
        return Gate(not rejected, acc_old, acc_new)

    def sit_out(self) -> Gate:
        """Take no part in a global round: keep the own model, and judge none."""
        self.work = {}
        return Gate(False, math.nan, math.nan)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return a message for each client that takes part: train this model.

        ``config`` holds what is the same for all clients; see :mod:`fedge_sim.records`.
        Who takes part is drawn anew in every round; centralised training is one client's, on the
        windows of all.
        """
        h = self.settings.hierarchy
        shared = [name for name in arrays if name not in self.personal]
        self._start = ArrayRecord({name: arrays[name] for name in shared})
        config[records.ROUND] = server_round
        sizes = self.data.num_train
        variate = records.to_record(self.variate) if self.variate else None
        if h.client_rule == "centralised":
            self._asked, examples = self.clients[:1], [sum(sizes)]
        else:
            sent_to = self._participants(server_round)
            self._asked = sent_to
            if self.pool is not None:
                self._asked, sent_to = self._admitted(server_round, self.pool, sent_to)
            size = sum(r.count_bytes() for r in (self._start, variate) if r is not None)
            for client in sent_to:
                self.work.setdefault(client, ClientWork()).bytes_down += size
            examples = [sizes[client] for client in self._asked]
        work = [work_of_a_job(self.settings, number) for number in examples]
        return self._messages(
            MessageType.TRAIN, records.TRAIN, self._start, config, work, variate=variate
        )

    def _participants(self, server_round: int) -> Sequence[int]:
        """Return the clients that are to train in a round, in ascending order."""
        number = self.settings.hierarchy.participants(len(self.clients))
        if self.pool is not None:
            number = self.settings.devices.selected_for(number)
        if number >= len(self.clients):
            return self.clients
        draw = stream(self.settings.seed, "participation", server_round, self.index)
        return sorted(draw.choice(self.clients, number, replace=False).tolist())

    def _admitted(
        self, server_round: int, pool: DevicePool, clients: Sequence[int]
    ) -> tuple[Sequence[int], Sequence[int]]:
        """Let a round go by on the virtual clock.

        Whoever does not come costs no real work. A round to which nobody comes is held again.

        Returns
        -------
        admitted : sequence of int
            Whose update comes, in ascending order.
        sent_to : sequence of int
            To whom the model was sent: several times to a client of several rounds.

        Raises
        ------
        StalledError
            If again and again nobody comes.
        """
        sent_to: list[int] = []
        h, devices = self.settings.hierarchy, self.settings.devices
        rounds = h.global_rounds * h.server_rounds_per_global + 1
        for attempt in range(ROUNDS_IN_VAIN):
            result = simulate_round(
                pool,
                clients,
                # One for every round and client, as it names the random streams.
                number=(attempt * rounds + server_round) * h.num_clients + self.clients[0],
                started=self.now,
                server=self.index,
                wanted=h.participants(len(self.clients)),
                timeout=devices.update_timeout,
            )
            self.now = result.ended
            for job in (*result.admitted, *result.lost):
                sent_to += [job.client] * job.was_sent
                done = self.work.setdefault(job.client, ClientWork())
                done.simulated_seconds += job.ended - job.started
                done.fate = job.fate
                done.lost += job.fate != "update"
            if result.admitted:
                return sorted(job.client for job in result.admitted), sent_to
        raise StalledError(
            f"no client came to leaf server {self.index} in {ROUNDS_IN_VAIN} rounds in a row, up "
            f"to {self.now:g} simulated seconds: raise devices.job_timeout, or lose fewer "
            "(dropout, availability)"
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Average the clients' models and step towards the mean, or do as ``leaf_strategy`` does.

        Weights are training examples, or all the same with ``averaging = "uniform"``. A client
        that failed, or that sent a value that is not finite, is left out by name. The sum is
        taken in client order, whatever the order of the replies.

        Raises
        ------
        RoundError
            If fewer than ``min_clients_per_round`` clients sent a usable update.
        """
        updates: dict[int, Arrays] = {}
        examples: dict[int, int] = {}
        losses: dict[int, float] = {}
        changes: list[Arrays] = []  # of SCAFFOLD's variates
        for client, reply in self._answers(replies).items():
            arrays, metrics = records.arrays_of(reply), records.metrics_of(reply)
            update = records.to_arrays(arrays)
            sent = records.variate_of(reply)
            change = {} if sent is None else records.to_arrays(sent)
            self._count(client, reply, metrics)
            if problem := records.not_finite(reply):
                log.warning("%s left out: %s", self._name(client), problem)
                continue
            updates[client] = update
            changes.append(change)
            examples[client] = metrics[records.NUM_EXAMPLES]
            losses[client] = metrics[records.LOSS]
            self._check_path(client, records.path_of(reply))
        if len(updates) < (needed := self.settings.runtime.min_clients_per_round):
            raise RoundError(
                f"leaf server {self.index}: usable updates came from {len(updates)} of "
                f"{len(self._asked)} clients in round {server_round}, and must from {needed} "
                "(runtime.min_clients_per_round)"
            )
        self.num_examples = sum(examples.values())
        uniform = self.settings.hierarchy.averaging == "uniform"
        weights = dict.fromkeys(updates, 1) if uniform else examples
        self.model = {**self.model, **self._aggregate(server_round, updates, weights, losses)}
        if self.variate:
            self.variate = server_variate(self.variate, changes, len(self.clients))
        mean_loss = float(np.average(list(losses.values()), weights=list(weights.values())))
        return records.to_record(self.model), MetricRecord({records.LOSS: mean_loss})

    def _aggregate(
        self,
        server_round: int,
        updates: Mapping[int, Arrays],
        weights: Mapping[int, int],
        losses: Mapping[int, float],
    ) -> Arrays:
        start = records.to_arrays(self._start)
        if self.rule is not None:
            return self.rule.aggregate(server_round, start, updates, weights, losses)
        mean = weighted_mean(list(updates.values()), list(weights.values()))
        return step_towards(start, mean, self.settings.hierarchy.server_lr, self.trainable)

    def _count(self, client: int, reply: Message, metrics: Mapping[str, Any]) -> None:
        """Add up what a client did and sent, SCAFFOLD's variates included."""
        done = self.work.setdefault(client, ClientWork())
        done.loss = metrics[records.LOSS]
        done.seconds += metrics[records.SECONDS]
        if self.settings.hierarchy.client_rule == "centralised":
            return  # the data were moved, once, and not a model
        done.bytes_up += sum(r.count_bytes() for r in reply.content.array_records.values())

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return a message for each client: evaluate this model.

        ``config`` names the model (``purpose``) and the clients' windows (``splits``).
        """
        sizes = {"test": self.data.num_test, "train": self.data.num_train}
        splits = [sizes[str(split)] for split in cast("list[str]", config[records.SPLITS])]
        self._asked = self.clients
        work = [sum(split[client] for split in splits) for client in self.clients]
        purpose = str(config[records.PURPOSE])
        return self._messages(MessageType.EVALUATE, purpose, arrays, config, work)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord:
        """Keep each client's evaluations of one model, and return them pooled over windows."""
        replies = list(replies)
        purpose = next((a.purpose for a in map(Address.of, replies) if a), "")
        self.evaluations[purpose] = {
            client: records.get_evaluations(reply)
            for client, reply in self._answers(replies).items()
        }
        pooled = self.pooled(purpose)
        return MetricRecord({records.LOSS: pooled.loss, records.ACCURACY: pooled.accuracy})

    def pooled(self, purpose: str, split: str = "test") -> Evaluation:
        """Return a model's evaluation on the windows of all clients together."""
        return pool(result[split] for result in self.evaluations.get(purpose, {}).values())

    def state(self) -> dict[str, Any]:
        """Return what the next round needs, for a checkpoint; :meth:`restore` takes it back."""
        return {
            "model": dict(self.model),
            "variate": dict(self.variate),
            "num_examples": self.num_examples,
            # What its last update began with, which the cloud may ask for in a later round.
            "started_from": dict(self.started_from) if self.settings.draws_leaf_servers else {},
            "rule": None if self.rule is None else self.rule.state(),
            "evaluations": {
                purpose: {str(c): {s: asdict(e) for s, e in own.items()} for c, own in all_.items()}
                for purpose, all_ in self.evaluations.items()
            },
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.model, self.variate = state["model"], state["variate"]
        self.num_examples, self.started_from = state["num_examples"], state["started_from"]
        if self.rule is not None:
            self.rule.restore(state["rule"])
        self.evaluations = {
            purpose: {
                int(client): {split: Evaluation(**e) for split, e in own.items()}
                for client, own in clients.items()
            }
            for purpose, clients in state["evaluations"].items()
        }

    def summary(self) -> None:
        """Log what this leaf server is."""
        log.info("leaf server %d: clients %s", self.index, ", ".join(map(str, self.clients)))

    def _messages(
        self,
        message_type: str,
        purpose: str,
        arrays: ArrayRecord,
        config: ConfigRecord,
        work: Sequence[int],
        variate: ArrayRecord | None = None,
    ) -> list[Message]:
        return [
            records.instruction(
                self.roster[client],
                message_type,
                ConfigRecord({**config, records.CLIENT_ID: client, records.WORK: amount}),
                arrays,
                Address(purpose, self.index, client),
                variate,
            )
            for client, amount in zip(self._asked, work, strict=True)
        ]

    def _answers(self, replies: Iterable[Message]) -> dict[int, Message]:
        """Return the good replies in client order; log the others by name."""
        answers: dict[int, Message] = {}
        reasons: dict[int, str | None] = {}
        for message in replies:
            if (address := Address.of(message)) is None:
                continue
            if message.has_content():
                answers[address.client] = message
            else:
                reasons[address.client] = message.error.reason
        for client in self._asked:
            if client not in answers:
                log.warning("%s left out: %s", self._name(client), reasons.get(client, "no reply"))
        return {client: answers[client] for client in self._asked if client in answers}

    def _check_path(self, client: int, path: str | None) -> None:
        """Say once if a client was trained in another way than asked for."""
        runtime = self.settings.runtime
        asked = "compiled" if runtime.compile is True else runtime.training
        if path and asked not in ("auto", path) and not self._told:
            self._told = True
            log.warning("%s was trained by %r, not %r", self._name(client), path, asked)

    def _name(self, client: int) -> str:
        return f"client {client} of leaf server {self.index}"
