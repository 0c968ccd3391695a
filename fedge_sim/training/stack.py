"""The models of many clients on top of each other, and how all of them take a step together.

Shapes: N clients, P values of all trained parameters, B rows of a batch, k batches of a step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedge_sim.training.base import ClientTask, TrainSettings, load_arrays
from fedge_sim.training.flat import trained_parameters
from fedge_sim.training.graphs import Recorder, Replayer
from fedge_sim.training.optimizer import State, adam_step
from fedge_sim.training.vectorised import Vectorised


class Mode(NamedTuple):
    """What a step's operations depend on, other than the shapes of its inputs.

    Attributes
    ----------
    full : bool
        No row is padding.
    alone : bool
        Some client has a single row.
    """

    full: bool
    alone: bool


@dataclass(frozen=True)
class Rule:
    """What all clients of a call share: settings, less ``lr`` and ``prox_mu``."""

    settings: TrainSettings
    proximal: bool
    corrected: bool

    @classmethod
    def of(cls, tasks: Sequence[ClientTask]) -> "Rule":
        """Return what the tasks share; a ValueError names what they differ in."""
        shared = {replace(task.settings, lr=0.0, prox_mu=0.0) for task in tasks}
        if len(shared) > 1:
            raise ValueError(
                "clients that train together may differ in lr and prox_mu alone, not in "
                + ", ".join(sorted(_differing([vars(settings) for settings in shared])))
            )
        if any(task.settings.inner_steps > 1 or task.settings.outer_lr > 0 for task in tasks):
            raise ValueError("pFedMe trains one client at a time")
        proximal = any(task.settings.prox_mu > 0 for task in tasks)
        return cls(shared.pop(), proximal, any(task.correction is not None for task in tasks))


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key for key in settings[0] if len({own[key] for own in settings}) > 1]


@dataclass(frozen=True)
class Layout:
    """Where a network's values are in a stack.

    Attributes
    ----------
    trained : dict of torch.Size
        Parameters that get a gradient, by name: one after the other in a vector (P,).
    fixed : list of str
        Other parameters, and buffers: each a tensor of its own.
    saved : dict of str
        Which of these an entry of the state dict is: tied ones are the same.
    """

    trained: dict[str, torch.Size]
    fixed: list[str]
    saved: dict[str, str]

    @classmethod
    def of(cls, network: Vectorised, example_shape: tuple[int, ...]) -> "Layout":
        """Find the parameters that get a gradient, by a forward and a backward pass."""
        module = network.module
        parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        like = next(iter(parameters.values()))
        used = trained_parameters(module, like.new_zeros(2, *example_shape))
        trained = {name: parameters[name].shape for name in used}
        names = {id(t): n for n, t in [*module.named_parameters(), *module.named_buffers()]}
        state = module.state_dict(keep_vars=True)
        saved = {entry: names[id(tensor)] for entry, tensor in state.items()}
        fixed = [name for name in dict.fromkeys(saved.values()) if name not in trained]
        return cls(trained, fixed, saved)

    def vector(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the trained parameters (P,)."""
        return torch.cat([values[name].detach().flatten() for name in self.trained])

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views (N, *shape) of the trained parameters (N, P)."""
        # One split, as its gradient is one concatenation; slices would add up vectors (P,).
        parts = flat.split([shape.numel() for shape in self.trained.values()], dim=1)
        shapes = self.trained.items()
        return {n: part.view(-1, *s) for part, (n, s) in zip(parts, shapes, strict=True)}


class Stack:
    """The models of N clients on top of each other, and how all take a step.

    What a step reads and writes stays where it is, so that steps can be recorded.
    """

    def __init__(
        self,
        network: Vectorised,
        layout: Layout,
        rule: Rule,
        clients: int,
        recorder: Recorder | None,
    ) -> None:
        self.rule = rule
        self.replayer = Replayer(self.step, recorder)
        self._network, self._layout = network, layout
        module = network.module
        self._values = dict([*module.named_parameters(), *module.named_buffers()])
        vector = layout.vector(self._values)
        self.flat = vector.new_empty(clients, len(vector))
        self._fixed = {n: _empty(clients, self._values[n]) for n in layout.fixed}
        self._rates = vector.new_empty(2, clients, 1)
        self._lr, self._mu = self._rates
        self.losses = vector.new_empty(clients)
        self._start = torch.empty_like(self.flat) if rule.proximal else None
        optimizer = rule.settings.optimizer
        keeps = optimizer == "adam" or rule.settings.momentum > 0
        self._state = State.zero(self.flat, optimizer) if keeps else None
        self._corrections = torch.empty_like(self.flat) if rule.corrected else None

    @torch.no_grad()
    def load(self, tasks: Sequence[ClientTask]) -> None:
        """Take on the tasks' starts, rates, and corrections."""
        starts = {id(task.start): task.start for task in tasks}
        for start in starts.values():
            load_arrays(self._network.module, start)
            places = [i for i, task in enumerate(tasks) if task.start is start]
            where = torch.tensor(places, device=self.flat.device)
            self.flat[where] = self._layout.vector(self._values)
            for name, stacked in self._fixed.items():
                stacked[where] = self._values[name].detach()
        rates = [(task.settings.lr, task.settings.prox_mu) for task in tasks]
        self._rates.copy_(torch.tensor(rates, dtype=torch.float64).T[..., None])
        self.losses.zero_()
        if self._start is not None:
            self._start.copy_(self.flat)
        for kept in self._state or ():
            kept.zero_()  # SGD's momentum is then the first step's gradient, as in PyTorch
        if self._corrections is not None:
            for row, task in zip(self._corrections, tasks, strict=True):
                row.zero_()
                if task.correction is not None:
                    given = {n: torch.tensor(task.correction[n]) for n in self._layout.trained}
                    row.copy_(self._layout.vector(given))

    def arrays(self) -> list[dict[str, NDArray[Any]]]:
        """Return copies of the clients' models, as of their state dicts."""
        flat, columns = self.flat.cpu().numpy(), self._layout.trained
        ends = np.cumsum([shape.numel() for shape in columns.values()])
        fixed = {name: stacked.cpu().numpy() for name, stacked in self._fixed.items()}
        models = []
        for i, row in enumerate(flat):
            parts = np.split(row.copy(), ends[:-1])
            own = {n: p.reshape(s) for p, (n, s) in zip(parts, columns.items(), strict=True)}
            own |= {name: np.array(stacked[i]) for name, stacked in fixed.items()}
            models.append({entry: own[name] for entry, name in self._layout.saved.items()})
        return models

    def step(self, x: Tensor, y: Tensor, lengths: Tensor, counted: Tensor, mode: Mode) -> None:
        """Take a step with the first n clients, in place.

        Parameters
        ----------
        x, y : Tensors (k, n, B, *example_shape) and (k, n, B)
        lengths : int64 Tensor (k, n)
            How many of a batch's rows are the client's own examples; the rest is padding.
        counted : Tensor (n,)
            What the mean loss of the step's examples weighs in the sum of the losses.
        mode : Mode
        """
        totals = lengths.sum(dim=0)
        parts = [self._gradient(*batch, totals, mode) for batch in zip(x, y, lengths, strict=True)]
        gradient, loss = parts[0]
        for more, more_loss in parts[1:]:
            gradient, loss = gradient.add_(more), loss.add_(more_loss)
        self.losses[: len(loss)].addcmul_(loss, counted)
        self._update(gradient)

    def _gradient(
        self, x: Tensor, y: Tensor, lengths: Tensor, totals: Tensor, mode: Mode
    ) -> tuple[Tensor, Tensor]:
        """Return what a batch adds to its step's gradients (n, P) and losses (n,)."""
        n, width = y.shape
        valid = torch.arange(width, device=y.device) < lengths[:, None]
        flat = self.flat[:n].detach().requires_grad_()
        with torch.enable_grad():
            # A network may change its buffers in place, and a batch may be padding alone.
            fixed = {name: stacked[:n].clone() for name, stacked in self._fixed.items()}
            state = self._layout.split(flat) | fixed
            logits, buffers = self._network(state, x, None if mode.full else valid, mode.alone)
            losses = functional.cross_entropy(
                logits.flatten(0, 1).to(flat.dtype),
                y.flatten(),
                reduction="none",
                label_smoothing=self.rule.settings.label_smoothing,
            )
            loss = (losses.view(n, width) * valid.to(flat.dtype) / totals[:, None]).sum(dim=1)
        # Clients share nothing, so the gradient of their sum is that of each.
        (gradient,) = torch.autograd.grad(loss.sum(), flat)
        for name, after in buffers.items():
            stacked = self._fixed[name][:n]
            took_part = (lengths > 0).view(-1, *[1] * (stacked.dim() - 1))
            stacked.copy_(torch.where(took_part, after.detach(), stacked))
        return gradient, loss.detach()

    @torch.no_grad()
    def _update(self, gradient: Tensor) -> None:
        """Do what :func:`local.train` does with a gradient, here (n, P), in the same order."""
        n, settings = len(gradient), self.rule.settings
        flat = self.flat[:n]
        if self._start is not None:
            gradient.addcmul_(flat - self._start[:n], self._mu[:n])
        if settings.clip_norm > 0:
            norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
            gradient.mul_((settings.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        if self._corrections is not None:
            gradient.add_(self._corrections[:n])
        if settings.weight_decay:
            gradient.add_(flat, alpha=settings.weight_decay)
        if self._state is not None:
            # Clients that are still here all took the same number of steps.
            state = State(self._state.momentum[:n], self._state.square[:n], self._state.steps)
            if settings.optimizer == "adam":
                adam_step(flat, gradient, self._lr[:n], state)
                return
            gradient = state.momentum.mul_(settings.momentum).add_(gradient)
        flat.addcmul_(gradient, self._lr[:n], value=-1)


def _empty(clients: int, like: Tensor) -> Tensor:
    return torch.empty(clients, *like.shape, dtype=like.dtype, device=like.device)
