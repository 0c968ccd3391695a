"""What a dataset is: examples in one memory-mapped array, and where each comes from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Rows of x that are worked on at a time where all of a dataset is gone through, in bytes.
CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Names:
    """What the codes of a dataset stand for.

    Attributes
    ----------
    classes : tuple of str
    users : tuple of str
        Sorted as text; empty where a dataset knows none, as the next two.
    models, devices : tuple of str
    """

    classes: tuple[str, ...]
    users: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """An opened store: read-only maps of its files, shared by all processes that open it.

    Attributes
    ----------
    x : float32 array (examples, *shape)
        In the units of the source. Sensor windows are (channels, samples), the channels in
        the order acc_x, acc_y, acc_z, gyro_x, gyro_y, gyro_z; images (channels, height, width).
    y : int64 array (examples,)
        Class of each example, an index into ``names.classes``.
    user, model, device : int32 array (examples,)
        Where it was recorded, an index into the names; -1 where that is not known.
    recording : int32 array (examples,)
        The recording that a window was cut from; recordings that several devices of one person
        made at the same time count as one.
    position : int32 array (examples,)
        First sample of the window in its recording: two windows of one recording share
        samples, or time, if their positions differ by less than their length.
    names : Names
    content : str
        SHA-256 of the arrays: the same content has the same value on every machine.
    report : mapping
        What was read and what was left out when the store was made.
    """

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    user: NDArray[np.int32]
    model: NDArray[np.int32]
    device: NDArray[np.int32]
    recording: NDArray[np.int32]
    position: NDArray[np.int32]
    names: Names
    content: str
    report: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.y)

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.x.shape[1:]


@dataclass(frozen=True)
class Standardisation:
    """Scales every channel: (x - mean) / std.

    Attributes
    ----------
    mean, std : float32 array (channels,)
        In the units of the channels; a feature vector has a channel for each feature. The
        deviation of a channel that never changes is 1, so that a test example that differs
        there stays of its size.
    """

    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    @classmethod
    def of(cls, x: NDArray[np.float32], rows: NDArray[np.int64]) -> "Standardisation":
        """Take mean and deviation of every channel over the given examples.

        Parameters
        ----------
        x : float32 array (examples, channels, ...)
        rows : int64 array (n,)
            The examples that give the statistics: training examples only.
        """
        rows = np.sort(rows)  # a map is read fastest in order
        axes = (0, *range(2, x.ndim))
        per_channel = len(rows) * x[0, 0].size
        # Two passes in float64, chunk by chunk: exact, whatever the units, in little memory.
        total = sum(part.sum(axis=axes, dtype=np.float64) for part in _chunks(x, rows))
        mean = np.asarray(total / per_channel)
        squares = sum(
            np.square(part - _along_channels(mean, part.ndim)).sum(axis=axes)
            for part in _chunks(x, rows)
        )
        std = np.sqrt(np.asarray(squares / per_channel))
        std[std <= 1e-12 * abs(mean)] = 1.0  # 0, but for rounding
        return cls(mean.astype(np.float32), std.astype(np.float32) + np.float32(1e-8))

    @classmethod
    def identity(cls, channels: int) -> "Standardisation":
        """Leave the values as they are."""
        return cls(np.zeros(channels, np.float32), np.ones(channels, np.float32))

    def apply(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scale examples (n, channels, ...) in place, and return them."""
        x -= _along_channels(self.mean, x.ndim)
        x /= _along_channels(self.std, x.ndim)
        return x


def _along_channels(values: NDArray[Any], ndim: int) -> NDArray[Any]:
    """Return values (channels,) in a shape that broadcasts over (n, channels, ...)."""
    return values.reshape(-1, *[1] * (ndim - 2))


def _chunks(x: NDArray[np.float32], rows: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    size = max(1, CHUNK_BYTES // max(1, x[0].nbytes))
    return (x[rows[i : i + size]] for i in range(0, len(rows), size))


@dataclass(frozen=True)
class Examples:
    """Examples as a client sees them: standardised when they are gathered, not before.

    A standardised copy of the whole array would be private to each process.
    """

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    scale: Standardisation

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return the standardised inputs (n, *shape) and classes (n,) of some rows."""
        x = self.scale.apply(self.x[rows])
        return torch.from_numpy(x), torch.from_numpy(self.y[rows])


@dataclass(frozen=True)
class ClientData:
    """A client's examples, as row numbers of the dataset.

    Attributes
    ----------
    train, test : int64 array (n,)
        Disjoint rows, in ascending order.
    left_out : int64 array (n,)
        Rows of this client on neither side: windows that overlap with held-out ones.
    """

    train: NDArray[np.int64]
    test: NDArray[np.int64]
    left_out: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def rows(self) -> NDArray[np.int64]:
        """All rows that were dealt out to the client, in ascending order."""
        return np.sort(np.concatenate([self.train, self.test, self.left_out]))


@dataclass(frozen=True)
class DataSummary:
    """What the clients of a run hold, known without their examples.

    Attributes
    ----------
    clients : tuple of ClientData
        The rows of client 0, 1, ...
    example_shape : tuple of int
    classes : tuple of str
    scales : tuple of Standardisation
        What client 0, 1, ... standardises its examples with; all the same one unless
        ``standardise`` is ``"client"``.
    content : str
        SHA-256 of the dataset, or of each in turn where nodes hold different ones.
    """

    clients: tuple[ClientData, ...]
    example_shape: tuple[int, ...]
    classes: tuple[str, ...]
    scales: Sequence[Standardisation]
    content: str

    @cached_property
    def num_train(self) -> tuple[int, ...]:
        """Training examples of client 0, 1, ..."""
        return tuple(len(client.train) for client in self.clients)

    @cached_property
    def num_test(self) -> tuple[int, ...]:
        """Test examples of client 0, 1, ..."""
        return tuple(len(client.test) for client in self.clients)
