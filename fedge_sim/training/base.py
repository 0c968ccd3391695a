"""What every way to train has in common: what a client is asked for, and what it sends back."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedge_sim.algorithms import Arrays
from fedge_sim.data.base import Examples


@dataclass(frozen=True)
class TrainSettings:
    """How a client trains.

    Attributes
    ----------
    lr : float
        Learning rate of this round.
    local_epochs, batch_size : int
    local_steps : int
        Steps after which training ends, however many epochs they are; 0: after
        ``local_epochs``.
    accumulation : int
        Batches whose gradients make one step: that of the mean over all their examples.
    momentum, weight_decay : float
        The first is SGD's alone; the second is the factor of an L2 term.
    clip_norm : float
        Largest norm of a step's gradient over all parameters; 0 turns clipping off.
    label_smoothing : float
    prox_mu : float
        FedProx's mu: the loss gains mu/2 ||w - w_start||^2 (Li et al. 2020, eq. 2), summed
        over the trainable parameters.
    inner_steps : int
        Steps on each batch, or on those that are accumulated.
    outer_lr : float
        Above 0 for pFedMe: after each batch's steps the anchor of the proximal term moves, and
        is the client's model in the end; see :mod:`fedge_sim.training.pfedme`.
    optimizer : {"sgd", "adam"}
        What takes the steps; its state is zero where training begins.
    """

    lr: float
    local_epochs: int = 5
    batch_size: int = 32
    momentum: float = 0.9
    weight_decay: float = 0.0001
    clip_norm: float = 1.0
    label_smoothing: float = 0.1
    prox_mu: float = 0.0
    accumulation: int = 1
    local_steps: int = 0
    inner_steps: int = 1
    outer_lr: float = 0.0
    optimizer: Literal["sgd", "adam"] = "sgd"


@dataclass(frozen=True)
class ClientTask:
    """One client's training in one round.

    Attributes
    ----------
    start : Arrays
        The model that it starts from: parameters and buffers, by name.
    examples : Examples
        All examples, as this client sees them.
    rows : int64 array (n,)
        Its training examples.
    settings : TrainSettings
    order : numpy Generator
        Draws the order of the examples, anew in every epoch.
    correction : Arrays, optional
        Added to the gradient of every step, after clipping, by parameter name: SCAFFOLD's
        c - c_i (Karimireddy et al. 2020, eq. 3).
    """

    start: Arrays
    examples: Examples
    rows: NDArray[np.int64]
    settings: TrainSettings
    order: np.random.Generator
    correction: Arrays | None = None


@dataclass(frozen=True)
class ClientUpdate:
    """What came of a client's training.

    Attributes
    ----------
    arrays : Arrays
        The trained model: parameters and buffers, by name.
    steps : int
    loss : float
        Mean over the examples of the last epoch, without the proximal term.
    seconds : float
        Seconds of computation; clients that trained in one step share its time by examples.
    path : str
        Which way to train it was: its :attr:`TrainingPath.name`.
    personal : Arrays, optional
        The client's own model beside it (pFedMe).
    """

    arrays: Arrays
    steps: int
    loss: float
    seconds: float
    path: str
    personal: Arrays | None = None


class TrainingPath(Protocol):
    """A way to train: the same mathematics and the same order of examples, at its own speed.

    An object works for one thread at a time.
    """

    @property
    def name(self) -> str:
        """What users know it by: a value of the setting ``runtime.training``."""

    def train(self, clients: Sequence[ClientTask]) -> list[ClientUpdate]:
        """Train clients, each from its own start; the updates are in their order."""


def epochs(task: ClientTask) -> Iterator[list[list[NDArray[np.int64]]]]:
    """Yield, for every epoch, its steps, and for every step the rows of its batches.

    The last step of an epoch may have fewer batches and its last batch fewer rows; a row left
    over alone is skipped (BatchNorm needs two).
    """
    settings, left = task.settings, task.settings.local_steps
    epoch = 0
    while left > 0 if settings.local_steps else epoch < settings.local_epochs:
        rows = task.order.permutation(task.rows)
        steps = [[rows[batch] for batch in step] for step in steps_of_an_epoch(len(rows), settings)]
        if not steps:
            return  # no epoch has a step, so local_steps would never be reached
        if settings.local_steps:
            steps = steps[:left]
            left -= len(steps)
        yield steps
        epoch += 1


def steps_of_an_epoch(examples: int, settings: TrainSettings) -> Sequence[Sequence[slice]]:
    """Return the batches of each step of an epoch, as places in the order of the examples."""
    return _cut(examples, settings.batch_size, settings.accumulation)


def num_steps(examples: int, settings: TrainSettings) -> int:
    """Return how many steps a client's training does: :attr:`ClientUpdate.steps`."""
    an_epoch = len(steps_of_an_epoch(examples, settings))
    batches = settings.local_steps or settings.local_epochs * an_epoch
    return settings.inner_steps * batches if an_epoch else 0


def num_examples_seen(examples: int, settings: TrainSettings) -> int:
    """Return how many examples those steps are on, each as often as it is."""
    sizes: list[int] = [
        step[-1].stop - step[0].start for step in steps_of_an_epoch(examples, settings)
    ]
    if not sizes:
        return 0
    batches = settings.local_steps or settings.local_epochs * len(sizes)
    epochs, rest = divmod(batches, len(sizes))
    return settings.inner_steps * (epochs * sum(sizes) + sum(sizes[:rest]))


@lru_cache(maxsize=256)  # all devices have as many examples
def _cut(examples: int, size: int, accumulation: int) -> tuple[tuple[slice, ...], ...]:
    used = examples - 1 if examples > 1 and examples % size == 1 else examples
    batches = [slice(i, min(i + size, used)) for i in range(0, used, size)]
    return tuple(tuple(batches[i : i + accumulation]) for i in range(0, len(batches), accumulation))


def model_arrays(model: nn.Module) -> dict[str, NDArray[Any]]:
    """Return copies of a model's parameters and buffers."""
    return {name: t.detach().cpu().numpy().copy() for name, t in model.state_dict().items()}


def load_arrays(model: nn.Module, arrays: Arrays) -> None:
    """Copy arrays into a model; names and shapes must be its own."""
    model.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
