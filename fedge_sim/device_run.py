"""A run of versions: servers take in devices' updates in the order of a virtual clock.

The timeline says who trains what and when it arrives; it does not depend on what training gives.
So this loop only follows it: begin the trainings of each dispatch, make each version of its
updates, and let the cloud meet the leaf servers when they are due.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import numpy as np

from fedge_sim import checkpoint, cloud, records
from fedge_sim.algorithms import Arrays
from fedge_sim.algorithms.asynchronous import ServerRule, Update
from fedge_sim.algorithms.server_rules import server_rule
from fedge_sim.client import initial_model
from fedge_sim.cloud import CloudState
from fedge_sim.config import Settings
from fedge_sim.data.base import DataSummary
from fedge_sim.errors import CheckpointError, RoundError
from fedge_sim.reporting.base import Callback, HeldOut, RunInfo, VersionRecord, new_results_folder
from fedge_sim.runtime.gpu import batch_of
from fedge_sim.runtime.node import LocalGrid
from fedge_sim.runtime.roster import call_roster, settle_training, survey
from fedge_sim.runtime.rounds import Job
from fedge_sim.runtime.timeline import (
    CloudAnswers,
    CloudAsks,
    Dispatched,
    Event,
    VersionMade,
    timeline,
)
from fedge_sim.runtime.trainings import Exchange, HeldOutTest, Start, Trained, Trainings
from fedge_sim.training.base import model_arrays
from fedge_sim.training.local import pool

if TYPE_CHECKING:
    from flwr.serverapp import Grid

log = logging.getLogger(__name__)

SAVE_SECONDS = 60.0  # between two checkpoints


@dataclass
class Server:
    """A server that makes versions.

    Attributes
    ----------
    model : Start
        The newest version.
    rule : ServerRule
    examples : int
        Training examples behind its updates since the cloud last asked.
    sent : Start, optional
        The model that is on its way to the cloud.
    """

    model: Start
    rule: ServerRule
    examples: int = 0
    sent: Start | None = None

    def take(self, handed: Arrays) -> None:
        """Take the cloud's model, and what was learnt here since the own one was sent."""
        if self.sent is not None and self.model is not self.sent:
            here, sent = self.model.arrays, self.sent.arrays
            handed = {
                name: np.asarray(array + (here[name] - sent[name]), array.dtype)
                for name, array in handed.items()
            }
        self.model, self.sent = Start(handed), None


@dataclass(frozen=True)
class Test:
    """Held-out evaluations under way, by leaf server (-1: all), and what they are of."""

    parts: Mapping[int, HeldOutTest]
    what: Literal["leaf", "cloud"]
    version: int
    time: float
    updates: int


