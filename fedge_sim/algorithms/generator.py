"""A network from noise to made-up examples, standardised as real ones are."""

from math import ceil

from torch import Tensor, nn

from fedge_sim.errors import ConfigError

SLOPE = 0.2


class Generator(nn.Module):
    """Linear, norm, twice (upsample x2, conv 3, norm, LeakyReLU), conv 3, tanh, norm.

    As published up to the last convolution. The last norm has neither scale nor shift: each
    channel of a batch has mean 0 and variance 1, as standardised examples have, and no statistic
    of real ones is needed. All norms are BatchNorm, by the batch. Windows are images of height 1,
    which is left as it is.

    Parameters
    ----------
    example_shape : tuple of int
        (channels, samples) or (channels, height, width), of any size: what is generated is a
        multiple of 4 and then cropped.
    noise_size : int
        Values of its input.
    width : int
        Channels of the last hidden layer; those before it have twice as many.

    Raises
    ------
    ConfigError
        If examples have another shape.
    """

    def __init__(self, example_shape: tuple[int, ...], noise_size: int, width: int) -> None:
        super().__init__()
        if len(example_shape) not in (2, 3):
            raise ConfigError.at(
                *("fedrevive", "variant", "generator"),
                "makes windows (channels, samples) and images (channels, height, width), and the "
                f'dataset\'s examples are {example_shape}: use variant = "light"',
            )
        windows = len(example_shape) == 2
        channels, *self.size = (example_shape[0], 1, example_shape[1]) if windows else example_shape
        self.example_shape = example_shape
        factor, kernel = ((1, 2), (1, 3)) if windows else ((2, 2), (3, 3))
        first = [ceil(size / f**2) for size, f in zip(self.size, factor, strict=True)]

        def norm(channels: int, affine: bool = True) -> nn.Module:
            return nn.BatchNorm2d(channels, affine=affine, track_running_stats=False)

        def larger(channels_in: int, channels: int) -> list[nn.Module]:
            conv = nn.Conv2d(channels_in, channels, kernel, padding="same", bias=False)
            up = nn.Upsample(scale_factor=factor)
            return [up, conv, norm(channels), nn.LeakyReLU(SLOPE)]

        self.layers = nn.Sequential(
            nn.Linear(noise_size, 2 * width * first[0] * first[1]),
            nn.Unflatten(1, (2 * width, *first)),
            norm(2 * width),
            *larger(2 * width, 2 * width),
            *larger(2 * width, width),
            nn.Conv2d(width, channels, kernel, padding="same"),
            nn.Tanh(),
        )
        self.standardise = norm(channels, affine=False)

    def forward(self, z_BN: Tensor) -> Tensor:
        """Return examples (B, *example_shape) from noise (B, noise_size), B at least 2."""
        height, width = self.size
        x: Tensor = self.layers(z_BN)
        x = self.standardise(x[..., :height, :width])
        return x.reshape(-1, *self.example_shape)
