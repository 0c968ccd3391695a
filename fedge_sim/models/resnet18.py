"""ResNet-18 (He et al. 2016) for small images, with GroupNorm in place of BatchNorm.

The first layer is a 3 x 3 convolution without pooling, as usual for images of 32 x 32.
GroupNorm needs no statistics over clients whose data differ (Hsieh et al. 2020).
"""

from collections.abc import Callable

from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512)
BLOCKS = 2  # of each width
GROUPS = 32


def group_norm(width: int) -> nn.Module:
    """Return GroupNorm as published for it (Wu & He 2018)."""
    return nn.GroupNorm(GROUPS, width)


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, which is 1 x 1 where the shape changes."""

    def __init__(
        self, width_in: int, width: int, stride: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = norm(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            conv = nn.Conv2d(width_in, width, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, norm(width))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the block's output, smaller by its stride."""
        x = self.norm1(self.conv1(x_BCHW)).relu()
        total: Tensor = self.norm2(self.conv2(x)) + self.shortcut(x_BCHW)
        return total.relu()


class ResNet18(nn.Module):
    """Conv 64, four pairs of blocks (64, 128, 256, 512 wide), mean over the image, Linear.

    11,173,962 parameters for CIFAR-10.

    Parameters
    ----------
    example_shape : (int, int, int)
        Channels, height and width of an image; any size will do.
    num_classes : int
    norm : callable
        From the width of a convolution to what stands behind it.
    """

    def __init__(
        self,
        example_shape: tuple[int, ...],
        num_classes: int,
        norm: Callable[[int], nn.Module] = group_norm,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(example_shape[0], WIDTHS[0], 3, padding=1, bias=False)
        self.norm = norm(WIDTHS[0])
        blocks, width_in = [], WIDTHS[0]
        for stage, width in enumerate(WIDTHS):
            for number in range(BLOCKS):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(Block(width_in, width, stride, norm))
                width_in = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width_in, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the logits (B, num_classes)."""
        x = self.blocks(self.norm(self.stem(x_BCHW)).relu())
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits
