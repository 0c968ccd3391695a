"""The store: every dataset becomes a folder of .npy files once, and is mapped from then on.

A store is written aside and renamed, so a half-written one is never seen; a lock makes a
second process wait for the first instead of doing the same work. Its name holds a hash of the
settings and of the data files that it was made from, so a change of either makes a new one.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from filelock import FileLock
from numpy.typing import ArrayLike, NDArray

from fedge_sim.config import AppConfig
from fedge_sim.data.base import Dataset, Names
from fedge_sim.errors import DataError

log = logging.getLogger(__name__)

# Raise it when the files, or what any dataset puts into them, change their meaning.
FORMAT = 1
MANIFEST = "manifest.json"
CODES = ("user", "model", "device", "recording", "position")
DTYPES = {"X": np.float32, "y": np.int64, **dict.fromkeys(CODES, np.int32)}

# Told what is being done and how much of it is done, 0 to 1.
Tell = Callable[[str, float], None]


def tell_nobody(what: str, share: float) -> None:
    """Let nobody know."""


@dataclass(frozen=True)
class Recipe:
    """How the store of a dataset is made.

    Attributes
    ----------
    dataset : str
    settings : mapping
        All settings that change its content, as JSON knows them.
    files : tuple of Path
        All files that it is made from.
    write : callable
        Adds all examples to the writer and returns the names and a report (for JSON) of what
        was read. It raises DataError if the source is not what it should be.
    """

    dataset: str
    settings: Mapping[str, Any]
    files: tuple[Path, ...]
    write: Callable[["StoreWriter"], tuple[Names, Mapping[str, Any]]]


class StoreDamagedError(Exception):
    """A store is not what its manifest says, or of another version; it is built anew."""


def cache_folder(config: AppConfig) -> Path:
    """Return where stores are kept: ``cache-dir``, or this user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(config.cache_dir or Path(base, "fedge-sim"))


def open_dataset(recipe: Recipe, cache: Path, tell: Tell = tell_nobody) -> Dataset:
    """Open the store of a recipe, made first if there is none or if it is damaged.

    Parameters
    ----------
    recipe : Recipe
    cache : Path
        The folder of all stores.
    tell : callable, optional
        Told of the progress while the store is made.

    Raises
    ------
    DataError
        If the source cannot be read, or the store cannot be written.
    """
    folder = cache / f"{recipe.dataset}-{_key(recipe)}"
    try:
        with suppress(FileNotFoundError, StoreDamagedError):
            return _open(folder)
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{recipe.dataset}.lock"):
            try:
                return _open(folder)  # made by another process in the meantime
            except FileNotFoundError:
                log.info("making the store of %s, once: %s", recipe.dataset, folder)
            except StoreDamagedError as damage:
                log.warning("store %s: %s; it is made anew", folder, damage)
            _build(recipe, folder, tell)
            return _open(folder)
    except OSError as error:
        raise cannot_use(cache, error) from None


def _key(recipe: Recipe) -> str:
    """Hash what a store is made from; a file is known by its name, size and time of change."""
    files = []
    for path in recipe.files:
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        files.append([path.name, stat.st_size, stat.st_mtime_ns])
    made_from = {"settings": recipe.settings, "files": files}
    return hashlib.sha256(canonical(made_from)).hexdigest()[:16]


