"""Where this process trains."""

import torch
from torch import nn

from fedge_sim.data.base import CPU


def device() -> torch.device:
    """Return the current CUDA device, or the CPU where there is none.

    Ray and Flower's simulation let an actor see only the GPUs that it holds.
    """
    if not torch.cuda.is_available():
        return CPU
    return torch.device("cuda", torch.cuda.current_device())


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's parameters are."""
    return next(model.parameters()).device
