"""Which way to train is fastest here: measured for a moment, not assumed."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from torch import nn

from fedge_sim.config import Runtime
from fedge_sim.errors import CannotVectoriseError
from fedge_sim.sealed import read_sealed, write_sealed
from fedge_sim.training.base import ClientTask, TrainingPath
from fedge_sim.training.cohort import Cohort
from fedge_sim.training.compiled import processor
from fedge_sim.training.device import device_of
from fedge_sim.training.single import Single

log = logging.getLogger(__name__)

COHORTS = (8, 32, 128)  # cohort sizes that are tried, as long as a larger one is faster
# Steps of each client in a measurement, and measurements, after a warm-up; fewer if long.
STEPS, TRIES = 4, 3
PROBE_SECONDS = 1.0  # seconds for one way to train: a size that would take longer is not tried
GAIN = 1.25  # factor by which a cohort must be faster: it takes more memory, and measuring is noisy
# What compiling costs, and the share of a step that it saves: see docs/performance.md.
COMPILE_SECONDS, COMPILE_SAVES = 20.0, 0.15


@dataclass(frozen=True)
class Choice:
    """The way to train that a run takes.

    Attributes
    ----------
    training : {"reference", "single", "cohort"}
    compile : bool
        Whether steps are compiled, in the way "single".
    cohort_size : int
        Clients of one vectorised step that train most clients a second; 1 without cohorts.
    reason : str
        For the log: what was measured.
    """

    training: Literal["reference", "single", "cohort"]
    compile: bool
    cohort_size: int
    reason: str


@dataclass(frozen=True)
class Measured:
    """Milliseconds that one step of one client takes, on one thread or GPU.

    Attributes
    ----------
    single : float
    cohorts : mapping of int to float
        By cohort size; empty where the network cannot be vectorised.
    problem : str
        Why it cannot, if so.
    """

    single: float
    cohorts: Mapping[int, float]
    problem: str = ""


def decide(measured: Measured, runtime: Runtime, steps: int, *, compilable: bool) -> Choice:
    """Return the way to train that the settings fix, or that what was measured speaks for.

    Parameters
    ----------
    measured : Measured
    runtime : Runtime
    steps : int
        That a worker will do in this run, all its clients together. Compiling is worth its
        time if it saves more: steps x seconds of one x ``COMPILE_SAVES`` > ``COMPILE_SECONDS``.
    compilable : bool
        Whether steps may be compiled: on a CPU, in float32. On a GPU, a cohort's are recorded.
    """
    untried = (COHORTS[0], math.inf)
    size, cohort = min(measured.cohorts.items(), key=lambda item: item[1], default=untried)
    asked = runtime.training == "cohort" or runtime.cohort_size not in ("auto", 1)
    reasons = [f"one client at a time {measured.single:.2f} ms a step"]
    if measured.cohorts:
        reasons.append(f"{size} at a time {cohort:.2f} ms for each")
    elif asked and not measured.problem:
        reasons.append("cohorts were not tried: a step is long")
    if measured.problem:
        reasons.append(f"no cohorts: {measured.problem}")
    training = runtime.training
    if training == "auto":
        wins = cohort * GAIN < measured.single and runtime.compile is not True
        training = "cohort" if asked or wins else "single"
    else:
        reasons.insert(0, "as set")
    if training == "cohort":
        if not measured.problem:
            return Choice("cohort", compile=False, cohort_size=size, reason="; ".join(reasons))
        training = "single"
    compiles = training == "single" and runtime.compile is True
    if training == "single" and runtime.compile == "auto" and compilable:
        saved = steps * measured.single / 1000 * COMPILE_SAVES
        compiles = saved > COMPILE_SECONDS
        reasons.append(
            f"compiling would take {COMPILE_SECONDS:.0f} s and save about {saved:.0f} s in "
            f"{steps:,} steps, so steps are {'' if compiles else 'not '}compiled"
        )
    return Choice(training, compile=compiles, cohort_size=1, reason="; ".join(reasons))


def measure(
    build: Callable[[], nn.Module],
    tasks: Callable[[int, int], Sequence[ClientTask]],
    *,
    most: int,
    classes: int,
    autocast: torch.dtype | None = None,
    precision: str = "",
    folder: Path | None = None,
) -> Measured:
    """Measure how long a step takes, one client at a time and in cohorts.

    What was measured once on a machine holds for later runs: so the same settings train in
    the same way, to the last bit, however busy the machine is.

    Parameters
    ----------
    build : callable
        Makes a network where clients are to train.
    tasks : callable
        From a number of clients and of steps to their tasks.
    most : int
        The largest cohort that is of use; 1 for none.
    classes : int
    autocast : torch.dtype, optional
        Of the forward pass.
    precision : str
        What tells measurements apart that differ in what a GPU does with float32.
    folder : Path, optional
        Where measurements are kept; if that cannot be, a warning says so.
    """
    key = _key(build(), tasks(1, 1), (most, autocast, precision))
    file = None if folder is None else folder / f"speed-{key}.sealed"
    if file is not None and (known := _read(file)) is not None:
        log.info("speeds are those measured before: %s", file)
        return known
    one = Single(build(), autocast=autocast)
    single = _seconds_a_step(one, tasks, 1)
    cohorts, problem = {}, ""
    try:
        if most > 1 and 2 * min(COHORTS[0], most) * single <= PROBE_SECONDS:
            path = Cohort(build(), autocast)
            path.check(tasks(1, 1)[0].examples.x.shape[1:], classes)
            cohorts = _cohorts(path, tasks, most, single)
            single = min(single, _seconds_a_step(one, tasks, 1))  # others use this machine too
    except CannotVectoriseError as error:
        problem = str(error)
    measured = Measured(1000 * single, cohorts, problem)
    if file is not None:
        try:
            _write(file, measured)
            measured = _read(file) or measured  # another process may have been first
        except OSError as error:
            log.warning("speeds cannot be kept, and are measured again in the next run: %s", error)
    return measured


def _cohorts(
    path: Cohort, tasks: Callable[[int, int], Sequence[ClientTask]], most: int, single: float
) -> dict[int, float]:
    """Return milliseconds a client's step by cohort size, as long as larger ones are faster."""
    found: dict[int, float] = {}
    expected = single
    for size in dict.fromkeys(min(size, most) for size in COHORTS):
        if 2 * size * expected > PROBE_SECONDS:
            break
        try:
            seconds = _seconds_a_step(path, tasks, size)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        found[size] = 1000 * seconds
        if seconds > expected:
            break
        expected = seconds
    return found


