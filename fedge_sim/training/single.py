"""One client at a time, tuned for a CPU: few operators a step, or one compiled function."""

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedge_sim.errors import CannotCompileError
from fedge_sim.training.base import (
    ClientTask,
    ClientUpdate,
    epochs,
    load_arrays,
    model_arrays,
)
from fedge_sim.training.compiled import CompiledStep, StepSpec, compiled_step
from fedge_sim.training.device import device_of
from fedge_sim.training.flat import FlatNetwork, trained_parameters
from fedge_sim.training.optimizer import State, take_step
from fedge_sim.training.pfedme import move_anchor

log = logging.getLogger(__name__)

# Bytes of examples that are gathered in one call: fewer calls, still in the cache.
GATHERED_BYTES = 2**20


class Single:
    """Trains one client after the other, on one vector of parameters.

    Parameters
    ----------
    network : nn.Module
        Of any values, where clients are to train; from now on this object's own.
    compiled : Path, optional
        Folder of compiled steps: with it, batches of the full size are trained on by one
        compiled function, which is made where the folder does not have it. Where it cannot be
        made, a warning says why, and training goes on without.
    autocast : torch.dtype, optional
        Of the forward pass, if not the parameters' own.
    """

    def __init__(
        self,
        network: nn.Module,
        compiled: Path | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self._network, self._folder, self._autocast = network, compiled, autocast
        self._flat: FlatNetwork | None = None
        self._steps: dict[StepSpec, CompiledStep | None] = {}

    @property
    def name(self) -> str:
        """``"compiled"`` if steps are."""
        return "single" if self._folder is None else "compiled"

    def train(self, clients: Sequence[ClientTask]) -> list[ClientUpdate]:
        """Train clients, each from its own start."""
        return [self._train(task) for task in clients]

    def _train(self, task: ClientTask) -> ClientUpdate:
        started = time.perf_counter()
        load_arrays(self._network, task.start)
        self._network.train()
        client = _Client(self._flatten(task), task, self._step_of(task), self._autocast)
        for epoch in epochs(task):
            client.train_epoch(epoch)
        loss = client.mean_loss()  # the device is waited for here alone
        arrays, personal = model_arrays(self._network), None
        if task.settings.outer_lr > 0:
            personal, arrays = arrays, {**arrays, **client.anchor()}
        return ClientUpdate(
            arrays=arrays,
            steps=client.steps,
            loss=loss,
            seconds=time.perf_counter() - started,
            path="single" if client.compiled is None else "compiled",
            personal=personal,
        )

    def _flatten(self, task: ClientTask) -> FlatNetwork:
        if self._flat is None:
            x, _ = task.examples.batch(task.rows[:1].repeat(2), device_of(self._network))
            x = x.to(next(self._network.parameters()).dtype)
            self._flat = FlatNetwork(self._network, trained_parameters(self._network, x))
            # The network's BatchNorm has seen the two rows of the trial.
            load_arrays(self._network, task.start)
        return self._flat

    def _step_of(self, task: ClientTask) -> CompiledStep | None:
        """Return the compiled step for a client, if it is to have one."""
        if self._folder is None or self._flat is None or task.settings.accumulation > 1:
            return None
        if self._autocast is not None:
            return None  # Runtime refuses the two together
        spec = StepSpec.of(task.settings, task.examples.x.shape[1:])
        if spec not in self._steps:
            try:
                self._steps[spec] = compiled_step(self._flat, spec, self._folder)
            except CannotCompileError as error:
                log.warning("%s; clients train without compiled steps", error)
                self._steps[spec] = None
        return self._steps[spec]


class _Client:
    """One client's training under way."""

    def __init__(
        self,
        flat: FlatNetwork,
        task: ClientTask,
        compiled: CompiledStep | None,
        autocast: torch.dtype | None,
    ) -> None:
        self.steps, self.compiled = 0, compiled
        self._flat, self._task, self._autocast = flat, task, autocast
        vector, settings = flat.vector, task.settings
        self._anchor = vector.clone()
        self._state = State.zero(vector, settings.optimizer)
        self._correction = None if task.correction is None else flat.vector_of(task.correction)
        self._loss, self._seen = vector.new_zeros(()), 0
        self._others: list[Tensor] | None = None
        fixed = torch.zeros_like(vector) if self._correction is None else self._correction
        numbers = [torch.tensor(v, dtype=vector.dtype) for v in (settings.lr, settings.prox_mu)]
        self._arguments = [vector, *self._state, self._anchor, fixed, self._loss, *numbers]

    def train_epoch(self, epoch: Sequence[Sequence[NDArray[np.int64]]]) -> None:
        """Do the steps of an epoch, each of one batch or of several accumulated."""
        self._loss.zero_()
        self._seen = 0
        settings = self._task.settings
        for batches in self._gathered(epoch):
            for _ in range(settings.inner_steps):
                self._step(batches)
            if settings.outer_lr > 0:
                move_anchor(self._anchor, self._flat.vector, settings)

    def _gathered(
        self, epoch: Sequence[Sequence[NDArray[np.int64]]]
    ) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield the batches of every step; rows are gathered for a few steps at a time."""
        examples, like = self._task.examples, self._flat.vector
        settings = self._task.settings
        step_bytes = examples.x[:1].nbytes * settings.batch_size * settings.accumulation
        together = max(1, GATHERED_BYTES // max(step_bytes, 1))
        for first in range(0, len(epoch), together):
            steps = epoch[first : first + together]
            rows = [batch for step in steps for batch in step]
            x, y = examples.batch(np.concatenate(rows), like.device)
            sizes = [len(batch) for batch in rows]
            parts = zip(x.to(like.dtype).split(sizes), y.split(sizes), strict=True)
            for step in steps:
                yield [next(parts) for _ in step]

    def anchor(self) -> dict[str, NDArray[Any]]:
        """Return the parameters that the proximal term ended at."""
        return {name: a.cpu().numpy() for name, a in self._flat.named(self._anchor).items()}

    def mean_loss(self) -> float:
        return float(self._loss) / max(self._seen, 1)

    def _step(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        total = sum(len(y) for _, y in batches)
        if self.compiled is not None and total == self._task.settings.batch_size:
            if self._others is None:
                self._others = list(self._flat.others.values())
            self.compiled([*self._arguments, *batches[0], *self._others])
        else:
            gradient = self._gradient(*batches[0], total)
            for x, y in batches[1:]:
                gradient += self._gradient(x, y, total)
            self._descend(gradient)
        self._seen += total
        self.steps += 1

    def _gradient(self, x: Tensor, y: Tensor, total: int) -> Tensor:
        """Return a batch's share (P,) in the gradient of the mean over ``total`` examples."""
        if x.dim() == 4:  # convolutions are faster so, and their gradients follow
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, self._autocast, enabled=self._autocast is not None):
            logits = self._flat.network(x).to(self._flat.vector.dtype)
        self._others = None  # the forward pass may have replaced its buffers
        smoothing = self._task.settings.label_smoothing
        loss = functional.cross_entropy(logits, y, label_smoothing=smoothing)
        self._loss += loss.detach() * len(y)
        share = torch.full_like(loss, len(y) / total)
        parts = torch.autograd.grad(loss, self._flat.parameters, share)
        return torch.cat([part.reshape(-1) for part in parts])

    @torch.no_grad()
    def _descend(self, gradient: Tensor) -> None:
        vector, settings = self._flat.vector, self._task.settings
        if settings.prox_mu > 0:  # the gradient of mu/2 ||w - w_start||^2
            gradient.add_(vector - self._anchor, alpha=settings.prox_mu)
        if settings.clip_norm > 0:
            norm = torch.linalg.vector_norm(gradient)
            gradient.mul_((settings.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        if self._correction is not None:
            gradient.add_(self._correction)
        take_step([vector], [gradient], [self._state], settings, fused=True)
