"""Knowledge distillation from several teachers, on examples that no client has (FedRevive).

Askin et al. 2025 (arXiv 2511.00655). Teachers are recent client models; what is known of their
examples is how many are of each class. K is the number of teachers, C of classes, B of a batch.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedge_sim.config_devices import FedRevive

CHUNK = 256  # examples that teachers look at together
WEIGHT_DECAY = 1e-5  # of the student, as published
LEAST = 1e-8  # what the shares of a class count as together, at the least


@dataclass
class Teacher:
    """A client's model as it came, frozen, in evaluation mode.

    Attributes
    ----------
    network : nn.Module
    mix : float64 array (C,)
        Shares of the classes in the client's examples.
    """

    network: nn.Module
    mix: NDArray[np.float64]

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False)


@dataclass(frozen=True)
class Lesson:
    """What a student learns from, a batch for each step; there may be no step.

    Attributes
    ----------
    x : Tensor (steps, K, batch, *shape)
        Of each teacher its own.
    targets : Tensor (steps, K, batch, C)
        That teacher's softened probabilities.
    """

    x: Tensor
    targets: Tensor


class Source(Protocol):
    """Where the examples come from that are distilled on."""

    def prepare(
        self,
        teachers: Sequence[Teacher],
        student: nn.Module,
        random: np.random.Generator,
    ) -> None:
        """Get ready for a lesson, and learn; ``student`` is the server's model, frozen."""

    def lesson(self, teachers: Sequence[Teacher], random: np.random.Generator) -> Lesson:
        """Draw the batches of all steps, and ask the teachers about them."""

    def state(self) -> dict[str, Any]:
        """Return what it remembers, as a tree that a checkpoint can hold."""

    def restore(self, state: Any) -> None:
        """Remember what another one of the same settings did: :meth:`state`."""


def class_mix(counts: Iterable[int]) -> NDArray[np.float64]:
    """Return the share of each class (C,) from numbers of examples, not all 0."""
    values = np.asarray(tuple(counts), np.float64)
    return np.asarray(values / values.sum())


def teacher_weights(teachers: Sequence[Teacher]) -> Tensor:
    """Return w_k(j) = q_k(j) / sum_t q_t(j) (K, C), float64: who knows class j, and how well.

    The weights of a class that no teacher knows are 0.
    """
    mixes = np.stack([teacher.mix for teacher in teachers])
    return torch.from_numpy(mixes / np.maximum(mixes.sum(axis=0), LEAST))


@torch.no_grad()
def taught(examples: Sequence[Tensor], teachers: Sequence[Teacher], temperature: float) -> Lesson:
    """Let each teacher answer for its own examples (steps, batch, *shape).

    So the loss of a step is the mean over teachers of KL(teacher_k || student) on what teacher k
    knows (Askin et al. 2025), and not the divergence from the mean of what all teachers say.
    """
    targets = []
    for x, teacher in zip(examples, teachers, strict=True):
        logits = torch.cat([teacher.network(part) for part in x.flatten(0, 1).split(CHUNK)])
        targets.append(functional.softmax(logits / temperature, 1).unflatten(0, x.shape[:2]))
    return Lesson(torch.stack(list(examples), 1), torch.stack(targets, 1))


def rows_by_class(
    labels: NDArray[np.int64],
    mix: NDArray[np.float64],
    size: tuple[int, ...],
    random: np.random.Generator,
) -> NDArray[np.int64]:
    """Draw samples whose classes follow a mix, each of its class as likely as another.

    Parameters
    ----------
    labels : int64 array (n,)
        Of all samples, n at least 1.
    mix : float64 array (C,)
        Shares of the classes. In place of a class without a sample, any sample is drawn.
    size : tuple of int
        Of what is returned.
    random : numpy Generator
    """
    by_class = np.argsort(labels, kind="stable")
    counts = np.bincount(labels, minlength=len(mix))
    first = np.cumsum(counts) - counts
    wanted = random.choice(len(mix), size, p=mix)
    absent = counts[wanted] == 0
    choices = np.where(absent, len(labels), counts[wanted])
    return by_class[np.where(absent, 0, first[wanted]) + random.integers(choices)]


def distil(student: nn.Module, lesson: Lesson, settings: FedRevive) -> list[float]:
    """Train a student on a lesson, in place, and return the loss of each step.

    It is the mean over all examples of T^2 KL(teacher || student), both softened by the
    temperature T (Hinton et al. 2015); the optimiser is Adam. In a step the student sees one
    teacher's batch after the other, each alone, as BatchNorm normalises by the batch, and is in
    training mode, so that its statistics move. A step is skipped, as if it had not been, if its
    loss, its gradient or a statistic is not finite: its loss is not a number.
    """
    parameters = list(student.parameters())
    adam = torch.optim.Adam(parameters, lr=settings.kd_lr, weight_decay=WEIGHT_DECAY)
    student.train()
    losses = []
    for x_KB, targets_KB in zip(lesson.x, lesson.targets, strict=True):
        before = {name: buffer.clone() for name, buffer in student.named_buffers()}
        adam.zero_grad()
        total = 0.0
        for x, targets in zip(x_KB, targets_KB, strict=True):
            logits = functional.log_softmax(student(x) / settings.temperature, 1)
            loss = functional.kl_div(logits, targets, reduction="sum")
            loss = settings.temperature**2 * loss / targets_KB[..., 0].numel()
            loss.backward()
            total += float(loss.detach())
        slopes = [p.grad for p in parameters if p.grad is not None]
        if math.isfinite(total) and all(
            torch.isfinite(values).all() for values in (*slopes, *student.buffers())
        ):
            adam.step()
            losses.append(total)
        else:
            student.load_state_dict(before, strict=False)
            losses.append(math.nan)
    return losses


class Unlabelled:
    """Examples of nobody in particular, without labels: FedRevive's light variant.

    Parameters
    ----------
    x : float32 array (n, *shape)
        Standardised as the clients' examples are.
    settings : FedRevive
    device : torch.device
    """

    def __init__(self, x: NDArray[np.float32], settings: FedRevive, device: torch.device) -> None:
        self._x = x
        self._settings = settings
        self._device = device

    def prepare(
        self,
        teachers: Sequence[Teacher],
        student: nn.Module,
        random: np.random.Generator,
    ) -> None:
        """Do nothing: the examples are there."""

    def lesson(self, teachers: Sequence[Teacher], random: np.random.Generator) -> Lesson:
        """Draw batches uniformly, as there is no label."""
        s = self._settings
        size = (s.kd_steps, s.kd_batch_size)
        drawn = [self._x[random.integers(len(self._x), size=size)] for _ in teachers]
        x = [torch.from_numpy(own).to(self._device) for own in drawn]
        return taught(x, teachers, s.temperature)

    def state(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def restore(self, state: Any) -> None:
        """Do nothing."""
