"""Samples that are made up so that teachers are sure of them, and a generator that learns to.

Each time a copy of the generator is trained for a few steps, together with its noise, the best of
the batches that it made is kept, and the generator moves towards it: fast meta-learned synthesis
(Fang et al. 2022) by Reptile (Nichol et al. 2018).

K is the number of teachers, C of classes, B of a batch.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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

BETAS = (0.5, 0.999)  # of Adam, for the generator, its copies and the noise


@contextmanager
def batch_norm_gaps(network: nn.Module) -> Iterator[list[Tensor]]:
    """Collect, in a forward pass, how far each BatchNorm's input is from what it has seen.

    A gap is ||mean - running mean||_2 + ||variance - running variance||_2 (Yin et al. 2020, eq. 4).
    """
    gaps: list[Tensor] = []

    def compare(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        rows_NC = inputs[0].movedim(1, -1).flatten(0, -2)  # var_mean is slow on channels last
        mean = rows_NC.mean(0)
        variance = (rows_NC - mean).square().mean(0)
        gaps.append((mean - layer.running_mean).norm() + (variance - layer.running_var).norm())

    hooks = [
        layer.register_forward_pre_hook(compare)
        for layer in network.modules()
        if isinstance(layer, NORMS) and layer.running_mean is not None
    ]
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
) -> Tensor:
    """Add the gradient of a batch's loss to all that x is made of, and return the loss, detached.

    The loss says how unlike a good batch of samples x is. With w_k(y) of :func:`teacher_weights`,
    it is the mean over the batch of ``one_hot`` times sum_k w_k(y) CE(teacher_k(x), y);
    ``batch_norm`` times the gaps of all teachers' BatchNorm layers, each by its mean w_k; less
    ``adversarial`` times sum_k w_k(y) KL(teacher_k || student) where both say the same class, as
    there a student can still learn (Askin et al. 2025).

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
    weights_KB = teacher_weights(teachers).to(x.device)[:, labels]
    made = x.detach().requires_grad_()
    said_BC = known_BC = None
    if student is not None:
        said_BC = student(made)
        known_BC = said_BC.detach().requires_grad_()
    total = x.new_zeros(())
    for teacher, weights_B in zip(teachers, weights_KB, strict=True):
        loss = _loss_of(teacher, made, labels, weights_B, known_BC, settings)
        loss.backward()
        total += loss.detach()
    if said_BC is not None and known_BC is not None:
        said_BC.backward(known_BC.grad)
    if x.requires_grad:
        x.backward(made.grad)
    return total


def _loss_of(
    teacher: Teacher,
    x: Tensor,
    labels: Tensor,
    weights_B: Tensor,
    student_BC: Tensor | None,
    settings: FedRevive,
) -> Tensor:
    """Return a teacher's part of the loss; of the student there are its logits."""
    with batch_norm_gaps(teacher.network) as gaps:
        log_p_BC = functional.log_softmax(teacher.network(x), 1)
    entropy_B = functional.nll_loss(log_p_BC, labels, reduction="none")
    loss = settings.one_hot * (weights_B * entropy_B).mean()
    if gaps:
        loss = loss + settings.batch_norm * weights_B.mean() * torch.stack(gaps).sum()
    if student_BC is not None:
        gain_B = (log_p_BC.exp() * (log_p_BC - functional.log_softmax(student_BC, 1))).sum(1)
        agree_B = log_p_BC.argmax(1) == student_BC.argmax(1)
        loss = loss - settings.adversarial * (weights_B * gain_B * agree_B).mean()
    return loss


class Synthesiser:
    """A generator, and the pool of the newest samples that copies of it have made.

    Parameters
    ----------
    generator : Generator
        It is trained in place.
    settings : FedRevive
    """

    def __init__(self, generator: Generator, settings: FedRevive) -> None:
        self.generator = generator.train()
        self._settings = settings
        self._adam = torch.optim.Adam(generator.parameters(), settings.generator_lr, BETAS)
        self._device = next(generator.parameters()).device
        self.x = torch.empty((0, *generator.example_shape), device=self._device)
        self.labels = np.empty(0, np.int64)

    def prepare(
        self,
        teachers: Sequence[Teacher],
        student: nn.Module,
        random: np.random.Generator,
        adversarial: bool,
    ) -> None:
        """Make a batch of samples for the pool, and let the generator learn from it."""
        s = self._settings
        mix = np.mean([teacher.mix for teacher in teachers], axis=0)
        labels = random.choice(len(mix), s.synthesis_batch_size, p=mix / mix.sum())
        y = torch.from_numpy(labels).to(self._device)
        size = (s.synthesis_batch_size, s.noise_size)
        noise = torch.from_numpy(random.standard_normal(size, np.float32)).to(self._device)
        clone = copy.deepcopy(self.generator)
        own: list[dict[str, Any]] = [
            {"params": list(clone.layers.parameters())},
            {"params": [noise.requires_grad_(), clone.classes.weight], "lr": s.noise_lr},
        ]
        adam = torch.optim.Adam(own, s.generator_lr, BETAS)
        lowest, best = float("inf"), None
        for _ in range(s.generator_steps):
            adam.zero_grad()
            x = clone(noise, y)
            loss = backward_synthesis(x, y, teachers, student if adversarial else None, s)
            if not torch.isfinite(loss):
                break  # so would be all that follows
            if loss.item() < lowest:
                lowest, best = loss.item(), x.detach()
            adam.step()
        if best is not None:
            self._keep(best, labels)
            self._move_towards(clone)

    def _keep(self, x: Tensor, labels: NDArray[np.int64]) -> None:
        newest = slice(-self._settings.max_samples, None)
        self.x = torch.cat([self.x, x.contiguous()])[newest]  # in the layout of a checkpoint
        self.labels = np.concatenate([self.labels, labels])[newest]

    def _move_towards(self, clone: Generator) -> None:
        """Take a step of Reptile: Adam on the gradient theta - theta of the copy."""
        pairs = list(zip(self.generator.parameters(), clone.parameters(), strict=True))
        if not all(torch.isfinite(there).all() for _, there in pairs):
            return
        for here, there in pairs:
            here.grad = here.detach() - there.detach()
        self._adam.step()

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


def _like(parameter: Tensor, array: NDArray[Any]) -> Tensor:
    """Return a value of Adam's as it was: in the parameter's layout, or the number of steps."""
    value = torch.tensor(array)
    return torch.empty_like(parameter).copy_(value) if array.ndim else value
