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


def set_precision(precision: str) -> torch.dtype | None:
    """Set how a GPU multiplies float32 matrices, and return what to cast a forward pass to.

    Parameters
    ----------
    precision : {"float32", "tf32", "bf16"}
        ``"tf32"`` lets a GPU round factors to 10 bits of mantissa; a CPU computes in float32
        all the same. ``"bf16"`` computes the forward pass in bfloat16, on a CPU too.
    """
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = precision != "float32"
        torch.backends.cudnn.allow_tf32 = precision != "float32"
    return torch.bfloat16 if precision == "bf16" else None
