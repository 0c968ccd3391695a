"""Reads .npz files without trust: no pickles, and one clear line for whatever is wrong."""

import lzma
import tokenize
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from fedge_sim.config import AppConfig
from fedge_sim.errors import DataError

INT32 = (-(2**31), 2**31 - 1)
INT64 = (-(2**63), 2**63 - 1)
NPY = b"\x93NUMPY"  # what an .npy file begins with
LARGEST = float(np.finfo(np.float32).max)

# All that numpy and zipfile raise for a file that is something else, or damaged.
_UNREADABLE = (
    *(KeyError, TypeError, ValueError, EOFError, OSError, OverflowError, MemoryError),
    *(RuntimeError, SyntaxError, tokenize.TokenError),  # encrypted; a header that is no Python
    *(BadZipFile, zlib.error, lzma.LZMAError),
)


def find(config: AppConfig, *names: str) -> Path | None:
    """Return ``data-root`` if it is a file, else the first of the names that is in it."""
    root = Path(config.data_root)
    if root.is_file():
        return root
    return next((root / name for name in names if (root / name).exists()), None)


def missing(config: AppConfig, what: str) -> DataError:
    """Return the error for a source that is not under ``data-root``."""
    return DataError(
        f'[app.config] data-root = "{config.data_root}": dataset "{config.dataset}" needs {what}, '
        "which is not there; set data-root to it or to the folder that holds it, as an absolute "
        "path under flwr run"
    )


def read_npz(
    file: Path, required: Iterable[str], optional: Iterable[str] = ()
) -> dict[str, NDArray[Any]]:
    """Read named arrays of an .npz file.

    Raises
    ------
    DataError
        If the file is none, or damaged, lacks an array, or one holds Python objects, which
        only a pickle could bring back.
    """
    with _opened(file, required) as archive:
        if absent := [name for name in required if name not in archive]:
            found = ", ".join(archive) or "nothing"
            raise DataError(
                f"{file}: has no array {', '.join(absent)}, only {found}; {_how(required)}"
            )
        return {n: _array(file, archive, n) for n in (*required, *optional) if n in archive}


def names_in(file: Path, required: Iterable[str]) -> list[str]:
    """Return the names of all arrays of an .npz file, of which some are required.

    Raises
    ------
    DataError
        If the file is none, or damaged.
    """
    with _opened(file, required) as archive:
        return list(archive)


@contextmanager
def _opened(file: Path, required: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    try:
        with file.open("rb") as stream:
            if stream.read(len(NPY)) == NPY:
                problem = f"it is one array alone (.npy); {_how(required)}"
                raise DataError(f"{file}: not an .npz file that can be read: {problem}")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as archive:
                yield archive
    except _UNREADABLE as error:
        raise DataError(f"{file}: not an .npz file that can be read: {reason(error)}") from None


def _how(required: Iterable[str]) -> str:
    return f"save it with numpy.savez(file, {', '.join(f'{name}=...' for name in required)})"


def _array(file: Path, archive: Mapping[str, Any], name: str) -> NDArray[Any]:
    try:
        array = archive[name]
    except ValueError as error:
        if "Object arrays" not in str(error):
            raise
        raise DataError(
            f"{file}: array {name} holds Python objects, which only a pickle could bring back, "
            f"and none is opened; save it as text or numbers: {name}.astype(str) for names, "
            f"numpy.stack({name}) for examples of one shape"
        ) from None
    if not isinstance(array, np.ndarray):  # numpy gives the bytes of what is no .npy file
        raise DataError(f"{file}: not an .npz file that can be read: {name} is no array")
    return array


def reason(error: Exception) -> str:
    """Return what an error of a library says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def whole_numbers(
    file: Path,
    values: NDArray[Any],
    n: int,
    what: str = "labels",
    limits: tuple[int, int] = INT64,
) -> NDArray[np.int64]:
    """Check whole numbers (n,) and their limits, both of which are allowed.

    Raises
    ------
    DataError
        If there are not n of them, one is no whole number, or one is outside the limits.
    """
    if values.shape != (n,):
        raise DataError(f"{file}: {n} examples, but {what} {values.shape}; one for each is needed")
    if values.dtype.kind not in "iuf":
        raise DataError(f"{file}: {what} must be whole numbers, not {values.dtype}")
    wrong = np.flatnonzero(~np.isfinite(values) | (values != np.floor(values)))
    if len(wrong):
        raise DataError(
            f"{file}: {what} must be whole numbers, not {values[wrong[0]]} (example {wrong[0]}, "
            f"the first of {len(wrong)} such); give each a whole number, or leave it out"
        )
    if n > 0:
        low, high = int(values.min()), int(values.max())
        if low < limits[0] or high > limits[1]:
            raise DataError(
                f"{file}: {what} must be from {limits[0]} to {limits[1]}, "
                f"but are from {low} to {high}"
            )
    return values.astype(np.int64)


def names(file: Path, values: NDArray[Any], what: str) -> NDArray[np.str_]:
    """Return names as text, whether they were saved as text, bytes or numbers.

    Whole numbers have no point, also if they were saved as real ones.

    Raises
    ------
    DataError
        If they have no text, or one is NaN or infinite.
    """
    if values.dtype.kind == "f":
        if len(wrong := np.flatnonzero(~np.isfinite(values))):
            raise DataError(
                f"{file}: {what} must be names or numbers, not {values.flat[wrong[0]]} (example "
                f"{wrong[0]}, the first of {len(wrong)} such); name each, or leave it out"
            )
        if (abs(values) < INT64[1]).all() and (values == np.floor(values)).all():
            values = values.astype(np.int64)
    try:
        if values.dtype.kind == "S":
            return np.asarray(np.char.decode(values, "utf-8"))
        return values.astype(str)
    except (TypeError, ValueError) as error:
        raise DataError(f"{file}: {what} cannot be read as text: {reason(error)}") from None


def real_numbers(file: Path, x: NDArray[Any], what: str = "examples") -> NDArray[Any]:
    """Check that an array holds real numbers that float32 can hold.

    Raises
    ------
    DataError
        If it is empty, or holds text, complex numbers, dates, NaN or infinity.
    """
    if x.dtype.kind not in "fiub":
        raise DataError(f"{file}: {what} must be real numbers, not {x.dtype}")
    if x.size == 0:
        raise DataError(f"{file}: there is no example in it, or none has values: {x.shape}")
    if not -LARGEST <= float(x.min()) <= float(x.max()) <= LARGEST:  # false for NaN
        rows = x.reshape(len(x) if x.ndim else 1, -1)
        wrong = np.flatnonzero(~(abs(rows.astype(np.float64)) <= LARGEST).all(axis=1))
        value = next(v for v in rows[wrong[0]] if not abs(float(v)) <= LARGEST)
        raise DataError(
            f"{file}: {what} holds NaN, infinity, or more than float32 can hold: {value} in "
            f"example {wrong[0]}, the first of {len(wrong)} such; leave them out, or fill them in"
        )
    return x
