"""A run of versions: servers take in devices' updates in the order of a virtual clock.

The timeline says who trains what and when it arrives; it does not depend on what training gives.
So this loop only follows it: begin the trainings of each dispatch, make each version of its
updates, and let the cloud meet the leaf servers when they are due.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedge_sim import checkpoint, cloud, records
from fedge_sim.algorithms import Arrays
from fedge_sim.algorithms.asynchronous import ServerRule, Update
from fedge_sim.algorithms.fedprox import next_mu, proximal_mu
from fedge_sim.algorithms.server_rules import server_rule
from fedge_sim.checkpoint import Checkpoints
from fedge_sim.client import initial_model, steps_of_a_job, work_of_a_job
from fedge_sim.cloud import CloudState
from fedge_sim.config import Settings
from fedge_sim.data.base import DataSummary
from fedge_sim.errors import RoundError
from fedge_sim.reporting.base import Callback, HeldOut, RunInfo, VersionRecord, new_results_folder
from fedge_sim.runtime.node import LocalGrid
from fedge_sim.runtime.roster import call_roster, settle_training, survey, survey_again
from fedge_sim.runtime.rounds import Job
from fedge_sim.runtime.timeline import (
    CloudAnswers,
    CloudAsks,
    Dispatched,
    Event,
    VersionMade,
    timeline,
)
from fedge_sim.runtime.trainings import Begun, Exchange, HeldOutTest, Start, Trained, Trainings
from fedge_sim.training.base import model_arrays
from fedge_sim.training.local import pool

if TYPE_CHECKING:
    from flwr.serverapp import Grid

log = logging.getLogger(__name__)

SAVE_SECONDS = 1.0  # between two checkpoints, at the least; the first is the first version's
SAVE_SHARE = 0.05  # of the time, at most, that goes into them
ATTENTION_SECONDS = 0.02  # between two looks at trainings while a version is made
FAILURES = 10  # of devices one after the other, that a run bears at the least


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
    tested : Start, optional
        The last model that was evaluated.
    version : int
        The number of the newest version that it made.
    """

    model: Start
    rule: ServerRule
    examples: int = 0
    sent: Start | None = None
    tested: Start | None = None
    version: int = 0

    def take(self, handed: Start, trainable: Set[str]) -> None:
        """Take the cloud's model: w = w_cloud + (w_now - w_sent).

        ``w_sent`` is the model that this leaf server sent to the cloud. Buffers are the cloud's:
        a difference of variances added to another could be negative.
        """
        if self.sent is not None and self.model is not self.sent:
            here, sent = self.model.arrays, self.sent.arrays
            handed = Start(
                {
                    name: np.asarray(array + (here[name] - sent[name]), array.dtype)
                    if name in trainable
                    else array
                    for name, array in handed.arrays.items()
                }
            )
        self.model, self.sent = handed, None


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
        self._started = time.monotonic()
        self._next_save = -math.inf
        self._updates = self._failures = self._position = 0
        self._now = 0.0  # simulated seconds
        self._at_work: dict[int, Job] = {}  # by number: dispatched, and not over
        self._accuracies: list[float] = []
        self._mu = settings.hierarchy.prox_mu  # FedProx's, of jobs that are dispatched now
        self._tests: list[Test] = []  # one at most: it is collected before the next begins
        self._reason: str | None = None  # to end the run

    def run(self) -> Path:
        """Follow the whole timeline, into a results folder of its own, and return that.

        Raises
        ------
        FedgeError
            If settings and data do not fit, a client has no node, or no client gets done.
        """
        settings, h = self.settings, self.settings.hierarchy
        self._roster = call_roster(self.grid, h.num_clients, settings.runtime.node_timeout_s)
        asked = settings.app
        if self._resumed is None:
            data = survey(self.grid, self._roster, settings)
        else:
            settings, data = survey_again(self.grid, self._roster, settings, self._resumed)
        self._data = data
        self.settings = settings = settle_training(self.grid, self._roster, settings)
        model = initial_model(settings, data.example_shape, len(data.classes))
        self._trainable = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
        first = Start(model_arrays(model))
        count = h.num_servers if settings.asynchronous.server == "leaf" else 1
        form = (data.example_shape, len(data.classes))
        names = self._trainable.keys()
        rules = (server_rule(settings, names, server, *form) for server in range(count))
        self._servers = [Server(first, rule, tested=first) for rule in rules]
        self._cloud = cloud.initial_state(first.arrays, h.num_servers)
        self._exchange = Exchange(self.grid)
        self._trainings = self._open_trainings()
        self._size = size = first.record.count_bytes()
        events = timeline(settings, size, size, partial(steps_of_a_client, settings, data))
        folder = new_results_folder(settings) if self._resumed is None else self._resumed
        with checkpoint.at_work(folder):
            settings = settings.model_copy(update={"app": asked})
            self._checkpoints = Checkpoints(folder, settings, data.content, data.clients)
            if self._resumed is not None:
                self._restore(events)
            done = tuple(self._accuracies)
            self._info = RunInfo(settings, folder, data, sum(self._trainable.values()), done)
            self._follow(events)
        return folder

    def _open_trainings(self) -> Trainings:
        settings, grid = self.settings, self.grid
        at_a_time, in_waves = len(self._roster.nodes), False
        if isinstance(grid, LocalGrid):
            at_a_time, in_waves = grid.at_a_time, grid.cohort_size > 1

        def work(client: int) -> int:
            return work_of_a_job(settings, _num_train(settings, self._data, client))

        return Trainings(
            *(self._exchange, settings, self._roster, work, at_a_time),
            ahead=self._ahead,
            classes=len(self._data.classes) if settings.asynchronous.rule == "fedrevive" else 0,
            in_waves=in_waves,
        )

    # ------------------------------------------------------------------ the timeline

    def _follow(self, events: Iterator[Event]) -> None:
        """Do what is left of the timeline, and tell the callbacks."""
        try:
            for callback in self.callbacks:
                callback.on_run_start(self._info)
            while not self._reason and (event := next(events, None)):
                self._position += 1
                self._watch(event)
                self._handle(event)
                self._save_if_due(event)
            self._collect()
            for index, server in enumerate(self._servers):
                if not self._reason and server.model is not server.tested:  # out of devices
                    self._test_server(index, server.version, self._now)
                    self._collect()
            if self._reason:
                log.info("ended after %d updates: %s", self._updates, self._reason)
            self._save("over")  # if the run is killed below, resuming it writes its last files
            end = self._now
            left = [_when_ended(job, end) for job in self._at_work.values()]
            for callback in self.callbacks:
                callback.on_versions_end(self._cloud, left)
            self._save("ended")
        finally:
            for callback in self.callbacks:
                callback.close()

    def _seconds(self) -> float:
        """Return the wall time since the run began, that of its earlier parts with it."""
        return time.monotonic() - self._started

    def _watch(self, event: Event) -> None:
        """Keep the time, and which jobs are under way."""
        self._now = event.time
        if isinstance(event, Dispatched):
            self._at_work.update({job.number: job for job in event.jobs})
        elif isinstance(event, VersionMade):
            for job in (*event.jobs, *event.lost):
                del self._at_work[job.number]

    def _handle(self, event: Event) -> None:
        """Do what an event says."""
        self._roster.look_for_new_nodes(self.grid)
        match event:
            case Dispatched():
                server = self._servers[event.jobs[0].server]
                self._trainings.begin(event.jobs, server.model, self._mu)
            case VersionMade():
                self._make_version(event)
            case CloudAsks():
                self._ask()
            case CloudAnswers():
                self._answer(event)

    def _make_version(self, event: VersionMade) -> None:
        """Let a server make a version of the updates that came."""
        server, h = self._servers[event.server], self.settings.hierarchy
        found = [(job, self._trainings.result(job)) for job in event.jobs]
        updates = [u for job, trained in found if (u := self._update(event, job, trained))]
        if updates:
            arrays = self._apply(server, updates, event.made)
            server.model = Start(arrays)
            if self.settings.asynchronous.server == "cloud":
                self._cloud = CloudState(event.version, (0,) * h.num_servers, (arrays,), arrays)
        self._updates += len(updates)
        server.version = event.version
        server.examples += sum(update.num_examples for update in updates)
        self._tell_version(event, updates, [trained for _, trained in found])
        if event.last:
            self._trainings.drop(event.server)
        if event.last or event.made % self.settings.devices.eval_frequency == 0:
            self._test_server(event.server, event.version, event.time)

    def _apply(self, server: Server, updates: Sequence[Update], made: int) -> Arrays:
        """Return a server's next model; trainings are begun and taken in while it is made.

        Distillation takes as long as many trainings, and actors are given work by this thread.
        """
        make = partial(server.rule.make_version, server.model.arrays, updates, made)
        if self.settings.asynchronous.rule != "fedrevive":
            return make()
        with ThreadPoolExecutor(1) as thread:
            future = thread.submit(make)
            while not future.done():
                self._trainings.go_on(ATTENTION_SECONDS)
            return future.result()

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

    def _answer(self, event: CloudAnswers) -> None:
        """Hand the cloud's models to the leaf servers, and evaluate them."""
        clusters = [Start(model) for model in self._cloud.cluster_models]
        models = {leaf: clusters[label] for leaf, label in enumerate(self._cloud.labels)}
        for leaf, server in enumerate(self._servers):
            server.take(models[leaf], self._trainable.keys())
            server.tested = server.model
        for callback in self.callbacks:
            callback.on_cloud_step(event, self._cloud)
        self._test(models, "cloud", event.step, event.time)

    # ------------------------------------------------------------------ what came back

    def _update(self, event: VersionMade, job: Job, trained: Trained) -> Update | None:
        """Return a job's update; None if its client failed, or sent what is not finite.

        Raises
        ------
        RoundError
            If too many updates, one after the other, were of no use.
        """
        if not trained.problem:
            self._failures = 0
            return Update(
                client=job.client,
                number=job.number,
                start_version=job.version,
                staleness=event.version - 1 - job.version,
                arrays=trained.arrays,
                start=trained.start.arrays,
                num_examples=trained.metrics[records.NUM_EXAMPLES],
                class_counts=tuple(trained.metrics.get(records.CLASS_COUNTS, ())),
            )
        where = f"device {job.client} of leaf server {job.leaf}"
        log.warning("%s left out: %s", where, trained.problem)
        self._failures += 1
        limit = max(FAILURES, self.settings.devices.device_selection_size)
        if self._failures >= limit:
            raise RoundError(
                f"{limit} devices one after the other sent no usable update, the last for "
                f"version {event.version} of server {event.server}: {trained.problem}"
            )
        return None

    def _tell_version(
        self, event: VersionMade, updates: Sequence[Update], trained: Sequence[Trained]
    ) -> None:
        came = [t for t in trained if t.arrays]
        losses = [t.metrics[records.LOSS] for t in came if not t.problem]
        size = self._size
        record = VersionRecord(
            event=event,
            num_updates=len(updates),
            train_loss=float(np.mean(losses)) if losses else float("nan"),
            num_examples=sum(update.num_examples for update in updates),
            bytes_up=size * len(came),
            bytes_down=size * event.sent,
            seconds=self._seconds(),
        )
        for callback in self.callbacks:
            callback.on_version(record)

    # ------------------------------------------------------------------ held-out examples

    def _test_server(self, server: int, version: int, now: float) -> None:
        """Begin to evaluate a server's newest version."""
        model = self._servers[server].tested = self._servers[server].model
        if self.settings.asynchronous.server == "cloud":
            self._test({-1: model}, "cloud", version, now)
        else:
            self._test({server: model}, "leaf", version, now)

    def _test(
        self, models: Mapping[int, Start], what: Literal["leaf", "cloud"], version: int, now: float
    ) -> None:
        """Begin to evaluate models, by leaf server.

        The evaluation goes on while the next version is made, unless something hangs on it:
        a run ends at the same version, and mu falls at the same one, however fast evaluations are.
        """
        self._collect()
        parts: dict[int, HeldOutTest] = {}
        same: dict[int, HeldOutTest] = {}  # of one model, on what is held out for all devices
        for leaf, model in models.items():
            if (test := same.get(id(model))) is None:
                common = (self._exchange, self.settings, self._roster, self._data)
                test = HeldOutTest(*common, model, leaf)
                if self._data.num_held_out:
                    same[id(model)] = test
            parts[leaf] = test
        self._tests.append(Test(parts, what, version, now, self._updates))
        h = self.settings.hierarchy
        if h.target_accuracy or h.es_patience or (h.prox_mu and h.prox_mu_decay < 1):
            self._collect()

    def _collect(self) -> None:
        """Wait for the evaluations under way, and tell the callbacks."""
        for test in self._tests:
            results = {leaf: part.result() for leaf, part in test.parts.items()}
            if test.what == "cloud" and -1 not in results:
                results[-1] = pool(results[leaf] for leaf in sorted(results))
            for leaf, result in results.items():
                record = HeldOut(
                    what=test.what,
                    server=leaf,
                    version=test.version,
                    simulated_seconds=test.time,
                    updates=test.updates,
                    test=result,
                    seconds=self._seconds(),
                )
                if (test.what, leaf) == ("cloud", -1):
                    before = self._accuracies[-1] if self._accuracies else math.nan
                    h = self.settings.hierarchy
                    self._mu = next_mu(self._mu, before, result.accuracy, h)
                    self._accuracies.append(result.accuracy)
                reasons = [callback.on_held_out(record) for callback in self.callbacks]
                self._reason = self._reason or next(filter(None, reasons), None)
        self._tests.clear()

    # ------------------------------------------------------------------ saving and resuming

    def _save_if_due(self, event: Event) -> None:
        whole = isinstance(event, VersionMade | CloudAnswers)
        if whole and (begun := time.monotonic()) >= self._next_save:
            self._collect()
            self._save("under way")
            ended = time.monotonic()
            self._next_save = ended + max(SAVE_SECONDS, (ended - begun) / SAVE_SHARE)

    def _save(self, stage: Literal["under way", "over", "ended"]) -> None:
        """Write the checkpoint of this moment, in the place of the one before.

        Beside the servers, the models that jobs began with, and what came of some of them; once
        the run is over, as all versions are made, nobody needs these.
        """
        place = _Places()
        begun, done = self._trainings.state() if stage == "under way" else ({}, {})
        tree: dict[str, Any] = {
            "reason": self._reason,
            "seconds": self._seconds(),
            "position": self._position,
            "updates": self._updates,
            "failures": self._failures,
            "accuracies": self._accuracies,
            "cloud": vars(self._cloud),
            "servers": [
                {
                    "model": place(server.model),
                    "sent": place(server.sent),
                    "tested": place(server.tested),
                    "examples": server.examples,
                    "version": server.version,
                    "rule": server.rule.state(),
                }
                for server in self._servers
            ],
            "begun": {str(n): [place(own.start), own.prox_mu] for n, own in begun.items()},
            "done": {
                str(number): [dict(t.arrays), dict(t.metrics), t.problem]
                for number, t in done.items()
            },
            "models": [dict(start.arrays) for start in place.models],
        }
        self._checkpoints.save(tree, ended=stage == "ended")

    def _restore(self, events: Iterator[Event]) -> None:
        """Go back to a run's checkpoint: its timeline is the same again up to there."""
        tree = self._checkpoints.restore()
        models = [Start(arrays) for arrays in tree["models"]]
        for server, saved in zip(self._servers, tree["servers"], strict=True):
            server.model = models[saved["model"]]
            server.sent = None if saved["sent"] < 0 else models[saved["sent"]]
            server.tested = None if saved["tested"] < 0 else models[saved["tested"]]
            server.examples, server.version = saved["examples"], saved["version"]
            server.rule.restore(saved["rule"])
        self._cloud = CloudState(**tree["cloud"])
        self._position, self._updates = tree["position"], tree["updates"]
        self._failures, self._accuracies = tree["failures"], list(tree["accuracies"])
        self._reason, self._started = tree["reason"], time.monotonic() - tree["seconds"]
        self._mu = proximal_mu(self._accuracies, self.settings.hierarchy)
        given = {int(n): (models[place], mu) for n, (place, mu) in tree["begun"].items()}
        done = {int(n): Trained(given[int(n)][0], *parts) for n, parts in tree["done"].items()}
        begun: list[Begun] = []
        for event in islice(events, self._position):
            self._watch(event)
            if isinstance(event, Dispatched):
                begun += [Begun(j, *given[j.number]) for j in event.jobs if j.number in given]
        self._trainings.restore(begun, done)
        self._checkpoints.cut_back(tree)
        log.info("resumed after %d updates", self._updates)


class _Places:
    """Gives each model a place in a list, once."""

    def __init__(self) -> None:
        self.models: list[Start] = []
        self._places: dict[int, int] = {}  # by id

    def __call__(self, start: Start | None) -> int:
        """Return a model's place; -1 for none."""
        if start is None:
            return -1
        if id(start) not in self._places:
            self._places[id(start)] = len(self.models)
            self.models.append(start)
        return self._places[id(start)]


def _when_ended(job: Job, end: float) -> Job:
    """Return what became of a job that is in no version by the end of the run."""
    if job.ended > end:
        training = min(job.training, end - job.started)
        return replace(job, ended=end, training=training, fate="under way")
    return replace(job, fate="unused") if job.fate == "update" else job


def steps_of_a_client(settings: Settings, data: DataSummary, client: int) -> int:
    """Return how many steps a client, or a device, does in a job."""
    return steps_of_a_job(settings, _num_train(settings, data, client))


def _num_train(settings: Settings, data: DataSummary, client: int) -> int:
    return data.num_train[client] if data.clients else settings.devices.subset_size
