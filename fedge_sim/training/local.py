"""One client's training and evaluation, plain and readable: the reference for faster paths."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedge_sim.algorithms import Arrays
from fedge_sim.data.base import Examples
from fedge_sim.training.base import (
    ClientTask,
    ClientUpdate,
    epochs,
    load_arrays,
    model_arrays,
)
from fedge_sim.training.device import device_of
from fedge_sim.training.optimizer import State, take_step
from fedge_sim.training.pfedme import move_anchor


@dataclass(frozen=True)
class TrainResult:
    """What training did: steps taken, mean loss of the last epoch, seconds of computation.

    The loss is that of the examples, without the proximal term. ``anchor`` has the parameters
    that the proximal term ended at, by name: pFedMe's shared model.
    """

    steps: int
    loss: float
    seconds: float
    anchor: Arrays


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy (nats, no smoothing) and share of right answers over some examples."""

    loss: float
    accuracy: float
    num_examples: int


class Reference:
    """The way to train of :func:`train`: one client after the other.

    Parameters
    ----------
    network : nn.Module
        Of any values, where clients are to train.
    autocast : torch.dtype, optional
        Of the forward pass, if not the parameters' own.
    """

    name = "reference"

    def __init__(self, network: nn.Module, autocast: torch.dtype | None = None) -> None:
        self._network, self._autocast = network, autocast

    def train(self, clients: Sequence[ClientTask]) -> list[ClientUpdate]:
        """Train clients, each from its own start."""
        return [self._train(task) for task in clients]

    def _train(self, task: ClientTask) -> ClientUpdate:
        load_arrays(self._network, task.start)
        result = train(self._network, task, self._autocast)
        arrays, personal = model_arrays(self._network), None
        if task.settings.outer_lr > 0:
            personal, arrays = arrays, {**arrays, **result.anchor}
        return ClientUpdate(arrays, result.steps, result.loss, result.seconds, self.name, personal)


def train(model: nn.Module, task: ClientTask, autocast: torch.dtype | None = None) -> TrainResult:
    """Train a model in place on one client's examples, where its parameters are.

    Parameters
    ----------
    model : nn.Module
        Holds the start values.
    task : ClientTask
    autocast : torch.dtype, optional
        Of the forward pass, if not the parameters' own.
    """
    started = time.perf_counter()
    settings = task.settings
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    anchors = [p.detach().clone() for p in parameters]
    correction = _in_order(task.correction, model)
    state = [State.zero(p.detach(), settings.optimizer) for p in parameters]
    model.train()
    device, dtype = device_of(model), parameters[0].dtype
    steps, loss_sum, seen = 0, torch.zeros((), device=device), 0
    for epoch in epochs(task):
        loss_sum, seen = torch.zeros((), device=device), 0
        for batches in (batches for step in epoch for batches in [step] * settings.inner_steps):
            model.zero_grad()
            total = sum(map(len, batches))
            for batch in batches:
                x, y = task.examples.batch(batch, device)
                with torch.autocast(device.type, autocast, enabled=autocast is not None):
                    logits = model(x.to(dtype)).to(dtype)
                loss = functional.cross_entropy(logits, y, label_smoothing=settings.label_smoothing)
                share = torch.full_like(loss, len(batch) / total)
                loss.backward(share)
                loss_sum += loss.detach() * len(batch)
            seen += total
            if settings.prox_mu > 0:  # the gradient of mu/2 ||w - w_start||^2
                for parameter, anchor in zip(parameters, anchors, strict=True):
                    if parameter.grad is not None:
                        parameter.grad.add_(parameter.detach() - anchor, alpha=settings.prox_mu)
            if settings.clip_norm > 0:
                nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            for parameter, c in zip(parameters, correction, strict=False):
                if parameter.grad is not None:
                    parameter.grad.add_(c)
            take_step(parameters, [p.grad for p in parameters], state, settings)
            steps += 1
            if settings.outer_lr > 0 and steps % settings.inner_steps == 0:
                for parameter, anchor in zip(parameters, anchors, strict=True):
                    move_anchor(anchor, parameter, settings)
    return TrainResult(
        steps=steps,
        loss=float(loss_sum) / max(seen, 1),
        seconds=time.perf_counter() - started,
        anchor={name: a.cpu().numpy() for name, a in zip(named, anchors, strict=True)},
    )


def _in_order(correction: Arrays | None, model: nn.Module) -> list[Tensor]:
    """Return a correction as tensors like the trainable parameters; none if there is none."""
    if correction is None:
        return []
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [torch.tensor(correction[name], dtype=p.dtype, device=p.device) for name, p in named]


@torch.inference_mode()
def evaluate(
    model: nn.Module, examples: Examples, rows: NDArray[np.int64], batch_size: int = 64
) -> Evaluation:
    """Evaluate a model on some examples: rows (n,) of all that a client sees."""
    model.eval()
    device, dtype = device_of(model), next(model.parameters()).dtype
    loss_sum, right = 0.0, 0
    for begin in range(0, len(rows), batch_size):
        x, target = examples.batch(rows[begin : begin + batch_size], device)
        logits = model(x.to(dtype))
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