def canonical(value: object) -> bytes:
    """Return JSON that is the same for the same value, to be hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _open(folder: Path) -> Dataset:
    """Map the files of a store, after a check that costs no reading of a large file.

    An array whose size and time of change are those in the manifest is taken as it is; one
    that was touched or copied must have the manifest's hash.
    """
    manifest = _read_manifest(folder)
    arrays: dict[str, Any] = {}
    try:
        for name, expected in manifest["arrays"].items():
            file = folder / f"{name}.npy"
            stat = file.stat()
            if stat.st_size != expected["bytes"]:
                raise StoreDamagedError(
                    f"{file.name} has {stat.st_size} bytes, expected {expected['bytes']}"
                )
            if stat.st_mtime_ns != expected["mtime_ns"]:
                if _hash(file) != expected["sha256"]:
                    raise StoreDamagedError(
                        f"{file.name} has another hash than when it was written"
                    )
                with suppress(OSError):  # so that it is not hashed again
                    os.utime(file, ns=(expected["mtime_ns"], expected["mtime_ns"]))
            # The base class: the map's own adds microseconds to every indexing.
            arrays[name] = np.load(file, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        names = Names(**{key: tuple(value) for key, value in manifest["names"].items()})
        recorded = manifest.get("recorded")
        if recorded is None:  # made before that was written down
            recorded = len(np.unique(arrays["recording"])) < len(arrays["recording"])
        dataset = Dataset(
            x=arrays.pop("X"),
            **arrays,
            names=names,
            content=manifest["content"],
            report=manifest["report"],
            recorded=recorded,
        )
        warnings = [str(line) for line in manifest.get("warnings", ())]  # older stores have none
    except FileNotFoundError as error:
        raise StoreDamagedError(f"{Path(error.filename).name} is missing") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreDamagedError(f"{MANIFEST} and arrays do not fit: {error}") from None
    for line in warnings:
        log.warning("%s", line)
    return dataset


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise FileNotFoundError(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        seal = manifest.pop("seal")
        version = manifest["format"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise StoreDamagedError(f"{MANIFEST} cannot be read ({error})") from None
    if version != FORMAT:
        raise StoreDamagedError(f"it is of format {version}, this version writes {FORMAT}")
    if seal != hashlib.sha256(canonical(manifest)).hexdigest():
        raise StoreDamagedError(f"{MANIFEST} was changed")
    return dict(manifest)


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _build(recipe: Recipe, folder: Path, tell: Tell) -> None:
    """Write a store aside and put it in its place; the caller holds the store's lock."""
    started = time.perf_counter()
    for leftover in folder.parent.glob(f"{folder.name}.*.tmp"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    aside.mkdir()
    try:
        with StoreWriter(recipe.dataset, aside, tell) as writer:
            names, report = recipe.write(writer)
            arrays = writer.close(names)
        manifest = {
            "format": FORMAT,
            "dataset": recipe.dataset,
            "settings": recipe.settings,
            "files": [{"name": file.name, "bytes": file.stat().st_size} for file in recipe.files],
            "names": asdict(names),
            "report": report,
            "warnings": writer.warnings,
            "examples": writer.num_examples,
            "recorded": writer.recorded,
            "arrays": arrays,
            "content": hashlib.sha256(
                canonical([[name, a["sha256"]] for name, a in arrays.items()])
            ).hexdigest(),
        }
        manifest["seal"] = hashlib.sha256(canonical(manifest)).hexdigest()
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    seconds = time.perf_counter() - started
    log.info("%d examples of %s in %.1f s", writer.num_examples, recipe.dataset, seconds)


class StoreWriter:
    """Takes the examples of a dataset, part by part, and appends them to the store's files.

    Attributes
    ----------
    scratch : Path
        A folder for files that are needed only while the store is made.
    tell : callable
        To be told of the progress.
    num_examples : int
        Examples added so far.
    warnings : list of str
        What a user of the dataset has to know: logged whenever the store is opened.
    recorded : bool
        Whether all came with recording and position.
    """

    def __init__(self, source: str, folder: Path, tell: Tell) -> None:
        self.tell = tell
        self.num_examples = 0
        self.warnings: list[str] = []
        self.recorded = True
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self._source = source
        self._files = {name: _ArrayFile(folder / f"{name}.npy", t) for name, t in DTYPES.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:  # there will be no store to say them
            for line in self.warnings:
                log.warning("%s", line)
        for file in self._files.values():
            file.release()

    def warn(self, line: str) -> None:
        """Keep a line in the store, to be logged whenever it is opened."""
        self.warnings.append(line)

    def add(self, x: ArrayLike, y: ArrayLike, **codes: ArrayLike) -> None:
        """Append examples.

        Parameters
        ----------
        x : array (n, *shape)
            Real numbers; the same shape in every call.
        y : array (n,)
            Class codes.
        **codes : array (n,) or int
            ``user``, ``model`` and ``device``, left out where not known, and ``recording`` and
            ``position``, left out where examples are independent of each other.

        Raises
        ------
        DataError
            If shapes do not fit together, or a value is not finite.
        """
        x, y = np.asarray(x), np.asarray(y)
        n = len(x)
        if x.ndim < 2 or 0 in x.shape[1:]:
            raise DataError(f"{self._source}: examples must have values, not the shape {x.shape}")
        first = np.arange(self.num_examples, self.num_examples + n)
        given = {"recording": first, "position": 0, "user": -1, "model": -1, "device": -1} | codes
        columns = {name: np.broadcast_to(np.asarray(given[name]), (n,)) for name in CODES}
        if y.shape != (n,):
            raise DataError(f"{self._source}: {n} examples, but labels {y.shape}")
        if n == 0:
            return
        with np.errstate(over="ignore"):  # found right below
            x = x.astype(np.float32, copy=False)
        if not np.isfinite(x).all():
            raise DataError(f"{self._source}: an example holds NaN or infinity")
        self.recorded &= {"recording", "position"} <= codes.keys()
        for name, values in {"X": x, "y": y, **columns}.items():
            self._files[name].append(values)
        self.num_examples += n

    def close(self, names: Names) -> dict[str, dict[str, Any]]:
        """Finish the files, check the codes, and return what the manifest says of each file."""
        shutil.rmtree(self.scratch)
        if self.num_examples == 0:
            raise DataError(f"{self._source}: there is no example in it")
        entries = {name: file.close() for name, file in self._files.items()}
        for name, known in {
            "y": names.classes,
            "user": names.users,
            "model": names.models,
            "device": names.devices,
        }.items():
            codes = np.load(self._files[name].path, mmap_mode="r", allow_pickle=False)
            low, high = int(codes.min()), int(codes.max())
            if high >= len(known) or (low < 0 and (known or name == "y")):
                raise DataError(
                    f"{self._source}: {name} must be from 0 to {len(known) - 1}, "
                    f"but is from {low} to {high}"
                )
        return entries


class _ArrayFile:
    """An .npy file that grows, for numpy's own reader; plain writes, as a full disk must raise."""

    def __init__(self, path: Path, dtype: type) -> None:
        self.path = path
        self._dtype = np.dtype(dtype)
        self._file = path.open("wb")
        self._shape: tuple[int, ...] = ()
        self._length = 0

    def append(self, values: NDArray[Any]) -> None:
        if self._length == 0:
            self._shape = values.shape[1:]
            self._write_header()
        elif values.shape[1:] != self._shape:
            raise DataError(f"examples of shapes {self._shape} and {values.shape[1:]} in one set")
        self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self._length += len(values)

    def close(self) -> dict[str, Any]:
        """Write the true length, and return size, time of change and hash."""
        self._file.seek(0)
        self._write_header()
        self._file.close()
        stat = self.path.stat()
        return {
            "bytes": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "sha256": _hash(self.path),
        }

    def release(self) -> None:
        """Let go of the file, whether it is whole or not."""
        with suppress(OSError):  # what is still to be written may not fit on the disk
            self._file.close()

    def _write_header(self) -> None:
        # numpy pads the header so that a longer first axis needs no more room.
        form = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._length, *self._shape),
        }
        np.lib.format.write_array_header_1_0(self._file, form)


def cannot_use(cache: Path, error: OSError) -> DataError:
    """Return the error for a cache folder that cannot be read or written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        problem = "the disk is full; nothing half-written was left; free some space, or"
    else:
        problem = f"cannot be used ({error.strerror or error});"
    return DataError(f"{cache}: {problem} set [app.config] cache-dir to another folder")
