"""A layer that watches what goes through it and changes nothing: FedRevive's in place of norms."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedge_sim.algorithms import Arrays

MOMENTUM = 0.1
MEAN, VARIANCE = "tracked_mean", "tracked_variance"  # nothing else's names end so


class Tracker(nn.Module):
    """Keeps running means and biased variances of the channels of its input, which it returns.

    running <- 0.9 running + 0.1 batch, in training mode (Askin et al. 2025).

    Parameters
    ----------
    channels : int

    Attributes
    ----------
    tracked_mean, tracked_variance : Tensor (channels,)
        Buffers; 0 and 1 before the first batch, and again in every average of models.
    """

    tracked_mean: Tensor
    tracked_variance: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer(MEAN, torch.zeros(channels))
        self.register_buffer(VARIANCE, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, C, ...) as it is."""
        if self.training:
            self.track(x)
        return x

    def track(self, x: Tensor, valid: Tensor | None = None) -> None:
        """Move the statistics towards those of a batch.

        Parameters
        ----------
        x : Tensor (B, C, ...)
        valid : bool Tensor (B,), optional
            Rows that are no padding; none: all.
        """
        mean, variance = channel_statistics(x.detach().to(self.tracked_mean.dtype), valid)
        # New tensors, as a network may be called with buffers that are somebody else's.
        self.tracked_mean = (1 - MOMENTUM) * self.tracked_mean + MOMENTUM * mean
        self.tracked_variance = (1 - MOMENTUM) * self.tracked_variance + MOMENTUM * variance

    def extra_repr(self) -> str:
        """Return what tells it apart."""
        return str(len(self.tracked_mean))


def channel_statistics(x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance (C,) of x (B, C, ...), by its valid rows (B,) alone."""
    rows_NC = x.movedim(1, -1).flatten(0, -2)  # var_mean is slow on channels last
    if valid is None:
        mean = rows_NC.mean(0)
        return mean, (rows_NC - mean).square().mean(0)
    weights_N1 = valid.to(x.dtype).repeat_interleave(x[0, 0].numel())[:, None]
    count = weights_N1.sum().clamp(min=1)
    mean = (rows_NC * weights_N1).sum(0) / count
    return mean, ((rows_NC - mean).square() * weights_N1).sum(0) / count


def forget_tracked(model: Arrays) -> dict[str, NDArray[Any]]:
    """Return a model with all trackers as new, as in an average: it saw no batch itself."""
    return {
        name: np.zeros_like(array)
        if name.endswith(MEAN)
        else np.ones_like(array)
        if name.endswith(VARIANCE)
        else array
        for name, array in model.items()
    }
