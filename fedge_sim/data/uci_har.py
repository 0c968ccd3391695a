"""UCI HAR (Anguita et al., ESANN 2013): windows (6, 128) of people with a phone, 50 Hz."""

from pathlib import Path

import numpy as np

from fedge_sim.config import AppConfig
from fedge_sim.data.base import WindowDataset
from fedge_sim.errors import DataError

FILE = "uci_har_21_subjects.npz"


def load(config: AppConfig) -> WindowDataset:
    """Read the windows from ``data-root``, the file itself or the folder that holds it.

    Raises
    ------
    DataError
        If the file is missing or is not what it should be.
    """
    root = Path(config.data_root)
    file = root / FILE if root.is_dir() else root
    if not file.is_file():
        raise DataError(
            f'[app.config] data-root = "{root}": dataset "uci-har" needs the file {FILE}, '
            "which is not there; set data-root to the file or to the folder that holds it, "
            "as an absolute path under flwr run"
        )
    try:
        with np.load(file, allow_pickle=False) as archive:
            x, y, subject = (archive[name] for name in ("X", "y", "subject"))
            classes = tuple(str(name) for name in archive["classes"])
    except (KeyError, ValueError, OSError) as error:
        raise DataError(f"{file}: not the archive that dataset uci-har reads: {error}") from None
    # People are ordered by name, as text, as those of HHAR are: 1, 11, 14, ..., 3, 30, 5.
    users, user = np.unique(subject.astype(str), return_inverse=True)
    return WindowDataset(
        x=np.ascontiguousarray(x, dtype=np.float32),
        y=y.astype(np.int64),
        user=user.astype(np.int64),
        users=tuple(users.tolist()),
        classes=classes,
    )
