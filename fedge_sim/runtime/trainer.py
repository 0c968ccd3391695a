"""The actor: one process that trains clients, on a core or on its share of a GPU.

Its ordinary calls work on messages, one hand at a time; those of the group "control" answer
meanwhile, so that the grid can ask what goes on.
"""

import gc
import importlib
import os
import socket
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import ray
import torch
from flwr.app import ArrayRecord, Message, MessageType
from flwr.clientapp import ClientApp
from flwr.supercore.run import Run
from ray.util.metrics import Gauge

from fedge_sim import client
from fedge_sim import client_app as our_client_app
from fedge_sim.config import settings_from_json
from fedge_sim.data import federated_data
from fedge_sim.errors import FedgeError
from fedge_sim.memory import freeze, trim
from fedge_sim.runtime import node
from fedge_sim.runtime.node import Answer, Failure, Node, States, identify
from fedge_sim.runtime.sizing import Need
from fedge_sim.training.choice import Choice

CONTROL = "control"  # name of the concurrency group
# Most models, and bytes, that an actor keeps of the newest rounds.
KEPT_MODELS, KEPT_BYTES = 8, 256 * 2**20
METRICS_SECONDS = 2.0  # pause between two reports of memory
TRIM_SECONDS = 5.0  # pause between two returns of freed memory to the host

ModelRef: TypeAlias = "ray.ObjectRef[ArrayRecord]"


@dataclass(frozen=True)
class Job:
    """A message without its arrays, and which of the hand's models they are, by record name."""

    message: Message
    models: dict[str, int]


@dataclass(frozen=True)
class Introduction:
    """Where an actor found itself.

    Attributes
    ----------
    name : str
        For example ``"trainer-0 cuda:0 0.25"`` or ``"trainer-0 cpu 1"``.
    node : str
        The machine's name and address.
    node_id : str
        Ray's name for it.
    pid : int
    gpu_memory : int
        Bytes of its whole GPU; 0 without one that torch can use.
    """

    name: str
    node: str
    node_id: str
    pid: int
    gpu_memory: int


@dataclass(frozen=True)
class Opened:
    """What came of opening the data: what is wrong with them, or their SHA-256."""

    error: str = ""
    content: str = ""


@dataclass(frozen=True)
class Peak:
    """The most memory that an actor has taken since it was probed, and for what.

    Attributes
    ----------
    memory : int
        Bytes, counted as :class:`Need` counts them.
    clients : int
        The most that it trained at a time; 0 if it has trained none.
    """

    memory: int
    clients: int


