"""What a server makes of updates that started from versions of different ages: rules, all pure.

x is the server's model, y_i a client's, delta_i = y_i - start_i its update and s_i its staleness:
how many versions were made since the one that it started from.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fedge_sim.algorithms import Arrays
from fedge_sim.algorithms.aggregation import step_towards, weighted_mean
from fedge_sim.config import Settings
from fedge_sim.models.tracker import forget_tracked


@dataclass(frozen=True)
class Update:
    """What a client sent, as the server sees it: of its examples, how many of each class.

    Attributes
    ----------
    client : int
    number : int
        Of its job, over all servers.
    start_version : int
        That it started from.
    staleness : int
        Versions made since then.
    num_examples : int
        That it trained on.
    class_counts : tuple of int
        How many of them are of class 0, 1, ...
    arrays : Arrays
        The client's model.
    start : Arrays
        The model that it started from.
    """

    client: int
    number: int
    start_version: int
    staleness: int
    num_examples: int
    class_counts: tuple[int, ...]
    arrays: Arrays
    start: Arrays

    @property
    def delta(self) -> Arrays:
        """What the client changed, worked out anew: :func:`difference` to where it started."""
        return difference(self.arrays, self.start)


class ServerRule(Protocol):
    """What a server does with updates; it may remember some of them."""

    def make_version(self, model: Arrays, updates: Sequence[Update], version: int) -> Arrays:
        """Return the server's next model.

        Parameters
        ----------
        model : Arrays
            The server's model now, parameters and buffers.
        updates : sequence of Update
            At least one, in order of arrival.
        version : int
            The number of the version that is made, from 1.
        """

    def state(self) -> dict[str, Any]:
        """Return what it remembers, as a tree that a checkpoint can hold."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what another one of the same settings did: :meth:`state`."""


