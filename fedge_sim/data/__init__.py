"""Datasets by name, and the federated data of a run: one array, an index array per client."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedge_sim.config import AppConfig, Settings
from fedge_sim.data import arrays, cifar10, digits, hhar, hhar_synthetic, uci_har
from fedge_sim.data.base import ClientData, Dataset, Examples, Standardisation
from fedge_sim.data.partition import MIN_EXAMPLES, partition
from fedge_sim.data.split import split
from fedge_sim.data.store import Recipe, Tell, cache_folder, open_dataset, tell_nobody
from fedge_sim.errors import ConfigError, suggest

DATASETS: dict[str, Callable[[AppConfig], Recipe]] = {
    "arrays": arrays.recipe,
    "cifar10": cifar10.recipe,
    "digits": digits.recipe,
    "hhar": hhar.recipe,
    "hhar-synthetic": hhar_synthetic.recipe,
    "uci-har": uci_har.recipe,
}


@dataclass(frozen=True)
class FederatedData:
    """The examples of all clients, and who holds which.

    Attributes
    ----------
    dataset : Dataset
    clients : tuple of ClientData
        Rows of client 0, 1, ...
    scales : sequence of Standardisation
        Of client 0, 1, ...: from its own training examples, or from those of all.
    """

    dataset: Dataset
    clients: tuple[ClientData, ...]
    scales: Sequence[Standardisation]

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.dataset.example_shape

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.dataset.names.classes

    def examples(self, client: int) -> Examples:
        """Return all examples as a client sees them."""
        return Examples(self.dataset.x, self.dataset.y, self.scales[client])


def load_dataset(config: AppConfig, tell: Tell = tell_nobody) -> Dataset:
    """Open the dataset of the settings; its store is made first where there is none.

    Raises
    ------
    ConfigError, DataError
        If the dataset is unknown, missing or damaged, or has another number of classes.
    """
    if config.dataset not in DATASETS:
        problem = f"unknown; {suggest(config.dataset, DATASETS)}"
        raise ConfigError.at("app.config", "dataset", config.dataset, problem)
    try:
        recipe = DATASETS[config.dataset](config)
    except OSError as error:  # of looking for its files
        problem = f"cannot be read ({error.strerror})"
        raise ConfigError.at("app.config", "data-root", config.data_root, problem) from None
    dataset = open_dataset(recipe, cache_folder(config), tell)
    num_classes = len(dataset.names.classes)
    if config.num_classes not in (0, num_classes):
        raise ConfigError.at(
            "app.config",
            "num-classes",
            config.num_classes,
            f"dataset {config.dataset!r} has {num_classes} classes; allowed: {num_classes}, or "
            "0 for what the dataset has",
        )
    return dataset


def federate(settings: Settings) -> FederatedData:
    """Open the dataset of the settings and deal its examples out to the clients.

    Raises
    ------
    ConfigError, DataError
        If the dataset or partition is unknown, missing, or does not fit the topology.
    """
    config = settings.data
    dataset = load_dataset(config)
    clients = split(dataset, partition(dataset, settings), config.split, settings.seed)
    for client, own in enumerate(clients):
        if len(own.train) < MIN_EXAMPLES - 1:
            raise ConfigError.at(
                "app.config",
                "split",
                config.split,
                f"client {client} keeps {len(own.train)} examples for training after the windows "
                "that overlap with held-out ones are left out; use more data or fewer clients",
            )
    return FederatedData(dataset, clients, _scales(config, dataset, clients))


def _scales(
    config: AppConfig, dataset: Dataset, clients: Sequence[ClientData]
) -> Sequence[Standardisation]:
    if config.standardise == "client":
        return [Standardisation.of(dataset.x, client.train) for client in clients]
    if config.standardise == "global":
        scale = Standardisation.of(dataset.x, np.concatenate([c.train for c in clients]))
    else:
        scale = Standardisation.identity(dataset.example_shape[0])
    return [scale] * len(clients)


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
