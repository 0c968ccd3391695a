"""A multi-layer perceptron on the flattened window: two hidden layers and a linear head."""

from torch import Tensor, nn

HIDDEN = (128, 64)


class MLP(nn.Module):
    """Flatten, Linear 128, ReLU, Linear 64, ReLU, Linear to the classes.

    Parameters
    ----------
    window_shape : (int, int)
        Channels and samples of a window.
    num_classes : int
    """

    def __init__(self, window_shape: tuple[int, int], num_classes: int) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(window_shape[0] * window_shape[1], HIDDEN[0])
        self.hidden2 = nn.Linear(*HIDDEN)
        self.head = nn.Linear(HIDDEN[1], num_classes)

    def forward(self, x_BCT: Tensor) -> Tensor:
        """Return the logits (B, num_classes)."""
        x = self.hidden1(x_BCT.flatten(1)).relu()
        x = self.hidden2(x).relu()
        logits: Tensor = self.head(x)
        return logits
