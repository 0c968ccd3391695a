"""A run's state in one file, what it must be gone on with, and its tables cut back to it.

A state is a tree: nested dicts, lists and tuples of arrays and plain values. Arrays are tensors of
a safetensors file; the rest is JSON in its metadata. Digests of both tell damage.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeAlias

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedge_sim.config import Settings, settings_from_json
from fedge_sim.data.base import ClientData
from fedge_sim.errors import CheckpointError, ConfigError

Tree: TypeAlias = (
    "NDArray[Any] | Mapping[str, Tree] | Sequence[Tree] | str | int | float | bool | None"
)
NAME = "checkpoint.safetensors"  # in the results folder
FORMAT = 4  # goes up when a state of before cannot be gone on from
RUN = "run.json"
# Of app.config: where files are, which may change while a run is not at work.
PATHS = ("output-dir", "partition-file", "data-root", "cache-dir")
# The files that only grow, or are written once; and one that is replaced until the run ends.
LASTING = ("timeline.csv", "partition.json", "metrics/*/*.csv", "clusters/*.csv", "clusters/*.json")
AT_THE_END = ("metrics/*/cluster_history.json",)
CHUNK = 2**20  # bytes, that are read at a time
WAY_OUT = "put it back, or start a new run"
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
    digests = {"tree_sha256": _digest(text.encode()), "arrays_sha256": _digest_of(arrays)}
    aside = file.with_suffix(".tmp")
    try:
        save_file(arrays, aside, {"tree": text, **digests})
        aside.replace(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: the checkpoint cannot be written: {error}") from None


def load(file: Path, arrays: bool = True) -> Any:
    """Return the state in a file, a tree equal to what was saved, to the last bit.

    Parameters
    ----------
    file : Path
    arrays : bool
        Whether to read the arrays; else each is None.

    Raises
    ------
    CheckpointError
        If the file is missing or damaged, or another version of the program wrote it.
    """
    found: dict[str, NDArray[Any]] = {}
    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata()
            if arrays:
                found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        text = metadata["tree"]
        if "sha256" not in metadata:  # one digest of all, up to format 3
            if metadata["tree_sha256"] != _digest(text.encode()) or (
                arrays and metadata["arrays_sha256"] != _digest_of(found)
            ):
                raise ValueError("its content is not what was written")
            match json.loads(text):
                case [int(number), packed] if number == FORMAT:
                    return unpack(packed, found)
        raise CheckpointError(
            f"{file}: another version of fedge-sim wrote this checkpoint: go on with that version, "
            'or start a new run (partition = "file" with its partition.json for the same clients)'
        )
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
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written to ({error.strerror})") from None
    try:
        yield
    finally:
        lock.release()


class Checkpoints:
    """The checkpoint of a run at work, with what the run must be gone on with.

    That are its settings, its data, who has which examples, and what it has written: of each file
    its size and checksum, for which only what was added since is read.

    Parameters
    ----------
    folder : Path
        The run's results folder.
    settings : Settings
    content : str
        The dataset's hash.
    clients : sequence of ClientData
    """

    def __init__(
        self, folder: Path, settings: Settings, content: str, clients: Sequence[ClientData]
    ) -> None:
        self._folder = folder
        self._began: dict[str, Any] = {
            "settings": settings.model_dump(mode="json", by_alias=True),
            "data": content,
            "clients": digest_of_clients(clients),
        }
        self._sums: dict[str, _Sum] = {}

    def save(self, tree: Mapping[str, Tree], *, ended: bool) -> None:
        """Write the state of this moment, in the place of the one before.

        Raises
        ------
        CheckpointError
            If it cannot be written.
        """
        if "run" not in self._began and (self._folder / RUN).exists():
            self._began["run"] = _digests(run_of(self._folder))
        files = {}
        try:
            for path in _files(self._folder, ended):
                self._sums[path] = _sum_of(self._folder / path, self._sums.get(path))
                files[path] = self._sums[path][:2]
        except OSError as error:
            raise CheckpointError(f"{error.filename}: {error.strerror}") from None
        whole = {**tree, "ended": ended, "began": self._began, "files": files}
        save(self._folder / NAME, whole)

    def restore(self) -> Any:
        """Return the state that was saved; nothing is changed.

        Raises
        ------
        CheckpointError
            If there is none, if the run began otherwise, or a file is not what it has written.
        """
        tree = load(self._folder / NAME)
        began, now = tree["began"], self._began
        settings_to_go_on_with(self._folder, tree)
        if difference := differs(began["settings"], _with_paths_of(now["settings"], began)):
            raise CheckpointError(f"{self._folder}: the run began with {difference}")
        if began["data"] != now["data"]:
            raise CheckpointError(f"{self._folder}: the data are not those that the run began with")
        if began["clients"] != now["clients"]:
            raise CheckpointError(
                f"{self._folder}: clients have other examples than the run began with (partition-"
                "file, or another version of fedge-sim)"
            )
        check_files(self._folder, tree)
        self._began = began
        return tree

    def cut_back(self, tree: Mapping[str, Any]) -> None:
        """Drop what was written since a state was saved: what was added to files, and new ones."""
        try:
            for path in _files(self._folder, ended=False):
                if path in tree["files"]:
                    os.truncate(self._folder / path, tree["files"][path][0])
                else:
                    (self._folder / path).unlink()
        except OSError as error:
            raise CheckpointError(f"{error.filename}: {error.strerror}") from None


def settings_to_go_on_with(folder: Path, tree: Mapping[str, Any]) -> Settings:
    """Return a run's settings; paths are those in its ``run.json``, as files may have moved.

    Parameters
    ----------
    folder : Path
        The run's results folder.
    tree : mapping
        Of its checkpoint.

    Raises
    ------
    CheckpointError
        If ``run.json`` is missing, damaged or changed.
    """
    began, run = tree["began"], run_of(folder)
    settings = _with_paths_of(began["settings"], run)
    if difference := differs(settings, run.get("settings")):
        raise CheckpointError(f"{folder / RUN}: the run began with {difference}; {WAY_OUT}")
    for key, digest in began.get("run", {}).items():
        if _digests({key: run.get(key)}) != {key: digest}:
            raise CheckpointError(f"{folder / RUN}: {key} is not what the run wrote; {WAY_OUT}")
    try:
        return settings_from_json(json.dumps(settings))
    except ConfigError as error:  # of a path that is none, or by another version
        raise CheckpointError(f"{folder / RUN}: {error}") from None


def check_files(folder: Path, tree: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a file does not begin with what the run has written."""
    for path, (size, checksum) in tree["files"].items():
        file = folder / path
        try:
            found, now, _ = _sum_of(file, size=size)
        except OSError as error:
            raise CheckpointError(f"{file}: {error.strerror}; {WAY_OUT}") from None
        if found < size:
            raise CheckpointError(
                f"{file}: has {found} bytes, and the run has written {size}; {WAY_OUT}"
            )
        if now != checksum:
            raise CheckpointError(f"{file}: is not what the run has written; {WAY_OUT}")


