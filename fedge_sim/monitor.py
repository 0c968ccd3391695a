"""``python -m fedge_sim.monitor RUN``: when each client ran on which worker, and how parallel.

The table gives every round's training and evaluation; the picture shows one lane for each
worker. Both are made from what a run's :class:`~fedge_sim.reporting.timeline.TimelineWriter`
leaves in its results folder.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import polars as pl
import typer
from numpy.typing import NDArray
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from fedge_sim.errors import FedgeError, TimelineError
from fedge_sim.records import TRAIN
from fedge_sim.reporting.picture import EVALUATION, TRAINING, draw, span
from fedge_sim.reporting.timeline import COLUMNS, TIMELINE, WORKERS, Told, read_told

DRAWN_ROUNDS = 3  # the last ones, unless rounds are asked for
MOST_ROWS = 2000  # of the table; the total is of all
FORMATS = (".png", ".pdf", ".svg")


# ---------------------------------------------------------------------- reading


def find_run(path: Path) -> Path:
    """Return the results folder that a path means.

    Parameters
    ----------
    path : Path
        A run's folder, anything in it, or the folder of all runs: then the newest.

    Raises
    ------
    TimelineError
        If there is no such path, or no run with a timeline.
    """
    path = path.absolute()
    if not path.exists():
        raise TimelineError(f"{path}: no such file or folder")
    if (path / TIMELINE).is_file():
        return path
    if runs := list(path.glob(f"*/{TIMELINE}")):
        return max(runs, key=lambda file: (file.stat().st_mtime_ns, file)).parent
    for folder in path.parents[:3]:  # files lie up to three levels deep in a run
        if (folder / TIMELINE).is_file():
            return folder
    raise TimelineError(f"{path}: no {TIMELINE} here; expected a run's results folder")


def read_timeline(file: Path) -> pl.DataFrame:
    """Read a timeline; a last line that a kill left half-written is skipped.

    Returns
    -------
    DataFrame
        The columns of the file and ``phase``: training or evaluation.

    Raises
    ------
    TimelineError
        If it cannot be read, holds no finished round, or a row is damaged: it names the line.
    """
    content = _read(file)
    header, _, rows = content[: content.rfind(b"\n") + 1].partition(b"\n")
    if header and header.decode(errors="replace").strip() != ",".join(COLUMNS):
        raise TimelineError(f"{file}, line 1: expected the columns {','.join(COLUMNS)}")
    if not rows.strip():
        raise TimelineError(
            f"{file}: empty; rows come when the first global round is finished, of a run in one "
            "process or on Ray (Flower's own runtimes do not tell where a client ran)"
        )
    try:
        text = pl.read_csv(
            b",".join([header.strip(), b"more\n"]) + rows,  # a column for what is too much
            infer_schema=False,
            truncate_ragged_lines=True,
            encoding="utf8-lossy",
        )
    except pl.exceptions.PolarsError as error:
        raise TimelineError(f"{file}: damaged ({str(error).splitlines()[0]})") from None
    whole, seconds = ("round", "leaf", "client"), ("start_s", "end_s")
    timeline = text.with_columns(
        pl.col(whole).cast(pl.Int64, strict=False), pl.col(seconds).cast(pl.Float64, strict=False)
    )
    good = pl.all_horizontal(
        pl.col("round") >= 1,
        pl.col("leaf", "client") >= 0,
        pl.col("purpose", "worker").is_not_null(),
        pl.col(seconds).is_finite(),
        pl.col("end_s") >= pl.col("start_s"),
        pl.col("more").is_null(),
    ).fill_null(value=False)
    bad = timeline.select(good.not_().arg_true()).to_series()
    if len(bad):
        line = rows.split(b"\n")[bad[0]].decode(errors="replace").strip()
        raise TimelineError(f"{file}, line {bad[0] + 2}: damaged row {line[:100]!r}")
    phase = pl.when(pl.col("purpose") == TRAIN).then(pl.lit(TRAINING)).otherwise(pl.lit(EVALUATION))
    return timeline.drop("more").with_columns(phase.alias("phase"))


def read_workers(file: Path, timeline: pl.DataFrame) -> list[Told]:
    """Read which workers there were, and from when on; without the file, those that worked.

    Raises
    ------
    TimelineError
        If the file is damaged.
    """
    told: list[Told] = []
    if file.exists():
        try:
            told = read_told(file)
        except ValidationError as error:
            raise TimelineError(f"{file}: damaged ({error.errors()[0]['msg']})") from None
        except OSError as error:
            raise _cannot_read(file, error) from None
    if any(entry.workers for entry in told):
        return sorted(told)
    return [Told(0.0, timeline["worker"].unique().sort().to_list())]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _cannot_read(file, error) from None


def _cannot_read(file: Path, error: OSError) -> TimelineError:
    return TimelineError(f"{file}: cannot be read ({error.strerror})")


# ---------------------------------------------------------------------- figures


def busy_seconds(timeline: pl.DataFrame) -> pl.DataFrame:
    """Return for how long each worker was busy in each phase of each round.

    The union of its clients' times: clients side by side keep their worker busy once.

    Parameters
    ----------
    timeline : DataFrame
        As from :func:`read_timeline`, rows in any order.

    Returns
    -------
    DataFrame
        Columns ``round``, ``phase``, ``worker``, ``busy_s``.
    """
    keys = ("round", "phase", "worker")
    reached = pl.col("end_s").cum_max().shift(1).over(keys)  # null for a worker's first
    new = (pl.col("end_s") - pl.max_horizontal("start_s", reached)).clip(lower_bound=0.0)
    return (
        timeline.sort(*keys, "start_s")
        .with_columns(busy_s=new)
        .group_by(keys, maintain_order=True)
        .agg(pl.col("busy_s").sum())
    )


def most_workers(
    told: Sequence[Told], start_s: NDArray[np.float64], end_s: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Return the largest number of workers that there were during each span of time."""
    times = [entry.told_s for entry in told]
    counts = np.array([len(entry.workers) for entry in told])
    first = np.clip(np.searchsorted(times, start_s, side="right") - 1, 0, None)
    last = np.maximum(first + 1, np.searchsorted(times, end_s, side="left"))
    return np.array([counts[a:b].max() for a, b in zip(first, last, strict=True)], dtype=np.int64)


