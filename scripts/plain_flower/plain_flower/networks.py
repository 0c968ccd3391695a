"""The networks, by name: ordinary PyTorch."""

from torch import Tensor, nn


class WindowNet(nn.Module):
    """Conv 6->64, BatchNorm, ReLU, Conv 64->64, BatchNorm, ReLU, mean over time, Linear."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(6, 64, kernel_size=5, padding=2),
            nn.BatchNorm1d(64),
            nn.ReLU(),
            nn.Conv1d(64, 64, kernel_size=5, padding=2),
            nn.BatchNorm1d(64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, num_classes)

    def forward(self, x_BCT: Tensor) -> Tensor:
        """Return the logits (B, num_classes)."""
        logits: Tensor = self.head(self.features(x_BCT).mean(dim=2))
        return logits


class PictureNet(nn.Sequential):
    """For images of 3 x 32 x 32: Conv 32, pool, Conv 64, pool, Linear 512, Linear."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(
            nn.Conv2d(3, 32, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 8 * 8, 512),
            nn.ReLU(),
            nn.Linear(512, num_classes),
        )


NETWORKS = {"cnn1d": WindowNet, "cnn2d": PictureNet}
