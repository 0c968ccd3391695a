"""A run's state in one file, and its tables cut back to what they were then.

A state is a tree: nested dicts, lists and tuples of arrays and plain values. Arrays are tensors of
a safetensors file; the rest is JSON in its metadata. A digest of all of it tells damage.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedge_sim.errors import CheckpointError

Tree: TypeAlias = (
    "NDArray[Any] | Mapping[str, Tree] | Sequence[Tree] | str | int | float | bool | None"
)
NAME = "checkpoint.safetensors"  # in the results folder
FORMAT = 3  # goes up when a state of before cannot be gone on from
# Where something else than a JSON value stands, and of what kind.
_ARRAY, _DICT, _TUPLE = "array", "dict", "tuple"


def save(file: Path, tree: Tree) -> None:
    """Write a state aside and rename it, so that a kill leaves the whole old or new one.

    A scalar of NumPy's comes back as an array without axes.

    Raises
    ------
    TypeError
        If something in it can be no part of a state.
    CheckpointError
        If the file cannot be written.
    """
    arrays: dict[str, NDArray[Any]] = {}
    text = json.dumps([FORMAT, _pack(tree, arrays, {})])
    metadata = {"tree": text, "sha256": _digest(text, arrays)}
    aside = file.with_suffix(".tmp")
    try:
        save_file(arrays, aside, metadata)
        aside.replace(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: the checkpoint cannot be written: {error}") from None


def load(file: Path) -> Any:
    """Return the state in a file, a tree equal to what was saved, to the last bit.

    Raises
    ------
    CheckpointError
        If the file is missing or damaged, or another version of the program wrote it.
    """
    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata()
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if metadata["sha256"] != _digest(metadata["tree"], arrays):
            raise ValueError("its content is not what was written")
        match json.loads(metadata["tree"]):
            case [int(number), packed] if number == FORMAT:
                return _unpack(packed, arrays)
        raise CheckpointError(f"{file}: another version of fedge-sim wrote this checkpoint")
    except FileNotFoundError:
        raise CheckpointError(f"{file}: there is no checkpoint") from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: the checkpoint is damaged: {error}") from None


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """Keep other processes out of a results folder.

    Raises
    ------
    CheckpointError
        If another one is at work there.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise CheckpointError(f"{folder}: another process is at work there") from None
    try:
        yield
    finally:
        lock.release()


def run_of(folder: Path) -> Any:
    """Return what a results folder's ``run.json`` says of its run.

    Raises
    ------
    CheckpointError
        If it is missing or damaged.
    """
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'run.json'}: cannot be read: {error}") from None


def csv_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every CSV file below a folder, by its path from there."""
    return {path: (folder / path).stat().st_size for path in _csv_files(folder)}


def truncate_csvs(folder: Path, sizes: Mapping[str, int]) -> None:
    """Cut the CSV files below a folder back to what they were, and remove those that were not.

    Parameters
    ----------
    folder : Path
    sizes : mapping from path to bytes
        As :func:`csv_sizes` gave them.

    Raises
    ------
    CheckpointError
        If a file is missing or shorter than it was; then all are left as they are.
    """
    now = csv_sizes(folder)
    for path, size in sizes.items():
        if now.get(path, -1) < size:
            raise CheckpointError(
                f"{folder / path}: must have {size} bytes at least to go on from the checkpoint, "
                + (f"and has {now[path]}" if path in now else "and is missing")
            )
    for path in now:
        if path in sizes:
            os.truncate(folder / path, sizes[path])
        else:
            (folder / path).unlink()


def _csv_files(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.csv"))


def _pack(tree: Tree, arrays: dict[str, NDArray[Any]], names: dict[int, str]) -> Any:
    """Return a tree as JSON values, and put its arrays aside under the numbers that it names.

    An array that stands in several places, as a model that is all clusters', is written once.
    """
    if isinstance(tree, np.ndarray | np.generic):
        if id(tree) not in names:
            names[id(tree)] = name = str(len(arrays))
            arrays[name] = np.asarray(tree, tree.dtype.newbyteorder("="), order="C")
        return {_ARRAY: names[id(tree)]}
    if isinstance(tree, Mapping):
        if wrong := [key for key in tree if not isinstance(key, str)]:
            raise TypeError(f"the keys of a state are str, not {wrong[0]!r}")
        return {_DICT: {key: _pack(value, arrays, names) for key, value in tree.items()}}
    if isinstance(tree, tuple):
        return {_TUPLE: [_pack(value, arrays, names) for value in tree]}
    if isinstance(tree, list):
        return [_pack(value, arrays, names) for value in tree]
    if tree is None or type(tree) in (str, int, float, bool):
        return tree
    raise TypeError(f"{tree!r} ({type(tree).__name__}) can be no part of a state")


def _unpack(value: Any, arrays: Mapping[str, NDArray[Any]]) -> Tree:
    if isinstance(value, list):
        return [_unpack(part, arrays) for part in value]
    if not isinstance(value, dict):
        return value  # type: ignore[no-any-return]
    [(kind, content)] = value.items()
    if kind == _ARRAY:
        return arrays[content]
    if kind == _TUPLE:
        return tuple(_unpack(part, arrays) for part in content)
    return {key: _unpack(part, arrays) for key, part in content.items()}


def _digest(text: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
