"""A real run in float64 on what is given: first model, examples, their order, who takes part.

All else is the program's own: orchestrator, leaf servers, messages, clients, ways to train, cloud.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedge_sim import client, client_app, cloud, records
from fedge_sim.config import load_settings
from fedge_sim.data import FederatedData
from fedge_sim.data.base import ClientData, Dataset, Names, Same, Standardisation
from fedge_sim.leaf import LeafServer
from fedge_sim.models import MODELS, Model
from fedge_sim.orchestrator import Orchestrator
from fedge_sim.reporting.base import Callback
from fedge_sim.runtime.in_process import InProcessGrid
from fedge_sim.training.base import load_arrays, model_arrays

Rows = NDArray[np.int64]
_numbers = count()  # a network's name is used once: a thread keeps the one that it used last


@dataclass(frozen=True)
class Given:
    """What a run would otherwise draw or look up.

    Attributes
    ----------
    network : nn.Module
        In float64, with the values that the run begins with.
    data : FederatedData
    epochs : callable
        From a round, counted from 1, and a client to its training rows in the order of each epoch.
    selected : callable, optional
        From a round to the clients that train, ascending; none: all do.
    """

    network: nn.Module
    data: FederatedData
    epochs: Callable[[int, int], Iterable[Rows]]
    selected: Callable[[int], Sequence[int]] | None = None


@dataclass
class Done(Callback):
    """What came of a run, round by round.

    Attributes
    ----------
    settings : Settings
    records : list of RoundRecord
    leaf_models : list of list of Arrays
        As they went to the cloud.
    trained : list of dict of int to Arrays
        What came of each client's training.
    variates : list of Arrays
        SCAFFOLD's c of the first leaf server.
    kept : list of dict of int to Arrays
        What clients keep.
    """

    records: list[Any] = field(default_factory=list)
    leaf_models: list[list[Any]] = field(default_factory=list)
    trained: list[dict[int, Any]] = field(default_factory=list)
    variates: list[Any] = field(default_factory=list)
    kept: list[dict[int, Any]] = field(default_factory=list)

    def on_round_end(self, record) -> None:
        self.records.append(record)
        states = self.orchestrator._client_state
        clients = range(self.orchestrator.settings.hierarchy.num_clients)
        found = {} if states is None else {c: states.read(c) for c in clients}
        self.kept.append({c: records.to_arrays(r) for c, r in found.items() if r is not None})


def data_of(
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    clients: Sequence[ClientData],
    scale: Standardisation | None = None,
) -> FederatedData:
    """Return given examples as a run holds them, not standardised unless a scale is given."""
    none = np.full(len(y), -1, np.int32)
    names = Names(tuple(f"class {number}" for number in range(int(y.max()) + 1)))
    dataset = Dataset(x, y.astype(np.int64), *[none] * 5, names, content="given")
    scale = scale or Standardisation.identity(x.shape[1])
    return FederatedData(dataset, clients, Same(scale, len(clients)))


def run_given(monkeypatch, given: Given, *assignments: str) -> Done:
    """Run with what is given, and with the settings that are; accuracy gate and clusters are off.

    Training is plain, in one thread, unless the settings say otherwise.
    """
    name = f"given {next(_numbers)}"
    settings = load_settings(
        assignments=[
            *(f"app.config.model={name}", "cloud_cluster.enable=false"),
            *("hierarchy.cluster_better_delta=-1.0", "hierarchy.lr_gamma=1.0"),
            *("hierarchy.prox_mu=0.0", "hierarchy.prox_mu_decay=1.0"),
            *("runtime.training=reference", "runtime.precision=float32", *assignments),
        ]
    )
    start, done = model_arrays(given.network), Done()

    def build(example_shape, num_classes) -> nn.Module:
        network = type(given.network)(example_shape, num_classes).double()
        assert {n: p.shape for n, p in network.state_dict().items()} == {
            n: a.shape for n, a in start.items()
        }
        return network

    def initialise(network: nn.Module, generator: torch.Generator) -> None:
        load_arrays(network, start)

    def step(state, models, *rest, **named):
        done.leaf_models.append(list(models))
        return own_step(state, models, *rest, **named)

    def aggregate(self, server_round, replies):
        if self.index == 0:
            done.trained.append({})
        for reply in replies:
            sent = records.to_arrays(records.arrays_of(reply))
            done.trained[-1][records.Address.of(reply).client] = sent
        result = own_aggregate(self, server_round, replies)
        if self.index == 0:
            done.variates.append(self.variate)
        return result

    def order(config: Mapping[str, Any]) -> Order:
        return Order(given.epochs(config[records.ROUND], config[records.CLIENT_ID]))

    own_step, own_aggregate = cloud.step, LeafServer.aggregate_train
    with monkeypatch.context() as patch:
        patch.setitem(MODELS, name, Model(build, "examples that are given", 0))
        patch.setattr(client, "initialise", initialise)
        for module in (client, client_app):
            patch.setattr(module, "federated_data", lambda settings: given.data)
        patch.setattr(client_app, "_order", lambda settings, config: order(config))
        if given.selected is not None:
            patch.setattr(LeafServer, "_participants", lambda self, r: given.selected(r))
        patch.setattr(LeafServer, "aggregate_train", aggregate)
        patch.setattr(cloud, "step", step)
        with InProcessGrid(client_app.app, 1) as grid:
            done.orchestrator = Orchestrator(settings, grid, [done])
            done.orchestrator.run()
            done.settings = done.orchestrator.settings
    return done


class Order:
    """In the place of the stream that draws the order of a client's examples."""

    def __init__(self, epochs: Iterable[Rows]) -> None:
        self._epochs = iter(epochs)

    def permutation(self, rows: Rows) -> Rows:
        """Return the next epoch's order."""
        return next(self._epochs)
