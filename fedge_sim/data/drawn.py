"""Devices by the thousand: each draws its examples from one pool, and only when it is used.

What a device draws depends on nothing but the seed and its number, so it is the same whenever
and wherever it is drawn. Examples of different devices may be the same ones.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import overload

import numpy as np
from numpy.typing import NDArray

from fedge_sim.config import Settings
from fedge_sim.data.base import ClientData, Dataset
from fedge_sim.data.split import split
from fedge_sim.errors import ConfigError
from fedge_sim.randomness import stream

KEPT = 256  # devices whose rows are kept: a cohort's, at most

Rows = NDArray[np.int64]


def are_drawn(settings: Settings) -> bool:
    """Whether devices draw their examples, and share out no dataset among them."""
    return settings.devices.enable and settings.devices.devices_per_leaf > 0


def drawn_from(dataset: Dataset, settings: Settings) -> ClientData:
    """Hold out a fifth of a dataset (``test``); the devices draw from the rest (``train``).

    Raises
    ------
    ConfigError
        If the rest is smaller than ``devices.subset_size``, or sizes are to be balanced.
    """
    if settings.data.partition_balanced:
        problem = "devices that draw their examples have as many each: must be false"
        raise ConfigError.at("app.config", "partition-balanced", True, problem)
    everything = np.arange(len(dataset))
    [whole] = split(dataset, [everything], settings.data.split, settings.seed)
    wanted, there = settings.devices.subset_size, len(whole.train)
    if wanted > there:
        problem = (
            f"is more than the {there} examples that a device can draw from, those left of "
            f"{len(dataset)} without what is held out: at most {there}, or use more data"
        )
        raise ConfigError.at("devices", "subset_size", wanted, problem)
    return whole


class DrawnClients(Sequence[ClientData]):
    """The rows of device 0, 1, ..., all to train on, drawn when they are asked for.

    With ``partition = "dirichlet"`` a device's mix of classes is drawn from the symmetric
    Dirichlet(partition_alpha) over the classes that occur, as in FedRevive (Askin et al. 2025), and
    its examples from that mix; with ``"iid"`` they are any of the pool. No device has an example
    twice. Hsu et al. 2019 draw from Dir(alpha p), with p the shares of the classes: their alpha is
    this one times the number of classes where all are alike.

    Parameters
    ----------
    y : int64 array (examples,)
        The classes of the dataset.
    pool : int64 array (n,)
        The rows that are drawn from.
    settings : Settings
    """

    def __init__(self, y: NDArray[np.int64], pool: Rows, settings: Settings) -> None:
        self._seed, self._size = settings.seed, settings.devices.subset_size
        self._devices, self._alpha = settings.hierarchy.num_clients, settings.data.partition_alpha
        one_kind = settings.data.partition == "iid"
        self._kinds = [pool] if one_kind else [pool[y[pool] == c] for c in np.unique(y[pool])]
        self._client = lru_cache(maxsize=KEPT)(self._draw)

    def __len__(self) -> int:
        return self._devices

    @overload
    def __getitem__(self, which: int) -> ClientData: ...
    @overload
    def __getitem__(self, which: slice) -> Sequence[ClientData]: ...
    def __getitem__(self, which: int | slice) -> ClientData | Sequence[ClientData]:
        devices = range(self._devices)[which]
        if isinstance(devices, range):
            return [self._client(device) for device in devices]
        return self._client(devices)

    def _draw(self, device: int) -> ClientData:
        rng = stream(self._seed, "device data", device)
        mix = rng.dirichlet(np.full(len(self._kinds), self._alpha))
        there = np.array([len(rows) for rows in self._kinds])
        counts = class_counts(rng, mix, there, self._size)
        drawn = [
            rng.choice(rows, count, replace=False, shuffle=False)
            for rows, count in zip(self._kinds, counts, strict=True)
        ]
        return ClientData(train=np.sort(np.concatenate(drawn)), test=np.empty(0, np.int64))


def class_counts(
    rng: np.random.Generator, mix: NDArray[np.float64], there: NDArray[np.int64], size: int
) -> NDArray[np.int64]:
    """Draw how many examples of each class a device gets.

    Parameters
    ----------
    rng : numpy Generator
    mix : float64 array (classes,)
        Shares of the classes, which add up to 1.
    there : int64 array (classes,)
        Examples of each class that there are: one with too few gives all, and what is missing
        is drawn anew from the others by their shares (equal ones if all of these are 0).
    size : int
        Examples of the device, at most all that are there.

    Returns
    -------
    int64 array (classes,)
    """
    counts = np.zeros_like(there)
    while missing := size - int(counts.sum()):
        free = counts < there
        shares = np.where(free, mix, 0.0)
        shares = shares if shares.any() else free.astype(float)
        counts = np.minimum(counts + rng.multinomial(missing, shares / shares.sum()), there)
    return counts