def phases(timeline: pl.DataFrame, told: Sequence[Told]) -> pl.DataFrame:
    """Return one row for each round's training and evaluation, in order.

    Returns
    -------
    DataFrame
        ``round``, ``phase``; ``start_s``, ``end_s``: the first client's start, the last one's
        end; ``wall_s`` in between; ``busy_s``, summed over workers; ``workers``, the most there
        were; ``mean_busy = busy_s / wall_s`` workers; ``parallelism = mean_busy / workers``, nan
        if no time passed; ``longest_client`` and its ``longest_s``.
    """
    seconds = pl.col("end_s") - pl.col("start_s")
    spans = timeline.group_by("round", "phase").agg(
        pl.col("start_s").min(),
        pl.col("end_s").max(),
        longest_client=pl.col("client").get(seconds.arg_max()),
        longest_s=seconds.max(),
    )
    busy = busy_seconds(timeline).group_by("round", "phase").agg(pl.col("busy_s").sum())
    table = spans.join(busy, on=["round", "phase"]).sort("round", "start_s", "phase")
    workers = most_workers(told, table["start_s"].to_numpy(), table["end_s"].to_numpy())
    return (
        table.with_columns(wall_s=pl.col("end_s") - pl.col("start_s"), workers=pl.Series(workers))
        .with_columns(mean_busy=pl.col("busy_s") / pl.col("wall_s"))
        .with_columns(parallelism=pl.col("mean_busy") / pl.col("workers"))
    )


class Total(NamedTuple):
    """All phases of one kind together; seconds are wall time."""

    wall_s: float
    mean_busy: float
    parallelism: float


def total(table: pl.DataFrame, phase: str = TRAINING) -> Total:
    """Return a phase's total over the rounds of a table from :func:`phases`; nan for no time."""
    rows = table.filter(pl.col("phase") == phase)
    wall, busy = float(rows["wall_s"].sum()), float(rows["busy_s"].sum())
    could = float((rows["wall_s"] * rows["workers"]).sum())
    return Total(wall, busy / wall if wall else np.nan, busy / could if could else np.nan)


# ---------------------------------------------------------------------- command


