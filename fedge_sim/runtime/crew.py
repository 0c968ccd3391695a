"""The actors of a run: how many, where, what each may take, and who replaces one that dies."""

import logging
import os
import signal
import socket
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from flwr.supercore.run import Run
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fedge_sim.config import Settings
from fedge_sim.errors import ConfigError, DataError, StalledError, WorkerError
from fedge_sim.runtime import gpu, sizing
from fedge_sim.runtime.in_process import available_cores
from fedge_sim.runtime.sizing import Machine, Need
from fedge_sim.runtime.trainer import Introduction, Opened, Peak, remote_trainer
from fedge_sim.training.choice import Choice

log = logging.getLogger(__name__)

CONTROL_SECONDS = 5.0  # for an actor to say what it does
START_FAILURES = 3  # of one actor in a row, after which it is given up
PROBED_COHORT = 4  # clients of the cohort whose memory is measured: a larger one follows from it
MIB = 2**20
TOO_LONG = (
    "; TMPDIR is too long for Ray's sockets: set the environment variable RAY_TMPDIR to a folder "
    "with a short name, for example RAY_TMPDIR=/tmp"
)
NO_DASHBOARD = (
    "Ray's dashboard did not start, and the run goes on without it; if the machine is busy, give "
    "it more than 60 s: the environment variable RAY_DASHBOARD_STARTUP_TIMEOUT_S"
)


@dataclass(eq=False)
class Worker:
    """An actor, seen from the grid.

    Attributes
    ----------
    index : int
    actor : Ray actor handle
    introduction : Introduction or None
        None until it has started.
    calls : list of ObjectRef
        The hands that it was given, the first of which it works on.
    busy_since : float
        When it began with the first, or was last seen to go on (monotonic seconds).
    started_at : float
        When it was asked to start.
    """

    index: int
    actor: Any
    starting: Any
    introduction: Introduction | None = None
    calls: list[Any] = field(default_factory=list)
    busy_since: float = 0.0
    started_at: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        """For example ``"trainer-0 cpu 1"``."""
        return self.introduction.name if self.introduction else f"trainer-{self.index}"


