"""Finds HHAR's CSV files: in a folder, in one below it, or in UCI's .zip as it was downloaded.

Of an archive only what a member is called is looked at; no name in it becomes a path on the disk.
"""

import os
import shutil
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fedge_sim.config import AppConfig
from fedge_sim.data.store import StoreWriter
from fedge_sim.errors import DataError

SENSORS = ("accelerometer", "gyroscope")
FOLDER = "Activity recognition exp"  # what the archive unpacks to
# The other experiment, of devices that lie still, has files of the same names; macOS adds others.
NOT_OURS = ("still exp", "__macosx")
COPY_BYTES = 2**20
# What zipfile raises for an archive that is damaged, encrypted, or packed in a way unknown to it.
BAD_ARCHIVE = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)

Csv = Path | zipfile.Path
Found = Mapping[str, list[Csv]]


@dataclass(frozen=True)
class Source:
    """Where the CSV files are.

    Attributes
    ----------
    files : tuple of Path
        What is on the disk: the CSV files, or the archive.
    members : tuple of (str, int, int)
        Of an archive, name, size and checksum of what is read of it.
    """

    config: AppConfig
    files: tuple[Path, ...]
    members: tuple[tuple[str, int, int], ...] = ()

    @contextmanager
    def opened(self, writer: StoreWriter) -> Iterator[Found]:
        """Give the CSV files of each sensor, as long as they are needed.

        Raises
        ------
        DataError
            If an archive cannot be read, or lacks a file.
        """
        if not self.members:
            yield _of_sensors(self.config, _folders(self.files[0].parent))
            return
        [file] = self.files
        with zip_archive(file) as archive:
            if not (inner := _inner(archive)):
                yield _of_sensors(self.config, _members(archive))
                return
            copy = writer.scratch / "inner.zip"
            writer.tell(f"unpacking {PurePosixPath(inner.filename).name}", 0.0)
            try:
                with archive.open(inner) as source, copy.open("wb") as target:
                    shutil.copyfileobj(source, target, COPY_BYTES)
            except BAD_ARCHIVE as error:
                raise damaged(file, error) from None
            with zip_archive(copy, shown=f"{file}/{inner.filename}") as unpacked:
                yield _of_sensors(self.config, _members(unpacked))


def find(config: AppConfig) -> Source:
    """Find the files of phones, and watches if asked, at ``data-root``.

    They may be in it, in a folder one level below (or in what the archive unpacks to in one), or
    in an archive that is ``data-root`` or the only one in it. Copies may have a prefix.

    Raises
    ------
    DataError
        If a file is missing, or the same stands in several places.
    """
    root = Path(config.data_root)
    if root.is_file():
        return _archive(config, root)
    below = [e for e in _entries(root) if e.is_dir() and os.access(e, os.R_OK | os.X_OK)]
    for level in (
        [root / FOLDER],
        [root],
        [folder for own in below for folder in (own, own / FOLDER)],
    ):
        places = _folders(*level)
        if any(_wanted(config, files) for files in places.values()):
            found = _of_sensors(config, places)
            files = (file for sensor in SENSORS for file in found[sensor])
            return Source(config, tuple(file for file in files if isinstance(file, Path)))
    archives = [e for e in _entries(root) if e.name.lower().endswith(".zip") and e.is_file()]
    if len(archives) > 1:
        names = ", ".join(file.name for file in archives)
        raise DataError(f"{root}: has several archives, {names}; set data-root to the one of HHAR")
    if archives:
        return _archive(config, archives[0])
    raise _missing(config, _names(config)[0])


def _archive(config: AppConfig, file: Path) -> Source:
    """Look at what an archive says it holds; what is in an inner one is found when it is read."""
    with zip_archive(file) as archive:
        if inner := _inner(archive):
            read = [inner]
        else:
            found = _of_sensors(config, _members(archive))
            files = (file for sensor in SENSORS for file in found[sensor])
            read = [archive.getinfo(f.at) for f in files if isinstance(f, zipfile.Path)]
        members = tuple((entry.filename, entry.file_size, entry.CRC) for entry in read)
    return Source(config, (file,), members)


