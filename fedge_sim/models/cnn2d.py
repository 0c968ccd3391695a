"""A small network for images: two convolutions and two dense layers (McMahan et al. 2017)."""

from torch import Tensor, nn
from torch.nn import functional

from fedge_sim.errors import ConfigError

WIDTHS = (32, 64)
KERNEL = 5
HIDDEN = 512


class CNN2D(nn.Module):
    """Conv 32, pool, conv 64, pool, Linear 512, ReLU, Linear to the classes.

    2,156,490 parameters for CIFAR-10.

    Parameters
    ----------
    example_shape : (int, int, int)
        Channels, height and width of an image, at least 4 each way.
    num_classes : int
    """

    def __init__(self, example_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        channels, height, width = example_shape
        if min(height, width) < 4:
            raise ConfigError.at(
                "app.config", "model", "cnn2d", f"needs images of 4 x 4, not {height} x {width}"
            )
        self.conv1 = nn.Conv2d(channels, WIDTHS[0], KERNEL, padding=KERNEL // 2)
        self.conv2 = nn.Conv2d(*WIDTHS, KERNEL, padding=KERNEL // 2)
        self.hidden = nn.Linear(WIDTHS[1] * (height // 4) * (width // 4), HIDDEN)
        self.head = nn.Linear(HIDDEN, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the logits (B, num_classes)."""
        x = functional.max_pool2d(self.conv1(x_BCHW).relu(), 2)
        x = functional.max_pool2d(self.conv2(x).relu(), 2)
        logits: Tensor = self.head(self.hidden(x.flatten(1)).relu())
        return logits
