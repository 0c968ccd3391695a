"""The workloads of clients that train: random examples, and how all sides train on them."""

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Self

import numpy as np

from fedge_sim.data.split import TEST_SHARE

OURS = "examples.npz"  # the same arrays as our dataset "arrays" takes them
CHUNK_BYTES = 32 * 2**20

# Settings of [tool.flwr.hierarchy] that every side has.
TRAINING = {
    "lr_init": 0.05,
    "local_epochs": 5,
    "local_steps": 0,
    "batch_size": 32,
    "eval_batch_size": 64,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "clip_norm": 1.0,
    "label_smoothing": 0.1,
}


@dataclass(frozen=True)
class Workload:
    """What all sides compute.

    Attributes
    ----------
    name : str
    sizes : sequence of sequence of int
        Examples of each client, those held out included, by leaf server.
    training : mapping
        The settings :data:`TRAINING`, with this workload's values.
    example_shape : sequence of int
    num_classes : int
    model : str
    """

    name: str
    sizes: Sequence[Sequence[int]]
    training: Mapping[str, float]
    example_shape: Sequence[int] = (6, 100)
    num_classes: int = 6
    model: str = "cnn1d"

    @property
    def client_sizes(self) -> tuple[int, ...]:
        """Examples of client 0, 1, ..."""
        return tuple(chain.from_iterable(self.sizes))

    @property
    def batches(self) -> list[int]:
        """The examples of every batch step of all clients in a round."""
        train = (size - round(TEST_SHARE * size) for size in self.client_sizes)
        return [size for n in train for size in batch_sizes(n, self.training)]

    def __str__(self) -> str:
        sizes = self.client_sizes
        return (
            f"{self.name}: {len(sizes)} clients, {sum(sizes):,} examples "
            f"{tuple(self.example_shape)}, {self.model}, {len(self.batches):,} batch steps a round"
        )

    def to_json(self) -> str:
        """Return text that :meth:`from_json` reads back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read back what :meth:`to_json` wrote."""
        return cls(**json.loads(text))

    def yardstick_config(self, data: Path, rounds: int) -> dict[str, str | float]:
        """Return what plain Flower and the bare loop are told, in plain Flower's words."""
        return {
            "data-root": str(data),
            "model": self.model,
            "num-classes": self.num_classes,
            "num-server-rounds": rounds,
            **{key.replace("_", "-"): value for key, value in self.training.items()},
        }

    def write(self, folder: Path) -> None:
        """Make the arrays, from a fixed seed, in little memory."""
        rng, n = np.random.default_rng(0), sum(self.client_sizes)
        folder.mkdir()
        shape = (n, *self.example_shape)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        rows = max(1, CHUNK_BYTES // (4 * math.prod(self.example_shape)))
        with (folder / "x.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, n, rows):
                part = (min(rows, n - start), *self.example_shape)
                rng.standard_normal(part, np.float32).tofile(file)
        client = np.repeat(np.arange(len(self.client_sizes)), self.client_sizes)
        user = np.char.zfill(client.astype(str), 5)  # as text, users are in the same order
        y = rng.integers(self.num_classes, size=n)
        for name, array in (("y", y), ("client", client), ("user", user)):
            np.save(folder / f"{name}.npy", array)
        with zipfile.ZipFile(folder / OURS, "w") as archive:  # what numpy.savez makes
            for name, member in (("x", "X"), ("y", "y"), ("user", "user")):
                archive.write(folder / f"{name}.npy", f"{member}.npy")


def batch_sizes(n: int, training: Mapping[str, float]) -> list[int]:
    """Return the examples of every batch step of a client with n training examples."""
    size, steps = int(training["batch_size"]), int(training["local_steps"])
    epoch = [min(size, n - start) for start in range(0, n, size)]
    return list(islice(cycle(epoch), steps)) if steps else epoch * int(training["local_epochs"])


W1 = Workload("w1", ((2755,) * 3, (569,) * 3, (523,) * 3), TRAINING)
# All of HHAR.
W1_FULL = Workload("w1-full", ((55108,) * 3, (11381,) * 3, (10463,) * 3), TRAINING)
# Devices of 350 training images, as 20 % are held out.
CIFAR = Workload(
    "cifar",
    ((438,) * 100,),
    TRAINING | {"local_steps": 25},
    example_shape=(3, 32, 32),
    num_classes=10,
    model="cnn2d",
)
