"""Networks by name. A new one is a file here and a line in ``MODELS``."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from fedge_sim.errors import ConfigError, suggest
from fedge_sim.models.cnn1d import CNN1D
from fedge_sim.models.cnn2d import CNN2D
from fedge_sim.models.cnn2d_small import CNN2DSmall
from fedge_sim.models.mlp import MLP
from fedge_sim.models.resnet18 import ResNet18
from fedge_sim.models.resnet18_tracked import ResNet18Tracked


class Model(NamedTuple):
    """A network in the registry.

    Attributes
    ----------
    build : callable
        From the shape of an example and the number of classes to a module.
    takes : str
        The examples that it is made for.
    num_axes : int
        Of an example; 0 if any will do.
    """

    build: Callable[[tuple[int, ...], int], nn.Module]
    takes: str
    num_axes: int


MODELS = {
    "cnn1d": Model(CNN1D, "windows (channels, samples)", 2),
    "cnn2d": Model(CNN2D, "images (channels, height, width)", 3),
    "cnn2d-small": Model(CNN2DSmall, "images (channels, height, width)", 3),
    "mlp": Model(MLP, "examples of any shape", 0),
    "resnet18": Model(ResNet18, "images (channels, height, width)", 3),
    "resnet18-tracked": Model(ResNet18Tracked, "images (channels, height, width)", 3),
}


def build_model(name: str, example_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Build a network for examples of the given shape.

    Its values are arbitrary: load arrays into it, or call :func:`initialise`.

    Raises
    ------
    ConfigError
        If no network has this name, or it is not made for such examples.
    """
    if name not in MODELS:
        raise ConfigError.at("app.config", "model", name, f"unknown; {suggest(name, MODELS)}")
    model = MODELS[name]
    if model.num_axes not in (0, len(example_shape)):
        fitting = [n for n, m in MODELS.items() if m.num_axes in (0, len(example_shape))]
        raise ConfigError.at(
            "app.config",
            "model",
            name,
            f"takes {model.takes}, but the dataset's examples are {tuple(example_shape)}; "
            f"allowed: {', '.join(fitting)}",
        )
    return model.build(example_shape, num_classes)


@torch.no_grad()
def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw all weights anew from a generator, by PyTorch's default rule for each layer.

    Convolutions and linear layers get U(-b, b) with b = 1 / sqrt(fan_in), for weights and
    biases alike (He et al. 2015 with a = sqrt(5)); embeddings N(0, 1); normalisation layers get
    1 and 0.
    The global random state is neither used nor changed.
    """
    for layer in model.modules():
        own = dict(layer.named_parameters(recurse=False))
        weight = own.get("weight")
        if weight is None:
            if own:
                raise TypeError(f"{type(layer).__name__}: no rule to initialise {sorted(own)}")
        elif isinstance(layer, nn.Embedding):
            weight.normal_(generator=generator)
        elif weight.dim() > 1:
            bound = weight[0].numel() ** -0.5
            for parameter in own.values():
                parameter.uniform_(-bound, bound, generator=generator)
        else:
            weight.fill_(1.0)
            if (bias := own.get("bias")) is not None:
                bias.zero_()
