"""Reads one sensor file of HHAR, block by block, with all the damage that copies of it have.

Columns are found by the header, in any order, or taken in HHAR's order where there is none;
they are separated by commas, tabs or semicolons. What cannot be a row is counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import polars as pl

from fedge_sim.data.resampling import ROW, UNKNOWN, Rows
from fedge_sim.errors import DataError

COLUMNS = (
    *("Index", "Arrival_Time", "Creation_Time", "x", "y", "z"),
    *("User", "Model", "Device", "gt"),
)
USED = COLUMNS[1:]
NAMES = ("User", "Model", "Device")
CLASSES = ("walking", "sitting", "standing", "biking", "stairsup", "stairsdown")
LABELS = {"walk": 0, "sit": 1, "stand": 2, "bike": 3, "stairsup": 4, "stairsdown": 5}
NULL_LABELS = ["null", "", "nan"]  # the last two where a program has read "null" as "no value"

BLOCK_BYTES = 16 * 2**20
LONGEST_LINE = 2**16
MAX_BAD_SHARE = 0.01
# Milliseconds and nanoseconds that leave room for sums of both in 64 bits; year 2096.
LATEST_ARRIVAL_MS = 4_000_000_000_000
LATEST_CREATION_NS = 4_000_000_000_000_000_000


class Key(NamedTuple):
    """Whose rows they are: the values of :data:`NAMES`."""

    user: str
    model: str
    device: str


@dataclass
class FileReport:
    """What a file held, and what of it was left out."""

    file: str
    rows: int = 0
    bad_rows: int = 0
    null_labels: int = 0
    unknown_labels: dict[str, int] = field(default_factory=dict)

    @property
    def used(self) -> int:
        """Rows that were not left out."""
        return self.rows - self.bad_rows - self.null_labels - sum(self.unknown_labels.values())


class _Layout(NamedTuple):
    separator: str
    num_columns: int
    where: dict[str, int]  # of each used column
    has_header: bool


def read_sensor_file(file: Path, report: FileReport) -> Iterator[tuple[Key, Rows, float]]:
    """Read a file and yield its labelled rows, each block's by user and device, in file order.

    Parameters
    ----------
    file : Path
    report : FileReport
        Is counted up while the file is read.

    Yields
    ------
    key : Key
    rows : structured array of dtype ROW
    share : float
        How much of the file is read, 0 to 1.

    Raises
    ------
    DataError
        If the file cannot be read, lacks a column, or more than 1 % of its rows have no time,
        no finite reading or no user, model and device.
    """
    first_bad = ""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            layout = _layout(file, stream)
            line = 1 + layout.has_header
            for block in _blocks(file, stream):
                text = _read_text(block, layout)
                table = _parse(text, layout)
                bad = ~(table["good"] | table["blank"])
                if not first_bad and bad.any():
                    index = int(bad.arg_max() or 0)
                    cells = layout.separator.join(cell or "" for cell in text.row(index))
                    first_bad = f"the first is line {line + index}: {cells[:200]!r}"
                line += len(table)
                report.rows += len(table) - int(table["blank"].sum())
                report.bad_rows += int(bad.sum())
                for key, rows in _labelled(table.filter("good"), report):
                    yield key, rows, stream.tell() / size
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{file}: from line {line} on, this is no table: {error}") from None
    if report.rows == 0:
        raise DataError(f"{file}: there are no rows in it; unpack or download it again")
    if report.bad_rows > MAX_BAD_SHARE * report.rows:
        raise DataError(
            f"{file}: {report.bad_rows:,} of {report.rows:,} rows have no time, reading, user, "
            f"model or device, expected at most {MAX_BAD_SHARE:.0%}; {first_bad}; "
            "download the file again, or remove these rows"
        )


def _layout(file: Path, stream: BinaryIO) -> _Layout:
    """Look at the first line, and leave the stream where the rows begin."""
    line = stream.readline(LONGEST_LINE)
    text = line.decode("utf-8-sig", errors="replace").strip("\r\n")
    separator = max(",\t;", key=text.count)
    cells = [cell.strip(' "') for cell in text.split(separator)]
    names = {cell.lower(): place for place, cell in reversed(list(enumerate(cells)))}
    where = {name: names[name.lower()] for name in USED if name.lower() in names}
    if len(where) == len(USED):
        return _Layout(separator, len(cells), where, has_header=True)
    if not text:
        raise DataError(f"{file}: is empty, or begins with an empty line; download it again")
    if where or len(cells) != len(COLUMNS):
        missing = [name for name in USED if name not in where]
        raise DataError(
            f"{file}: line 1 has {len(cells)} columns and no {', '.join(missing)}; expected "
            f"the header {','.join(COLUMNS)}, or no header and these {len(COLUMNS)} columns"
        )
    stream.seek(0)
    places = {name: place for place, name in enumerate(COLUMNS) if name in USED}
    return _Layout(separator, len(cells), places, has_header=False)


def _blocks(file: Path, stream: BinaryIO) -> Iterator[bytes]:
    """Yield the rest of a file in blocks of whole lines."""
    while block := stream.read(BLOCK_BYTES):
        block += stream.readline(LONGEST_LINE)
        if not block.endswith(b"\n") and stream.read(1):
            raise DataError(
                f"{file}: has a line of more than {LONGEST_LINE:,} bytes, so it is no CSV file "
                "of HHAR; unpack or download it again"
            )
        yield block


def _read_text(block: bytes, layout: _Layout) -> pl.DataFrame:
    """Return all cells of a block as text; a cell that a line lacks is null."""
    # No value holds a blank or a quote: without them, quoted copies and CRLF are read as well.
    if any(byte in block for byte in (b'"', b" ", b"\r")):
        block = block.translate(None, b'" \r')
    # polars takes the number of columns from the first line: give it a full one.
    full_line = layout.separator * (layout.num_columns - 1) + "\n"
    return pl.read_csv(
        full_line.encode() + block,
        has_header=False,
        separator=layout.separator,
        schema={str(place): pl.String for place in range(layout.num_columns)},
        quote_char=None,
        truncate_ragged_lines=True,
        encoding="utf8-lossy",
    ).slice(1)


def _parse(text: pl.DataFrame, layout: _Layout) -> pl.DataFrame:
    """Turn cells into numbers, and say which rows are good and which are blank."""
    columns = {name: pl.col(str(place)) for name, place in layout.where.items()}
    arrival = pl.coalesce(
        columns["Arrival_Time"].cast(pl.Int64, strict=False),
        columns["Arrival_Time"].cast(pl.Float64, strict=False).cast(pl.Int64, strict=False),
    )
    # A time that lost its last digits (1.42469663191325E+018) is no integer: it is UNKNOWN.
    creation = columns["Creation_Time"].cast(pl.Int64, strict=False)
    known = creation.is_between(-LATEST_CREATION_NS, LATEST_CREATION_NS)
    table = text.lazy().select(
        arrival.alias("Arrival_Time"),
        pl.when(known).then(creation).otherwise(int(UNKNOWN)).alias("Creation_Time"),
        *(columns[axis].cast(pl.Float32, strict=False).alias(axis) for axis in "xyz"),
        *(columns[name].alias(name) for name in NAMES),
        columns["gt"].fill_null("").str.to_lowercase().alias("gt"),
        pl.all_horizontal(pl.all().is_null()).alias("blank"),
    )
    good = pl.all_horizontal(
        pl.col("Arrival_Time").is_between(0, LATEST_ARRIVAL_MS),
        *(pl.col(axis).is_finite() for axis in "xyz"),
        *(pl.col(name).is_not_null() for name in NAMES),
    )
    return table.with_columns(good.fill_null(value=False).alias("good")).collect()


def _labelled(table: pl.DataFrame, report: FileReport) -> Iterator[tuple[Key, Rows]]:
    """Count the labels of good rows, and yield the rows with a known one by user and device."""
    labels = table["gt"].value_counts().rows()
    for label, count in labels:
        if label in NULL_LABELS:
            report.null_labels += count
        elif label not in LABELS:
            report.unknown_labels[label] = report.unknown_labels.get(label, 0) + count
    known = table.filter(pl.col("gt").is_in(list(LABELS)))
    code = pl.col("gt").replace_strict(LABELS, return_dtype=pl.Int8)
    parts = known.with_columns(code).partition_by(
        NAMES, maintain_order=True, include_key=False, as_dict=True
    )
    for key, part in parts.items():
        rows = np.empty(len(part), ROW)
        rows["arrival"] = part["Arrival_Time"].to_numpy() * 1_000_000
        rows["creation"] = part["Creation_Time"].to_numpy()
        for place, axis in enumerate("xyz"):
            rows["xyz"][:, place] = part[axis].to_numpy()
        rows["label"] = part["gt"].to_numpy()
        yield Key(*key), rows
