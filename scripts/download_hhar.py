"""Download HHAR, the UCI "Heterogeneity Activity Recognition" dataset (id 344).

``python scripts/download_hhar.py [FOLDER]`` puts its four CSV files into ``FOLDER``
(``data/hhar``). A. Stisen et al., Smart Devices are Different, SenSys 2015; data:
https://doi.org/10.24432/C5689X.

The archive holds two archives. "Activity recognition exp.zip" has the folder "Activity recognition
exp/" with the four files; "Still exp.zip" has recordings of devices that lie still, in files of the
same names, and is left out. At the older address stands the first inner archive alone:
https://archive.ics.uci.edu/ml/machine-learning-databases/00344/Activity%20recognition%20exp.zip

Everything is written to ``FOLDER/download.part`` first and moved when complete: no file under its
own name is ever half-written. That folder goes at the end, whatever the end.
"""

import shlex
import shutil
import zipfile
import zlib
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, Annotated
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

URL = "https://archive.ics.uci.edu/static/public/344/heterogeneity+activity+recognition.zip"
FILES = (
    "Phones_accelerometer.csv",
    "Phones_gyroscope.csv",
    "Watch_accelerometer.csv",
    "Watch_gyroscope.csv",
)
STILL = "still exp"  # the other experiment: same names, other files
CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 60
# What zipfile raises for a damaged, encrypted or exotic archive.
BAD_ARCHIVE = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)


class DownloadError(Exception):
    """The files could not be had: one line that says why."""


def fetch(folder: Path, url: str, progress: Progress) -> None:
    """Put the four files into a folder: all of them or, on any failure, none.

    Raises
    ------
    DownloadError
        If the address cannot be read, or holds no zip archive with the four files.
    OSError
        If they cannot be written: the disk is full, the folder is not ours.
    """
    is_new = not folder.exists()
    part = folder / "download.part"
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    part.mkdir(parents=True)
    try:
        archive = part / "archive.zip"
        download(url, archive, progress)
        unpack(archive, part, progress)
        missing = [name for name in FILES if not (part / name).exists()]
        if missing:
            raise DownloadError(f"{url}: no {', '.join(missing)} in this archive")
        for name in FILES:
            (part / name).replace(folder / name)
    except BAD_ARCHIVE as error:
        raise DownloadError(f"{url}: not a zip archive, or a damaged one: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # not empty: all went well
                folder.rmdir()


def download(url: str, path: Path, progress: Progress) -> None:
    """Write what is at an address to a file."""
    try:
        with urlopen(url, timeout=TIMEOUT_SECONDS) as response:
            length = response.headers.get("Content-Length")
            copy(response, path, int(length) if length else None, "download", progress)
    except HTTPError as error:
        raise DownloadError(f"{url}: HTTP {error.code} {error.reason}") from error
    except URLError as error:
        raise DownloadError(f"{url}: cannot be reached: {error.reason}") from error
    except (HTTPException, ConnectionError, TimeoutError, ValueError) as error:
        raise DownloadError(f"{url}: {error!r}") from error
    # A server that hangs up early raises nothing.
    if length and path.stat().st_size < int(length):
        raise DownloadError(f"{url}: the connection was cut; try again")


def unpack(archive: Path, folder: Path, progress: Progress) -> None:
    """Take the files out of an archive and the archives in it, wherever they are inside.

    Only base names of entries are used, so that nothing is written outside the folder.
    """
    with zipfile.ZipFile(archive) as opened:
        for entry in opened.infolist():
            name = PurePosixPath(entry.filename).name
            inner = archive.with_name(f"inner-{archive.name}")
            is_archive = name.lower().endswith(".zip")
            if STILL in entry.filename.lower() or not (is_archive or name in FILES):
                continue
            with opened.open(entry) as source:
                copy(
                    source, inner if is_archive else folder / name, entry.file_size, name, progress
                )
            if is_archive:
                if zipfile.is_zipfile(inner):  # "__MACOSX/._x.zip" is none
                    unpack(inner, folder, progress)
                inner.unlink()


def copy(source: IO[bytes], path: Path, size: int | None, name: str, progress: Progress) -> None:
    """Write a stream to a file, a chunk at a time, and show how far it is."""
    task = progress.add_task(name, total=size)
    with path.open("wb") as file:
        while chunk := source.read(CHUNK_BYTES):
            file.write(chunk)
            progress.advance(task, len(chunk))


def main(
    folder: Annotated[
        Path, typer.Argument(file_okay=False, help="Where the four files go.")
    ] = Path("data/hhar"),
    url: Annotated[str, typer.Option(help="Where the archive is; file:// works too.")] = URL,
) -> None:
    """Download the HHAR dataset and unpack its four CSV files."""
    if all((folder / name).is_file() for name in FILES):
        typer.echo(f"{folder} has all four files already: nothing to download")
    else:
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        try:
            with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
                fetch(folder, url, progress)
        except (DownloadError, OSError) as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from error
        typer.echo(f"{folder} has the four files of HHAR")
    typer.echo(f"next: make run-hhar DATA={shlex.quote(str(folder))}")


if __name__ == "__main__":
    typer.run(main)