class Trainer:
    """A process that runs the ClientApp on messages.

    Parameters
    ----------
    index : int
    client_app : str
        ``"module:attribute"``; the module's ``answer_together``, if it has one, answers cohorts.
    run : Run
    metrics : bool
        Whether to report memory to Ray's dashboard.
    """

    def __init__(self, index: int, client_app: str, run: Run, metrics: bool) -> None:
        resources = ray.get_runtime_context().get_assigned_resources()
        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        share = resources.get("GPU", 0.0) if gpus else resources.get("CPU", 0.0)
        place = f"cuda:{','.join(gpus)}" if gpus else "cpu"
        # Set first, as Ray asks for it on any error.
        self._name = f"trainer-{index} {place} {share:g}"
        identify(run)
        name, _, attribute = client_app.partition(":")
        module = importlib.import_module(name)
        app: ClientApp = getattr(module, attribute)
        self._node = Node(app, run.run_id, together=getattr(module, "answer_together", None))
        self._models: OrderedDict[ModelRef, ArrayRecord] = OrderedDict()
        self._kept = 0
        self._at_work: dict[str, tuple[float, int]] = {}  # message id -> start, clients in cohort
        self._on_gpu = bool(gpus) and torch.cuda.is_available()
        self._pool = ThreadPoolExecutor(1, initializer=self._take_stream)
        self._streams = self._cohort_size = 1
        # Memory when it was probed: this process's own, and resident as the peak is.
        self._at_rest = 0, 0
        self._trained_at_a_time = 0
        self._next_trim = 0.0
        if self._on_gpu:  # so that results repeat to the last bit
            torch.backends.cudnn.deterministic = True
        freeze()  # what is imported stays, for as long as this process does
        if metrics:
            threading.Thread(target=self._report_memory, daemon=True).start()

    def __repr__(self) -> str:
        """Return the name that Ray's dashboard and logs show."""
        return self._name

    # ------------------------------------------------------------------ ordinary calls

    def introduce(self) -> Introduction:
        """Say where this actor is."""
        return Introduction(
            name=self._name,
            node=f"{socket.gethostname()} ({ray.util.get_node_ip_address()})",
            node_id=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            gpu_memory=torch.cuda.mem_get_info()[1] if self._on_gpu else 0,
        )

    def open(self, settings: str) -> Opened:
        """Open the run's data, for as long as this actor lives.

        Parameters
        ----------
        settings : str
            As JSON.
        """
        try:
            data = our_client_app.open_data(settings_from_json(settings))
        except FedgeError as error:
            return Opened(error=str(error))
        return Opened(content=data.dataset.content)

    def choose(self, settings: str) -> Choice:
        """Measure which way to train is fastest, on a thread that trains clients."""
        return self._pool.submit(client.choose, settings_from_json(settings)).result()

    def probe(self, settings: str, sharing: int, cohort_size: int) -> Need:
        """Measure the memory of training, for a few batches of the clients with most examples.

        Parameters
        ----------
        settings : str
            As JSON.
        sharing : int
            Actors on this GPU, this one included.
        cohort_size : int
            Clients of the larger of two measurements; what one takes follows from both, if it is
            above 1.
        """
        loaded = settings_from_json(settings)

        # Runs on a thread that trains clients, which has its own network.
        def growth(clients: int) -> int:
            self.clean()
            self._reset_peak()
            before = self._memory()
            self._pool.submit(client.probe, loaded, clients).result()
            return self._peak() - before

        sizes = [1, cohort_size] if cohort_size > 1 else [1]
        for size in sizes:  # the first call also loads libraries and data, which are there once
            growth(size)
        self.clean()
        base, before = self._own_memory(sharing), self._memory()
        grown = [growth(size) for size in sizes]
        per_client = max(1, (grown[-1] - grown[0]) // (cohort_size - 1) if grown[1:] else grown[0])
        self.clean()
        self._reset_peak()
        self._at_rest = base, before
        return Need(base=max(0, base + grown[0] - per_client), per_client=per_client)

    def settle(self, memory_share: float, cohort_size: int, streams: int) -> None:
        """Take the size that the plan gave: the share of the GPU's memory is a hard limit."""
        if self._on_gpu:
            torch.cuda.set_per_process_memory_fraction(memory_share)
        self._cohort_size = cohort_size
        if streams != self._streams:
            self._pool.shutdown()
            self._pool = ThreadPoolExecutor(streams, initializer=self._take_stream)
            self._streams = streams

    def work(
        self, jobs: Sequence[Job], models: Sequence[ModelRef], states: States | None = None
    ) -> list[Answer]:
        """Answer messages, in cohorts, of which each stream works on one at a time.

        ``states`` are those of their clients, if the grid keeps them.
        """
        records = [self._model(ref) for ref in models]
        for job in jobs:
            for name, place in job.models.items():
                job.message.content[name] = records[place]
        messages = [job.message for job in jobs]
        cohorts = self._node.cohorts(messages, self._cohort_size, self._streams)
        answers: dict[str, Answer] = {}
        all_found = self._pool.map(self._answer, cohorts, repeat(states))
        for cohort, found in zip(cohorts, all_found, strict=True):
            answers.update(zip((m.metadata.message_id for m in cohort), found, strict=True))
        if not self._on_gpu and time.monotonic() >= self._next_trim:
            trim()  # gives back what threads keep of models that they received or sent
            self._next_trim = time.monotonic() + TRIM_SECONDS
        return [answers[message.metadata.message_id] for message in messages]

    def clean(self) -> None:
        """Give back the memory that torch holds and does not use."""
        gc.collect()
        if self._on_gpu:
            torch.cuda.empty_cache()
        else:
            trim()

    # ------------------------------------------------------------------ control

    @ray.method(concurrency_group=CONTROL)
    def at_work(self) -> dict[str, float]:
        """Return the ids of the messages under way, and for how many seconds.

        A cohort's time is divided equally among its messages.
        """
        now = time.monotonic()
        return {name: (now - start) / n for name, (start, n) in list(self._at_work.items())}

    @ray.method(concurrency_group=CONTROL)
    def peak(self) -> Peak:
        """Return the most memory since this actor was probed."""
        own, memory = self._at_rest
        return Peak(own + self._peak() - memory, self._trained_at_a_time)

    @ray.method(concurrency_group=CONTROL)
    def stacks(self) -> str:
        """Return what each thread is doing."""
        return node.stacks()

    @ray.method(concurrency_group=CONTROL)
    def cohort_size(self) -> int:
        """Return how many clients are trained together."""
        return self._cohort_size

    @ray.method(concurrency_group=CONTROL)
    def times_opened(self) -> int:
        """Return how often this process has opened a dataset."""
        return federated_data.times_opened

    # ------------------------------------------------------------------ inside

    def _answer(self, cohort: Sequence[Message], states: States | None) -> list[Answer]:
        ids = [message.metadata.message_id for message in cohort]
        self._at_work.update(dict.fromkeys(ids, (time.monotonic(), len(ids))))
        if cohort[0].metadata.message_type == MessageType.TRAIN:
            self._trained_at_a_time = max(self._trained_at_a_time, len(self._at_work))
        try:
            answers = self._node.answer_all(cohort, states)
        finally:
            for message_id in ids:
                del self._at_work[message_id]
        for failure in (answer.result for answer in answers):
            if isinstance(failure, Failure) and failure.breaks_the_gpu:
                print(failure.details, file=sys.stderr, flush=True)
                os._exit(1)  # a GPU error that no process survives: the grid replaces this actor
        return answers

    def _model(self, ref: ModelRef) -> ArrayRecord:
        if ref not in self._models:
            self._models[ref] = ray.get(ref)
            self._kept += self._models[ref].count_bytes()
        self._models.move_to_end(ref)
        while len(self._models) > 1 and (
            len(self._models) > KEPT_MODELS or self._kept > KEPT_BYTES
        ):
            self._kept -= self._models.popitem(last=False)[1].count_bytes()
        return self._models[ref]

    def _memory(self) -> int:
        """Return what this process holds now, but for what it shares: the data, libraries."""
        if self._on_gpu:
            return torch.cuda.memory_reserved()
        memory = psutil.Process().memory_info()
        return int(memory.rss - getattr(memory, "shared", 0))

    def _take_stream(self) -> None:
        """Give a thread its own CUDA stream: cohorts side by side need not wait for each other."""
        if self._on_gpu:
            torch.cuda.set_stream(torch.cuda.Stream())

    def _own_memory(self, sharing: int) -> int:
        if not self._on_gpu:
            return int(psutil.Process().memory_full_info().uss)
        free, total = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved()
        # The rest is taken by the contexts of the actors, and by others who use the GPU.
        return int((total - free - reserved) / sharing + reserved)

    def _reset_peak(self) -> None:
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):  # not Linux, or not allowed: then the peak may be from before
                Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set

    def _peak(self) -> int:
        if self._on_gpu:
            return torch.cuda.max_memory_reserved()
        status = Path("/proc/self/status")
        if not status.exists():  # not Linux
            return self._memory()
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024 - int(psutil.Process().memory_info().shared)

    def _report_memory(self) -> None:
        gauge = Gauge(
            "fedge_actor_memory_bytes",
            "GPU memory that an actor holds, or memory of the host without a GPU",
            tag_keys=("actor",),
        )
        while True:
            gauge.set(self._memory(), tags={"actor": self._name})
            time.sleep(METRICS_SECONDS)


def remote_trainer() -> Any:
    """Return :class:`Trainer` as a Ray actor class."""
    return ray.remote(concurrency_groups={CONTROL: 1})(Trainer)  # type: ignore[call-overload]