def _seconds_a_step(
    path: TrainingPath, tasks: Callable[[int, int], Sequence[ClientTask]], size: int
) -> float:
    """Return the seconds of one client's step in a cohort of a size."""

    def seconds(steps: int) -> float:
        started = time.perf_counter()
        path.train(tasks(size, steps))
        return (time.perf_counter() - started) / (size * steps)

    first = seconds(1)
    steps = max(1, min(STEPS, int(PROBE_SECONDS / (size * first))))
    tries = max(1, min(TRIES, int(PROBE_SECONDS / (size * first * steps))))
    return min(seconds(steps) for _ in range(tries))  # others use this machine too


def _key(network: nn.Module, tasks: Sequence[ClientTask], how: tuple[object, ...]) -> str:
    """Return what tells measurements apart that may differ."""
    device = device_of(network)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    settings = tasks[0].settings
    parts = (
        torch.__version__,
        where,
        torch.get_num_threads(),
        repr(network),
        [(name, tuple(value.shape)) for name, value in network.state_dict().items()],
        tasks[0].examples.x.shape[1:],
        (settings.batch_size, settings.accumulation, settings.optimizer),
        how,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _read(file: Path) -> Measured | None:
    """Return what was measured before; None if it was not, or the file is not as it was written."""
    try:
        kept = read_sealed(file, file.name.encode())
    except OSError:
        return None
    if kept is None:
        return None
    values: dict[str, Any] = json.loads(kept)
    cohorts = {int(size): ms for size, ms in values["cohorts"].items()}
    return Measured(values["single"], cohorts, values["problem"])


def _write(file: Path, measured: Measured) -> None:
    """Keep what was measured, unless another process was first: all take the same then."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if _read(file) is None:
            write_sealed(file, json.dumps(asdict(measured)).encode(), file.name.encode())
