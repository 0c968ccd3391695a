"""A multi-layer perceptron on the flattened example: two hidden layers and a linear head."""

import math

from torch import Tensor, nn

HIDDEN = (128, 64)


class MLP(nn.Module):
    """Flatten, Linear 128, ReLU, Linear 64, ReLU, Linear to the classes.

    Parameters
    ----------
    example_shape : tuple of int
        Of any length.
    num_classes : int
    """

    def __init__(self, example_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(math.prod(example_shape), HIDDEN[0])
        self.hidden2 = nn.Linear(*HIDDEN)
        self.head = nn.Linear(HIDDEN[1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, num_classes)."""
        x = self.hidden1(x.flatten(1)).relu()
        x = self.hidden2(x).relu()
        logits: Tensor = self.head(x)
        return logits
