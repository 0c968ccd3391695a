"""The network of FedRevive's authors: ResNet-18 without normalisation, and trackers in its place.

A server knows from the trackers what clients' features are like (Askin et al. 2025).
"""

from fedge_sim.models.resnet18 import ResNet18
from fedge_sim.models.tracker import Tracker


class ResNet18Tracked(ResNet18):
    """:class:`ResNet18` with a tracker behind each convolution, 11,164,362 parameters.

    Parameters
    ----------
    example_shape : (int, int, int)
    num_classes : int
    """

    def __init__(self, example_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__(example_shape, num_classes, norm=Tracker)
