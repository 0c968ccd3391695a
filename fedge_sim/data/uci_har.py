"""UCI HAR (Anguita et al., ESANN 2013): windows (6, 128) of people with a phone, 50 Hz."""

import zlib
from pathlib import Path
from zipfile import BadZipFile

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
    root = file = Path(config.data_root)
    try:
        if root.is_dir():
            file = root / FILE
        if not file.is_file():
            raise DataError(
                f'[app.config] data-root = "{root}": dataset "uci-har" needs the file {FILE}, '
                "which is not there; set data-root to the file or to the folder that holds it, "
                "as an absolute path under flwr run"
            )
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            # People are ordered by name, as text, as those of HHAR are: 1, 11, ..., 3, 30, 5.
            users, user = np.unique(archive["subject"].astype(str), return_inverse=True)
            dataset = WindowDataset(
                x=np.ascontiguousarray(archive["X"], dtype=np.float32),
                y=archive["y"].astype(np.int64),
                user=user.astype(np.int64),
                users=tuple(users.tolist()),
                classes=tuple(str(name) for name in archive["classes"]),
            )
    # All that numpy and zipfile raise for a file that is something else, or damaged.
    except (KeyError, TypeError, ValueError, EOFError, OSError, BadZipFile, zlib.error) as error:
        raise DataError(f"{file}: not the archive that dataset uci-har reads: {error}") from None
    dataset.check(str(file))
    return dataset
