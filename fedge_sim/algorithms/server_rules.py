"""The server rules by name: values of the setting ``asynchronous.rule``."""

from collections.abc import Set
from functools import partial

from fedge_sim.algorithms.asynchronous import (
    ServerRule,
    Stateless,
    average,
    beta_of,
    fedasync,
    fedavg,
    staleness_weight,
)
from fedge_sim.algorithms.fedrevive import FedRevive
from fedge_sim.config import Settings


def server_rule(
    settings: Settings,
    trainable: Set[str],
    server: int,
    example_shape: tuple[int, ...],
    num_classes: int,
) -> ServerRule:
    """Return the rule of a server; each server has its own.

    Parameters
    ----------
    settings : Settings
    trainable : set of str
        The names of the model's parameters; all else are buffers.
    server : int
        Which server it is, from 0.
    example_shape : tuple of int
        Of the clients' examples.
    num_classes : int

    Raises
    ------
    ConfigError
        If FedRevive can make up no such examples.
    DataError
        If FedRevive's unlabelled examples cannot be read.
    """
    a, lr = settings.asynchronous, settings.hierarchy.server_lr

    def weight(staleness: int) -> float:
        return staleness_weight(staleness, a.staleness, a.staleness_a, a.staleness_b)

    def fresh(staleness: int) -> float:
        return 1.0 - beta_of(settings, staleness)

    if a.rule == "fedrevive":
        return FedRevive(settings, trainable, server, example_shape, num_classes)
    if a.rule == "fedavg":
        return Stateless(partial(fedavg, lr=lr, trainable=trainable))
    if a.rule == "fedasync":
        return Stateless(partial(fedasync, weight=weight, mixing=a.mixing))
    of_update = fresh if a.rule == "downweight" else weight
    return Stateless(partial(average, weight=of_update, lr=lr, trainable=trainable))
