"""A leaf server: a Flower Strategy over its own clients, with the accuracy gate."""

import logging
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedge_sim import records
from fedge_sim.algorithms import Arrays
from fedge_sim.algorithms.aggregation import step_towards, weighted_mean
from fedge_sim.config import Settings
from fedge_sim.data.base import DataSummary
from fedge_sim.errors import RoundError
from fedge_sim.records import Address
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
        Of model that the client sent and received for training.
    """

    loss: float = float("nan")
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0


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

    Attributes
    ----------
    model : Arrays
        Its own latest model.
    num_examples : int
        Training windows behind it.
    work : dict of int to ClientWork
        What each client did in this global round.
    evaluations : dict of str to dict of int to dict of str to Evaluation
        By purpose, client and split.
    """

    index: int
    clients: Sequence[int]
    roster: Mapping[int, int]
    settings: Settings
    trainable: Set[str]
    data: DataSummary
    model: Arrays = field(default_factory=dict)
    num_examples: int = 0
    work: dict[int, ClientWork] = field(default_factory=dict)
    evaluations: dict[str, dict[int, dict[str, Evaluation]]] = field(default_factory=dict)
    _start: ArrayRecord = field(default_factory=ArrayRecord)
    _told: bool = False

    def begin(self, cloud_model: Arrays) -> bool:
        """Start a global round: take the cloud's model, or keep the own (the accuracy gate).

        The own latest model is kept if the cloud's is less accurate than it plus
        ``cluster_better_delta``, both on the test windows of the leaf's clients, as evaluated
        at the end of the round before. In the first round the cloud's is taken.

        Returns
        -------
        bool
            Whether the cloud's model was taken.
        """
        both = [self.evaluations.get(purpose, {}) for purpose in (records.LEAF, records.CLOUD)]
        same = both[0].keys() & both[1].keys()  # clients that answered for both models
        acc_old, acc_new = (pool(e[c]["test"] for c in sorted(same)).accuracy for e in both)
        # Not a number, and so not rejected, where there is nothing to compare.
        rejected = acc_new < acc_old + self.settings.hierarchy.cluster_better_delta
        if not rejected:
            self.model = cloud_model
        self.work = {}
        self.evaluations = {}
        return not rejected

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return a message for each client: train this model.

        ``config`` holds what is the same for all clients; see :mod:`fedge_sim.records`.
        """
        self._start = arrays
        config[records.ROUND] = server_round
        epochs = self.settings.hierarchy.local_epochs
        work = [epochs * self.data.num_train[client] for client in self.clients]
        return self._messages(MessageType.TRAIN, records.TRAIN, arrays, config, work)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Average the clients' models by training examples and step towards the mean.

        A client that failed, or that sent a value that is not finite, is left out by name.
        The sum is taken in client order, whatever the order of the replies.

        Raises
        ------
        RoundError
            If fewer than ``min_clients_per_round`` clients sent a usable update.
        """
        updates, weights, losses = [], [], []
        for client, reply in self._answers(replies).items():
            arrays, metrics = records.arrays_of(reply), records.metrics_of(reply)
            update = records.to_arrays(arrays)
            if not all(np.isfinite(array).all() for array in update.values()):
                log.warning("%s left out: its model is not finite", self._name(client))
                continue
            updates.append(update)
            weights.append(metrics[records.NUM_EXAMPLES])
            losses.append(metrics[records.LOSS])
            self._check_path(client, records.path_of(reply))
            done = self.work.setdefault(client, ClientWork())
            done.loss = losses[-1]
            done.seconds += metrics[records.SECONDS]
            done.bytes_up += arrays.count_bytes()
            done.bytes_down += self._start.count_bytes()
        if len(updates) < (needed := self.settings.runtime.min_clients_per_round):
            raise RoundError(
                f"leaf server {self.index}: usable updates came from {len(updates)} of "
                f"{len(self.clients)} clients in round {server_round}, and must from {needed} "
                "(runtime.min_clients_per_round)"
            )
        self.num_examples = sum(weights)
        self.model = step_towards(
            records.to_arrays(self._start),
            weighted_mean(updates, weights),
            self.settings.hierarchy.server_lr,
            self.trainable,
        )
        mean_loss = float(np.average(losses, weights=weights))
        return records.to_record(self.model), MetricRecord({records.LOSS: mean_loss})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return a message for each client: evaluate this model.

        ``config`` names the model (``purpose``) and the clients' windows (``splits``).
        """
        sizes = {"test": self.data.num_test, "train": self.data.num_train}
        splits = [sizes[str(split)] for split in cast("list[str]", config[records.SPLITS])]
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
    ) -> list[Message]:
        return [
            records.instruction(
                self.roster[client],
                message_type,
                ConfigRecord({**config, records.CLIENT_ID: client, records.WORK: amount}),
                arrays,
                Address(purpose, self.index, client),
            )
            for client, amount in zip(self.clients, work, strict=True)
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
        for client in self.clients:
            if client not in answers:
                log.warning("%s left out: %s", self._name(client), reasons.get(client, "no reply"))
        return {client: answers[client] for client in self.clients if client in answers}

    def _check_path(self, client: int, path: str | None) -> None:
        """Say once if a client was trained in another way than asked for."""
        runtime = self.settings.runtime
        asked = "compiled" if runtime.compile is True else runtime.training
        if path and asked not in ("auto", path) and not self._told:
            self._told = True
            log.warning("%s was trained by %r, not %r", self._name(client), path, asked)

    def _name(self, client: int) -> str:
        return f"client {client} of leaf server {self.index}"
