"""Anybody's own data: an .npz file with ``X``, ``y`` and what else is known."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedge_sim.config import AppConfig
from fedge_sim.data import archive
from fedge_sim.data.base import Names
from fedge_sim.data.store import Recipe, StoreWriter
from fedge_sim.errors import DataError

MOST_CHANNELS = 4  # of an image: red, green, blue, alpha


def recipe(config: AppConfig) -> Recipe:
    """Say how the file that ``data-root`` names becomes a store.

    The file holds ``X``, real numbers: (N, channels, samples), (N, features), or images
    (N, channels, height, width) or (N, height, width, channels); ``y`` (N,), class numbers or
    names; and, if known, ``user`` (N,), ``classes`` (names of the class numbers 0, 1, ...),
    and ``recording`` (N,) with ``position`` (N,), the first sample of each window in its
    recording, by which ``split = "blocked"`` tells which windows overlap.

    Raises
    ------
    DataError
        If there is no such file.
    """
    file = Path(config.data_root)
    if not file.is_file():
        raise DataError(
            f'[app.config] data-root = "{file}": is no file; dataset "arrays" needs an .npz file '
            "with X and y (an absolute path under flwr run)"
        )
    return Recipe("arrays", {}, (file,), partial(_write, file))


def _write(file: Path, writer: StoreWriter) -> tuple[Names, dict[str, Any]]:
    optional = ("user", "recording", "position", "classes")
    arrays = archive.read_npz(file, ("X", "y"), optional)
    x = _channels_first(file, archive.real_numbers(file, arrays["X"]))
    classes, y = _classes(file, arrays["y"], arrays.get("classes"), len(x))
    codes: dict[str, NDArray[Any]] = {}
    users: tuple[str, ...] = ()
    for name in ("user", "recording", "position"):
        if name in arrays and arrays[name].shape != (len(x),):
            raise DataError(f"{file}: {len(x)} examples, but {name} {arrays[name].shape}")
    if "user" in arrays:
        texts = archive.names(file, arrays["user"], "user")
        names, codes["user"] = np.unique(texts, return_inverse=True)
        users = tuple(names.tolist())
    if ("recording" in arrays) != ("position" in arrays):
        raise DataError(f"{file}: recording and position belong together; one is missing")
    if "recording" in arrays:
        codes["recording"] = np.unique(arrays["recording"], return_inverse=True)[1]
        codes["position"] = archive.whole_numbers(
            file, arrays["position"], len(x), "position", archive.INT32
        )
    writer.add(x, y, **codes)
    return Names(classes, users), {}


def _channels_first(file: Path, x: NDArray[Any]) -> NDArray[Any]:
    if x.ndim not in (2, 3, 4):
        raise DataError(
            f"{file}: X must be (N, features), (N, channels, samples) or images (N, channels, "
            f"height, width), not {x.shape}"
        )
    if x.ndim == 4 and x.shape[1] > MOST_CHANNELS:
        if x.shape[3] > MOST_CHANNELS:
            raise DataError(
                f"{file}: X is {x.shape}, but images have at most {MOST_CHANNELS} channels, in "
                "the second or the last place"
            )
        return x.transpose(0, 3, 1, 2)
    return x


def _classes(
    file: Path, y: NDArray[Any], classes: NDArray[Any] | None, n: int
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return class names and codes; without names, the values that occur are the classes."""
    if classes is not None:
        if classes.ndim != 1 or len(classes) == 0:
            raise DataError(f"{file}: classes must be a list of names, not {classes.shape}")
        names = tuple(archive.names(file, classes, "classes").tolist())
        return names, archive.whole_numbers(file, y, n, limits=(0, len(names) - 1))
    if y.dtype.kind not in "USb":
        y = archive.whole_numbers(file, y, n)
    elif y.shape != (n,):
        raise DataError(f"{file}: {n} examples, but labels {y.shape}; one for each is needed")
    else:
        y = archive.names(file, y, "y")
    values, codes = np.unique(y, return_inverse=True)
    return tuple(str(value) for value in values.tolist()), codes.astype(np.int64)
