"""Many clients trained side by side, in one vectorised step after another.

Shapes: N clients, P values of all trained parameters, B rows of a batch, k batches of a step.
"""

import copy
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedge_sim.data.base import Examples, Standardisation
from fedge_sim.errors import CannotVectoriseError
from fedge_sim.training.base import ClientTask, ClientUpdate, TrainSettings
from fedge_sim.training.batches import Plan, bring, feed
from fedge_sim.training.device import device_of
from fedge_sim.training.graphs import CudaRecorder, Recorder
from fedge_sim.training.local import Reference
from fedge_sim.training.stack import Layout, Mode, Rule, Stack
from fedge_sim.training.vectorised import Vectorised


class Cohort:
    """The way to train in which all clients of a call take their steps together.

    Parameters
    ----------
    network : nn.Module
        Of any values, where clients are to train; it stays as it is.
    autocast : dtype, optional
        Of the forward pass's matrix products and convolutions; none: the network's own.
    recorder : Recorder, optional
        None: CUDA graphs on a CUDA device, and plain calls elsewhere.

    Raises
    ------
    CannotVectoriseError
        If the network is none that clients can have copies of.
    """

    name = "cohort"

    def __init__(
        self,
        network: nn.Module,
        autocast: torch.dtype | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        dtypes = {p.dtype for p in network.parameters() if p.requires_grad}
        if len(dtypes) != 1:
            raise CannotVectoriseError(
                f"expected trainable parameters of one dtype, found {dtypes}"
            )
        try:
            self._network = Vectorised(network, autocast)
        except (RuntimeError, TypeError) as error:
            raise CannotVectoriseError(f"the network cannot be copied: {_line(error)}") from error
        self._original = network
        self._device = device_of(network)
        if recorder is None and self._device.type == "cuda":
            recorder = CudaRecorder(self._device)
        self._recorder = recorder
        self._layout: Layout | None = None
        self._stack: Stack | None = None

    def train(self, clients: Sequence[ClientTask]) -> list[ClientUpdate]:
        """Train clients, each from its own start; the updates are in their order.

        Raises
        ------
        ValueError
            If settings other than ``lr`` and ``prox_mu`` differ.
        """
        if not clients:
            return []
        started = time.perf_counter()
        rule = Rule.of(clients)
        plan = Plan.of(clients)
        tasks = [clients[i] for i in plan.order]
        stack = self._stack_of(rule, tasks)
        stack.load(tasks)
        self._run(stack, plan, tasks)
        arrays, losses = stack.arrays(), stack.losses.tolist()  # this waits for the device
        seen = plan.totals.sum(axis=0)
        shares = (time.perf_counter() - started) * seen / max(seen.sum(), 1)
        counted = np.maximum(plan.counted.sum(axis=0), 1)
        updates = {
            i: ClientUpdate(
                arrays=arrays[place],
                steps=int(plan.steps[place]),
                loss=losses[place] / int(counted[place]),
                seconds=float(shares[place]),
                path=self.name,
            )
            for place, i in enumerate(plan.order)
        }
        return [updates[i] for i in range(len(clients))]

    def _run(self, stack: Stack, plan: Plan, tasks: Sequence[ClientTask]) -> None:
        """Take all steps; nothing here waits for the device."""
        pinned = tasks[0].examples.pinned
        dtype = stack.flat.dtype
        lengths = bring(torch.from_numpy(plan.lengths), self._device, pinned)
        counted = bring(torch.from_numpy(plan.counted), self._device, pinned).to(dtype)
        gather = feed(plan, [task.examples for task in tasks], self._device)
        alone = any(len(task.rows) == 1 for task in tasks)
        ticks = list(plan.ticks(fixed_width=self._recorder is not None))
        ahead = Counter(tick.shape for tick in ticks)
        for tick in ticks:
            x, y = gather(tick)
            inputs = (
                x.to(dtype),
                y,
                lengths[tick.number, : tick.batches, : tick.clients],
                counted[tick.number, : tick.clients],
            )
            stack.replayer(inputs, Mode(tick.full, alone), ahead[tick.shape])
            ahead[tick.shape] -= 1

    def _stack_of(self, rule: Rule, tasks: Sequence[ClientTask]) -> Stack:
        """Return a stack for these tasks: the last one, if it fits and holds recordings."""
        if self._layout is None:
            self._layout = Layout.of(self._network, tasks[0].examples.x.shape[1:])
        stack = self._stack
        if stack is None or (stack.rule, len(stack.flat)) != (rule, len(tasks)):
            self._stack = None  # make room first
            stack = Stack(self._network, self._layout, rule, len(tasks), self._recorder)
            self._stack = stack if self._recorder is not None else None
        return stack

    def check(self, example_shape: tuple[int, ...], num_classes: int) -> None:
        """Train three small clients both in this way and in the plain one, and compare.

        Raises
        ------
        CannotVectoriseError
            If the network cannot be trained in this way, or other values come out: a forward
            pass that draws random numbers, decides by values, or mixes the rows of a batch
            otherwise than BatchNorm.
        """
        tasks = _trial(self._original, example_shape, num_classes)
        kind = type(self._original).__name__
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            try:
                network, expected, tolerance = _plainly(self._original, tasks)
                updates = Cohort(network).train(_fresh(tasks))
            except Exception as error:  # a forward pass may raise anything
                raise CannotVectoriseError(f"{kind}: {_line(error)}") from error
        for update, right in zip(updates, expected, strict=True):
            for name, array in right.arrays.items():
                if not _close(update.arrays[name], array, tolerance):
                    raise CannotVectoriseError(
                        f"{kind}: side by side, {name} is trained to other "
                        "values than alone; does a forward pass draw random numbers, or mix the "
                        "rows of a batch otherwise than BatchNorm?"
                    )


# ------------------------------------------------------------------------- the check


def _trial(
    network: nn.Module, example_shape: tuple[int, ...], num_classes: int
) -> list[ClientTask]:
    """Return the training of three small clients: two full batches, a short last one, one short.

    Parameters are drawn anew, as a network's own may be 0 or not a number.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=(17, *example_shape)).astype(np.float32)
    scale = Standardisation.identity(example_shape[0])
    examples = Examples(x, rng.integers(num_classes, size=17), scale)
    settings = TrainSettings(lr=0.05, batch_size=4, local_steps=2)
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    tasks = []
    for rows in (np.arange(8), np.arange(8, 14), np.arange(14, 17)):
        start = {name: tensor.cpu().numpy().copy() for name, tensor in network.state_dict().items()}
        for name in sorted(parameters & start.keys()):
            shape = start[name].shape
            bound = np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.5
            centre = 0.0 if len(shape) > 1 else 1.0
            start[name] = rng.uniform(centre - bound, centre + bound, shape)
        tasks.append(ClientTask(start, examples, rows, settings, rng))
    return tasks


def _plainly(
    network: nn.Module, tasks: Sequence[ClientTask]
) -> tuple[nn.Module, list[ClientUpdate], float]:
    """Return a network in double precision, its plain training, and how near others must come.

    A network that insists on its own precision keeps it.
    """
    double = copy.deepcopy(network).double()
    try:
        return double, Reference(copy.deepcopy(double)).train(_fresh(tasks)), 1e-8
    except RuntimeError:
        return network, Reference(copy.deepcopy(network)).train(_fresh(tasks)), 1e-3


def _fresh(tasks: Sequence[ClientTask]) -> list[ClientTask]:
    """Return the tasks with generators as new: training draws from them."""
    return [replace(task, order=np.random.default_rng(i)) for i, task in enumerate(tasks)]


def _close(ours: NDArray[Any], theirs: NDArray[Any], tolerance: float) -> bool:
    largest = np.abs(theirs).max(where=np.isfinite(theirs), initial=0.0)
    return bool(np.allclose(ours, theirs, rtol=0.0, atol=tolerance * largest, equal_nan=True))


def _line(error: Exception) -> str:
    """Return an error's first line: PyTorch adds whole pages."""
    return (str(error) or type(error).__name__).splitlines()[0]
