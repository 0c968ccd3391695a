"""What clients train with: a network and a way to train, by the settings and the machine."""

import logging
import math
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedge_sim.config import Settings
from fedge_sim.data import FederatedData, federated_data
from fedge_sim.data.base import CPU, Examples
from fedge_sim.data.store import cache_folder
from fedge_sim.errors import CannotVectoriseError
from fedge_sim.models import build_model
from fedge_sim.randomness import stream
from fedge_sim.runtime import gpu
from fedge_sim.runtime.in_process import available_cores
from fedge_sim.runtime.sizing import MAX_COHORT
from fedge_sim.training.base import ClientTask, TrainingPath, TrainSettings, model_arrays
from fedge_sim.training.choice import Choice, decide, measure
from fedge_sim.training.cohort import Cohort
from fedge_sim.training.device import device, set_precision
from fedge_sim.training.evaluation import evaluate_together
from fedge_sim.training.local import Reference
from fedge_sim.training.single import Single

log = logging.getLogger(__name__)


def train_settings(settings: Settings, lr: float) -> TrainSettings:
    """Return how a client trains in a round with this learning rate."""
    h, (batch_size, accumulation) = settings.hierarchy, gpu.batch_of(settings)
    return TrainSettings(
        lr=lr,
        local_epochs=h.local_epochs,
        local_steps=h.local_steps,
        batch_size=batch_size,
        accumulation=accumulation,
        momentum=h.momentum,
        weight_decay=h.weight_decay,
        clip_norm=h.clip_norm,
        label_smoothing=h.label_smoothing,
        prox_mu=h.prox_mu,
    )


@dataclass(frozen=True)
class Tools:
    """What a thread works with: a network to evaluate with, and a way to train."""

    network: nn.Module
    path: TrainingPath


class _Kept(threading.local):
    """What a thread used last, and for what kind of work."""

    kind: object = None
    tools: Tools | None = None


_kept = _Kept()


def tools(settings: Settings, data: FederatedData) -> Tools:
    """Return what this thread needs for the settings' work, the last ones if kept."""
    runtime, keep = settings.runtime, _profile(settings).keep_warm
    how = (runtime.training, runtime.compile, runtime.precision, runtime.threads_per_client)
    kind = (settings.data.model, data.example_shape, len(data.classes), _where(settings), how)
    if _kept.tools is not None and kind == _kept.kind:
        return _kept.tools
    new = Tools(_network(settings, data), _path(settings, data))
    _kept.kind, _kept.tools = (kind, new) if keep else (None, None)
    return new


def _path(settings: Settings, data: FederatedData) -> TrainingPath:
    """Return the way to train that the settings name; "auto" is for nodes that nobody asked."""
    training, network = settings.runtime.training, _network(settings, data)
    autocast = autocast_of(settings)
    if training == "reference":
        return Reference(network, autocast)
    if training == "cohort":
        path = Cohort(network, autocast)
        try:
            path.check(data.example_shape, len(data.classes))
            return path
        except CannotVectoriseError as error:
            log.warning("clients are trained one at a time: %s", error)
    compiled = _cache(settings) if settings.runtime.compile is True else None
    return Single(network, compiled, autocast)


def _network(settings: Settings, data: FederatedData) -> nn.Module:
    """Return a network of arbitrary values where this process trains."""
    network = build_model(settings.data.model, data.example_shape, len(data.classes))
    return network.to(_where(settings))


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


def _profile(settings: Settings) -> gpu.Profile:
    """Return the GPU profile as it holds in this process."""
    return gpu.resolve(settings.runtime, torch.cuda.device_count())


def choose(settings: Settings, *, cohorts: bool = True) -> Choice:
    """Return the way to train that the settings fix, or else the fastest one measured here.

    Parameters
    ----------
    settings : Settings
    cohorts : bool
        Whether messages of several clients are answered together.
    """
    runtime, data = settings.runtime, federated_data(settings)
    torch.set_num_threads(runtime.threads_per_client)
    workers = max(1, torch.cuda.device_count() if _on_gpu(settings) else _workers(settings))
    most = min(MAX_COHORT, math.ceil(len(data.clients) / workers)) if cohorts else 1
    if runtime.cohort_size != "auto":
        most = min(most, runtime.cohort_size)
    if runtime.training in ("reference", "single"):
        most = 1
    measured = measure(
        lambda: _network(settings, data),
        lambda size, steps: _trial(settings, data, size, steps),
        most=most,
        classes=len(data.classes),
        folder=_cache(settings),
    )
    return decide(measured, runtime, _steps(settings, data) // workers, on_gpu=_on_gpu(settings))


def _on_gpu(settings: Settings) -> bool:
    return _where(settings).type != "cpu"


def _workers(settings: Settings) -> int:
    return available_cores() // settings.runtime.threads_per_client


def _steps(settings: Settings, data: FederatedData) -> int:
    """Return how many steps all clients will do in the run."""
    h, (batch_size, accumulation) = settings.hierarchy, gpu.batch_of(settings)
    size = batch_size * accumulation
    an_epoch = (-(-len(client.train) // size) for client in data.clients)
    each = (h.local_steps or h.local_epochs * steps for steps in an_epoch)
    return h.global_rounds * h.server_rounds_per_global * sum(each)


def _trial(settings: Settings, data: FederatedData, size: int, steps: int) -> list[ClientTask]:
    """Return so many tasks, of so many full steps each, on the data of the largest clients."""
    largest = sorted(range(len(data.clients)), key=lambda c: -len(data.clients[c].train))[:size]
    how = replace(train_settings(settings, lr=1e-3), local_steps=steps)
    start = model_arrays(_network(settings, data))
    rows_needed = how.batch_size * how.accumulation * steps
    tasks = []
    for number in range(size):
        client = largest[number % len(largest)]
        rows = np.resize(data.clients[client].train, rows_needed)
        order = stream(0, "trial", number)
        tasks.append(ClientTask(start, examples_of(settings, data, client), rows, how, order))
    return tasks


def probe(settings: Settings, cohort_size: int = 1) -> None:
    """Train and evaluate so many clients on a few batches, to see what it takes.

    Parameters
    ----------
    settings : Settings
    cohort_size : int
    """
    torch.set_num_threads(settings.runtime.threads_per_client)
    data = federated_data(settings)
    own, tasks = tools(settings, data), _trial(settings, data, cohort_size, 2)
    own.path.train(tasks)
    parts = [(task.examples, task.rows) for task in tasks]
    evaluate_together(own.network, parts, settings.hierarchy.eval_batch_size, autocast_of(settings))
