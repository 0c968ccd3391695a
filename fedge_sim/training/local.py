"""One client's training and evaluation, plain and readable: the reference for faster paths."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.sgd import sgd

from fedge_sim.data.base import Examples
from fedge_sim.training.device import device_of


@dataclass(frozen=True)
class TrainSettings:
    """How a client trains.

    Attributes
    ----------
    lr : float
        Learning rate of this round.
    local_epochs, batch_size : int
    accumulation : int
        Batches whose gradients make one step: that of the mean over all their examples.
    momentum, weight_decay : float
        Of SGD.
    clip_norm : float
        Largest norm of a step's gradient over all parameters; 0 turns clipping off.
    label_smoothing : float
    prox_mu : float
        FedProx's mu: the loss gains mu/2 ||w - w_start||^2 (Li et al. 2020, eq. 2), summed
        over the trainable parameters.
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


@dataclass(frozen=True)
class TrainResult:
    """What training did: steps taken, mean loss of the last epoch, seconds of computation.

    The loss is that of the examples, without the proximal term.
    """

    steps: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy (nats, no smoothing) and share of right answers over some examples."""

    loss: float
    accuracy: float
    num_examples: int


def train(
    model: nn.Module,
    examples: Examples,
    rows: NDArray[np.int64],
    settings: TrainSettings,
    order: np.random.Generator,
) -> TrainResult:
    """Train a model in place on one client's examples, where its parameters are.

    Parameters
    ----------
    model : nn.Module
        Holds the start values.
    examples : Examples
    rows : int64 array (n,)
        The client's training examples.
    settings : TrainSettings
    order : numpy Generator
        Draws the order of the examples, anew in every epoch. The last batch of an epoch may
        be short; if one example is left over, it is skipped (BatchNorm needs two).
    """
    started = time.perf_counter()
    parameters = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]
    momenta: list[Tensor | None] = [None] * len(parameters)
    model.train()
    device = device_of(model)
    steps, loss_sum, seen = 0, torch.zeros((), device=device), 0
    for _ in range(settings.local_epochs):
        loss_sum, seen = torch.zeros((), device=device), 0
        for batches in _steps(order.permutation(rows), settings):
            model.zero_grad()
            total = sum(map(len, batches))
            for batch in batches:
                x, y = examples.batch(batch, device)
                logits = model(x)
                loss = functional.cross_entropy(logits, y, label_smoothing=settings.label_smoothing)
                share = torch.full_like(loss, len(batch) / total)
                loss.backward(share)
                loss_sum += loss.detach() * len(batch)
            seen += total
            if settings.prox_mu > 0:  # the gradient of mu/2 ||w - w_start||^2
                for parameter, anchor in zip(parameters, start, strict=True):
                    if parameter.grad is not None:
                        parameter.grad.add_(parameter.detach() - anchor, alpha=settings.prox_mu)
            if settings.clip_norm > 0:
                nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            _step(parameters, momenta, settings)
            steps += 1
    return TrainResult(
        steps=steps,
        loss=float(loss_sum) / max(seen, 1),
        seconds=time.perf_counter() - started,
    )


@torch.no_grad()
def _step(
    parameters: Sequence[nn.Parameter], momenta: list[Tensor | None], settings: TrainSettings
) -> None:
    """Do a step of SGD in place, as ``torch.optim.SGD`` does.

    That class imports the compiler when it is first used: a second, in every process.
    """
    used = [i for i, parameter in enumerate(parameters) if parameter.grad is not None]
    buffers = [momenta[i] for i in used]
    sgd(
        [parameters[i] for i in used],
        [g for i in used if (g := parameters[i].grad) is not None],
        buffers,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )
    for i, buffer in zip(used, buffers, strict=True):
        momenta[i] = buffer


def _steps(rows: NDArray[np.int64], settings: TrainSettings) -> Iterator[list[NDArray[np.int64]]]:
    """Yield the batches of every step of an epoch."""
    size = settings.batch_size
    for begin in range(0, len(rows), size * settings.accumulation):
        step = rows[begin : begin + size * settings.accumulation]
        batches = [step[i : i + size] for i in range(0, len(step), size)]
        if len(batches[-1]) == 1 and len(rows) > 1:
            batches.pop()
        if batches:
            yield batches


@torch.inference_mode()
def evaluate(
    model: nn.Module, examples: Examples, rows: NDArray[np.int64], batch_size: int = 64
) -> Evaluation:
    """Evaluate a model on some examples; parameters as in :func:`train`."""
    model.eval()
    device, loss_sum, right = device_of(model), 0.0, 0
    for begin in range(0, len(rows), batch_size):
        x, target = examples.batch(rows[begin : begin + batch_size], device)
        logits = model(x)
        loss_sum += float(functional.cross_entropy(logits, target, reduction="sum"))
        right += int((logits.argmax(dim=1) == target).sum())
    n = max(len(rows), 1)
    return Evaluation(loss=loss_sum / n, accuracy=right / n, num_examples=len(rows))


def pool(parts: Iterable[Evaluation]) -> Evaluation:
    """Return the evaluation on all examples of the parts together; NaN if there are none."""
    parts = list(parts)
    n = sum(part.num_examples for part in parts)
    if n == 0:
        return Evaluation(math.nan, math.nan, 0)
    return Evaluation(
        loss=sum(part.loss * part.num_examples for part in parts) / n,
        accuracy=sum(part.accuracy * part.num_examples for part in parts) / n,
        num_examples=n,
    )
