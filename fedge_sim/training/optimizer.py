"""Steps of SGD and Adam (Kingma & Ba 2015, algorithm 1), and what these keep between them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from fedge_sim.training.base import TrainSettings

BETAS, EPSILON = (0.9, 0.999), 1e-8


class State(NamedTuple):
    """What an optimiser keeps of a tensor.

    Attributes
    ----------
    momentum : Tensor
        SGD's buffer, or Adam's mean of the gradients; it has the tensor's shape.
    square : Tensor
        Adam's mean of the squared gradients; empty with SGD.
    steps : Tensor ()
        How many steps Adam has done.
    """

    momentum: Tensor
    square: Tensor
    steps: Tensor

    @classmethod
    def zero(cls, values: Tensor, optimizer: str) -> "State":
        """Return what there is where training begins."""
        square = torch.zeros_like(values) if optimizer == "adam" else values.new_zeros(0)
        return cls(torch.zeros_like(values), square, torch.zeros((), device=values.device))


@torch.no_grad()
def take_step(
    values: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    states: Sequence[State],
    settings: TrainSettings,
    fused: bool | None = None,
) -> None:
    """Do a step in place, as ``torch.optim.SGD`` and ``torch.optim.Adam`` do.

    Those classes import the compiler when they are first used: a second, in every process.

    Parameters
    ----------
    values : sequence of Tensor
    gradients : sequence of Tensor or None
        A value without one stays as it is.
    states : sequence of State
    settings : TrainSettings
    fused : bool, optional
        Whether to pass over the values once; none: as PyTorch likes.
    """
    triples = zip(values, gradients, states, strict=True)
    used = [(value, g, state) for value, g, state in triples if g is not None]
    changed, slopes = [value for value, _, _ in used], [g for _, g, _ in used]
    momenta = [state.momentum for _, _, state in used]
    if settings.optimizer == "adam":
        adam(
            changed,
            slopes,
            momenta,
            [state.square for _, _, state in used],
            [],
            [state.steps for _, _, state in used],
            fused=fused,
            lr=settings.lr,
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPSILON,
            weight_decay=settings.weight_decay,
            amsgrad=False,
            maximize=False,
        )
        return
    sgd(
        changed,
        slopes,
        list(momenta),
        fused=fused,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )


def adam_step(vector: Tensor, gradient: Tensor, lr: Tensor, state: State) -> None:
    """Do a step of Adam in place, in operations that can be recorded or compiled.

    A GPU is not waited for: also what depends on the number of steps is computed there.

    Parameters
    ----------
    vector, gradient : Tensor (..., P)
        The second with all that is added to it, weight decay too.
    lr : Tensor () or (..., 1)
    state : State
    """
    mean, square, steps = state
    steps.add_(1)
    mean.lerp_(gradient, 1 - BETAS[0])
    square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    # In single precision, 1 - 0.999 would have four digits.
    of_mean, of_square = (1 - beta ** steps.double() for beta in BETAS)
    root = (square.sqrt() / of_square.sqrt()).add_(EPSILON)
    vector.sub_(lr / of_mean * mean / root)
