"""Datasets by name, and the federated data of a run: one array, an index array per client."""

import importlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from fedge_sim.config import AppConfig, Settings
from fedge_sim.data.base import (
    CPU,
    ClientData,
    Dataset,
    Examples,
    ResidentExamples,
    Same,
    Standardisation,
    resident,
)
from fedge_sim.data.drawn import DrawnClients, are_drawn, drawn_from
from fedge_sim.data.groups import client_groups, combined, swapped_clients, swapped_labels
from fedge_sim.data.partition import MIN_TRAIN, partition
from fedge_sim.data.split import split
from fedge_sim.data.store import Recipe, Tell, cache_folder, open_dataset, tell_nobody
from fedge_sim.errors import ConfigError, suggest

# The module of each; imported when it is used, as some need libraries that take long to load.
DATASETS = {
    "arrays": "arrays",
    "cifar10": "cifar10",
    "digits": "digits",
    "hhar": "hhar",
    "hhar-synthetic": "hhar_synthetic",
    "uci-har": "uci_har",
}


@dataclass(frozen=True)
class FederatedData:
    """The examples of all clients, and who holds which.

    Attributes
    ----------
    dataset : Dataset
    clients : sequence of ClientData
        Rows of client 0, 1, ...
    scales : sequence of Standardisation
        Of client 0, 1, ...: from its own training examples, or from those of all.
    labels : mapping of int to int64 array (examples,)
        What takes the place of ``dataset.y`` for the clients whose labels are swapped, one
        array for all.
    groups : tuple of int
        As in :class:`DataSummary`.
    whole : ClientData, optional
        Where devices draw their examples: from which (``train``), and what is held out (``test``).
    sides_given : bool
        As in :class:`DataSummary`.
    """

    dataset: Dataset
    clients: Sequence[ClientData]
    scales: Sequence[Standardisation]
    labels: Mapping[int, NDArray[np.int64]] = field(default_factory=dict)
    groups: tuple[int, ...] = ()
    whole: ClientData | None = None
    sides_given: bool = False

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.dataset.example_shape

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.dataset.names.classes

    @property
    def held_out(self) -> NDArray[np.int64]:
        """The rows (n,) that no device draws; none where clients have tests of their own."""
        return np.empty(0, np.int64) if self.whole is None else self.whole.test

    def examples(
        self,
        client: int,
        device: torch.device = CPU,
        *,
        caching: bool = False,
        pipelining: bool = False,
    ) -> Examples:
        """Return all examples as a client sees them.

        Parameters
        ----------
        client : int
        device : torch.device
            Where they will be asked for.
        caching : bool
            Whether to keep all of them there, unless it is the CPU.
        pipelining : bool
            Whether batches go there while it computes.
        """
        plain = Examples(self.dataset.x, self.labels_of(client), self.scales[client], pipelining)
        return self._brought(plain, device) if caching else plain

    def labels_of(self, client: int) -> NDArray[np.int64]:
        """Return the labels (examples,) of all examples as a client sees them."""
        return self.labels.get(client, self.dataset.y)

    def pooled(
        self, device: torch.device = CPU, *, caching: bool = False, pipelining: bool = False
    ) -> tuple[Examples, NDArray[np.int64]]:
        """Return the examples of all clients, each as its own client sees it, and their rows.

        Parameters are those of :meth:`examples`.

        Returns
        -------
        examples : Examples
        rows : int64 array (n,)
            What all clients train on, in ascending order.
        """
        y, scale, owner = self._pool
        plain = Examples(self.dataset.x, y, scale, pipelining, owner)
        rows = np.sort(np.concatenate([client.train for client in self.clients]))
        return self._brought(plain, device) if caching else plain, rows

    @cached_property
    def _pool(self) -> tuple[NDArray[np.int64], Standardisation, NDArray[np.int64] | None]:
        """Return all clients' labels (examples,), scale and, if they differ in it, whose it is."""
        y = self.dataset.y
        if self.labels:
            y = y.copy()
            for client, labels in self.labels.items():
                rows = self.clients[client].rows
                y[rows] = labels[rows]
        if isinstance(self.scales, Same):
            return y, self.scales[0], None
        owner = np.zeros(len(y), np.int64)
        for client, own in enumerate(self.clients):
            owner[own.rows] = client
        mean, std = (np.stack([getattr(s, key) for s in self.scales]) for key in ("mean", "std"))
        return y, Standardisation(mean, std), owner

    def _brought(self, plain: Examples, device: torch.device) -> Examples:
        """Return examples whose values are kept on a device, unless it is the CPU."""
        if device.type == "cpu":
            return plain
        there = resident(self.dataset, device, None if plain.y is self.dataset.y else plain.y)
        return ResidentExamples(**vars(plain), resident=there)


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
        module = importlib.import_module(f"fedge_sim.data.{DATASETS[config.dataset]}")
        recipe: Recipe = module.recipe(config)
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
    if are_drawn(settings):
        return _of_devices(settings, dataset)
    dealt = partition(dataset, settings)
    clients = split(dataset, dealt, config.split, settings.seed)
    for client, own in enumerate(clients):
        if len(own.train) < MIN_TRAIN:
            raise ConfigError.at(
                "app.config",
                "split",
                config.split,
                f"client {client} keeps {len(own.train)} examples for training after the windows "
                f"that overlap with held-out ones are left out; allowed: at least {MIN_TRAIN}; use "
                'more data or fewer clients, or split = "random"',
            )
    groups = client_groups(dataset, clients)
    labels: dict[int, NDArray[np.int64]] = {}
    swapped = swapped_clients(config.label_swap, len(clients))
    if config.label_swap and not swapped:
        problem = f"is none of {len(clients)} clients: allowed: 0, or a share of one at least"
        raise ConfigError.at("app.config", "label-swap", config.label_swap, problem)
    if swapped:
        num_classes = len(dataset.names.classes)
        if num_classes < 2:
            problem = f"there is no other label to swap with: {num_classes} class in the dataset"
            raise ConfigError.at("app.config", "label-swap", config.label_swap, problem)
        labels = dict.fromkeys(swapped, swapped_labels(dataset.y, num_classes, settings.seed))
        is_swapped = [int(client in swapped) for client in range(len(clients))]
        groups = combined(groups or (0,) * len(clients), is_swapped)
    scales = _scales(config, dataset, clients)
    given = isinstance(dealt[0], ClientData)
    return FederatedData(dataset, clients, scales, labels, groups, sides_given=given)


