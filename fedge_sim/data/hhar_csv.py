"""Reads one sensor file of HHAR, block by block, with all the damage that copies of it have.

Columns are found by the header, in any order, or taken in HHAR's order where there is none;
they are separated by commas, tabs or semicolons. What cannot be a row is counted, by column.
"""

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, NamedTuple

import numpy as np
import polars as pl

from fedge_sim.data.hhar_files import BAD_ARCHIVE, Csv, damaged
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
# How copies spell them, in letters and digits alone: "Stairs Up" and "stairs_up" are "stairsup".
SPELLINGS = (
    LABELS
    | {name: code for code, name in enumerate(CLASSES)}
    | dict.fromkeys(("stairup", "upstairs", "walkupstairs", "walkingupstairs"), 4)
    | dict.fromkeys(("stairdown", "downstairs", "walkdownstairs", "walkingdownstairs"), 5)
)
NULL_LABELS = ("null", "nan", "none", "na")  # all but the first: a program's "no value"

DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}|\d{1,2}:\d{2}")
QUOTED_DECIMAL_COMMA = re.compile(rb'"(-?\d+),(\d+(?:[eE][-+]?\d+)?)"')

BLOCK_BYTES = 16 * 2**20
LONGEST_LINE = 2**16
MAX_BAD_SHARE = 0.01  # of rows that cannot be read, and of those with unknown labels
MAX_COARSE_SHARE = 0.25  # of times without milliseconds: 1 in 1,000, where nothing is lost
MIN_STILL_SHARE = 0.8  # of rows at the time of the one before: no sensor makes 5 in a millisecond
MOST_LISTED = 20  # names in a message; the manifest has them all
MOST_LABELS = 1000  # unknown ones that are told apart
CELLS = "number of cells"  # named in the place of a column, where a row has too many
# Times since 1970 from 2001 to 2096 show their unit: no other unit has them in a year near.
EPOCH_S = (1_000_000_000, 4_000_000_000)
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
    bad_columns: dict[str, int] = field(default_factory=dict)  # rows, by what cannot be read
    bad_cells: dict[str, str] = field(default_factory=dict)  # the first, and what is wrong
    no_creation: int = 0
    creation_cell: str = ""
    null_labels: int = 0
    unknown_labels: dict[str, int] = field(default_factory=dict)

    @property
    def used(self) -> int:
        """Rows that were not left out."""
        return self.rows - self.bad_rows - self.null_labels - sum(self.unknown_labels.values())

    def faults(self) -> str:
        """Say which columns of bad rows are wrong, in how many of them, and how."""
        by_count = sorted(self.bad_columns.items(), key=lambda pair: -pair[1])
        return "; ".join(f"{name}: {n:,} ({self.bad_cells[name]})" for name, n in by_count)


class _Layout(NamedTuple):
    separator: str
    num_columns: int
    where: dict[str, int]  # of each used column
    has_header: bool
    in_seconds: bool = False  # whether arrival times are seconds, with a fraction