def run_of(folder: Path) -> dict[str, Any]:
    """Return what a results folder's ``run.json`` says of its run.

    Raises
    ------
    CheckpointError
        If it is missing or damaged.
    """
    try:
        run = json.loads((folder / RUN).read_text(encoding="utf-8"))
        if not isinstance(run, dict):
            raise ValueError("it holds no table")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / RUN}: cannot be read: {error}; {WAY_OUT}") from None
    return run


def differs(before: Any, now: Any, path: str = "") -> str:
    """Return the first key of two tables with another value, and both values; "" if all are."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if found := differs(before.get(key), now.get(key), f"{path}.{key}".lstrip(".")):
                return found
        return ""
    if before == now and type(before) is type(now):
        return ""
    shown = (shorten(json.dumps(value), 80, placeholder=" ...") for value in (before, now))
    return f"{path or 'settings'} = {', now '.join(shown)}"


def digest_of_clients(clients: Iterable[ClientData]) -> str:
    """Return a digest of the rows that each client trains on, is tested on, and has beside."""
    digest = hashlib.sha256()
    for client in clients:
        for rows in (client.train, client.test, client.left_out):
            digest.update(len(rows).to_bytes(8, "little") + rows.astype("<i8").tobytes())
    return digest.hexdigest()


_Sum: TypeAlias = tuple[int, int, int]  # size, checksum, time of change in ns


def _sum_of(file: Path, before: "_Sum | None" = None, size: int | None = None) -> "_Sum":
    """Return a file's size, checksum and time of change, or those of its first ``size`` bytes.

    Parameters
    ----------
    file : Path
    before : tuple, optional
        What this gave for a file to which something may have been added since.
    size : int, optional
    """
    stat = file.stat()
    whole, (start, checksum, changed) = stat.st_size, before or (0, 0, 0)
    if (start, changed) == (whole, stat.st_mtime_ns):
        return start, checksum, changed
    if start >= whole:  # written anew
        start, checksum = 0, 0
    end = whole if size is None else min(size, whole)
    with file.open("rb") as stream:
        stream.seek(start)
        while start < end and (data := stream.read(min(CHUNK, end - start))):
            start, checksum = start + len(data), zlib.crc32(data, checksum)
    return start, checksum, stat.st_mtime_ns


def _files(folder: Path, ended: bool) -> list[str]:
    """Return the files that are known by their sums, as paths from the folder."""
    patterns = (*LASTING, *AT_THE_END) if ended else LASTING
    found = (file for pattern in patterns for file in folder.glob(pattern))
    return sorted(file.relative_to(folder).as_posix() for file in found)


def _digests(run: Mapping[str, Any]) -> dict[str, str]:
    """Return digests of what ``run.json`` says beside the settings, by key."""
    rest = ((key, value) for key, value in run.items() if key != "settings")
    return {key: _digest(json.dumps(value, sort_keys=True).encode()) for key, value in rest}


def _with_paths_of(settings: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the paths of those that another table has, as far as it has them."""
    taken = deepcopy(dict(settings))
    for key in PATHS:
        with suppress(KeyError, TypeError):
            taken["app"]["config"][key] = other["settings"]["app"]["config"][key]
    return taken


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


def unpack(value: Any, arrays: Mapping[str, NDArray[Any]]) -> Tree:
    """Return the tree that JSON values stand for; an array that is not given is None."""
    if isinstance(value, list):
        return [unpack(part, arrays) for part in value]
    if not isinstance(value, dict):
        return value  # type: ignore[no-any-return]
    [(kind, content)] = value.items()
    if kind == _ARRAY:
        return arrays.get(content)
    if kind == _TUPLE:
        return tuple(unpack(part, arrays) for part in content)
    return {key: unpack(part, arrays) for key, part in content.items()}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest_of(arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    add_arrays(digest, arrays)
    return digest.hexdigest()


def add_arrays(digest: "hashlib._Hash", arrays: Mapping[str, NDArray[Any]]) -> None:
    """Add names, types, shapes and values of arrays to a digest."""
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
