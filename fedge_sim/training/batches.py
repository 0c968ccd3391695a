"""Batches of many clients side by side: who trains on which rows when, and their gathering."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedge_sim.data.base import Examples, ResidentExamples
from fedge_sim.training.base import ClientTask, epochs


class Tick(NamedTuple):
    """A step of all clients that still have one.

    Attributes
    ----------
    number : int
    clients, batches, width : int
        How many clients take part, the first ones of the plan; the most batches that one of
        them has in this step; the rows of the largest batch, or more.
    full : bool
        Whether all these batches have ``width`` rows.
    """

    number: int
    clients: int
    batches: int
    width: int
    full: bool

    @property
    def shape(self) -> tuple[int, int, int, bool]:
        """All that steps must have in common to be recorded as one."""
        return self[1:]


@dataclass(frozen=True)
class Plan:
    """All steps of some clients, drawn at once: the client with most steps comes first.

    Short batches are padded with a row of the client's own, which does not count.

    Attributes
    ----------
    order : list of int
        Number of the task whose client stands first, second, ...
    rows : int64 array (ticks, batches, clients, width)
        Which examples of the dataset a batch has.
    lengths : int64 array (ticks, batches, clients)
        How many of a batch's rows are the client's own examples; the rest is padding.
    steps : int64 array (clients,)
        Steps of each client, in descending order; tick t has the clients with more than t steps.
    last : bool array (ticks, clients)
        Whether a step belongs to the client's last epoch.
    """

    order: list[int]
    rows: NDArray[np.int64]
    lengths: NDArray[np.int64]
    steps: NDArray[np.int64]
    last: NDArray[np.bool_]

    @classmethod
    def of(cls, tasks: Sequence[ClientTask]) -> "Plan":
        """Draw the order of all examples, as :func:`epochs` has it."""
        drawn = [list(epochs(task)) for task in tasks]
        numbers = [sum(map(len, own)) for own in drawn]
        order = sorted(range(len(tasks)), key=lambda i: -numbers[i])
        ticks, clients = max(numbers, default=0), len(tasks)
        every = [batch for own in drawn for steps in own for step in steps for batch in step]
        width = max(map(len, every), default=0)
        most = max((len(step) for own in drawn for steps in own for step in steps), default=0)
        rows = np.zeros((ticks, most, clients, width), np.int64)
        lengths = np.zeros((ticks, most, clients), np.int64)
        last = np.zeros((ticks, clients), np.bool_)
        for place, i in enumerate(order):
            steps = [step for own in drawn[i] for step in own]
            if not steps:
                continue
            last[len(steps) - len(drawn[i][-1]) : len(steps), place] = True
            for tick, step in enumerate(steps):
                lengths[tick, : len(step), place] = [len(batch) for batch in step]
            own_rows = rows[:, :, place]
            own_rows[...] = steps[0][0][0]
            # Row-major order is that of the steps, their batches, and their rows.
            used = np.arange(width) < lengths[:, :, place, None]
            own_rows[used] = np.concatenate([batch for step in steps for batch in step])
        counts = np.array([numbers[i] for i in order], np.int64)
        return cls(order, rows, lengths, counts, last)

    @cached_property
    def totals(self) -> NDArray[np.int64]:
        """Examples of each step (ticks, clients)."""
        return np.asarray(self.lengths.sum(axis=1))

    @cached_property
    def counted(self) -> NDArray[np.int64]:
        """Examples of each step (ticks, clients) of a last epoch, 0 of earlier ones."""
        return self.totals * self.last

    def ticks(self, fixed_width: bool) -> Iterator[Tick]:
        """Yield the ticks, as wide as each needs, or all as wide as the widest."""
        clients = np.searchsorted(-self.steps, -np.arange(len(self.rows)), side="left")
        batches = (self.lengths > 0).any(axis=2).sum(axis=1)
        widths = self.lengths.max(axis=(1, 2), initial=0)
        for number, (n, k) in enumerate(zip(clients.tolist(), batches.tolist(), strict=True)):
            width = self.rows.shape[3] if fixed_width else int(widths[number])
            full = bool((self.lengths[number, :k, :n] == width).all())
            yield Tick(number, n, k, width, full)


def feed(
    plan: Plan, examples: Sequence[Examples], device: torch.device
) -> Callable[[Tick], tuple[Tensor, Tensor]]:
    """Return what gathers a tick's inputs (batches, clients, width, *shape) and classes.

    The values are those of :meth:`Examples.batch`, to the last bit.

    Parameters
    ----------
    plan : Plan
    examples : sequence of Examples
        In the order of the plan's clients.
    device : torch.device
        Where they are wanted.
    """
    if all(own.owner is None for own in examples):
        there = [
            own
            for own in examples
            if isinstance(own, ResidentExamples) and own.resident.x.device == device
        ]
        if len(there) == len(examples) and _same([own.resident.x for own in there]):
            return _feed_there(plan, there, device)
        if _same([own.x for own in examples]):
            return _feed_from_host(plan, examples, device)
    return _feed_each(plan, examples, device)


def _feed_there(
    plan: Plan, examples: Sequence[ResidentExamples], device: torch.device
) -> Callable[[Tick], tuple[Tensor, Tensor]]:
    held = examples[0]
    rows = bring(torch.from_numpy(plan.rows), device, held.pinned)
    mean, std = (torch.from_numpy(values).to(device) for values in _scale(examples))
    places, numbers = _numbered([own.resident.y for own in examples])
    different = [examples[place].resident.y for place in places]
    labels = torch.stack(different) if len(different) > 1 else different[0][None]
    which = torch.from_numpy(numbers).to(device)

    def gather(tick: Tick) -> tuple[Tensor, Tensor]:
        here = rows[tick.number, : tick.batches, : tick.clients, : tick.width]
        x = held.resident.x[here]
        x.sub_(mean[: tick.clients]).div_(std[: tick.clients])
        return x, labels[which[: tick.clients], here]

    return gather


def _feed_from_host(
    plan: Plan, examples: Sequence[Examples], device: torch.device
) -> Callable[[Tick], tuple[Tensor, Tensor]]:
    mean, std = _scale(examples)
    first = examples[0]
    places, which = _numbered([own.y for own in examples])
    different = [examples[place].y for place in places]
    labels = np.stack(different) if len(different) > 1 else different[0][None]

    def gather(tick: Tick) -> tuple[Tensor, Tensor]:
        rows = plan.rows[tick.number, : tick.batches, : tick.clients, : tick.width]
        x, y = first.x[rows], labels[which[: tick.clients], rows]
        x -= mean[: tick.clients]
        x /= std[: tick.clients]
        parts = torch.from_numpy(x), torch.from_numpy(y)
        return bring(parts[0], device, first.pinned), bring(parts[1], device, first.pinned)

    return gather


def _feed_each(
    plan: Plan, examples: Sequence[Examples], device: torch.device
) -> Callable[[Tick], tuple[Tensor, Tensor]]:
    """Gather for one client after the other: each has its own array, or many scales."""

    def gather(tick: Tick) -> tuple[Tensor, Tensor]:
        rows = plan.rows[tick.number, : tick.batches, : tick.clients, : tick.width]
        own = zip(examples, rows.swapaxes(0, 1), strict=False)
        x, y = zip(*(seen.batch(here.reshape(-1), device) for seen, here in own), strict=True)
        form = (tick.batches, tick.width)
        return (
            torch.stack([part.unflatten(0, form) for part in x], dim=1),
            torch.stack([part.unflatten(0, form) for part in y], dim=1),
        )

    return gather


def _same(values: Sequence[object]) -> bool:
    return all(value is values[0] for value in values)


def _numbered(values: Sequence[object]) -> tuple[list[int], NDArray[np.int64]]:
    """Return a place of every different object, and the number (n, 1) of each value's own."""
    ids = [id(value) for value in values]
    _, places, numbers = np.unique(ids, return_index=True, return_inverse=True)
    return places.tolist(), numbers[:, None]


def _scale(examples: Sequence[Examples]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return means and deviations (clients or 1, 1, channels, ...), for (..., clients, rows).

    There is one of each where all clients share it.
    """
    scales = [own.scale for own in examples]
    if _same(scales):
        scales = scales[:1]
    inner = [1] * (examples[0].x.ndim - 2)
    mean, std = (
        np.stack([getattr(scale, name) for scale in scales]).reshape(len(scales), 1, -1, *inner)
        for name in ("mean", "std")
    )
    return mean, std


def bring(values: Tensor, device: torch.device, pinned: bool) -> Tensor:
    """Copy a tensor to a device; from page-locked memory, the host does not wait for it."""
    if pinned and device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
