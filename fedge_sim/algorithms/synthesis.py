"""Samples that are made up so that teachers are sure of them, and a generator that learns to.

Each time a copy of the generator is trained for a few steps, together with its noise and what
stands for each class, the best of the batches that it made is kept, and the generator moves
towards it: fast meta-learned synthesis (Fang et al. 2022) by Reptile (Nichol et al. 2018).

K is the number of teachers, C of classes, B of a batch, N of a generator's inputs.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedge_sim.algorithms.distillation import (
    Lesson,
    Teacher,
    rows_by_class,
    taught,
    teacher_weights,
)
from fedge_sim.algorithms.generator import Generator
from fedge_sim.algorithms.personal import NORMS
from fedge_sim.config_devices import FedRevive
from fedge_sim.models.tracker import Tracker, channel_statistics

BETAS = (0.5, 0.999)  # of Adam, for the generator, its copies and the noise


class Losses(NamedTuple):
    """How unlike a good batch of samples is, in three ways; :meth:`total` weighs them.

    Attributes
    ----------
    one_hot, batch_norm, adversarial : Tensor ()
    """

    one_hot: Tensor
    batch_norm: Tensor
    adversarial: Tensor

    def total(self, settings: FedRevive) -> Tensor:
        """Return their sum, each times its weight."""
        return (
            settings.one_hot * self.one_hot
            + settings.batch_norm * self.batch_norm
            + settings.adversarial * self.adversarial
        )


def statistics(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return means and variances of the channels that a layer has seen; none if it keeps none."""
    if isinstance(layer, Tracker):
        return layer.tracked_mean, layer.tracked_variance
    if isinstance(layer, NORMS) and layer.running_mean is not None:
        assert layer.running_var is not None
        return layer.running_mean, layer.running_var
    return None


