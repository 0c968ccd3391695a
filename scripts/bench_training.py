"""The workload ``w1``: clients that train, under this application and under plain Flower.

Run as a script, this is one of our sides.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measuring import Measurement, header, measure_flower, measure_script, stamp

from fedge_sim.config import load_settings
from fedge_sim.data.split import TEST_SHARE
from fedge_sim.orchestrator import run
from fedge_sim.reporting.base import Callback, RoundRecord, RunInfo
from fedge_sim.reporting.tables import TableWriter
from fedge_sim.reporting.weights import WeightWriter
from fedge_sim.runtime.in_process import available_cores

OURS = "examples.npz"  # the same arrays as our dataset "arrays" takes them
BACKENDS = {"inprocess": "ours, in one process", "ray": "ours, Ray"}


@dataclass(frozen=True)
class Workload:
    """What both sides compute: random windows, and how clients train on them."""

    sizes: tuple[tuple[int, ...], ...]  # windows of each client, by leaf server
    training: Mapping[str, float]  # settings of [tool.flwr.hierarchy] that plain Flower has too
    window_shape: tuple[int, ...] = (6, 100)
    num_classes: int = 6
    model: str = "cnn1d"

    @property
    def client_sizes(self) -> tuple[int, ...]:
        """Windows of client 0, 1, ..."""
        return sum(self.sizes, ())

    @property
    def steps(self) -> int:
        """Batch steps of all clients in a round."""
        train = (size - round(TEST_SHARE * size) for size in self.client_sizes)
        batches = sum(math.ceil(n / self.training["batch_size"]) for n in train)
        return int(self.training["local_epochs"]) * batches

    def __str__(self) -> str:
        sizes = self.client_sizes
        return (
            f"{len(sizes)} clients, {sum(sizes):,} windows {self.window_shape}, {self.model}, "
            f"{self.steps:,} batch steps a round"
        )

    def write(self, folder: Path) -> None:
        """Make the arrays, from a fixed seed."""
        rng, n = np.random.default_rng(0), sum(self.client_sizes)
        folder.mkdir()
        x = rng.standard_normal((n, *self.window_shape), np.float32)
        y = rng.integers(self.num_classes, size=n)
        client = np.repeat(np.arange(len(self.client_sizes)), self.client_sizes)
        for name, array in (("x", x), ("y", y), ("client", client)):
            np.save(folder / f"{name}.npy", array)
        user = np.char.zfill(client.astype(str), 5)  # as text, users are in the same order
        np.savez(folder / OURS, X=x, y=y, user=user)


W1 = Workload(
    sizes=((2755,) * 3, (569,) * 3, (523,) * 3),
    training={
        "lr_init": 0.05,
        "local_epochs": 5,
        "batch_size": 32,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "clip_norm": 1.0,
        "label_smoothing": 0.1,
    },
)


class Stamps(Callback):
    """Notes when the first round starts and when each has ended, its result files written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_run_start(self, info: RunInfo) -> None:
        """Note the time."""
        stamp(self._folder)

    def on_round_end(self, record: RoundRecord) -> None:
        """Note the time, but fail if a client did: a round without it would look fast."""
        if not all(client.bytes_up for client in record.clients):
            raise RuntimeError(f"a client failed in round {record.global_round}")
        stamp(self._folder)


def bench(rounds: int, folder: Path) -> None:
    """Measure our sides and plain Flower, one after the other."""
    columns = ("s/round", "fastest", "slowest", "warm-up", "to start", "peak MiB", "other cores")
    print(header(f"w1: {W1}", rounds))
    print(f"{'':<22}" + "".join(f"{column:>10}" for column in columns[:-1]) + f"{columns[-1]:>13}")
    W1.write(folder / "data")
    ours = {}
    for backend, name in BACKENDS.items():
        ours[name] = measure_ours(backend, rounds + 1, folder / backend)
        print(line(name, ours[name]), flush=True)
    config: dict[str, str | float] = {
        "num-server-rounds": rounds + 1,
        "num-classes": W1.num_classes,
        "data-root": str(folder / "data"),
        **{key.replace("_", "-"): value for key, value in W1.training.items()},
    }
    plain = measure_flower(config, len(W1.client_sizes), folder / "plain-flower")
    print(line("plain Flower", plain), flush=True)
    print()
    for name, mine in ours.items():
        ratio, memory = mine.median / plain.median, mine.peak / plain.peak
        print(f"{f'{name} / plain Flower':<37}seconds {ratio:.2f}   memory {memory:.2f}")


def line(name: str, side: Measurement) -> str:
    """Return a side's line of the table."""
    measured = side.seconds[1:]
    times = (side.median, min(measured), max(measured), side.seconds[0], side.start)
    columns = "".join(f"{t:10.2f}" for t in times)
    return f"{name:<22}{columns}{side.peak:10,.0f}{side.other_cores:13.2f}"


def measure_ours(backend: str, rounds: int, folder: Path) -> Measurement:
    """Measure :func:`run_ours` in a process of its own."""
    return measure_script(__file__, [backend, str(rounds), str(folder)], folder)


def run_ours(backend: str, rounds: int, folder: Path) -> None:
    """Run this application from here, as ``python -m fedge_sim.orchestrator`` does."""
    tables = {
        "app.config.dataset": "arrays",
        "app.config.data-root": folder.parent / "data" / OURS,
        "app.config.cache-dir": folder / "cache",
        "app.config.partition": "user",
        "app.config.model": W1.model,
        "app.config.num-classes": W1.num_classes,
        "app.config.output-dir": folder / "results",
        "hierarchy.num_servers": len(W1.sizes),
        "hierarchy.clients_per_server": [len(leaf) for leaf in W1.sizes],
        "hierarchy.global_rounds": rounds,
        "runtime.backend": backend,
        "runtime.num_workers": available_cores(),  # as many as plain Flower takes
    } | {f"hierarchy.{key}": value for key, value in W1.training.items()}
    settings = load_settings(assignments=[f"{key}={value}" for key, value in tables.items()])
    run(settings, [TableWriter(), WeightWriter(), Stamps(folder)])


if __name__ == "__main__":
    run_ours(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
