"""What clients train with: a network and a way to train, by the settings and the machine."""

import logging
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedge_sim.config import Settings
from fedge_sim.data import FederatedData, federated_data
from fedge_sim.data.base import CPU, Examples
from fedge_sim.data.store import cache_folder
from fedge_sim.errors import CannotVectoriseError
from fedge_sim.models import build_model, initialise
from fedge_sim.randomness import stream, torch_generator
from fedge_sim.runtime import gpu
from fedge_sim.runtime.in_process import available_cores
from fedge_sim.runtime.sizing import MAX_COHORT
from fedge_sim.training.base import (
    ClientTask,
    TrainingPath,
    TrainSettings,
    model_arrays,
    num_examples_seen,
    num_steps,
)
from fedge_sim.training.choice import Choice, decide, measure
from fedge_sim.training.cohort import Cohort
from fedge_sim.training.device import device, set_precision
from fedge_sim.training.evaluation import evaluate_together
from fedge_sim.training.graphs import WARM_UP, WORTH_IT
from fedge_sim.training.local import Reference
from fedge_sim.training.pfedme import pfedme_settings
from fedge_sim.training.single import Single

log = logging.getLogger(__name__)


def train_settings(settings: Settings, lr: float, prox_mu: float) -> TrainSettings:
    """Return how a client trains in a round with this learning rate and FedProx's mu."""
    h, (batch_size, accumulation) = settings.hierarchy, gpu.batch_of(settings)
    alone = h.client_rule in ("local", "centralised")  # there is no server to stay close to
    how = TrainSettings(
        lr=lr,
        local_epochs=h.local_epochs,
        local_steps=settings.local_steps,
        batch_size=batch_size,
        accumulation=accumulation,
        momentum=h.momentum,
        weight_decay=h.weight_decay,
        clip_norm=h.clip_norm,
        label_smoothing=h.label_smoothing,
        prox_mu=0.0 if alone else prox_mu,
        optimizer=h.optimizer,
    )
    return pfedme_settings(how, h) if h.client_rule == "pfedme" else how


def steps_of_a_job(settings: Settings, examples: int) -> int:
    """Return the steps that a client with this number of examples does each time it trains."""
    return num_steps(examples, _usual(settings))


def work_of_a_job(settings: Settings, examples: int) -> int:
    """Return the examples that a client with this number goes through in a training."""
    return num_examples_seen(examples, _usual(settings))


def _usual(settings: Settings) -> TrainSettings:
    """Return how clients train, whatever changes from round to round."""
    return train_settings(settings, lr=settings.hierarchy.lr_init, prox_mu=0.0)