def parse_rounds(text: str) -> tuple[int, int]:
    """Return the first and last of ``"3"`` or ``"3-5"``.

    Raises
    ------
    TimelineError
        If it is neither.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,8})(?:-([1-9][0-9]{0,8}))?", text.strip(), re.ASCII)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last:
        raise TimelineError(f"--rounds {text}: expected a round, as 3, or a span of them, as 3-5")
    return first, last


def show(run: Path, rounds: str | None, output: Path | None, console: Console) -> None:
    """Print a run's table and write its picture.

    Raises
    ------
    TimelineError
        If there is no run, no timeline, no such round, or the picture cannot be written.
    """
    if output is not None and output.suffix.lower() not in FORMATS:
        raise TimelineError(f"--output {output}: expected a name that ends in {', '.join(FORMATS)}")
    span = None if rounds is None else parse_rounds(rounds)
    run = find_run(run)
    timeline = read_timeline(run / TIMELINE)
    told = read_workers(run / WORKERS, timeline)
    all_rounds = timeline["round"].unique().sort().to_list()
    if span:
        timeline = timeline.filter(pl.col("round").is_between(*span))
        if timeline.is_empty():
            raise TimelineError(
                f"--rounds {rounds}: not in {run / TIMELINE}, which has the rounds "
                f"{all_rounds[0]} to {all_rounds[-1]}"
            )
    table = phases(timeline, told)
    console.print(_rich_table(table, run.name))
    for line in _sentences(table):
        console.print(line, highlight=False, soft_wrap=True)
    drawn = timeline
    if not span:
        earliest = all_rounds[-DRAWN_ROUNDS:][0]
        drawn = timeline.filter(pl.col("round") >= earliest)
    drawn_table = phases(drawn, told)
    first, last = drawn_table["round"][0], drawn_table["round"][-1]
    which = f"round {first}" if first == last else f"rounds {first} to {last}"
    file = run / "timeline.png" if output is None else output.absolute()
    title = f"{run.name}, {which} of {all_rounds[-1]}\n{_sentences(drawn_table)[0]}"
    draw(drawn, _workers_of(told, drawn), title, file)
    console.print(f"picture of {which}: {file}", highlight=False, soft_wrap=True)


def _workers_of(told: Sequence[Told], timeline: pl.DataFrame) -> set[str]:
    """Return all workers that there were while these rows were worked on."""
    start, end = span(timeline)
    until = [entry.told_s for entry in told[1:]] + [np.inf]
    spans = zip(told, until, strict=True)
    in_time = [entry for entry, last in spans if entry.told_s < end and last > start] or told[:1]
    return {name for entry in in_time for name in entry.workers}


def _sentences(table: pl.DataFrame) -> list[str]:
    """Return a line for each kind of phase that there is, training first."""
    lines = []
    for (phase,), rows in sorted(table.partition_by("phase", as_dict=True).items(), reverse=True):
        whole, workers = total(table, str(phase)), rows["workers"].to_numpy().max()
        lines.append(
            f"{phase}: {whole.wall_s:.2f} s, on average {whole.mean_busy:.2f} of {workers} workers "
            f"busy: parallelism {whole.parallelism:.1%}"
        )
    return lines


def _rich_table(table: pl.DataFrame, name: str) -> Table:
    left_out = max(0, len(table) - MOST_ROWS)
    more = f" (the last {MOST_ROWS:,} rows; --rounds shows others)" if left_out else ""
    shown = Table(title=f"{name}: workers busy, by round{more}")
    for header in ("round", "phase", "wall s", "mean busy", "workers", "parallelism"):
        shown.add_column(header, justify="left" if header == "phase" else "right")
    shown.add_column("longest client")
    for row in table.tail(MOST_ROWS).iter_rows(named=True):
        shown.add_row(
            f"{row['round']}",
            row["phase"],
            f"{row['wall_s']:.3f}",
            f"{row['mean_busy']:.2f}",
            f"{row['workers']}",
            f"{row['parallelism']:.1%}",
            f"client {row['longest_client']}, {row['longest_s']:.3f} s",
        )
    return shown


def main(
    run: Annotated[
        Path,
        typer.Argument(
            help="A run's results folder, a file in it, or the folder of all runs: the newest."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="The picture: a .png, .pdf or .svg file; else timeline.png in the run."),
    ] = None,
    rounds: Annotated[
        str | None,
        typer.Option(
            metavar="N or N-M",
            help="Only these global rounds; else the table has all, the picture the last "
            f"{DRAWN_ROUNDS}.",
        ),
    ] = None,
) -> None:
    """Show when each client ran on which worker, and how many workers were busy."""
    try:
        console = Console(markup=False)
        if not console.is_terminal:
            console = Console(markup=False, width=140)
        show(run, rounds, output, console)
    except FedgeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


if __name__ == "__main__":
    typer.run(main)
