"""Which grid a run gets: this process, or Ray's actors."""

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from fedge_sim import client, client_app
from fedge_sim.config import Runtime, Settings
from fedge_sim.errors import ConfigError
from fedge_sim.runtime import gpu, sizing
from fedge_sim.runtime.in_process import InProcessGrid, available_cores
from fedge_sim.runtime.node import LocalGrid, OnDone

log = logging.getLogger(__name__)

# Ray reads this when it is imported. With 0 all its processes listen on 127.0.0.1 alone; without it
# they listen on all addresses, and whoever reaches one can run programs here.
RAY_IS_LOCAL = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0"
CLIENT_APP = "fedge_sim.client_app:app"
# Most threads of one process that train as fast as actors do: they share an interpreter.
THREADS_THAT_SCALE = 2
COMPILED_WAIT = "compiled steps keep the interpreter: threads would wait for each other"


def choose(runtime: Runtime, num_clients: int, cores: int, gpus: int) -> tuple[str, str]:
    """Return the backend and the reason for it.

    Parameters
    ----------
    runtime : Runtime
    num_clients : int
    cores, gpus : int
        Of this machine.

    Returns
    -------
    backend : str
        ``"inprocess"`` or ``"ray"``.
    reason : str
        For the log.
    """
    threads = max(1, min(cores // runtime.threads_per_client, num_clients))
    if runtime.backend != "auto":
        return runtime.backend, "as set"
    for needs_ray, reason in (
        (runtime.ray_address, "a Ray cluster is given"),
        (runtime.dashboard, "the dashboard is Ray's"),
        (runtime.client_timeout_s, "only an actor can be stopped (client_timeout_s)"),
        (runtime.num_workers != "auto", "num_workers counts actors"),
        (gpus and runtime.num_gpus_per_actor != 0, "actors share the GPUs"),
        (threads > THREADS_THAT_SCALE, f"{threads} threads would wait for one interpreter"),
        (threads > 1 and runtime.compile is True, COMPILED_WAIT),
    ):
        if needs_ray:
            return "ray", reason
    return "inprocess", f"{threads} threads train as fast as actors, and need no start"


@contextmanager
def open_grid(
    settings: Settings,
    on_done: OnDone,
    on_workers: Callable[[Sequence[str]], None],
) -> Iterator[tuple[LocalGrid, Settings]]:
    """Open the grid that the settings ask for, ready to work; close it at the end.

    Yields
    ------
    grid : LocalGrid
    settings : Settings
        Those given, with the way to train settled.

    Raises
    ------
    ConfigError, DataError, WorkerError
        If actors cannot be started, or cannot use the data.
    """
    runtime, cores = settings.runtime, available_cores()
    clients = settings.clients_at_a_time
    backend, reason = choose(runtime, clients, cores, torch.cuda.device_count())
    workers, best = _threads(runtime, cores), 1
    if backend == "inprocess":
        sizing.refuse_missing_gpu(runtime, torch.cuda.device_count())
        settings, best = _settle(settings, workers)
        if settings.runtime.compile is True and workers > 1:
            if runtime.backend == "auto":
                backend, reason = "ray", COMPILED_WAIT
            else:
                log.warning("%s (runtime.compile, runtime.backend)", COMPILED_WAIT)
    log.info("backend %s: %s", backend, reason)
    if unused := gpu.set_for_nothing(runtime, torch.cuda.device_count()):
        log.warning("set, and without effect on CPUs: %s", ", ".join(unused))
    if backend == "ray":
        if not runtime.ray_address:
            os.environ.setdefault(*RAY_IS_LOCAL)
        from fedge_sim.runtime.ray_grid import RayGrid  # Ray is slow to import

        with RayGrid(CLIENT_APP, settings, on_done, on_workers) as grid:
            grid.prepare()
            yield grid, grid.settings
    else:
        with _in_process(settings, workers, best, on_done, on_workers) as both:
            yield both


@contextmanager
def _in_process(
    settings: Settings,
    workers: int,
    best_cohort: int,
    on_done: OnDone,
    on_workers: Callable[[Sequence[str]], None],
) -> Iterator[tuple[InProcessGrid, Settings]]:
    runtime = settings.runtime
    for key, problem in (
        ("client_timeout_s", "a thread cannot be stopped"),
        ("dashboard", "it is Ray's"),
    ):
        if value := getattr(runtime, key):
            raise ConfigError.at("runtime", key, value, f'{problem}; use backend = "ray"')
    each = math.ceil(settings.clients_at_a_time / workers)
    size = sizing.fixed_cohort(runtime) or min(best_cohort, each, sizing.MAX_COHORT)
    settings = sizing.settle_cohort(settings, size)
    on_workers([f"thread-{number}" for number in range(workers)])
    with InProcessGrid(
        client_app.app,
        workers,
        runtime,
        on_done=on_done,
        together=client_app.answer_together,
        cohort_size=size,
    ) as grid:
        yield grid, settings


def _threads(runtime: Runtime, cores: int) -> int:
    """Return how many threads train clients in this process."""
    threads = max(1, cores // runtime.threads_per_client)
    return threads if runtime.num_workers == "auto" else min(threads, runtime.num_workers)


def _settle(settings: Settings, workers: int) -> tuple[Settings, int]:
    """Settle how to train, and return the cohort size that trains most clients a second."""
    runtime = settings.runtime
    sizing.fixed_cohort(runtime)  # refused, if at all, before anything is measured
    if not sizing.is_open(runtime):
        return settings, 1
    client_app.open_data(settings)  # what a user can mend is found here
    compiles = workers == 1 or runtime.backend == "auto"
    choice = client.choose(settings, compiles=compiles)
    settings = sizing.settle(settings, choice)
    log.info("training %s: %s", settings.runtime.training, choice.reason)
    return settings, choice.cohort_size
