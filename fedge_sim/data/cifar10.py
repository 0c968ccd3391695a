"""CIFAR-10 (Krizhevsky 2009): 50,000 training images (3, 32, 32), 10 classes.

Only the training part is dealt out to clients; the official test images stay untouched.
"""

import pickle
from collections.abc import Callable, Mapping
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

FILE = "cifar10_train.npz"
FOLDER = "cifar-10-batches-py"
BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
SHAPE = (3, 32, 32)
CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


def recipe(config: AppConfig) -> Recipe:
    """Say how CIFAR-10 becomes a store.

    ``data-root`` is the unpacked archive of python batches, the folder around it, or an .npz
    file with ``x`` (N, 32, 32, 3) and ``y`` (N,). Images are averaged down to ``image-size``.

    Raises
    ------
    ConfigError
        If ``image-size`` does not divide 32.
    DataError
        If neither is there.
    """
    size = config.image_size or SHAPE[1]
    if SHAPE[1] % size:
        problem = "images of 32 x 32 are averaged down: must be 0 (as they are), 1, 2, 4, 8, 16, 32"
        raise ConfigError.at("app.config", "image-size", size, problem)
    # Those as they are have the store that they always had.
    of_size = {} if size == SHAPE[1] else {"image_size": size}
    if file := archive.find(config, FILE):
        return Recipe("cifar10", of_size, (file,), partial(_write_archive, file, size))
    root = Path(config.data_root)
    for folder in (root / FOLDER, root):
        files = tuple(folder / name for name in BATCHES)
        if files[0].is_file():
            return Recipe("cifar10", of_size, files, partial(_write_batches, files, size))
    raise archive.missing(config, f"the folder {FOLDER} or the file {FILE}")


def _write_archive(file: Path, size: int, writer: StoreWriter) -> tuple[Names, dict[str, Any]]:
    arrays = archive.read_npz(file, ("x", "y"))
    x = archive.real_numbers(file, arrays["x"])
    if x.shape[1:] != (*SHAPE[1:], SHAPE[0]):
        raise DataError(f"{file}: images must be (N, 32, 32, 3), not {x.shape}")
    images = _averaged(x.transpose(0, 3, 1, 2), size)
    writer.add(images, _labels(file, arrays["y"], len(x)))
    return Names(CLASSES), {}


def _write_batches(
    files: tuple[Path, ...], size: int, writer: StoreWriter
) -> tuple[Names, dict[str, Any]]:
    for number, file in enumerate(files):
        writer.tell(file.name, number / len(files))
        batch = _read_batch(file)
        data, labels = batch.get(b"data"), batch.get(b"labels")
        if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != np.prod(SHAPE):
            raise DataError(f"{file}: has no images of {np.prod(SHAPE)} values; unpack it again")
        if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
            raise DataError(f"{file}: has no list of labels; unpack it again")
        x = archive.real_numbers(file, data).reshape(-1, *SHAPE)
        writer.add(_averaged(x, size), _labels(file, np.array(labels), len(x)))
    return Names(CLASSES), {}


def _averaged(x: NDArray[Any], size: int) -> NDArray[Any]:
    """Average images (n, channels, 32, 32) down to (n, channels, size, size)."""
    if (of_each := SHAPE[1] // size) == 1:
        return x
    squares = x.reshape(*x.shape[:2], size, of_each, size, of_each)
    return np.asarray(squares.mean(axis=(3, 5), dtype=np.float32))


def _labels(file: Path, y: NDArray[Any], n: int) -> NDArray[np.int64]:
    return archive.whole_numbers(file, y, n, limits=(0, len(CLASSES) - 1))


def _read_batch(file: Path) -> Mapping[Any, Any]:
    try:
        with file.open("rb") as stream:
            batch = _PlainUnpickler(stream, encoding="bytes").load()
    # All that pickle raises for a file that is something else, or damaged.
    except (
        *(OSError, EOFError, ValueError, TypeError, AttributeError, LookupError),
        *(MemoryError, OverflowError, pickle.UnpicklingError),
    ) as error:
        problem = archive.reason(error)
        raise DataError(f"{file}: is no batch of CIFAR-10: {problem}; unpack it again") from None
    if not isinstance(batch, dict):
        raise DataError(f"{file}: is no batch of CIFAR-10, but a {type(batch).__name__}")
    return batch


def _plain_dtype(name: bytes | str, *_: object) -> np.dtype[Any]:
    if name not in (b"u1", "u1"):
        raise pickle.UnpicklingError(f"its array is of {name!r}, not of bytes")
    return np.dtype(np.uint8)


class _PlainUnpickler(pickle.Unpickler):
    """Reads the one form of pickle that CIFAR-10's batches are: a dict with an array.

    A pickle can name any function to be called. This one calls nothing but what makes bytes
    and numpy arrays of bytes; any other name is an error.
    """

    _ALLOWED: Mapping[tuple[str, str], Callable[..., Any] | None] = {
        ("numpy", "_reconstruct"): lambda *_: np.empty(0, np.uint8),
        ("numpy", "ndarray"): None,  # given to the function above, and not called
        ("numpy", "dtype"): _plain_dtype,
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name stands for here, if it is one of the few."""
        try:
            return self._ALLOWED[module.partition(".")[0], name]
        except KeyError:
            problem = f"it asks for {module}.{name}, which no batch needs"
            raise pickle.UnpicklingError(problem) from None