class Crew:
    """Starts, sizes, replaces and stops the actors.

    Parameters
    ----------
    client_app : str
        ``"module:attribute"`` of the ClientApp.
    settings : Settings
    run : Run
    on_change : callable
        Told the names of all actors whenever they change.

    Attributes
    ----------
    workers : list of Worker
        Those that have started, and replacements under way.
    plan : Plan
    settings : Settings
        Those given, with the way to train settled by :meth:`prepare`.
    reliefs : int
        How often cohorts or actors were made fewer, for memory.

    Raises
    ------
    ConfigError
        If the settings do not fit the machine.
    WorkerError
        If no actor can be started.
    """

    def __init__(
        self,
        client_app: str,
        settings: Settings,
        run: Run,
        on_change: Callable[[Sequence[str]], None],
    ) -> None:
        self._client_app, self.settings, self._run = client_app, settings, run
        self._on_change = on_change
        self._failed_starts = 0
        self._generation = 0
        self._group: PlacementGroup | None = None
        self._gpu_share = 1.0  # of its GPU's memory, that an actor may take
        self._need: Need | None = None  # until it has been compared with what is taken
        self._probed: Worker | None = None  # where that was measured
        self.reliefs = 0
        self.workers: list[Worker] = []
        self._own_ray = not ray.is_initialized()
        if self._own_ray:
            _start_ray(settings)
        elif settings.runtime.ray_address or settings.runtime.dashboard:
            log.warning("Ray is running already and is used: ray_address and dashboard are ignored")
        try:
            self._hire()
        except BaseException:
            self.close()
            raise

    def _hire(self) -> None:
        """Start as many actors as cores and GPUs allow; memory is looked at later."""
        runtime, there = self.settings.runtime, ray.cluster_resources()
        gpus = int(there.get("GPU", 0))
        threads = runtime.threads_per_client  # which are all on one machine
        cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        cores = [n // threads * threads for n in cores] if len(cores) > 1 else cores
        self._profile = gpu.resolve(runtime, gpus)
        log.info(gpu.describe(self._profile, runtime.gpu_profile, gpus))
        self._machine = Machine(sum(cores), int(there.get("memory", 0)), gpus)
        self.plan = sizing.plan(self.settings, self._profile, self._machine)
        if gpus and not self.plan.gpus_per_actor:
            log.warning("%d GPUs are there and none is used: num_gpus_per_actor is 0", gpus)
        if self.plan.gpus_per_actor and gpus > 1 and self.plan.actors > 1:
            self._group = self._reserve_gpus()
        self.workers = [self._start(index) for index in range(self.plan.actors)]
        deadline = time.monotonic() + runtime.node_timeout_s
        while (left := deadline - time.monotonic()) > 0:
            if not (starting := [w.starting for w in self.workers if not w.introduction]):
                break
            ray.wait(starting, num_returns=len(starting), timeout=left)
            self.welcome()
        self.welcome()
        for worker in [w for w in self.workers if not w.introduction]:  # a second try, too late
            self.retire(worker)
        if not self.workers:
            raise WorkerError(f"no actor started within {runtime.node_timeout_s:g} s")

    def _reserve_gpus(self) -> PlacementGroup:
        """Reserve GPUs whole, and deal the actors out: Ray would fill one after the other."""
        actors, gpus = self.plan.actors, min(self._machine.gpus, self.plan.actors)
        bundles = [
            {"GPU": 1.0, "CPU": len(range(first, actors, gpus)) * self.plan.cpus_per_actor}
            for first in range(gpus)
        ]
        group: PlacementGroup = placement_group(bundles)
        if not group.wait(self.settings.runtime.node_timeout_s):
            remove_placement_group(group)
            raise WorkerError(f"Ray cannot reserve {gpus} GPUs with their actors' cores")
        return group

    def _start(self, index: int) -> Worker:
        options: dict[str, Any] = {
            "num_cpus": self.plan.cpus_per_actor,
            "num_gpus": self.plan.gpus_per_actor,
            "name": f"trainer-{index}" + (f".{self._generation}" if self._generation else ""),
            # Ray keeps a record of every call, for its dashboard, and grows by it.
            "enable_task_events": self.settings.runtime.dashboard,
            "scheduling_strategy": "SPREAD" if len(ray.nodes()) > 1 else "DEFAULT",
        }
        if self._group:
            bundle = index % len(self._group.bundle_specs)
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._group, bundle)
        if self.plan.gpus_per_actor:
            variables = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # the same bits on every stream
            if self._profile.memory_pool:
                variables["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
            options["runtime_env"] = {"env_vars": variables}
        metrics = self.settings.runtime.dashboard
        actor = remote_trainer().options(**options)
        handle = actor.remote(index, self._client_app, self._run, metrics)
        return Worker(index, handle, starting=handle.introduce.remote())

    def welcome(self) -> bool:
        """Take in the actors that have started, and try those that failed to again.

        Returns
        -------
        bool
            Whether one has.

        Raises
        ------
        WorkerError
            If none is left, and none can be started.
        """
        starting = {w.starting: w for w in self.workers if not w.introduction}
        if not starting:
            return False
        limit, reason = self.settings.runtime.node_timeout_s, ""
        started, _ = ray.wait(list(starting), num_returns=len(starting), timeout=0)
        for ref in started:
            worker = starting[ref]
            try:
                worker.introduction = ray.get(ref)
                self._failed_starts = 0
            except RayError as error:
                self._failed_starts += 1
                if self._failed_starts < START_FAILURES:
                    self.replace(worker)
                    continue
                reason = _last_line(error)
                log.warning("%s cannot be started: %s", worker.name, reason)
                self.retire(worker)
        for worker in [w for w in self.workers if not w.introduction]:
            if time.monotonic() - worker.started_at > limit:
                reason = f"none did within {limit:g} s (node_timeout_s)"
                log.warning("%s did not start within %g s", worker.name, limit)
                self.retire(worker)
        if not self.workers:
            raise WorkerError(f"no actor can be started: {reason}")
        if started:
            self._tell()
        return bool(started)

    def prepare(self) -> None:
        """Open the data in every actor, settle how to train, and fit the plan to the memory.

        Raises
        ------
        DataError
            If an actor cannot use the data: it names the path, and the actor's machine.
        ConfigError
            If not even one client fits into the memory allowed.
        """
        introductions = [w.introduction for w in self.workers if w.introduction]
        self._open(introductions)
        best_cohort = self._choose()
        gpu_memory = min(who.gpu_memory for who in introductions)
        machine = replace(self._machine, gpu_memory=gpu_memory)
        if self.plan.gpus_per_actor and not gpu_memory:
            log.warning("Ray gives out GPUs, but torch sees none: clients train on the CPU")
        else:
            self._need = self._probe(machine, best_cohort)
        self.plan = sizing.plan(self.settings, self._profile, machine, self._need, best_cohort)
        self.settings = sizing.settle_cohort(self.settings, self.plan.cohort_size)
        if gpu_memory:
            self._gpu_share = min(1.0, self.plan.memory_cap / gpu_memory)
        for worker in self.workers[self.plan.actors :]:
            self.retire(worker)
        self.plan = replace(self.plan, actors=len(self.workers))  # some may not have started
        self._settle(self.workers)
        if self._need:
            log.info(
                "memory: %.0f MiB an actor, and %.0f MiB for each client that it trains at a time: "
                "%.0f MiB with %d",
                *(self._need.base / MIB, self._need.per_client / MIB),
                *(self._need.of(self.plan.at_a_time) / MIB, self.plan.at_a_time),
            )
        log.info(self.plan.describe(self.settings.clients_at_a_time))
        for who in introductions[: len(self.workers)]:
            log.info("%s on %s", who.name, who.node)
        self._tell()

    def _open(self, introductions: Sequence[Introduction]) -> None:
        """Open the data in every actor: the same everywhere."""
        text = self.settings.to_json()
        answers: list[Opened] = self._get([w.actor.open.remote(text) for w in self.workers])
        for who, opened in zip(introductions, answers, strict=True):
            if opened.error:
                raise DataError(f"{opened.error} ({who.name} on {who.node})")
            if opened.content != answers[0].content:
                there, here = who.node, introductions[0].node
                path = self.settings.data.data_root
                raise DataError(f"{path}: the data on {there} are other than those on {here}")

    def _choose(self) -> int:
        """Settle how to train, and return the cohort size that is best for it."""
        if not sizing.is_open(self.settings.runtime):
            return 1
        call = self.workers[0].actor.choose.remote(self.settings.to_json())
        choice: Choice = self._get([call])[0]
        self.settings = sizing.settle(self.settings, choice)
        log.info("training %s: %s", self.settings.runtime.training, choice.reason)
        return choice.cohort_size

    def _probe(self, machine: Machine, best_cohort: int) -> Need:
        """Measure the memory of one client, and of a small cohort if there are to be cohorts."""
        sharing = len(range(0, len(self.workers), max(1, machine.gpus)))
        wanted = sizing.plan(self.settings, self._profile, machine, best_cohort=best_cohort)
        size = min(wanted.cohort_size, PROBED_COHORT)
        text, self._probed = self.settings.to_json(), self.workers[0]
        need: Need = self._get([self._probed.actor.probe.remote(text, sharing, size)])[0]
        return need

    def compare_memory(self, worker: Worker) -> None:
        """Once, after the first full cohorts: log what memory they took, beside the prediction."""
        if self._need is None or worker is not self._probed:
            return
        try:
            peak: Peak = ray.get(worker.actor.peak.remote(), timeout=CONTROL_SECONDS)
        except RayError:  # too busy to say, or dead
            return
        if peak.clients >= self.plan.at_a_time:
            predicted, self._need = self._need.of(peak.clients), None
            log.info(
                "cohort of %d: predicted %.0f MiB, measured %.0f MiB an actor",
                *(peak.clients, predicted / MIB, peak.memory / MIB),
            )

    def replace(self, worker: Worker) -> None:
        """Start another actor in place of one that is dead, or that is to die."""
        ray.kill(worker.actor)
        self._generation += 1
        new = self.workers[self.workers.index(worker)] = self._start(worker.index)
        self._settle([new])

    def retire(self, worker: Worker) -> None:
        """Stop an actor for good."""
        ray.kill(worker.actor)
        self.workers.remove(worker)

    def relieve(self, worker: Worker) -> bool:
        """After an actor ran out of memory: smaller cohorts, else fewer actors.

        Returns
        -------
        bool
            False if there is nothing left to reduce.
        """
        if (cohort := self.plan.cohort_size) > 1:
            self.plan = replace(self.plan, cohort_size=cohort // 2)
            setting = f"cohort_size = {cohort // 2}"
        elif (streams := self.plan.streams) > 1:
            self.plan = replace(self.plan, streams=streams // 2)
            setting = f"streams = {streams // 2}"
        elif len(self.workers) > 1:
            self.retire(worker)
            self.plan = replace(self.plan, actors=len(self.workers))
            setting = f"num_workers = {len(self.workers)}"
            if self._machine.gpus and self.plan.gpus_per_actor:
                each = Counter(w.index % self._machine.gpus for w in self.workers)
                self._gpu_share = self._profile.memory_share / max(each.values())
        else:
            return False
        log.warning(
            "%s ran out of memory: actors now %d, cohort size %d; next time set runtime.%s",
            *(worker.name, len(self.workers), self.plan.cohort_size, setting),
        )
        self.reliefs += 1
        self._settle(self.workers)
        self._tell()
        return True

    def _settle(self, workers: Sequence[Worker]) -> None:
        """Tell actors what they may take, before the hands that they are given from now on."""
        for worker in workers:
            size = (self._gpu_share, self.plan.cohort_size, self.plan.streams)
            worker.actor.settle.remote(*size)

    def clean(self) -> None:
        """At a round's end: give back memory of the GPU, if the profile says so."""
        if self._profile.memory_cleanup == "round" and self.plan.gpus_per_actor:
            for worker in self.workers:
                worker.actor.clean.remote()

    def stacks(self) -> str:
        """Return what every thread of every actor is doing, as far as they answer."""
        calls = {worker.name: worker.actor.stacks.remote() for worker in self.workers}
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=CONTROL_SECONDS)
        return "\n".join(f"--- {name}\n{_answer_or_reason(ref)}" for name, ref in calls.items())

    def times_opened(self) -> list[int]:
        """Return how often each actor has opened the data."""
        times: list[int] = self._get([w.actor.times_opened.remote() for w in self.workers])
        return times

    def close(self) -> None:
        """Stop the actors, and Ray if it was started here."""
        if ray.is_initialized():  # not shut down by another, which would start it anew
            for worker in self.workers:
                ray.kill(worker.actor)
            if self._group:
                remove_placement_group(self._group)
            if self._own_ray:
                ray.shutdown()
        self.workers, self._group, self._own_ray = [], None, False

    def _get(self, refs: list[Any]) -> Any:
        limit = self.settings.runtime.progress_timeout_s
        try:
            return ray.get(refs, timeout=limit)
        except GetTimeoutError:
            log.error("no progress; what the actors are doing:\n%s", self.stacks())
            raise StalledError(
                f"the actors did not get ready within {limit:g} s (runtime.progress_timeout_s)"
            ) from None
        except RayError as error:
            raise WorkerError(f"an actor failed at the start: {_last_line(error)}") from None

    def _tell(self) -> None:
        self._on_change([worker.name for worker in self.workers])


def _start_ray(settings: Settings) -> None:
    runtime = settings.runtime
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    where: dict[str, Any] = {"address": runtime.ray_address}
    if runtime.ray_address:
        _knock(runtime.ray_address)
    else:
        where = {
            "address": "local",
            "num_cpus": available_cores(),
            # None: with one, and it is no error if it does not start.
            "include_dashboard": None if runtime.dashboard else False,
        }
        where["dashboard_host"] = "127.0.0.1"
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():  # of Ray's own future
            warnings.simplefilter("ignore", FutureWarning)
            context = ray.init(**where, logging_level=logging.WARNING)
    except Exception as error:  # Ray raises all kinds
        if not runtime.ray_address:
            hint = TOO_LONG if "AF_UNIX path length" in str(error) else ""
            raise WorkerError(f"Ray cannot be started: {_last_line(error)}{hint}") from error
        problem = f"no Ray cluster answers there ({_last_line(error)})"
        raise ConfigError.at("runtime", "ray_address", runtime.ray_address, problem) from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # which Ray took for itself
    if runtime.dashboard:
        if context.dashboard_url:
            log.info("Ray dashboard: http://%s", context.dashboard_url)
        else:
            log.warning("%s", NO_DASHBOARD)
        for node in ray.nodes():
            address, port = node["NodeManagerAddress"], node["MetricsExportPort"]
            log.info("metrics for Prometheus: http://%s:%d/metrics", address, port)


def _knock(address: str) -> None:
    """Fail at once if nobody listens there: Ray tries for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    problem = 'must be "auto" or HOST:PORT, as "ray start --head" prints it'
    if not host or not port.isdecimal():
        raise ConfigError.at("runtime", "ray_address", address, problem)
    try:
        socket.create_connection((host, int(port)), timeout=CONTROL_SECONDS).close()
    except (OSError, OverflowError) as error:
        problem = f"no Ray cluster answers there ({error})"
        raise ConfigError.at("runtime", "ray_address", address, problem) from None


def _answer_or_reason(ref: Any) -> str:
    try:
        return str(ray.get(ref, timeout=0))
    except GetTimeoutError:
        return f"did not answer within {CONTROL_SECONDS:g} s"
    except RayError as error:
        return _last_line(error)


def _last_line(error: Exception) -> str:
    return next((line for line in reversed(str(error).splitlines()) if line.strip()), repr(error))