@contextmanager
def zip_archive(file: Path, shown: str = "") -> Iterator[zipfile.ZipFile]:
    """Open an archive; ``shown`` is what messages call it."""
    try:
        archive = zipfile.ZipFile(file)
    except (*BAD_ARCHIVE, OSError) as error:
        raise damaged(shown or str(file), error) from None
    with archive:
        archive.filename = shown or str(file)
        yield archive


def damaged(file: Csv | str, error: Exception) -> DataError:
    """Return the error for an archive that cannot be read."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(
        f"{file}: not a .zip archive that can be read ({reason}); download it again, or unpack "
        "it and set data-root to the folder of the CSV files"
    )


def _names(config: AppConfig) -> list[str]:
    kinds = ("Phones", "Watch") if config.use_watches else ("Phones",)
    return [f"{kind}_{sensor}.csv" for sensor in SENSORS for kind in kinds]


def _is_ours(path: str) -> bool:
    parts = path.rstrip("/").split("/")
    hidden = any(part.startswith(".") or not part for part in parts)  # "..", too
    return not hidden and not any(name in path.lower() for name in NOT_OURS)


def _entries(folder: Path) -> list[Path]:
    """Return what is in a folder, sorted; nothing if there is no such folder."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return sorted(entry for entry in folder.iterdir() if _is_ours(entry.name))
    return []


def _inner(archive: zipfile.ZipFile) -> zipfile.ZipInfo | None:
    """Return the archive in an archive that has no CSV files of its own, as UCI's has two."""
    ours = {e.filename.lower(): e for e in archive.infolist() if _is_ours(e.filename)}
    zips = [entry for name, entry in ours.items() if name.endswith(".zip")]
    has_csv = any(name.endswith(".csv") for name in ours)
    return zips[0] if len(zips) == 1 and not has_csv else None


Places = Mapping[str, Iterable[Csv]]  # files by folder


def _folders(*folders: Path) -> Places:
    return {str(folder): [f for f in _entries(folder) if f.is_file()] for folder in folders}


def _members(archive: zipfile.ZipFile) -> Places:
    places: defaultdict[str, list[Csv]] = defaultdict(list)
    for name in sorted(filter(_is_ours, archive.namelist())):
        if not name.endswith("/"):
            places[name.rpartition("/")[0]].append(zipfile.Path(archive, name))
    return places


def _wanted(config: AppConfig, files: Iterable[Csv]) -> dict[str, list[Csv]]:
    """Return the files that have each wanted name, or that name after a prefix."""
    by_name = {file.name: file for file in files}
    found: dict[str, list[Csv]] = {}
    for name in _names(config):
        prefixed = [file for own, file in by_name.items() if own.endswith(f"_{name}")]
        if own := [by_name[name]] if name in by_name else prefixed:
            found[name] = own
    return found


def _of_sensors(config: AppConfig, places: Places) -> Found:
    """Return the files of each sensor in the one of these folders that has them."""
    names = _names(config)
    found = {where: own for where, files in places.items() if (own := _wanted(config, files))}
    found = {where: own for where, own in found.items() if len(own) == len(names)} or found
    if len(found) > 1:
        raise DataError(
            f'[app.config] data-root = "{config.data_root}": HHAR\'s files are in several places, '
            f"{', '.join(found)}; set data-root to one of them"
        )
    own = next(iter(found.values()), {})
    if absent := [name for name in names if name not in own]:
        raise _missing(config, absent[0])
    return {s: [f for name in names if s in name for f in own[name]] for s in SENSORS}


def _missing(config: AppConfig, name: str) -> DataError:
    hint = ", or set use-watches = false" if name.startswith("Watch") else ""
    return DataError(
        f'[app.config] data-root = "{config.data_root}": dataset "hhar" needs the file '
        f"{name}, which is not there; set data-root to the unpacked folder or the .zip (an "
        f"absolute path under flwr run), get the files with scripts/download_hhar.py{hint}"
    )
