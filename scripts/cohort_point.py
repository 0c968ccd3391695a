"""One point of the workload ``cohort``: a way to train, so many clients a call.

Run as a script, with a :class:`Question` as JSON, this measures one, and prints it as JSON.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import psutil
import torch
from workloads import TRAINING

from fedge_sim.data.base import Examples, Resident, ResidentExamples, Standardisation
from fedge_sim.models import build_model, initialise
from fedge_sim.training import base
from fedge_sim.training.device import device

NETWORKS = {"cnn1d": ((6, 100), 6), "mlp": ((6, 100), 6), "cnn2d": ((3, 32, 32), 10)}
# One client at a time, in one process; then a cohort.
ALONE = ("reference", "single", "compiled")
COHORT = "cohort"
EXAMPLES = 96  # of a client: 3 steps
POINT_SECONDS, ENOUGH_SECONDS, ENOUGH_REPEATS = 20.0, 2.0, 5
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
MIB = 2**20


@dataclass(frozen=True)
class Question:
    """What a process is to measure: a way to train, so many clients a call.

    Attributes
    ----------
    network, path : str
    size : int
    folder : str
        For compiled steps.
    """

    network: str
    path: str
    size: int
    folder: str


@dataclass(frozen=True)
class Point:
    """What it found.

    Attributes
    ----------
    path : str
    size : int
        Clients of a call.
    seconds : float
        Of a call, the median.
    repeats : int
    cpu : float
        Seconds of a core for each second of those calls: with one thread on a CPU, less than 1
        where other programs were in the way.
    growth : int
        Bytes by which the process grew while it trained, at its peak; on a GPU, of its memory.
    free : int
        Bytes that were free before.
    """

    path: str
    size: int
    seconds: float
    repeats: int
    cpu: float
    growth: int
    free: int

    @property
    def rate(self) -> float:
        """Clients a second."""
        return self.size / self.seconds

    def __str__(self) -> str:
        memory = self.growth / MIB
        return (
            f"  {self.path:<12}{self.size:10}{self.rate:14.2f}{1000 / self.rate:14.2f}"
            f"{memory:14,.1f}{memory / self.size:14,.1f}{self.repeats:10}{self.cpu:10.2f}"
        )


def measure_point(question: Question) -> Point:
    """Train the same clients again and again, for a median of seconds and a peak of memory."""
    torch.set_num_threads(1)
    shape, num_classes = NETWORKS[question.network]
    network = build_model(question.network, shape, num_classes)
    initialise(network, torch.Generator().manual_seed(0))
    network.to(device())
    start = base.model_arrays(network)
    examples = make_examples(question.size * EXAMPLES, shape, num_classes)
    path = make_path(question, network)

    def call(size: int, rows: int) -> float:
        tasks = [client(number, rows, start, examples) for number in range(size)]
        started = time.perf_counter()
        path.train(tasks)
        return time.perf_counter() - started

    call(size=1, rows=2)  # loads libraries, compiles; with next to no memory of its own
    free = memory_free()
    peak = peak_of_memory()
    times: list[float] = []
    warm_up, cpu = call(question.size, EXAMPLES), time.process_time()
    while not times or (
        (len(times) < ENOUGH_REPEATS or sum(times) < ENOUGH_SECONDS)
        and warm_up + sum(times) + times[-1] < POINT_SECONDS
    ):
        times.append(call(question.size, EXAMPLES))
    return Point(
        path=question.path,
        size=question.size,
        seconds=statistics.median(times),
        repeats=len(times),
        cpu=(time.process_time() - cpu) / sum(times),
        growth=peak(),
        free=free,
    )


def make_path(question: Question, network: torch.nn.Module) -> base.TrainingPath:
    """Return a way to train, by its name."""
    module, name = {
        "reference": ("local", "Reference"),
        "single": ("single", "Single"),
        "compiled": ("single", "Single"),
        "cohort": ("cohort", "Cohort"),
    }[question.path]
    kind: Callable[..., base.TrainingPath] = getattr(
        import_module(f"fedge_sim.training.{module}"), name
    )
    if question.path == "compiled":
        return kind(network, Path(question.folder))
    return kind(network)


def make_examples(n: int, shape: tuple[int, ...], num_classes: int) -> Examples:
    """Return random examples, on the device where clients train."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((n, *shape), np.float32), rng.integers(num_classes, size=n)
    scale, here = Standardisation.identity(shape[0]), device()
    if here.type == "cpu":
        return Examples(x, y, scale)
    there = Resident(torch.from_numpy(x).to(here), torch.from_numpy(y).to(here))
    return ResidentExamples(x, y, scale, resident=there)


def client(
    number: int, rows: int, start: Mapping[str, np.ndarray], examples: Examples
) -> base.ClientTask:
    """Return one client's task, on the first of its rows."""
    settings = base.TrainSettings(
        lr=TRAINING["lr_init"],
        local_epochs=1,
        batch_size=int(TRAINING["batch_size"]),
        momentum=TRAINING["momentum"],
        weight_decay=TRAINING["weight_decay"],
        clip_norm=TRAINING["clip_norm"],
        label_smoothing=TRAINING["label_smoothing"],
    )
    own = np.arange(number * EXAMPLES, number * EXAMPLES + rows)
    return base.ClientTask(start, examples, own, settings, np.random.default_rng(number))


def memory_free() -> int:
    """Return the bytes that are free where clients train."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def peak_of_memory() -> Callable[[], int]:
    """Return a function that gives the bytes by which memory grew since now, at its peak."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        reserved = torch.cuda.memory_reserved()
        return lambda: torch.cuda.max_memory_reserved() - reserved
    with suppress(OSError):  # not allowed: then the peak may be that of the imports
        CLEAR_REFS.write_text("5")  # the resident set's peak starts anew
    before = psutil.Process().memory_info().rss

    def peak() -> int:
        if not STATUS.exists():  # not Linux
            return psutil.Process().memory_info().rss - before
        fields = dict(text.split(":", 1) for text in STATUS.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024 - before

    return peak


if __name__ == "__main__":
    print(json.dumps(asdict(measure_point(Question(**json.loads(sys.argv[1]))))))
