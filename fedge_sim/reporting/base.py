"""What callbacks are told: how a run starts, every global round, how it ends."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Literal

from fedge_sim.cloud import CloudState
from fedge_sim.config import Settings
from fedge_sim.data.base import DataSummary
from fedge_sim.errors import ConfigError
from fedge_sim.leaf import Gate
from fedge_sim.runtime.rounds import Job
from fedge_sim.runtime.timeline import CloudAnswers, VersionMade
from fedge_sim.training.local import Evaluation


@dataclass(frozen=True)
class RunInfo:
    """A run that is about to start.

    Attributes
    ----------
    settings : Settings
    folder : Path
        Where its results go: its own, made for it.
    data : DataSummary
    num_parameters : int
        Trainable parameters of the model.
    accuracies : sequence of float
        Mean client accuracy of the global rounds that are done already: none, but in a run that
        is resumed, whose folder has the results of these rounds.
    """

    settings: Settings
    folder: Path
    data: DataSummary
    num_parameters: int
    accuracies: Sequence[float] = ()


@dataclass(frozen=True)
class ClientDone:
    """One try of one client at one piece of work, when it is over.

    Attributes
    ----------
    client, leaf : int
    purpose : str
        What for: one of those in :mod:`fedge_sim.records`.
    worker : str
        Who did it: the name of a Ray actor or of a thread.
    started, ended : float
        Unix time, in seconds, by the worker's clock.
    """

    client: int
    leaf: int
    purpose: str
    worker: str
    started: float
    ended: float


@dataclass(frozen=True)
class ClientRound:
    """One client in one global round.

    ``leaf_test``, ``cloud_test`` and ``global_test`` evaluate, on this client's test windows,
    its leaf's model before the cloud step, the model that the cloud hands back to the leaf,
    and the average of all leaves; ``own_test`` and ``own_train`` the model that the method gives
    the client: its personal one in pFedMe, else what the cloud hands back, which the leaf's gate
    may still reject. Where layers stay with the client, it has its own in all of them. Bytes and
    seconds are those of training; simulated seconds those that its leaf server waited for it.
    ``fate`` says how its last job on the virtual clock ended, and ``lost`` how many brought no
    update.
    """

    client: int
    leaf: int
    num_train: int
    train_loss: float
    leaf_test: Evaluation
    cloud_test: Evaluation
    global_test: Evaluation
    own_test: Evaluation
    own_train: Evaluation
    bytes_up: int
    bytes_down: int
    seconds: float
    simulated_seconds: float
    fate: str
    lost: int


@dataclass(frozen=True)
class LeafRound:
    """One leaf server in one global round; evaluations pool its clients' test windows.

    ``gate`` is the decision at the round's start, on the model of the round before.
    """

    leaf: int
    cluster: int
    gate: Gate
    leaf_test: Evaluation
    cloud_test: Evaluation
    clients: tuple[ClientRound, ...]


@dataclass(frozen=True)
class RoundRecord:
    """One global round.

    Attributes
    ----------
    global_round : int
        From 1.
    lr : float
    leaves : tuple of LeafRound
    central_train, central_test : Evaluation
        The average of all leaf models, on all clients' windows together.
    cloud : CloudState
        The state after the round.
    seconds : float
        Wall time of the round.
    simulated_seconds : float
        At its end, since the run began; nan without a virtual clock.
    """

    global_round: int
    lr: float
    leaves: tuple[LeafRound, ...]
    central_train: Evaluation
    central_test: Evaluation
    cloud: CloudState
    seconds: float
    simulated_seconds: float

    @property
    def clients(self) -> tuple[ClientRound, ...]:
        """All clients, in order."""
        return tuple(client for leaf in self.leaves for client in leaf.clients)

    @property
    def mean_leaf_accuracy(self) -> float:
        """Mean over leaves of the accuracy before the cloud step."""
        return mean_accuracy(leaf.leaf_test for leaf in self.leaves)

    @property
    def mean_client_accuracy(self) -> float:
        """Mean over clients of the accuracy of the models that the method gives them."""
        return mean_accuracy(client.own_test for client in self.clients)


@dataclass(frozen=True)
class VersionRecord:
    """A version that a server made.

    Attributes
    ----------
    event : VersionMade
        When, by whom and of which jobs.
    num_updates : int
        How many of these jobs were of use: a client may fail.
    train_loss : float
        Mean over its jobs.
    num_examples : int
        Training examples behind its updates.
    bytes_up, bytes_down : int
        Of the models that came, and of those that its server sent since the version before.
    seconds : float
        Wall time since the run began, without what lay between its parts if it was resumed.
    """

    event: VersionMade
    num_updates: int
    train_loss: float
    num_examples: int
    bytes_up: int
    bytes_down: int
    seconds: float


@dataclass(frozen=True)
class HeldOut:
    """A model evaluated on examples that no client trains on.

    Attributes
    ----------
    what : {"leaf", "cloud"}
        Whose model.
    server : int
        The leaf server that it is of, or was handed to; -1: the one model of all, or the models
        that all leaf servers were handed, each on its own examples.
    version : int
        Of the server that made it; of the cloud, where leaf servers make versions, its step.
    simulated_seconds : float
    updates : int
        Of all servers up to then.
    test : Evaluation
    seconds : float
        Wall time since the run began, without what lay between its parts if it was resumed.
    """

    what: Literal["leaf", "cloud"]
    server: int
    version: int
    simulated_seconds: float
    updates: int
    test: Evaluation
    seconds: float


def mean_accuracy(evaluations: Iterable[Evaluation]) -> float:
    """Return the plain mean; who did not answer (no windows evaluated) does not count."""
    accuracies = [e.accuracy for e in evaluations if e.num_examples > 0]
    return sum(accuracies) / len(accuracies) if accuracies else math.nan


class Callback:
    """Base of all callbacks: every hook does nothing."""

    def on_run_start(self, info: RunInfo) -> None:
        """Before the first round, when data and topology are known to be good."""

    def on_workers(self, workers: Sequence[str]) -> None:
        """Which workers (actors or threads) the grid has, by name.

        Told before the first round, and whenever one is added, replaced or given up; only grids
        of this process tell, from any thread.
        """

    def on_client_done(self, done: ClientDone) -> None:
        """After a client replied, or was left out for good; only grids of this process tell.

        From any thread, and before :meth:`on_run_start` if the grid is used before it.
        """

    def on_round_end(self, record: RoundRecord) -> str | None:
        """After every global round; what it returns is the reason to end the run here."""

    def on_run_end(self, last: RoundRecord) -> None:
        """After the last round."""

    def on_version(self, record: VersionRecord) -> None:
        """After a server made a version, in a run of versions; it has no rounds."""

    def on_held_out(self, record: HeldOut) -> str | None:
        """After an evaluation on held-out examples; what it returns is the reason to end the run.

        Other versions may have been made since.
        """

    def on_cloud_step(self, event: CloudAnswers, state: CloudState) -> None:
        """After the cloud grouped and averaged leaf servers that make versions."""

    def on_versions_end(self, state: CloudState, left: Sequence[Job]) -> None:
        """After the last version: the cloud's models then, and the jobs that are in no version.

        One that is under way ends with the run.
        """

    def close(self) -> None:
        """After the run, however it ended."""


def new_results_folder(settings: Settings) -> Path:
    """Make a folder for one run under ``output-dir``; an existing one is never used.

    Raises
    ------
    ConfigError
        If nothing can be written there.
    """
    root = Path(settings.data.output_dir)
    name = f"{datetime.now():%Y%m%d-%H%M%S}_{settings.data.dataset}_seed{settings.seed}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for number in count(1):
            folder = root / (name if number == 1 else f"{name}_{number}")
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    except OSError as error:
        raise ConfigError.at(
            "app.config", "output-dir", str(root), f"cannot be written to ({error.strerror})"
        ) from None
    raise AssertionError("unreachable")
