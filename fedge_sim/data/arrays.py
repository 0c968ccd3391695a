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
from fedge_sim.errors import ConfigError, DataError

MOST_CHANNELS = 4  # of an image: red, green, blue, alpha
REQUIRED = ("X", "y")
USER = ("user", "users", "subject", "subjects")  # what people call it
READER = 2  # raise it when the same file comes to be read in another way


def recipe(config: AppConfig) -> Recipe:
    """Say how the file that ``data-root`` names becomes a store.

    The file holds ``X``, real numbers: (N, channels, samples), (N, features), or images
    (N, channels, height, width) or (N, height, width, channels), or as ``layout`` says; ``y``
    (N,), class numbers or names; and, if known, ``user`` (N,), also named ``users`` or
    ``subject``, ``classes`` (names of the class numbers 0, 1, ...), and ``recording`` (N,) with
    ``position`` (N,), the first sample of each window in its recording, by which
    ``split = "blocked"`` tells which windows overlap.

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
    made_from = {"reader": READER, "layout": config.layout}
    return Recipe("arrays", made_from, (file,), partial(_write, file, config.layout))


def _write(file: Path, layout: str, writer: StoreWriter) -> tuple[Names, dict[str, Any]]:
    there = archive.names_in(file, REQUIRED)
    whose = next((name for name in USER if name in there), "user")
    optional = (whose, "recording", "position", "classes")
    arrays = archive.read_npz(file, REQUIRED, optional)
    if unread := [name for name in there if name not in arrays]:
        writer.warn(
            f"{file}: not read: {', '.join(unread)}; what is read: X, y, user (also named users or "
            "subject), recording, position, classes"
        )
    x = _channels_first(file, archive.real_numbers(file, arrays["X"], "X"), layout)
    if whose in arrays:
        arrays["user"] = arrays.pop(whose)
    classes, y = _classes(file, arrays["y"], arrays.get("classes"), len(x))
    codes: dict[str, NDArray[Any]] = {}
    users: tuple[str, ...] = ()
    for name in ("user", "recording", "position"):
        if name in arrays and arrays[name].shape != (len(x),):
            raise DataError(
                f"{file}: {len(x)} examples, but {name if name != 'user' else whose} "
                f"{arrays[name].shape}; one for each is needed"
            )
    if "user" in arrays:
        texts = archive.names(file, arrays["user"], whose)
        names, codes["user"] = np.unique(texts, return_inverse=True)
        users = tuple(names.tolist())
    if ("recording" in arrays) != ("position" in arrays):
        raise DataError(f"{file}: recording and position belong together; one is missing")
    if "recording" in arrays:
        archive.names(file, arrays["recording"], "recording")  # refuses NaN
        codes["recording"] = np.unique(arrays["recording"], return_inverse=True)[1]
        codes["position"] = archive.whole_numbers(
            file, arrays["position"], len(x), "position", archive.INT32
        )
    writer.add(x, y, **codes)
    return Names(classes, users), {}


def _channels_first(file: Path, x: NDArray[Any], layout: str) -> NDArray[Any]:
    if x.ndim not in (2, 3, 4):
        raise DataError(
            f"{file}: X must be (N, features), (N, channels, samples) or images (N, channels, "
            f"height, width), not {x.shape}"
        )
    if layout == "channels-last":
        if x.ndim == 2:
            problem = f'{file}: X is (N, features), {x.shape}, without channels: must be "auto"'
            raise ConfigError.at("app.config", "layout", layout, problem)
        return np.moveaxis(x, -1, 1)
    if layout == "auto" and x.ndim == 4 and x.shape[1] > MOST_CHANNELS:
        if x.shape[3] > MOST_CHANNELS:
            raise DataError(
                f"{file}: X is {x.shape}, but images have at most {MOST_CHANNELS} channels, in "
                "the second or the last place; if these have more, set [app.config] layout = "
                '"channels-first" or "channels-last"'
            )
        return x.transpose(0, 3, 1, 2)
    return x


def _classes(
    file: Path, y: NDArray[Any], classes: NDArray[Any] | None, n: int
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return class names and codes; without names, the values that occur are the classes."""
    if y.shape != (n,):
        raise DataError(f"{file}: {n} examples, but y {y.shape}; {_one_label_each(y, n)}")
    if classes is not None:
        if classes.ndim != 1 or len(classes) == 0:
            raise DataError(f"{file}: classes must be a list of names, not {classes.shape}")
        if y.dtype.kind in "US":
            raise DataError(
                f"{file}: y holds names, and classes has the names of class numbers: leave classes "
                "out, or give the numbers 0, 1, ... in y"
            )
        names = tuple(archive.names(file, classes, "classes").tolist())
        return names, archive.whole_numbers(file, y, n, "y", limits=(0, len(names) - 1))
    if y.dtype.kind not in "USb":
        y = archive.whole_numbers(file, y, n, "y")
    else:
        y = archive.names(file, y, "y")
    values, codes = np.unique(y, return_inverse=True)
    return tuple(str(value) for value in values.tolist()), codes.astype(np.int64)


def _one_label_each(y: NDArray[Any], n: int) -> str:
    """Say what to do about labels of another shape."""
    if y.shape == (n, 1):
        return "one for each is needed: y[:, 0]"
    one_hot = y.ndim == 2 and len(y) == n and y.dtype.kind in "fiub"
    if one_hot and ((y == 0) | (y == 1)).all() and (y.sum(axis=1) == 1).all():
        return "it is one-hot, and one class number for each is needed: y.argmax(axis=1)"
    return "one for each is needed"