@contextmanager
def statistics_gaps(network: nn.Module) -> Iterator[list[Tensor]]:
    """Collect, in a forward pass, how far each layer's input is from what it has seen.

    Of BatchNorm's and trackers' inputs; a gap is ||mean - running mean||_2 +
    ||variance - running variance||_2 (Yin et al. 2020, eq. 4).
    """
    gaps: list[Tensor] = []

    def compare(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen = statistics(layer)
        assert seen is not None
        pairs = zip(channel_statistics(inputs[0]), seen, strict=True)
        gaps.append(torch.stack([(here - there).norm() for here, there in pairs]).sum())

    layers = [layer for layer in network.modules() if statistics(layer) is not None]
    hooks = [layer.register_forward_pre_hook(compare) for layer in layers]
    try:
        yield gaps
    finally:
        for hook in hooks:
            hook.remove()


def backward_synthesis(
    x: Tensor,
    labels: Tensor,
    teachers: Sequence[Teacher],
    student: nn.Module | None,
    settings: FedRevive,
) -> Losses:
    """Add the gradient of a batch's loss to all that x is made of, and return it, detached.

    With w_k(y) of :func:`teacher_weights`, the losses are: ``one_hot``, the mean over the batch of
    sum_k w_k(y) CE(teacher_k(x), y); ``batch_norm``, the sum over teachers of the gaps of all
    their statistics times their mean w_k; ``adversarial``, minus the mean of
    sum_k w_k(y) KL(teacher_k || student) where both say the same class, as there a student can
    still learn (Askin et al. 2025).

    Its gradient is that of one teacher after the other: what all of them together keep for it
    would be most of the server's memory.

    Parameters
    ----------
    x : Tensor (B, *shape)
    labels : int64 Tensor (B,)
    teachers : sequence of Teacher
    student : nn.Module, optional
        In evaluation mode; None leaves the last term out.
    settings : FedRevive
    """
    weights_KB = teacher_weights(teachers).to(x)[:, labels]
    made = x.detach().requires_grad_()
    said_BC = known_BC = None
    if student is not None:
        said_BC = student(made)
        known_BC = said_BC.detach().requires_grad_()
    sums = x.new_zeros(3)
    for teacher, weights_B in zip(teachers, weights_KB, strict=True):
        losses = _losses_of(teacher, made, labels, weights_B, known_BC)
        losses.total(settings).backward()
        sums += torch.stack(losses).detach()
    if said_BC is not None and known_BC is not None:
        said_BC.backward(known_BC.grad)
    if x.requires_grad:
        x.backward(made.grad)
    return Losses(*sums)


def _losses_of(
    teacher: Teacher, x: Tensor, labels: Tensor, weights_B: Tensor, student_BC: Tensor | None
) -> Losses:
    """Return a teacher's part of the losses; of the student there are its logits."""
    with statistics_gaps(teacher.network) as gaps:
        log_p_BC = functional.log_softmax(teacher.network(x), 1)
    entropy_B = functional.nll_loss(log_p_BC, labels, reduction="none")
    adversarial = x.new_zeros(())
    if student_BC is not None:
        gain_B = (log_p_BC.exp() * (log_p_BC - functional.log_softmax(student_BC, 1))).sum(1)
        agree_B = log_p_BC.argmax(1) == student_BC.argmax(1)
        adversarial = -(weights_B * gain_B * agree_B).mean()
    return Losses(
        one_hot=(weights_B * entropy_B).mean(),
        batch_norm=weights_B.mean() * torch.stack(gaps).sum() if gaps else x.new_zeros(()),
        adversarial=adversarial,
    )


class Synthesis(NamedTuple):
    """What came of one time that samples were made up.

    Attributes
    ----------
    copy : Generator
        As it was trained.
    losses : list of Losses
        Of each step, before it; the last is not finite if training had to end.
    best : Tensor (B, *shape), optional
        The batch of the lowest loss; none if no loss was finite.
    """

    copy: Generator
    losses: list[Losses]
    best: Tensor | None


class Synthesiser:
    """A generator, and the pool of the newest samples that copies of it have made.

    Parameters
    ----------
    generator : Generator
        It is trained in place.
    settings : FedRevive

    Attributes
    ----------
    calls : int
        How often samples were made up: from the ``adversarial_start``-th time on the student
        takes part.
    """

    def __init__(self, generator: Generator, settings: FedRevive) -> None:
        self.generator = generator.train()
        self._settings = settings
        # Without an epsilon: a first step is the rate times a sign, however near the copy is.
        self._adam = torch.optim.Adam(generator.parameters(), settings.generator_lr, BETAS, eps=0.0)
        like = next(generator.parameters())
        self._device = like.device
        self.x = torch.empty((0, *generator.example_shape), device=like.device, dtype=like.dtype)
        self.labels = np.empty(0, np.int64)
        self.calls = 0

    def prepare(
        self, teachers: Sequence[Teacher], student: nn.Module, random: np.random.Generator
    ) -> None:
        """Make a batch of samples for the pool, and let the generator learn from it.

        What stands for each class is drawn anew, as the noise is.
        """
        s = self._settings
        mix = np.mean([teacher.mix for teacher in teachers], axis=0)
        labels = random.choice(len(mix), s.synthesis_batch_size, p=mix / mix.sum())
        noise, classes = (
            torch.from_numpy(random.standard_normal((rows, s.noise_size), np.float32))
            for rows in (s.synthesis_batch_size, len(mix))
        )
        self.synthesise(labels, noise.to(self._device), classes.to(self._device), teachers, student)

    def synthesise(
        self,
        labels: NDArray[np.int64],
        noise: Tensor,
        classes: Tensor,
        teachers: Sequence[Teacher],
        student: nn.Module,
    ) -> Synthesis:
        """Train a copy of the generator with its inputs; keep the best batch, and follow the copy.

        Parameters
        ----------
        labels : int64 array (B,)
            The classes that the samples are to be of.
        noise : Tensor (B, N)
        classes : Tensor (C, N)
            What is added to the noise of each class, times ``class_weight``. Both are trained in
            place.
        teachers : sequence of Teacher
        student : nn.Module
            In evaluation mode.
        """
        s = self._settings
        self.calls += 1
        opponent = student if s.adversarial and self.calls >= s.adversarial_start else None
        y = torch.from_numpy(labels).to(self._device)
        clone = copy.deepcopy(self.generator)
        inputs = [noise.requires_grad_(), classes.requires_grad_()]
        own: list[dict[str, Any]] = [
            {"params": list(clone.parameters())},
            {"params": inputs, "lr": s.noise_lr},
        ]
        adam = torch.optim.Adam(own, s.generator_lr, BETAS)
        lowest, result = float("inf"), Synthesis(clone, [], None)
        for _ in range(s.generator_steps):
            adam.zero_grad()
            x = clone(noise + s.class_weight * classes[y])
            losses = backward_synthesis(x, y, teachers, opponent, s)
            result.losses.append(losses)
            loss = losses.total(s)
            if not torch.isfinite(loss):
                break  # so would be all that follows
            if loss.item() < lowest:
                lowest, result = loss.item(), result._replace(best=x.detach())
            adam.step()
        if result.best is not None:
            self._keep(result.best, labels)
            self._move_towards(clone)
        return result

    def _keep(self, x: Tensor, labels: NDArray[np.int64]) -> None:
        newest = slice(-self._settings.max_samples, None)
        self.x = torch.cat([self.x, x.contiguous()])[newest]  # in the layout of a checkpoint
        self.labels = np.concatenate([self.labels, labels])[newest]

    @torch.no_grad()
    def _move_towards(self, clone: Generator) -> None:
        """Take a step of Reptile: Adam on the gradient theta - theta of the copy.

        A value that never differed from the copy's stays as it is: for Adam it would be 0 / 0.
        """
        pairs = list(zip(self.generator.parameters(), clone.parameters(), strict=True))
        if not all(torch.isfinite(there).all() for _, there in pairs):
            return
        before = [here.clone() for here, _ in pairs]
        for here, there in pairs:
            here.grad = here - there
        self._adam.step()
        for (here, _), then in zip(pairs, before, strict=True):
            here.copy_(torch.where(torch.isfinite(here), here, then))

    def lesson(self, teachers: Sequence[Teacher], random: np.random.Generator) -> Lesson:
        """Draw each teacher's batches by the classes that it knows."""
        s = self._settings
        if not len(self.labels):
            return Lesson(self.x, self.x)  # no step
        size = (s.kd_steps, s.kd_batch_size)
        rows = [rows_by_class(self.labels, teacher.mix, size, random) for teacher in teachers]
        x = [self.x[torch.from_numpy(own).to(self._device)] for own in rows]
        return taught(x, teachers, s.temperature)

    def state(self) -> dict[str, Any]:
        """Return generator, its optimiser and the pool, as a tree that a checkpoint can hold."""
        adam = self._adam.state_dict()["state"]
        return {
            "generator": [p.detach().cpu().numpy().copy() for p in self.generator.parameters()],
            "adam": [
                {name: value.cpu().numpy().copy() for name, value in adam[i].items()}
                for i in range(len(adam))
            ],
            "x": self.x.cpu().numpy(),
            "labels": self.labels,
            "calls": self.calls,
        }

    @torch.no_grad()
    def restore(self, state: Any) -> None:
        """Remember what another one of the same settings did: :meth:`state`."""
        for parameter, array in zip(self.generator.parameters(), state["generator"], strict=True):
            parameter.copy_(torch.tensor(array))
        both = zip(state["adam"], self.generator.parameters(), strict=False)  # none before a step
        moments = {
            i: {name: _like(parameter, array) for name, array in own.items()}
            for i, (own, parameter) in enumerate(both)
        }
        groups = self._adam.state_dict()["param_groups"]
        self._adam.load_state_dict({"state": moments, "param_groups": groups})
        self.x = torch.tensor(state["x"]).to(self._device)
        self.labels = np.array(state["labels"])
        self.calls = int(state["calls"])


def _like(parameter: Tensor, array: NDArray[Any]) -> Tensor:
    """Return a value of Adam's as it was: in the parameter's layout, or the number of steps."""
    value = torch.tensor(array)
    return torch.empty_like(parameter).copy_(value) if array.ndim else value