class DeviceRun:
    """Follows a timeline over a grid.

    Parameters
    ----------
    settings : Settings
        With :attr:`Settings.by_versions`.
    grid : Grid
    callbacks : sequence of Callback
        Told of the start, of versions, of held-out evaluations, of the end; in this order.
    folder : Path, optional
        The results folder of a run to resume from its checkpoint; none: a new run.
    ahead : int, optional
        See :class:`Trainings`; 0 is strictly sequential.
    """

    def __init__(
        self,
        settings: Settings,
        grid: "Grid",
        callbacks: Sequence[Callback] = (),
        folder: Path | None = None,
        ahead: int | None = None,
    ) -> None:
        self.settings, self.grid, self.callbacks = settings, grid, callbacks
        self._resumed, self._ahead = folder, ahead
        self._started = self._saved_at = time.monotonic()
        self._updates = self._failures = self._position = 0
        self._accuracies: list[float] = []
        self._tests: list[Test] = []  # one at most: it is collected before the next begins
        self._starts: dict[int, Start] = {}  # of jobs that are not taken in yet, by number

    def run(self) -> Path:
        """Follow the whole timeline, into a results folder of its own, and return that.

        Raises
        ------
        FedgeError
            If settings and data do not fit, a client has no node, or no client gets done.
        """
        settings, h = self.settings, self.settings.hierarchy
        self._roster = call_roster(self.grid, h.num_clients, settings.runtime.node_timeout_s)
        self._data = data = survey(self.grid, self._roster, settings)
        self.settings = settings = settle_training(self.grid, self._roster, settings)
        model = initial_model(settings, data.example_shape, len(data.classes))
        self._trainable = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
        first = Start(model_arrays(model))
        count = h.num_servers if settings.asynchronous.server == "leaf" else 1
        form = (data.example_shape, len(data.classes))
        names = self._trainable.keys()
        self._servers = [
            Server(first, server_rule(settings, names, i, *form)) for i in range(count)
        ]
        self._cloud = cloud.initial_state(first.arrays, count)
        self._exchange = Exchange(self.grid)
        self._trainings = self._open_trainings()
        size = first.record.count_bytes()
        events = timeline(settings, size, size, partial(steps_of_a_job, settings, data))
        folder = new_results_folder(settings) if self._resumed is None else self._resumed
        with checkpoint.at_work(folder):
            if self._resumed is not None:
                self._restore(folder, events)
            done = tuple(self._accuracies)
            self._info = RunInfo(settings, folder, data, sum(self._trainable.values()), done)
            self._follow(events)
        return folder

    def _open_trainings(self) -> Trainings:
        settings, grid = self.settings, self.grid
        at_a_time, in_waves = len(self._roster.nodes), False
        if isinstance(grid, LocalGrid):
            at_a_time, in_waves = grid.at_a_time, grid.cohort_size > 1
        batch_size, accumulation = batch_of(settings)

        def work(client: int) -> int:
            return steps_of_a_job(settings, self._data, client) * batch_size * accumulation

        return Trainings(
            *(self._exchange, settings, self._roster, work, at_a_time),
            ahead=self._ahead,
            in_waves=in_waves,
        )

    # ------------------------------------------------------------------ the timeline

    def _follow(self, events: Iterator[Event]) -> None:
        """Do what is left of the timeline, and tell the callbacks."""
        reason: str | None = None
        try:
            for callback in self.callbacks:
                callback.on_run_start(self._info)
            for event in events:
                self._position += 1
                reason = self._handle(event)
                if reason:
                    break
                self._save_if_due(event)
            reason = reason or self._collect()
            if reason:
                log.info("ended after %d updates: %s", self._updates, reason)
            self._save(ended=True)
            for callback in self.callbacks:
                callback.on_versions_end(self._cloud)
        finally:
            for callback in self.callbacks:
                callback.close()

    def _handle(self, event: Event) -> str | None:
        """Do what an event says; return the reason to end the run, if there is one."""
        match event:
            case Dispatched():
                start = self._servers[event.jobs[0].server].model
                self._starts.update({j.number: start for j in event.jobs if j.fate == "update"})
                self._trainings.begin(event.jobs, start)
                return None
            case VersionMade():
                return self._make_version(event)
            case CloudAsks():
                self._ask()
                return None
            case CloudAnswers():
                return self._answer(event)

    def _make_version(self, event: VersionMade) -> str | None:
        """Let a server make a version of the updates that came."""
        server, devices = self._servers[event.server], self.settings.devices
        found = [(job, self._trainings.result(job)) for job in event.jobs]
        updates = [u for job, trained in found if (u := self._update(event, job, trained))]
        if updates:
            arrays = server.rule.make_version(server.model.arrays, updates, event.version)
            server.model = Start(arrays)
            if self.settings.asynchronous.server == "cloud":
                self._cloud = CloudState(event.version, (0,), (arrays,), arrays)
        self._updates += len(updates)
        server.examples += sum(update.num_examples for update in updates)
        for job in event.jobs:
            del self._starts[job.number]
        self._tell_version(event, updates, [trained for _, trained in found])
        if last := self._is_last(event):
            self._trainings.drop(event.server)
        if event.version % devices.eval_frequency and not last:
            return None
        if self.settings.asynchronous.server == "cloud":
            return self._test({-1: server.model}, "cloud", event.version, event.time)
        return self._test({event.server: server.model}, "leaf", event.version, event.time)

    def _is_last(self, event: Event) -> TypeGuard[VersionMade]:
        """Whether a server makes its last version."""
        return isinstance(event, VersionMade) and event.last

    def _ask(self) -> None:
        """Let the cloud average the leaf servers' models of this moment, each cluster's own."""
        h, servers = self.settings.hierarchy, self._servers
        for server in servers:
            server.sent = server.model
        uniform = h.averaging == "uniform"  # and a server that had no update still counts
        weights = [1 if uniform else max(1, server.examples) for server in servers]
        self._cloud = cloud.step(
            self._cloud,
            [server.model.arrays for server in servers],
            weights,
            self.settings.cloud_cluster,
            global_lr=h.global_lr,
            trainable=self._trainable.keys(),
        )
        for server in servers:
            server.examples = 0

    def _answer(self, event: CloudAnswers) -> str | None:
        """Hand the cloud's models to the leaf servers, and evaluate them."""
        for leaf, server in enumerate(self._servers):
            server.take(self._cloud.model_for(leaf))
        for callback in self.callbacks:
            callback.on_cloud_step(event, self._cloud)
        models = {leaf: Start(self._cloud.model_for(leaf)) for leaf in range(len(self._servers))}
        return self._test(models, "cloud", event.step, event.time)

    # ------------------------------------------------------------------ what came back

    def _update(self, event: VersionMade, job: Job, trained: Trained) -> Update | None:
        """Return a job's update; None if its client failed, or sent what is not finite.

        Raises
        ------
        RoundError
            If as many updates as devices are at work were of no use, one after the other.
        """
        reply = trained.reply
        if not reply.has_content():
            problem = str(reply.error.reason)
        else:
            arrays = records.to_arrays(records.arrays_of(reply))
            if all(np.isfinite(array).all() for array in arrays.values()):
                self._failures = 0
                metrics = records.metrics_of(reply)
                return Update(
                    client=job.client,
                    number=job.number,
                    start_version=job.version,
                    staleness=event.version - 1 - job.version,
                    arrays=arrays,
                    start=trained.start.arrays,
                    num_examples=metrics[records.NUM_EXAMPLES],
                    class_counts=tuple(metrics.get(records.CLASS_COUNTS, ())),
                )
            problem = "its model is not finite"
        log.warning("device %d of leaf server %d left out: %s", job.client, job.leaf, problem)
        self._failures += 1
        if self._failures >= (limit := self.settings.devices.device_selection_size):
            raise RoundError(
                f"{limit} devices one after the other sent no usable update, the last for "
                f"version {event.version} of server {event.server}: {problem}"
            )
        return None

    def _tell_version(
        self, event: VersionMade, updates: Sequence[Update], trained: Sequence[Trained]
    ) -> None:
        replies = [t.reply for t in trained if t.reply.has_content()]
        losses = [records.metrics_of(reply)[records.LOSS] for reply in replies]
        record = VersionRecord(
            event=event,
            train_loss=float(np.mean(losses)) if losses else float("nan"),
            num_examples=sum(update.num_examples for update in updates),
            bytes_up=sum(records.arrays_of(reply).count_bytes() for reply in replies),
            bytes_down=sum(t.start.record.count_bytes() for t in trained),
            seconds=time.monotonic() - self._started,
        )
        for callback in self.callbacks:
            callback.on_version(record)

    # ------------------------------------------------------------------ held-out examples

    def _test(
        self, models: Mapping[int, Start], what: Literal["leaf", "cloud"], version: int, now: float
    ) -> str | None:
        """Begin to evaluate models, by leaf server; return the reason to end the run, if any.

        The evaluation goes on while the next version is made, unless its result can end the run:
        a run ends at the same version however fast evaluations are.
        """
        reason = self._collect()
        common = (self._exchange, self.settings, self._roster, self._data)
        parts = {leaf: HeldOutTest(*common, model, leaf) for leaf, model in models.items()}
        self._tests.append(Test(parts, what, version, now, self._updates))
        h = self.settings.hierarchy
        return self._collect() if h.target_accuracy or h.es_patience else reason

    def _collect(self) -> str | None:
        """Wait for the evaluations under way, and tell the callbacks."""
        reasons: list[str | None] = []
        for test in self._tests:
            results = {leaf: part.result() for leaf, part in test.parts.items()}
            if len(results) > 1:
                results[-1] = pool(results[leaf] for leaf in sorted(results))
            for leaf, result in results.items():
                record = HeldOut(
                    what=test.what,
                    server=leaf,
                    version=test.version,
                    simulated_seconds=test.time,
                    updates=test.updates,
                    test=result,
                    seconds=time.monotonic() - self._started,
                )
                if (test.what, leaf) == ("cloud", -1):
                    self._accuracies.append(result.accuracy)
                reasons += [callback.on_held_out(record) for callback in self.callbacks]
        self._tests.clear()
        return next(filter(None, reasons), None)

    # ------------------------------------------------------------------ saving and resuming

    def _save_if_due(self, event: Event) -> None:
        whole = isinstance(event, VersionMade | CloudAnswers)
        if whole and time.monotonic() - self._saved_at > SAVE_SECONDS:
            self._collect()
            self._save(ended=False)

    def _save(self, *, ended: bool) -> None:
        """Write the checkpoint of this moment, in the place of the one before.

        Beside the servers, the models that jobs under way began with: they are trained again.
        """
        models: dict[int, int] = {}  # id -> place

        def place(start: Start | None) -> int:
            return -1 if start is None else models.setdefault(id(start), len(models))

        servers = [
            {
                "model": place(server.model),
                "sent": place(server.sent),
                "examples": server.examples,
                "rule": server.rule.state(),
            }
            for server in self._servers
        ]
        starts = {str(number): place(start) for number, start in self._starts.items()}
        everyone = [x for s in self._servers for x in (s.model, s.sent) if x is not None]
        kept = {id(start): start for start in (*everyone, *self._starts.values())}
        tree: dict[str, Any] = {
            "ended": ended,
            "position": self._position,
            "updates": self._updates,
            "accuracies": self._accuracies,
            "cloud": vars(self._cloud),
            "servers": servers,
            "starts": starts,
            "models": [dict(kept[key].arrays) for key in models],
            "csv_sizes": checkpoint.csv_sizes(self._info.folder),
        }
        checkpoint.save(self._info.folder / checkpoint.NAME, tree)
        self._saved_at = time.monotonic()

    def _restore(self, folder: Path, events: Iterator[Event]) -> None:
        """Go back to a run's checkpoint: its timeline is the same again up to there."""
        tree: Any = checkpoint.load(folder / checkpoint.NAME)
        if self._data.content != checkpoint.run_of(folder)["dataset_sha256"]:
            raise CheckpointError(f"{folder}: the data are not those that the run began with")
        checkpoint.truncate_csvs(folder, tree["csv_sizes"])
        models = [Start(arrays) for arrays in tree["models"]]
        for server, saved in zip(self._servers, tree["servers"], strict=True):
            server.model = models[saved["model"]]
            server.sent = None if saved["sent"] < 0 else models[saved["sent"]]
            server.examples = saved["examples"]
            server.rule.restore(saved["rule"])
        self._cloud = CloudState(**tree["cloud"])
        self._position, self._updates = tree["position"], tree["updates"]
        self._accuracies = list(tree["accuracies"])
        starts = {int(number): models[place] for number, place in tree["starts"].items()}
        for event in islice(events, self._position):
            for job in event.jobs if isinstance(event, Dispatched) else ():
                if start := starts.get(job.number):
                    self._starts[job.number] = start
                    self._trainings.begin([job], start)
            if self._is_last(event):
                self._trainings.drop(event.server)
        log.info("resumed after %d updates", self._updates)


def steps_of_a_job(settings: Settings, data: DataSummary, client: int) -> int:
    """Return how many steps a client does in a job, its last short batches counted whole."""
    if settings.local_steps:
        return settings.local_steps
    batch_size, accumulation = batch_of(settings)
    examples = data.num_train[client] if data.clients else settings.devices.subset_size
    return settings.hierarchy.local_epochs * -(-examples // (batch_size * accumulation))