def initial_model(settings: Settings, example_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return the network that a run begins with, the same wherever it is made."""
    model = build_model(settings.data.model, example_shape, classes)
    initialise(model, torch_generator(settings.seed, "initial model"))
    return model


@dataclass(frozen=True)
class Tools:
    """What a thread works with: a network to evaluate with, and a way to train."""

    settings: Settings
    example_shape: tuple[int, ...]
    num_classes: int

    @cached_property
    def network(self) -> nn.Module:
        """To evaluate with."""
        return _network(self.settings, self.example_shape, self.num_classes)

    @cached_property
    def path(self) -> TrainingPath:
        """To train with."""
        return _path(self)


class _Kept(threading.local):
    """What a thread used last, for what kind of work, and in which round it last trained."""

    kind: object = None
    round: int = 0
    tools: Tools | None = None


_kept = _Kept()


def tools(settings: Settings, data: FederatedData, flat_round: int | None = None) -> Tools:
    """Return what this thread needs for the settings' work: the last ones, where they will do.

    Unless the profile keeps them warm, they are made anew for every round of training.
    """
    runtime = settings.runtime
    how = (runtime.training, runtime.compile, runtime.precision, runtime.threads_per_client)
    form = (data.example_shape, len(data.classes))
    kind = (settings.data.model, *form, _where(settings), how)
    now = _kept.round if flat_round is None or _profile(settings).keep_warm else flat_round
    if _kept.tools is None or (kind, now) != (_kept.kind, _kept.round):
        _kept.tools = None  # make room first
        _kept.kind, _kept.round, _kept.tools = kind, now, Tools(settings, *form)
    return _kept.tools


def _path(own: Tools) -> TrainingPath:
    """Return the way to train that the settings name; "auto" is for nodes that nobody asked."""
    settings = own.settings
    form = (own.example_shape, own.num_classes)
    training, network = settings.runtime.training, _network(settings, *form)
    autocast = autocast_of(settings)
    if training == "reference":
        return Reference(network, autocast)
    if training == "cohort":
        try:
            path = Cohort(network, autocast)
            path.check(*form)
            return path
        except CannotVectoriseError as error:
            log.warning("clients are trained one at a time: %s", error)
    compiled = _cache(settings) if settings.runtime.compile is True else None
    return Single(network, compiled, autocast)


def _network(settings: Settings, example_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return a network of arbitrary values where this process trains."""
    return build_model(settings.data.model, example_shape, num_classes).to(_where(settings))


def _where(settings: Settings) -> torch.device:
    return device() if _profile(settings).gpu_fraction > 0 else CPU


def autocast_of(settings: Settings) -> torch.dtype | None:
    """Set the precision of the settings, and return what to cast a forward pass to."""
    return set_precision(settings.runtime.precision)


def _cache(settings: Settings) -> Path:
    """Return where compiled steps and measured speeds are kept from one run to the next."""
    return cache_folder(settings.data) / "training"


def examples_of(settings: Settings, data: FederatedData, client: int) -> Examples:
    """Return all examples as a client sees them, where this process trains."""
    profile = _profile(settings)
    return data.examples(
        client, _where(settings), caching=profile.caching, pipelining=profile.pipelining
    )


def pooled_examples(settings: Settings, data: FederatedData) -> tuple[Examples, NDArray[np.int64]]:
    """Return the training rows of all clients, and all examples as their own clients see them."""
    profile = _profile(settings)
    return data.pooled(_where(settings), caching=profile.caching, pipelining=profile.pipelining)


def _profile(settings: Settings) -> gpu.Profile:
    """Return the GPU profile as it holds in this process."""
    return gpu.resolve(settings.runtime, torch.cuda.device_count())


def choose(settings: Settings, *, cohorts: bool = True, compiles: bool = True) -> Choice:
    """Return the way to train that the settings fix, or else the fastest one measured here.

    Parameters
    ----------
    settings : Settings
    cohorts : bool
        Whether messages of several clients are answered together.
    compiles : bool
        Whether steps may be compiled: then they are, here and now, if that repays.
    """
    if not cohorts:
        settings = settings.with_runtime(cohort_size=1)
    runtime, data = settings.runtime, federated_data(settings)
    form = (data.example_shape, len(data.classes))
    torch.set_num_threads(runtime.threads_per_client)
    workers = max(1, torch.cuda.device_count() if _on_gpu(settings) else _workers(settings))
    most = min(MAX_COHORT, math.ceil(settings.clients_at_a_time / workers)) if cohorts else 1
    if runtime.cohort_size != "auto":
        most = min(most, runtime.cohort_size)
    if runtime.training in ("reference", "single") or settings.hierarchy.client_rule == "pfedme":
        most = 1
    measured = measure(
        lambda: _network(settings, *form),
        lambda size, steps: _trial(settings, data, size, steps),
        most=most,
        classes=len(data.classes),
        autocast=autocast_of(settings),
        precision=runtime.precision,
        folder=_cache(settings),
    )
    compilable = compiles and not _on_gpu(settings) and runtime.precision != "bf16"
    choice = decide(measured, runtime, _steps(settings, data) // workers, compilable=compilable)
    if choice.compile:  # before the first round, once for all processes of this machine
        path = Single(_network(settings, *form), _cache(settings))
        [update] = path.train(_trial(settings, data, 1, 1))
        if update.path != "compiled":
            return replace(choice, compile=False, reason=f"{choice.reason}, but not possible")
    return choice


def _on_gpu(settings: Settings) -> bool:
    return _where(settings).type != "cpu"


def _workers(settings: Settings) -> int:
    fixed = settings.runtime.num_workers
    return available_cores() // settings.runtime.threads_per_client if fixed == "auto" else fixed


def _steps(settings: Settings, data: FederatedData) -> int:
    """Return how many steps all clients will do in the run."""
    h = settings.hierarchy
    if settings.by_versions:  # of devices, which are not all looked at: the first stands for them
        servers = h.num_servers if settings.asynchronous.server == "leaf" else 1
        jobs = servers * settings.devices.max_model_version * settings.updates_for_model
        return jobs * steps_of_a_job(settings, len(data.clients[0].train))
    sizes = [len(client.train) for client in data.clients]
    if h.client_rule == "centralised":
        a_round = steps_of_a_job(settings, sum(sizes))
    else:
        a_round = sum(steps_of_a_job(settings, examples) for examples in sizes)
        a_round = a_round * settings.num_training // h.num_clients
    return a_round * h.global_rounds * h.server_rounds_per_global


def _trial(settings: Settings, data: FederatedData, size: int, steps: int) -> list[ClientTask]:
    """Return ``size`` tasks of ``steps`` full steps each, on the data of the largest clients.

    Devices of a run of versions, which may be very many, are taken as they come.
    """
    ids: Sequence[int] = range(len(data.clients))
    if not settings.by_versions:
        ids = sorted(ids, key=lambda client: -len(data.clients[client].train))
    largest = ids[:size]
    how = train_settings(settings, lr=1e-3, prox_mu=settings.hierarchy.prox_mu)
    how = replace(how, local_steps=steps)
    start = model_arrays(_network(settings, data.example_shape, len(data.classes)))
    rows_needed = how.batch_size * how.accumulation * steps
    tasks = []
    for number in range(size):
        client = largest[number % len(largest)]
        rows = np.resize(data.clients[client].train, rows_needed)
        order = stream(0, "trial", number)
        tasks.append(ClientTask(start, examples_of(settings, data, client), rows, how, order))
    return tasks


def probe(settings: Settings, cohort_size: int = 1) -> None:
    """Train and evaluate ``cohort_size`` clients on a few batches, to see what it takes.

    Parameters
    ----------
    settings : Settings
    cohort_size : int
    """
    torch.set_num_threads(settings.runtime.threads_per_client)
    data = federated_data(settings)
    # On a GPU, enough steps for a recording of them, which takes memory too.
    steps = WARM_UP + WORTH_IT + 1 if _on_gpu(settings) else 2
    own, tasks = tools(settings, data), _trial(settings, data, cohort_size, steps)
    own.path.train(tasks)
    parts = [(task.examples, task.rows) for task in tasks]
    evaluate_together(own.network, parts, settings.hierarchy.eval_batch_size, autocast_of(settings))
