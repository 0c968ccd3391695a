"""What a dataset is: windows of sensor channels, with a label and a user each."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedge_sim.errors import DataError


@dataclass(frozen=True)
class WindowDataset:
    """All windows of a dataset, in one contiguous array.

    Attributes
    ----------
    x : float32 array (windows, channels, samples)
        Channels in the order acc_x, acc_y, acc_z, gyro_x, gyro_y, gyro_z.
    y : int64 array (windows,)
        Class of each window, an index into ``classes``.
    user : int64 array (windows,)
        User of each window, an index into ``users``.
    users, classes : tuple of str
        Names; users sorted as text.
    """

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    user: NDArray[np.int64]
    users: tuple[str, ...]
    classes: tuple[str, ...]

    @property
    def window_shape(self) -> tuple[int, int]:
        """Channels and samples of a window."""
        return self.x.shape[1], self.x.shape[2]

    def check(self, source: str) -> None:
        """Check what was read from somewhere else.

        Raises
        ------
        DataError
            If shapes do not fit together, a class has no name, or a value is not finite.
        """
        n = len(self.x)
        if self.x.ndim != 3 or 0 in self.x.shape:
            problem = f"windows must be (windows, channels, samples), not {self.x.shape}"
        elif self.y.shape != (n,) or self.user.shape != (n,):
            problem = f"{n} windows, but labels {self.y.shape} and users {self.user.shape}"
        elif not 0 <= self.y.min() <= self.y.max() < len(self.classes):
            problem = f"labels must be from 0 to {len(self.classes) - 1}"
        elif not np.isfinite(self.x).all():
            problem = "a window holds NaN or infinity"
        else:
            return
        raise DataError(f"{source}: {problem}")

    def standardised(
        self, rows: NDArray[np.int64]
    ) -> tuple["WindowDataset", NDArray[np.float32], NDArray[np.float32]]:
        """Scale every channel to mean 0 and deviation 1 over the given windows.

        Parameters
        ----------
        rows : int64 array (n,)
            The windows that give the statistics: training windows only.

        Returns
        -------
        dataset : WindowDataset
            The scaled copy.
        mean, std : float32 array (channels,)
            The statistics, in the units of the channels.
        """
        sample = self.x[rows]
        mean = sample.mean(axis=(0, 2), dtype=np.float64).astype(np.float32)
        std = sample.std(axis=(0, 2), dtype=np.float64).astype(np.float32) + np.float32(1e-8)
        scaled = (self.x - mean[:, None]) / std[:, None]
        return replace(self, x=scaled), mean, std


@dataclass(frozen=True)
class DataSummary:
    """What the clients of a run hold, known without their windows.

    Attributes
    ----------
    num_train, num_test : tuple of int
        Windows of client 0, 1, ...
    window_shape : (int, int)
        Channels and samples.
    classes : tuple of str
    mean, std : tuple of float
        What each channel is standardised with.
    """

    num_train: tuple[int, ...]
    num_test: tuple[int, ...]
    window_shape: tuple[int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
