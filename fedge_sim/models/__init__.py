"""Networks by name. A new one is a file here and a line in ``MODELS``."""

from collections.abc import Callable

import torch
from torch import nn

from fedge_sim.errors import ConfigError, suggest
from fedge_sim.models.cnn1d import CNN1D
from fedge_sim.models.mlp import MLP

MODELS: dict[str, Callable[[tuple[int, int], int], nn.Module]] = {
    "cnn1d": CNN1D,
    "mlp": MLP,
}


def build_model(name: str, window_shape: tuple[int, int], num_classes: int) -> nn.Module:
    """Build a network for windows of the given (channels, samples).

    Its values are arbitrary: load arrays into it, or call :func:`initialise`.

    Raises
    ------
    ConfigError
        If no network has this name.
    """
    if name not in MODELS:
        raise ConfigError.at("app.config", "model", name, f"unknown; {suggest(name, MODELS)}")
    return MODELS[name](window_shape, num_classes)


@torch.no_grad()
def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw all weights anew from a generator, by PyTorch's default rule for each layer.

    Convolutions and linear layers get U(-b, b) with b = 1 / sqrt(fan_in), for weights and
    biases alike (He et al. 2015 with a = sqrt(5)); normalisation layers get 1 and 0.
    The global random state is neither used nor changed.
    """
    for layer in model.modules():
        own = dict(layer.named_parameters(recurse=False))
        weight = own.get("weight")
        if weight is None:
            if own:
                raise TypeError(f"{type(layer).__name__}: no rule to initialise {sorted(own)}")
        elif weight.dim() > 1:
            bound = weight[0].numel() ** -0.5
            for parameter in own.values():
                parameter.uniform_(-bound, bound, generator=generator)
        else:
            weight.fill_(1.0)
            if (bias := own.get("bias")) is not None:
                bias.zero_()
