"""Datasets by name, and the federated data of a run: one array, an index array per client."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedge_sim.config import AppConfig, Settings
from fedge_sim.data import hhar_synthetic, uci_har
from fedge_sim.data.base import WindowDataset
from fedge_sim.data.partition import PARTITIONS, ClientData, check_sizes, split
from fedge_sim.errors import ConfigError, suggest

DATASETS: dict[str, Callable[[AppConfig], WindowDataset]] = {
    "hhar-synthetic": hhar_synthetic.load,
    "uci-har": uci_har.load,
}


@dataclass(frozen=True)
class FederatedData:
    """Standardised windows of all clients, and who holds which.

    Attributes
    ----------
    x : float32 tensor (windows, channels, samples)
    y : int64 tensor (windows,)
    clients : tuple of ClientData
        Rows of client 0, 1, ...
    classes : tuple of str
    mean, std : float32 array (channels,)
        What the windows were standardised with: statistics of all training windows.
    """

    x: torch.Tensor
    y: torch.Tensor
    clients: tuple[ClientData, ...]
    classes: tuple[str, ...]
    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    @property
    def window_shape(self) -> tuple[int, int]:
        """Channels and samples of a window."""
        return self.x.shape[1], self.x.shape[2]


def federate(settings: Settings) -> FederatedData:
    """Read the dataset of the settings and hand its windows to the clients.

    Raises
    ------
    ConfigError, DataError
        If the dataset or partition is unknown, missing, or does not fit the topology.
    """
    config = settings.data
    load = _named(DATASETS, "dataset", config.dataset)
    partition = _named(PARTITIONS, "partition", config.partition)
    dataset = load(config)
    if len(dataset.classes) != config.num_classes:
        raise ConfigError.at(
            "app.config",
            "num-classes",
            config.num_classes,
            f"dataset {config.dataset!r} has {len(dataset.classes)} classes",
        )
    rows = partition(dataset, settings.hierarchy.clients_per_server)
    check_sizes(rows, settings.hierarchy.clients_per_server)
    clients = tuple(split(r, settings.seed, client) for client, r in enumerate(rows))
    dataset, mean, std = dataset.standardised(np.concatenate([c.train for c in clients]))
    return FederatedData(
        x=torch.from_numpy(dataset.x),
        y=torch.from_numpy(dataset.y),
        clients=clients,
        classes=dataset.classes,
        mean=mean,
        std=std,
    )


class _LastUsed:
    """The federated data that this process used last: one copy, shared by its threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: tuple[AppConfig, tuple[int, ...]] | None = None
        self._data: FederatedData | None = None

    def get(self, settings: Settings) -> FederatedData:
        key = (settings.data, settings.hierarchy.clients_per_server)
        with self._lock:
            if self._data is None or key != self._key:
                self._data, self._key = federate(settings), key
            return self._data


federated_data = _LastUsed().get


T = TypeVar("T")


def _named(registry: dict[str, T], key: str, name: str) -> T:
    if name not in registry:
        raise ConfigError.at("app.config", key, name, f"unknown; {suggest(name, registry)}")
    return registry[name]
