"""The reference network: two convolutions over time and a linear head, 23,174 parameters."""

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 64
KERNEL = 5


class TimeConv(nn.Conv1d):
    """``nn.Conv1d`` computed as a channels-last 2-D convolution, which is faster on a CPU.

    The parameters have Conv1d's names and shapes. Input and output are (B, C, 1, T).
    """

    def forward(self, x_BC1T: Tensor) -> Tensor:
        """Convolve over the last axis."""
        weight = self.weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        return functional.conv2d(x_BC1T, weight, self.bias, padding=(0, KERNEL // 2))


class CNN1D(nn.Module):
    """Conv 6->64, BatchNorm, ReLU, Conv 64->64, BatchNorm, ReLU, mean over time, Linear.

    Parameters
    ----------
    example_shape : (int, int)
        Channels and samples of a window; any number of samples will do.
    num_classes : int
    """

    def __init__(self, example_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.conv1 = TimeConv(example_shape[0], WIDTH, KERNEL, padding=KERNEL // 2)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        self.conv2 = TimeConv(WIDTH, WIDTH, KERNEL, padding=KERNEL // 2)
        self.bn2 = nn.BatchNorm2d(WIDTH)
        self.head = nn.Linear(WIDTH, num_classes)

    def forward(self, x_BCT: Tensor) -> Tensor:
        """Return the logits (B, num_classes)."""
        x = x_BCT.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        x = functional.relu(self.bn2(self.conv2(x)), inplace=True)
        # Its gradient keeps the channels last, which mean(dim=(2, 3)) does not: then the steps
        # before it take three times as long.
        x_BTC = x.squeeze(2).transpose(1, 2)
        logits: Tensor = self.head(x_BTC.mean(dim=1))
        return logits