def _of_devices(settings: Settings, dataset: Dataset) -> FederatedData:
    """Let devices draw their examples; however many they are, this costs the same."""
    whole = drawn_from(dataset, settings)
    clients = DrawnClients(dataset.y, whole.train, settings)
    [scale] = _scales(settings.data, dataset, [whole])
    return FederatedData(dataset, clients, Same(scale, len(clients)), whole=whole)


def _scales(
    config: AppConfig, dataset: Dataset, clients: Sequence[ClientData]
) -> Sequence[Standardisation]:
    if config.standardise == "client":
        return [Standardisation.of(dataset.x, client.train) for client in clients]
    if config.standardise == "global":
        scale = Standardisation.of(dataset.x, np.concatenate([c.train for c in clients]))
    else:
        scale = Standardisation.identity(dataset.example_shape[0])
    return Same(scale, len(clients))


class _LastUsed:
    """The federated data that this process used last: one copy, shared by its threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: tuple[AppConfig, tuple[int, ...], int] | None = None
        self._data: FederatedData | None = None
        self.times_opened = 0

    def __call__(self, settings: Settings) -> FederatedData:
        drawn = settings.devices.subset_size if are_drawn(settings) else 0
        key = (settings.data, settings.hierarchy.clients_per_server, drawn)
        with self._lock:
            if self._data is None or key != self._key:
                self._data, self._key = federate(settings), key
                self.times_opened += 1
            return self._data


federated_data = _LastUsed()
