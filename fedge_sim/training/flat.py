"""A network with all its trainable parameters in one vector: a step is a few operators on it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedge_sim.algorithms import Arrays


class FlatNetwork:
    """A network whose trainable parameters are views of one vector, in their order.

    Parameters
    ----------
    network : nn.Module
        Its parameters live in the vector from now on.
    names : sequence of str
        The parameters that are trained.

    Attributes
    ----------
    network : nn.Module
    names : list of str
    parameters : list of nn.Parameter
        The views.
    vector : Tensor (P,)

    Raises
    ------
    TypeError
        If the parameters are of several types.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        self.network, self.names = network, list(names)
        named = dict(network.named_parameters())
        self.parameters = [named[name] for name in self.names]
        if len({p.dtype for p in self.parameters}) > 1:
            raise TypeError("parameters of several types cannot be trained as one vector")
        self.vector = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        for parameter, part in zip(self.parameters, self._split(self.vector), strict=True):
            parameter.data = part
        self._fixed = {n: p.data for n, p in named.items() if n not in set(self.names)}

    @property
    def others(self) -> dict[str, Tensor]:
        """Buffers, which a forward pass may replace, and parameters that are not trained."""
        return self._fixed | dict(self.network.named_buffers())

    def _split(self, vector: Tensor) -> list[Tensor]:
        sizes = [p.numel() for p in self.parameters]
        parts = vector.split(sizes)
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the parameters that another vector holds, by name."""
        return dict(zip(self.names, self._split(vector), strict=True))

    def all(self) -> dict[str, Tensor]:
        """Return all tensors of the network, by name."""
        return self.named(self.vector) | self.others

    def vector_of(self, arrays: Arrays) -> Tensor:
        """Return arrays by parameter name as a vector (P,)."""
        parts = [torch.tensor(arrays[name]).reshape(-1) for name in self.names]
        return torch.cat(parts).to(self.vector)


def trained_parameters(network: nn.Module, x: Tensor) -> list[str]:
    """Return the names of the parameters that get a gradient, in their order.

    A parameter that the forward pass does not use has none, and SGD leaves it as it is.

    Parameters
    ----------
    network : nn.Module
        Its buffers may change.
    x : Tensor (2 or more, *example_shape)
    """
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    with torch.random.fork_rng([x.device] if x.is_cuda else []):  # dropout would draw
        total = network(x).sum()
    gradients = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    return [name for (name, _), g in zip(named, gradients, strict=True) if g is not None]
