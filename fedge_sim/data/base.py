"""What a dataset is: examples in one memory-mapped array, and where each comes from."""

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedge_sim.config import AppConfig

log = logging.getLogger(__name__)

# Rows of x that are worked on at a time where all of a dataset is gone through, in bytes.
CHUNK_BYTES = 32 * 2**20
CPU = torch.device("cpu")

T = TypeVar("T")


class Same(Sequence[T]):
    """One value that all of many clients have, in the place of a list of it."""

    def __init__(self, value: T, length: int) -> None:
        self._value, self._length = value, length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, which: int) -> T: ...
    @overload
    def __getitem__(self, which: slice) -> Sequence[T]: ...
    def __getitem__(self, which: int | slice) -> T | Sequence[T]:
        places = range(self._length)[which]
        return Same(self._value, len(places)) if isinstance(places, range) else self._value


@dataclass(frozen=True)
class Names:
    """What the codes of a dataset stand for.

    Attributes
    ----------
    classes : tuple of str
    users : tuple of str
        Sorted as text (partitions take whole numbers in their order); empty where a dataset
        knows none, as the next two.
    models, devices : tuple of str
    groups : tuple of int
        Of a made-up dataset, the group that each user was planted in, from 0.
    """

    classes: tuple[str, ...]
    users: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    groups: tuple[int, ...] = field(default=(), kw_only=True)


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
    recorded : bool
        Whether the source said recording and position; if not, each example is a recording.
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
    recorded: bool = True

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
        In the units of the channels; a feature vector has a channel for each feature. With
        another axis before it they are of several clients, or of as many examples. The
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

    def of_each(self, which: NDArray[np.int64]) -> "Standardisation":
        """Take means and deviations (n, channels) out of those of several clients."""
        return Standardisation(self.mean[which], self.std[which])

    def apply(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scale examples (n, channels, ...) in place, and return them."""
        x -= _along_channels(self.mean, x.ndim)
        x /= _along_channels(self.std, x.ndim)
        return x


def form_of(example_shape: Sequence[int]) -> str:
    """Say what an example is, in words: ``6 channels x 100 samples``."""
    words = {1: ("feature",), 2: ("channel", "sample")}.get(len(example_shape), ("channel",))
    parts = [
        f"{n} {word}{'s' if n != 1 else ''}" for n, word in zip(example_shape, words, strict=False)
    ]
    if len(example_shape) > 2:
        parts.append(f"{' x '.join(map(str, example_shape[1:]))} pixels")
    return " x ".join(parts)


def warn_of_form(config: AppConfig, example_shape: Sequence[int]) -> None:
    """Say it if windows look as if their axes were the other way round."""
    if config.dataset == "arrays" and config.layout == "auto" and len(example_shape) == 2:
        channels, samples = example_shape
        if channels > samples:
            log.warning(
                "X is read as windows of %s: if they are %d samples of %d channels, set "
                'app.config.layout = "channels-last", and else "channels-first"',
                *(form_of(example_shape), channels, samples),
            )


def _along_channels(values: NDArray[Any], ndim: int) -> NDArray[Any]:
    """Return values ([n,] channels) in a shape that broadcasts over (n, channels, ...)."""
    return values.reshape(*values.shape, *[1] * (ndim - 2))


def _chunks(x: NDArray[np.float32], rows: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    size = max(1, CHUNK_BYTES // max(1, x[0].nbytes))
    return (x[rows[i : i + size]] for i in range(0, len(rows), size))


@dataclass(frozen=True)
class Examples:
    """Examples as a client sees them: standardised when they are gathered, not before.

    A standardised copy of the whole array would be private to each process.

    Attributes
    ----------
    x, y : arrays
        Of all examples, as in :class:`Dataset`; y may be other labels than the dataset's.
    scale : Standardisation
    pinned : bool
        Batches go to a GPU from page-locked memory, and the host does not wait for them.
    owner : int64 array (examples,), optional
        Which of the clients in ``scale`` each example is scaled as, where they are several.
    """

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    scale: Standardisation
    pinned: bool = False
    owner: NDArray[np.int64] | None = None

    def batch(self, rows: NDArray[np.int64], device: torch.device = CPU) -> tuple[Tensor, Tensor]:
        """Return the standardised inputs (n, *shape) and classes (n,) of some rows."""
        scale = self.scale if self.owner is None else self.scale.of_each(self.owner[rows])
        x = torch.from_numpy(scale.apply(self.x[rows]))
        return self._bring(x, device), self._bring(torch.from_numpy(self.y[rows]), device)

    def _bring(self, values: Tensor, device: torch.device) -> Tensor:
        if self.pinned and device.type == "cuda":
            return values.pin_memory().to(device, non_blocking=True)
        return values.to(device)


@dataclass(frozen=True)
class Resident:
    """All examples of a dataset on a device, raw: x float32 (examples, *shape), y int64."""

    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, dataset: Dataset, device: torch.device) -> "Resident":
        """Copy a dataset to a device, chunk by chunk."""
        x = torch.empty(dataset.x.shape, device=device)
        size = max(1, CHUNK_BYTES // max(1, dataset.x[0].nbytes))
        for i in range(0, len(dataset), size):
            x[i : i + size] = torch.tensor(dataset.x[i : i + size])
        return cls(x, x.new_empty(0, dtype=torch.int64)).labelled(dataset.y)

    def labelled(self, y: NDArray[np.int64]) -> "Resident":
        """Return the same examples, which are not copied, with these labels."""
        device = self.x.device
        there = torch.tensor(y).to(device)
        if device.type == "cuda":  # other threads read it on streams of their own
            torch.cuda.synchronize(device)
        return Resident(self.x, there)


@dataclass(frozen=True)
class ResidentExamples(Examples):
    """Examples that a device holds: batches for it are gathered and standardised there."""

    resident: Resident = field(kw_only=True)

    def batch(self, rows: NDArray[np.int64], device: torch.device = CPU) -> tuple[Tensor, Tensor]:
        """Return the standardised inputs (n, *shape) and classes (n,) of some rows."""
        if device != self.resident.x.device:
            return super().batch(rows, device)
        here = self._bring(torch.tensor(rows), device)
        mean, std = self._scale_there
        if self.owner is not None:
            own = self._bring(torch.from_numpy(self.owner[rows]), device)
            mean, std = mean[own], std[own]
        return (self.resident.x[here] - mean) / std, self.resident.y[here]

    @cached_property
    def _scale_there(self) -> list[Tensor]:
        x = self.resident.x
        scale = (self.scale.mean, self.scale.std)
        return [torch.tensor(_along_channels(values, x.ndim)).to(x.device) for values in scale]


class _LastResident:
    """The dataset that this process last put on a device: one copy, shared by its threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: tuple[str, torch.device] | None = None
        self._resident: Resident | None = None
        self._labelled: list[tuple[NDArray[np.int64], Resident]] = []

    def __call__(
        self, dataset: Dataset, device: torch.device, y: NDArray[np.int64] | None = None
    ) -> Resident:
        """Return the dataset there, with its own labels or with other ones."""
        key = (dataset.content, device)
        with self._lock:
            if self._resident is None or key != self._key:
                self._resident, self._labelled = None, []  # make room first
                self._resident, self._key = Resident.of(dataset, device), key
            if y is None:
                return self._resident
            for known, there in self._labelled:
                if known is y:
                    return there
            # A run has two at most: swapped ones, and those of all clients together.
            self._labelled = [*self._labelled[-1:], (y, self._resident.labelled(y))]
            return self._labelled[-1][1]


resident = _LastResident()


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

    def listed(self, sides_given: bool) -> list[int] | dict[str, list[int]]:
        """Return the rows as ``partition-file`` takes them, in two lists if it gave them so."""
        if not sides_given:
            return self.rows.tolist()  # type: ignore[no-any-return]
        return {"train": self.train.tolist(), "test": self.test.tolist()}


@dataclass(frozen=True)
class DataSummary:
    """What the clients of a run hold, known without their examples.

    Attributes
    ----------
    clients : tuple of ClientData
        The rows of client 0, 1, ...; empty for devices that draw theirs.
    example_shape : tuple of int
    classes : tuple of str
    scales : tuple of Standardisation
        What client 0, 1, ... standardises its examples with; all the same one unless
        ``standardise`` is ``"client"``. One for all devices that draw their examples.
    content : str
        SHA-256 of the dataset, or of each in turn where nodes hold different ones.
    groups : tuple of int
        The planted group of client 0, 1, ...; -1 where its users belong to several. Empty where
        none are planted.
    num_held_out : int
        Where devices draw their examples, how many none draws; else 0.
    sides_given : bool
        Whether ``partition-file`` says what is held out; else ``split`` does.
    """

    clients: tuple[ClientData, ...]
    example_shape: tuple[int, ...]
    classes: tuple[str, ...]
    scales: Sequence[Standardisation]
    content: str
    groups: tuple[int, ...] = ()
    num_held_out: int = 0
    sides_given: bool = False

    @property
    def form(self) -> str:
        """What an example is, in words: ``6 channels x 100 samples``."""
        return form_of(self.example_shape)

    @cached_property
    def num_train(self) -> tuple[int, ...]:
        """Training examples of client 0, 1, ..."""
        return tuple(len(client.train) for client in self.clients)

    @cached_property
    def num_test(self) -> tuple[int, ...]:
        """Test examples of client 0, 1, ..."""
        return tuple(len(client.test) for client in self.clients)
