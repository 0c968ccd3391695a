"""A light network for images: three convolutions with BatchNorm, and a linear head."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedge_sim.errors import ConfigError

WIDTHS = (16, 32, 64)


class CNN2DSmall(nn.Module):
    """Conv 16, pool, conv 32, pool, conv 64, mean over the image, Linear to the classes.

    Each convolution is 3 x 3, with BatchNorm, whose shift takes the place of a bias, and ReLU.
    24,346 parameters for CIFAR-10.

    Parameters
    ----------
    example_shape : (int, int, int)
        Channels, height and width of an image, at least 8 each way.
    num_classes : int
    """

    def __init__(self, example_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        channels, height, width = example_shape
        if min(height, width) < 8:
            problem = f"needs images of 8 x 8, not {height} x {width}"
            raise ConfigError.at("app.config", "model", "cnn2d-small", problem)
        self.conv1 = nn.Conv2d(channels, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.conv2 = nn.Conv2d(WIDTHS[0], WIDTHS[1], 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(WIDTHS[1])
        self.conv3 = nn.Conv2d(WIDTHS[1], WIDTHS[2], 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(WIDTHS[2])
        self.head = nn.Linear(WIDTHS[2], num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the logits (B, num_classes)."""
        x = x_BCHW.contiguous(memory_format=torch.channels_last)
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x)), inplace=True), 2)
        x = functional.max_pool2d(functional.relu(self.bn2(self.conv2(x)), inplace=True), 2)
        x = functional.relu(self.bn3(self.conv3(x)), inplace=True)
        # As in CNN1D, the mean is taken so that its gradient keeps the channels last.
        logits: Tensor = self.head(x.flatten(2).transpose(1, 2).mean(dim=1))
        return logits
