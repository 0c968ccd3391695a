"""One client's training and evaluation, plain and readable: the reference for faster paths."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from fedge_sim.data.base import Examples


@dataclass(frozen=True)
class TrainSettings:
    """How a client trains.

    Attributes
    ----------
    lr : float
        Learning rate of this round.
    local_epochs, batch_size : int
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
    """Train a model in place on one client's examples.

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
    optimiser = torch.optim.SGD(
        parameters,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    model.train()
    steps, loss_sum, seen = 0, torch.zeros(()), 0
    for _ in range(settings.local_epochs):
        loss_sum, seen = torch.zeros(()), 0
        shuffled = order.permutation(rows)
        for begin in range(0, len(rows), settings.batch_size):
            batch = shuffled[begin : begin + settings.batch_size]
            if len(batch) == 1 and len(rows) > 1:
                continue
            x, y = examples.batch(batch)
            loss = functional.cross_entropy(model(x), y, label_smoothing=settings.label_smoothing)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if settings.prox_mu > 0:  # the gradient of mu/2 ||w - w_start||^2
                for parameter, anchor in zip(parameters, start, strict=True):
                    if parameter.grad is not None:
                        parameter.grad.add_(parameter.detach() - anchor, alpha=settings.prox_mu)
            if settings.clip_norm > 0:
                nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            optimiser.step()
            steps += 1
            loss_sum += loss.detach() * len(batch)
            seen += len(batch)
    return TrainResult(
        steps=steps,
        loss=float(loss_sum) / max(seen, 1),
        seconds=time.perf_counter() - started,
    )


@torch.inference_mode()
def evaluate(
    model: nn.Module, examples: Examples, rows: NDArray[np.int64], batch_size: int = 64
) -> Evaluation:
    """Evaluate a model on some examples; parameters as in :func:`train`."""
    model.eval()
    loss_sum, right = 0.0, 0
    for begin in range(0, len(rows), batch_size):
        x, target = examples.batch(rows[begin : begin + batch_size])
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