def listed(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return ", ".join(names[:MOST_LISTED]) + more


def counted(labels: Mapping[str, int]) -> str:
    """Return labels with their counts, the most frequent first."""
    by_count = sorted(labels.items(), key=lambda pair: (-pair[1], pair[0]))
    return listed([f"{label!r} ({n})" for label, n in by_count])


def size_of(file: Csv) -> int:
    """Return how many bytes of text a file holds."""
    if isinstance(file, zipfile.Path):
        return file.root.getinfo(file.at).file_size
    return file.stat().st_size


def read_sensor_file(file: Csv, report: FileReport) -> Iterator[tuple[Key, Rows, float]]:
    """Read a file and yield its labelled rows, each block's by user and device, in file order.

    Parameters
    ----------
    file : Path or zipfile.Path
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
        If the file cannot be read, lacks a column, more than 1 % of its rows have no time, no
        finite reading or no user, model and device, or an unknown label, none has a known
        one, or its times are too coarse to tell rows apart.
    """
    first_bad, times = "", _Times()
    try:
        size = size_of(file)
        with file.open("rb") as stream:
            layout = _layout(file, stream)
            line = 1 + layout.has_header
            for number, block in enumerate(_blocks(file, stream)):
                text = _read_text(block, layout)
                if number == 0:
                    layout = layout._replace(in_seconds=_are_seconds(text, layout))
                table = _parse(text, layout)
                bad = ~(table["good"] | table["blank"])
                if bad.any():
                    if not first_bad:
                        index = int(bad.arg_max() or 0)
                        cells = layout.separator.join(cell or "" for cell in text.row(index))
                        cells = cells.rstrip(layout.separator)
                        first_bad = f"the first is line {line + index}: {cells[:200]!r}"
                    _count_faults(text.filter(bad), layout, report)
                line += len(table)
                report.rows += len(table) - int(table["blank"].sum())
                report.bad_rows += int(bad.sum())
                _count_no_creation(text, table, layout, report)
                times.add(text, table, layout)
                for key, rows in _labelled(table.filter("good"), report):
                    yield key, rows, stream.tell() / size
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{file}: from line {line} on, this is no table: {error}") from None
    except BAD_ARCHIVE as error:
        raise damaged(file, error) from None
    if report.rows == 0:
        raise DataError(f"{file}: there are no rows in it; unpack or download it again")
    if report.bad_rows > MAX_BAD_SHARE * report.rows:
        raise DataError(
            f"{file}: {report.bad_rows:,} of {report.rows:,} rows have no time, reading, user, "
            f"model or device, expected at most {MAX_BAD_SHARE:.0%}; {report.faults()}; "
            f"{first_bad}; download the file again, or mend these columns or rows"
        )
    if problem := times.problem(report.rows):
        raise DataError(f"{file}: {problem}")
    if report.used == 0:
        raise DataError(
            f"{file}: none of its {report.rows:,} rows has a known label: "
            f"{report.null_labels:,} have none, the others "
            f"{counted(report.unknown_labels) or 'nothing else'}; expected "
            f"{', '.join(LABELS)} in the column gt"
        )
    num_unknown = sum(report.unknown_labels.values())
    if num_unknown > MAX_BAD_SHARE * report.rows:
        raise DataError(
            f"{file}: {num_unknown:,} of {report.rows:,} rows have unknown labels, expected at "
            f"most {MAX_BAD_SHARE:.0%}: {counted(report.unknown_labels)}; rename them in the "
            f"column gt to {', '.join(LABELS)} or null (which is left out), or remove these rows"
        )


class _Times:
    """Looks at arrival times that can be read, and yet are no milliseconds."""

    def __init__(self) -> None:
        self._coarse = self._still = self._next = self._steps = 0
        self._cell = ""

    def add(self, text: pl.DataFrame, table: pl.DataFrame, layout: _Layout) -> None:
        """Take in a block."""
        time, coarse = table["Arrival_Time"], table["coarse"]
        if coarse.any():
            self._coarse += int(coarse.sum())
            place = str(layout.where["Arrival_Time"])
            self._cell = self._cell or str(text[place][int(coarse.arg_max() or 0)])
        step = time.diff().drop_nulls()
        self._steps += len(step)
        self._still += int((step == 0).sum())
        self._next += int((step == 1).sum())

    def problem(self, rows: int) -> str:
        """Say what is wrong with the times, if anything is."""
        if self._coarse > MAX_COARSE_SHARE * rows:
            return (
                f"Arrival_Time: {self._coarse:,} of {rows:,} rows have a time that has lost its "
                f"last digits, as in a spreadsheet ({self._cell!r}); expected milliseconds since "
                "1970 in full: take the column from the original file, or save it as a number "
                "without decimals"
            )
        # Elsewhere time moves by more than one, unless it is the last digit of a slower clock.
        slow = self._next >= 0.5 * (self._steps - self._still)
        if self._steps > 0 and self._still >= MIN_STILL_SHARE * self._steps and slow:
            return (
                f"Arrival_Time: {self._still:,} of {rows:,} rows have the time of the row before: "
                "it is in seconds or days; expected milliseconds since 1970: take the column "
                "from the original file"
            )
        return ""


def _layout(file: Csv, stream: IO[bytes]) -> _Layout:
    """Look at the first line, and leave the stream where the rows begin."""
    line = QUOTED_DECIMAL_COMMA.sub(rb"\1.\2", stream.readline(LONGEST_LINE))
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


def _blocks(file: Csv, stream: IO[bytes]) -> Iterator[bytes]:
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
    if b'"' in block:
        block = QUOTED_DECIMAL_COMMA.sub(rb"\1.\2", block)
    if any(byte in block for byte in (b'"', b" ", b"\r")):
        block = block.translate(None, b'" \r')
    # polars takes the number of columns from the first line: give it a full one, and one more
    # for what should not be there.
    full_line = layout.separator * layout.num_columns + "\n"
    return pl.read_csv(
        full_line.encode() + block,
        has_header=False,
        separator=layout.separator,
        schema={str(place): pl.String for place in range(layout.num_columns + 1)},
        quote_char=None,
        truncate_ragged_lines=True,
        encoding="utf8-lossy",
    ).slice(1)


def _number(layout: _Layout, name: str) -> pl.Expr:
    """Return a column's cells with a decimal point, where commas cannot separate columns."""
    cell = pl.col(str(layout.where[name]))
    return cell if layout.separator == "," else cell.str.replace(",", ".", literal=True)


def _are_seconds(text: pl.DataFrame, layout: _Layout) -> bool:
    """Whether arrival times are seconds since 1970, of which most have a fraction."""
    time = text.select(_number(layout, "Arrival_Time").cast(pl.Float64, strict=False)).to_series()
    time = time.filter(time.is_between(*EPOCH_S, closed="left"))
    return len(time) > 0 and int((time != time.floor()).sum()) > 0.5 * len(time)


def _arrival(text: pl.DataFrame, layout: _Layout) -> pl.DataFrame:
    """Read arrival times in the unit that their size shows.

    Returns
    -------
    DataFrame
        ``ms``, and ``coarse``: whether a time seems to have lost its milliseconds.
    """
    cell = text.select(_number(layout, "Arrival_Time")).to_series()
    whole = cell.cast(pl.Int64, strict=False).alias("ms")
    if whole.null_count() == 0 and bool((whole < EPOCH_S[0] * 1_000_000).all()):  # as a rule
        return pl.DataFrame([whole, (whole % 1000 == 0).alias("coarse")])
    real = pl.col("cell").cast(pl.Float64, strict=False)

    def since_1970(per_second: float) -> pl.Expr:
        first, last = EPOCH_S
        return real.is_between(first * per_second, last * per_second, closed="left")

    def divided(by: int) -> pl.Expr:
        return pl.coalesce(pl.col("ms") // by, (real / by).cast(pl.Int64, strict=False))

    ms = (
        pl.when(since_1970(1) & layout.in_seconds)
        .then((real * 1e3).round().cast(pl.Int64, strict=False))
        .when(since_1970(1e6))
        .then(divided(1000))
        .when(since_1970(1e9))
        .then(divided(1_000_000))
        .otherwise(divided(1))
    )
    short = pl.lit(layout.in_seconds) | pl.col("cell").str.contains("[eE]")
    times = pl.DataFrame([cell.alias("cell"), whole]).select(ms.alias("ms"), short.alias("short"))
    coarse = (pl.col("ms") % 1000 == 0) | (pl.col("short") & (pl.col("ms") % 100 == 0))
    return times.select("ms", coarse.fill_null(value=False).alias("coarse"))


def _parse(text: pl.DataFrame, layout: _Layout) -> pl.DataFrame:
    """Turn cells into numbers, and say which rows are good, which blank, and which coarse."""
    # A time that lost its last digits (1.42469663191325E+018) is no integer: it is UNKNOWN.
    creation = pl.col(str(layout.where["Creation_Time"])).cast(pl.Int64, strict=False)
    known = creation.is_between(-LATEST_CREATION_NS, LATEST_CREATION_NS)
    cells = pl.all_horizontal(pl.col(text.columns).is_null())
    table = pl.concat([text, _arrival(text, layout)], how="horizontal").lazy()
    return table.select(
        pl.col("ms").alias("Arrival_Time"),
        "coarse",
        pl.when(known).then(creation).otherwise(int(UNKNOWN)).alias("Creation_Time"),
        *(_number(layout, axis).cast(pl.Float32, strict=False).alias(axis) for axis in "xyz"),
        *(pl.col(str(layout.where[name])).alias(name) for name in NAMES),
        pl.col(str(layout.where["gt"])).fill_null("").str.to_lowercase().alias("gt"),
        cells.alias("blank"),
        pl.all_horizontal(_readable(layout).values()).alias("good"),
    ).collect()


def _readable(layout: _Layout) -> dict[str, pl.Expr]:
    """Say of each column that a row needs whether it has it, and that it has no more cells."""
    numbers = {axis: _number(layout, axis).cast(pl.Float32, strict=False) for axis in "xyz"}
    return {
        "Arrival_Time": pl.col("ms").is_between(0, LATEST_ARRIVAL_MS).fill_null(value=False),
        **{axis: cell.is_finite().fill_null(value=False) for axis, cell in numbers.items()},
        **{name: pl.col(str(layout.where[name])).is_not_null() for name in NAMES},
        CELLS: pl.col(str(layout.num_columns)).is_null(),
    }


def _count_faults(bad: pl.DataFrame, layout: _Layout, report: FileReport) -> None:
    """Count rows by the column that cannot be read, and keep the first cell of each."""
    with_times = pl.concat([bad, _arrival(bad, layout)], how="horizontal")
    readable = with_times.select(**_readable(layout))
    for name in readable.columns:
        wrong = ~readable[name]
        if not wrong.any():
            continue
        report.bad_columns[name] = report.bad_columns.get(name, 0) + int(wrong.sum())
        if name not in report.bad_cells:
            place = layout.num_columns if name == CELLS else layout.where[name]
            cell = bad[str(place)].filter(wrong)[0]
            report.bad_cells[name] = _fault(name, cell, layout)


def _fault(name: str, cell: str | None, layout: _Layout) -> str:
    """Say what is wrong with a cell."""
    if not cell:
        return "empty"
    shown = repr(cell[:40])
    if name == CELLS:
        return (
            f"more than {layout.num_columns}, as decimal commas or a column without a name make "
            f"them: {shown}"
        )
    if DATE.match(cell):
        return f"a date: {shown}; expected milliseconds since 1970"
    if name == "Arrival_Time":
        return f"{shown}; expected milliseconds since 1970"
    return f"{shown}; expected a number"


def _count_no_creation(
    text: pl.DataFrame, table: pl.DataFrame, layout: _Layout, report: FileReport
) -> None:
    """Count good rows whose Creation_Time is not known, and keep the first cell."""
    without = table["good"] & (table["Creation_Time"] == int(UNKNOWN))
    if without.any():
        place = str(layout.where["Creation_Time"])
        cell = text[place][int(without.arg_max() or 0)]
        report.creation_cell = report.creation_cell or (cell or "")[:40]
        report.no_creation += int(without.sum())


def class_of(label: str) -> int | None:
    """Return the class that a label in lower case names, or None."""
    return SPELLINGS.get(re.sub(r"[\W_]", "", label))


def _labelled(table: pl.DataFrame, report: FileReport) -> Iterator[tuple[Key, Rows]]:
    """Count the labels of good rows, and yield the rows with a known one by user and device."""
    codes: dict[str, int] = {}
    for label, count in table["gt"].value_counts().rows():
        if (code := class_of(label)) is not None:
            codes[label] = code
        elif not label.strip() or re.sub(r"[\W_]", "", label) in NULL_LABELS:
            report.null_labels += count
        else:
            full = len(report.unknown_labels) >= MOST_LABELS
            name = "..." if full and label not in report.unknown_labels else label
            report.unknown_labels[name] = report.unknown_labels.get(name, 0) + count
    known = table.filter(pl.col("gt").is_in(list(codes)))
    class_code = pl.col("gt").replace_strict(codes, return_dtype=pl.Int8)
    parts = known.with_columns(class_code).partition_by(
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