@dataclass(frozen=True)
class Stateless:
    """A server rule that remembers nothing."""

    step: Callable[[Arrays, Sequence[Update]], Arrays]

    def make_version(self, model: Arrays, updates: Sequence[Update], version: int) -> Arrays:
        """Return the server's next model."""
        return self.step(model, updates)

    def state(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Do nothing."""


def staleness_weight(staleness: int, function: str, a: float, b: float) -> float:
    """Return FedAsync's s(t - tau), from 1 down towards 0 (Xie et al. 2019, section 5.2).

    Parameters
    ----------
    staleness : int
        t - tau, at least 0.
    function : {"constant", "polynomial", "hinge"}
        1; (staleness + 1)^-a; or 1 up to staleness b, then 1 / (a (staleness - b) + 1).
    a, b : float
        a > 0, b >= 0.
    """
    if function == "polynomial":
        return math.pow(staleness + 1.0, -a)
    if function == "hinge" and staleness > b:
        return 1.0 / (a * (staleness - b) + 1.0)
    return 1.0


def beta(staleness: int, form: str, factor: float, threshold: float) -> float:
    """Return how little of a raw update is left, from 0 to 1 (FedRevive, Askin et al. 2025).

    Parameters
    ----------
    staleness : int
        At least 0.
    form : {"constant", "linear", "exponential", "stepwise", "cosine", "sqrt"}
        Half a wave of a cosine reaches 1 at twice ``factor``; the stepwise one goes up by 0.25 at
        each quarter of ``threshold``. All rise with staleness but the constant and ``"sqrt"``,
        factor / (1 + sqrt(staleness)), which falls, from staleness 1 on, and is 0 at 0.
    factor : float
        Above 0; of ``"constant"`` beta itself.
    threshold : float
        Above 0, the staleness at which the stepwise one is 1: :func:`beta_of`.
    """
    if form == "constant":
        return factor
    if form == "linear":
        return min(1.0, factor * staleness)
    if form == "exponential":
        return 1.0 - math.exp(-factor * staleness)
    if form == "stepwise":
        return min(4, math.floor(4 * staleness / threshold)) / 4
    if form == "sqrt":
        return min(1.0, factor / (1.0 + math.sqrt(staleness))) if staleness else 0.0
    phase = min(1.0, staleness / (2.0 * factor))
    return 1.0 - 0.5 * (1.0 + math.cos(math.pi * phase))


def beta_of(settings: Settings, staleness: int) -> float:
    """Return :func:`beta` as the settings have it.

    The threshold of the stepwise one is ``beta_factor`` times the mean staleness: the active
    jobs of a server by the updates that make a version.
    """
    a, active = settings.asynchronous, settings.devices.device_selection_size
    threshold = a.beta_factor * active / settings.updates_for_model
    return beta(staleness, a.beta, a.beta_factor, threshold)


def difference(model: Arrays, start: Arrays) -> Arrays:
    """Return model - start; integer arrays (BatchNorm's step counter) have none."""
    return {
        name: np.asarray(array - start[name], array.dtype)
        for name, array in model.items()
        if np.issubdtype(array.dtype, np.floating)
    }


def change(model: Arrays, update: Update, weight: float, trainable: Set[str]) -> Arrays:
    """Return how an update would change the server's model, times a weight, in float64.

    By delta_i; but by y_i - x in buffers, as the sum of a variance and a difference to another
    one can be negative, and a mean of variances cannot.

    Parameters
    ----------
    model : Arrays
        x.
    update : Update
    weight : float
        From 0 to 1.
    trainable : set of str
        The names of the parameters; all others are buffers.
    """
    return {
        name: weight * delta.astype(np.float64)
        if name in trainable
        else weight * (update.arrays[name].astype(np.float64) - model[name])
        for name, delta in update.delta.items()
    }


def step(
    model: Arrays, changes: Iterable[Arrays], last: Arrays, lr: float, trainable: Set[str]
) -> Arrays:
    """Return x + lr * the mean of changes (FedBuff, Nguyen et al. 2022, alg. 1); trackers as new.

    Parameters
    ----------
    model : Arrays
        x.
    changes : iterable of Arrays
        As :func:`change` gives them, at least one; they are added in the order given.
    last : Arrays
        The model whose integer arrays are taken.
    lr : float
        The server's learning rate; of buffers it is 1 at most, so that variances stay above 0.
    trainable : set of str
    """
    totals: dict[str, Any] = {}
    number = 0
    for arrays in changes:
        number += 1
        totals = {name: totals[name] + a for name, a in arrays.items()} if totals else {**arrays}
    return forget_tracked(
        {
            name: np.asarray(
                array + (lr if name in trainable else min(lr, 1.0)) / number * totals[name],
                array.dtype,
            )
            if name in totals
            else last[name].copy()
            for name, array in model.items()
        }
    )


def average(
    model: Arrays,
    updates: Sequence[Update],
    weight: Callable[[int], float],
    lr: float,
    trainable: Set[str],
) -> Arrays:
    """Return x + lr / K * sum_i weight(s_i) delta_i: FedBuff and down-weighting by staleness.

    The sum is over K, the number of updates, not over their weights: a version of old updates
    only is a small step (Nguyen et al. 2022, alg. 1).
    """
    changes = (change(model, u, weight(u.staleness), trainable) for u in updates)
    return step(model, changes, updates[-1].arrays, lr, trainable)


def fedasync(
    model: Arrays, updates: Sequence[Update], weight: Callable[[int], float], mixing: float
) -> Arrays:
    """Return (1 - alpha_t) x + alpha_t y, alpha_t = mixing * s(staleness) (Xie et al. 2019).

    Several updates are mixed in one after the other.
    """
    for update in updates:
        alpha = mixing * weight(update.staleness)
        model = {
            name: np.asarray(
                (1.0 - alpha) * x.astype(np.float64)
                + alpha * update.arrays[name].astype(np.float64),
                x.dtype,
            )
            if np.issubdtype(x.dtype, np.floating)
            else update.arrays[name].copy()
            for name, x in model.items()
        }
    return forget_tracked(model)


def fedavg(model: Arrays, updates: Sequence[Update], lr: float, trainable: Set[str]) -> Arrays:
    """Return x + lr * (the clients' mean by examples - x) (McMahan et al. 2017, alg. 1).

    If x is not the model that all of them started from any more, as the cloud has changed it
    meanwhile, what they learnt is added to it: the mean moves by x - start, but for buffers.
    """
    mean = weighted_mean([u.arrays for u in updates], [float(u.num_examples) for u in updates])
    start = updates[0].start
    if start is not model:
        moved = {n: np.asarray(mean[n] + (model[n] - start[n]), mean[n].dtype) for n in trainable}
        mean = {name: moved.get(name, array) for name, array in mean.items()}
    return step_towards(model, mean, lr, trainable)
