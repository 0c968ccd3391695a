"""UCI HAR (Anguita et al., ESANN 2013): windows (6, 128) of people with a phone, 50 Hz.

Read from an archive of its training part, or from the text files of the original folder.
"""

from functools import partial
from pathlib import Path
from statistics import mode
from typing import Any
from warnings import catch_warnings

import numpy as np
from numpy.typing import NDArray

from fedge_sim.config import AppConfig
from fedge_sim.data import archive
from fedge_sim.data.base import Names
from fedge_sim.data.store import Recipe, StoreWriter
from fedge_sim.errors import DataError

FILE = "uci_har_21_subjects.npz"
FOLDER = "UCI HAR Dataset"
SIGNALS = tuple(f"{s}_{axis}" for s in ("total_acc", "body_gyro") for axis in "xyz")
CLASSES = (
    *("WALKING", "WALKING_UPSTAIRS", "WALKING_DOWNSTAIRS"),
    *("SITTING", "STANDING", "LAYING"),
)
LENGTH = 128
STRIDE = 64  # windows of one recording overlap by half


def recipe(config: AppConfig) -> Recipe:
    """Say how UCI HAR becomes a store; ``data-root`` is the archive, or a folder.

    Raises
    ------
    DataError
        If neither the archive nor the folder of text files is there.
    """
    if file := archive.find(config, FILE):
        return Recipe("uci-har", {}, (file,), partial(_write_archive, file))
    root = Path(config.data_root)
    for folder in (root / FOLDER / "train", root / "train", root):
        if (folder / "Inertial Signals").is_dir():
            files = _text_files(folder)
            return Recipe("uci-har", {}, files, partial(_write_text, files))
    raise archive.missing(config, f"the file {FILE} or the folder {FOLDER}")


def _write_archive(file: Path, writer: StoreWriter) -> tuple[Names, dict[str, Any]]:
    names = ("X", "y", "subject", "segment", "pos", "classes")
    arrays = archive.read_npz(file, names)
    x = archive.real_numbers(file, arrays["X"])
    if x.ndim != 3:
        raise DataError(f"{file}: windows must be (windows, channels, samples), not {x.shape}")
    classes = tuple(np.atleast_1d(archive.names(file, arrays["classes"], "classes")).tolist())
    y, recording, pos = (
        archive.whole_numbers(file, arrays[name], len(x), name, limits)
        for name, limits in {
            "y": (0, len(classes) - 1),
            "segment": archive.INT32,
            "pos": (0, archive.INT32[1] // STRIDE),
        }.items()
    )
    if arrays["subject"].shape != y.shape:
        raise DataError(f"{file}: {len(x)} windows, but subject {arrays['subject'].shape}")
    users, user = _people(archive.names(file, arrays["subject"], "subject"))
    writer.add(x, y, user=user, recording=recording, position=STRIDE * pos)
    return Names(classes, users), {}


def _text_files(folder: Path) -> tuple[Path, ...]:
    signals = [folder / "Inertial Signals" / f"{name}_train.txt" for name in SIGNALS]
    files = (*signals, folder / "y_train.txt", folder / "subject_train.txt")
    if absent := [str(file) for file in files if not file.is_file()]:
        raise DataError(f"{absent[0]}: is missing; unpack the dataset again")
    return files


def _write_text(files: tuple[Path, ...], writer: StoreWriter) -> tuple[Names, dict[str, Any]]:
    channels = []
    for number, file in enumerate(files[: len(SIGNALS)]):
        writer.tell(file.name, number / len(files))
        channels.append(_read_text(file, LENGTH))
    y, subject = (_read_text(file, 1)[:, 0] for file in files[-2:])
    lengths = [len(values) for values in (*channels, y, subject)]
    n = mode(lengths)  # the damaged file is the one that differs
    for file, length in zip(files, lengths, strict=True):
        if length != n:
            raise DataError(f"{file}: has {length} lines, expected {n}")
    labels = archive.whole_numbers(files[-2], y, n, limits=(1, len(CLASSES)))
    subjects = archive.whole_numbers(files[-1], subject, n, "subjects")
    x = np.stack(channels, axis=1)
    recording, position = _recordings(x, labels, subjects)
    users, user = _people(subjects)
    writer.add(x, labels - 1, user=user, recording=recording, position=position)
    return Names(CLASSES, users), {}


def _read_text(file: Path, columns: int) -> NDArray[np.float64]:
    try:
        with catch_warnings(action="error", category=UserWarning):  # of an empty file
            values = np.loadtxt(file, ndmin=2)
    except (OSError, ValueError, UserWarning) as error:
        problem = archive.reason(error)
        raise DataError(f"{file}: cannot be read as a table of numbers: {problem}") from None
    if values.shape[1] != columns:
        raise DataError(f"{file}: has {values.shape[1]} columns, expected {columns}")
    return archive.real_numbers(file, values)


def _people(subject: NDArray[Any]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Give people codes by name, as text: 1, 11, ..., 3, 30, 5. Partitions sort them as numbers."""
    users, user = np.unique(subject.astype(str), return_inverse=True)
    return tuple(users.tolist()), user.astype(np.int64)


def _recordings(
    x: NDArray[np.float64], labels: NDArray[np.int64], subjects: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find uninterrupted recordings: where the next window begins with this one's second half."""
    goes_on = (x[1:, :, :STRIDE] == x[:-1, :, STRIDE:]).all(axis=(1, 2))
    goes_on &= (labels[1:] == labels[:-1]) & (subjects[1:] == subjects[:-1])
    recording = np.cumsum(np.r_[0, ~goes_on])
    first = np.flatnonzero(np.r_[True, ~goes_on])
    return recording, STRIDE * (np.arange(len(x)) - first[recording])
