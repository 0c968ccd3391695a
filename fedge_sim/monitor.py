"""``python -m fedge_sim.monitor RUN``: when each client ran on which worker, and how parallel.

The table gives every round's training and evaluation; the picture shows one lane for each
worker. Both are made from what a run's :class:`~fedge_sim.reporting.timeline.TimelineWriter`
leaves in its results folder.
"""

import re
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import polars as pl
import typer
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from fedge_sim.errors import FedgeError
from fedge_sim.records import TRAIN
from fedge_sim.reporting.timeline import COLUMNS, TIMELINE, WORKERS

TRAINING, EVALUATION = "training", "evaluation"
DRAWN_ROUNDS = 3  # the last ones, unless rounds are asked for
MOST_ROWS = 2000  # of the table; the total is of all
FORMATS = (".png", ".pdf", ".svg")
# Okabe and Ito's colours, told apart by colour-blind readers and in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442")
LIGHTER = 0.65  # share of white in the bars of evaluation
MOST_NAMED_BARS, MOST_EDGED_BARS, MOST_NAMED_ROUNDS, MOST_NAMED_LANES = 400, 1000, 20, 48
PIXELS = 4000  # across the picture, at most; what lies closer together is drawn once


Colour = tuple[float, float, float]


class TimelineError(FedgeError):
    """A run's timeline cannot be found, read, or drawn."""

    exit_code = 2


class Told(NamedTuple):
    """The workers that a grid had from some time on, in seconds since the run's start."""

    told_s: float
    workers: list[str]


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
            told = TypeAdapter(list[Told]).validate_json(_read(file))
        except ValidationError as error:
            raise TimelineError(f"{file}: damaged ({error.errors()[0]['msg']})") from None
    if any(entry.workers for entry in told):
        return sorted(told)
    return [Told(0.0, timeline["worker"].unique().sort().to_list())]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise TimelineError(f"{file}: cannot be read ({error.strerror})") from None


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


# ---------------------------------------------------------------------- picture


def sub_lanes(start_s: Sequence[float], end_s: Sequence[float]) -> NDArray[np.int64]:
    """Return a lane for each span of time, as few as possible, none shared by two at a time."""
    lanes = np.zeros(len(start_s), dtype=np.int64)
    busy: list[tuple[float, int]] = []  # (until, lane)
    free: list[int] = []
    for i in np.lexsort((end_s, start_s)):
        while busy and busy[0][0] <= start_s[i]:
            heappush(free, heappop(busy)[1])
        lanes[i] = heappop(free) if free else len(busy)
        heappush(busy, (end_s[i], int(lanes[i])))
    return lanes


def draw(timeline: pl.DataFrame, workers: Iterable[str], title: str, file: Path) -> None:
    """Draw who worked on which client when: one lane a worker, bars coloured by leaf server.

    Parameters
    ----------
    timeline : DataFrame
        As from :func:`read_timeline`; all of its rows are drawn.
    workers : iterable of str
        All workers: one without work has an empty lane.
    title : str
    file : Path
        A ``.png``, ``.pdf`` or ``.svg`` file.

    Raises
    ------
    TimelineError
        If the file cannot be written.
    """
    names = sorted({*workers, *timeline["worker"].unique()}, key=_natural)
    by_worker = timeline.partition_by("worker", as_dict=True)
    bars, bands, top = [], [], 0.0
    for name in names:
        own = by_worker.get((name,), timeline.clear())
        lanes = sub_lanes(own["start_s"].to_list(), own["end_s"].to_list())
        bars.append(own.with_columns(lane=pl.Series(top + lanes, dtype=pl.Float64)))
        height = int(lanes.max(initial=0)) + 1
        bands.append((top, height))
        top += height + 0.25
    figure = Figure(figsize=(11, float(np.clip(1.9 + 0.3 * top, 3, 16))), layout="constrained")
    axes = figure.subplots()
    for low, height in bands:
        axes.axhspan(low, low + height, color="0.94", linewidth=0, zorder=0)
    leaves = timeline["leaf"].unique().sort().to_list()
    colours = _leaf_colours(leaves)
    _draw_bars(axes, pl.concat(bars), colours)
    _name_rounds(axes, timeline)
    step = -(-len(names) // MOST_NAMED_LANES)
    axes.set_yticks([low + height / 2 for low, height in bands][::step], names[::step])
    axes.set_ylim(top - 0.25, 0)
    start, end = _span(timeline)
    axes.set_xlim(start - 0.002 * (end - start), end + 0.002 * (end - start))
    axes.set_xlabel("seconds since the run's start")
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11, pad=22)
    shown = leaves if len(leaves) <= len(COLOURS) else [leaves[0], leaves[-1]]
    handles = [Patch(color=colours[leaf], label=f"leaf server {leaf}") for leaf in shown]
    handles += [
        Patch(facecolor="0.4", label=TRAINING),
        Patch(facecolor=_lighter([to_rgb("0.4")])[0], edgecolor="0.4", label=EVALUATION),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise TimelineError(
            f"{file}: cannot be written ({error.strerror}); choose another with --output"
        ) from None


def _draw_bars(axes: Axes, bars: pl.DataFrame, colours: dict[int, Colour]) -> None:
    """Draw solid bars for training and light ones for evaluation, with the clients' numbers."""
    left, right = _span(bars)
    pixel = (right - left) / PIXELS
    if len(bars) > PIXELS:  # bars thinner than a pixel fill one, and share it
        first = ((pl.col("start_s") - left) / pixel).floor()
        last = ((pl.col("end_s") - left) / pixel).ceil()
        bars = bars.with_columns(
            start_s=left + pixel * first, end_s=left + pixel * pl.max_horizontal(first + 1, last)
        ).unique(["lane", "start_s", "end_s"], keep="first", maintain_order=True)
    is_training = (bars["phase"] == TRAINING).to_numpy()
    solid = np.array([colours[leaf] for leaf in bars["leaf"]])
    faces = np.where(is_training[:, None], solid, _lighter(solid))
    start, end, lane = (bars[name].to_numpy() for name in ("start_s", "end_s", "lane"))
    low, high = lane + 0.06, lane + 0.94
    corners = [(start, low), (start, high), (end, high), (end, low)]
    axes.add_collection(
        PolyCollection(
            list(np.stack([np.stack(corner, axis=-1) for corner in corners], axis=1)),
            facecolors=faces,
            edgecolors=np.where(is_training[:, None], 1.0, solid),  # white between bars
            linewidths=0.6 if len(bars) <= MOST_EDGED_BARS else 0.0,
            rasterized=len(bars) > MOST_EDGED_BARS,
        )
    )
    if len(bars) <= MOST_NAMED_BARS:
        for client, x0, x1, y, face in zip(bars["client"], start, end, lane, faces, strict=True):
            if (x1 - x0) / (right - left) > 0.008 * len(str(client)):
                dark = face @ (0.299, 0.587, 0.114) < 0.55
                axes.text(
                    (x0 + x1) / 2, y + 0.52, str(client), ha="center", va="center", fontsize=7,
                    color="white" if dark else "black", clip_on=True,
                )  # fmt: skip


def _name_rounds(axes: Axes, timeline: pl.DataFrame) -> None:
    """Mark where each round begins, unless there are too many to tell apart."""
    begins = timeline.group_by("round").agg(pl.col("start_s").min()).sort("round")
    if len(begins) <= MOST_NAMED_ROUNDS:
        for number, start in begins.iter_rows():
            axes.axvline(start, color="0.3", linewidth=0.8, linestyle=(0, (4, 3)))
            axes.annotate(
                f"round {number}", (start, 1), xycoords=("data", "axes fraction"),
                xytext=(2, 4), textcoords="offset points", fontsize=8, color="0.3",
            )  # fmt: skip


def _leaf_colours(leaves: Sequence[int]) -> dict[int, Colour]:
    """Return a colour for each leaf server; many share a scale from dark to light."""
    if max(leaves) < len(COLOURS):  # the same in every picture of a run
        return {leaf: to_rgb(COLOURS[leaf]) for leaf in leaves}
    scale = colormaps["cividis"](np.linspace(0, 1, len(leaves)))
    return {leaf: to_rgb(tuple(colour)) for leaf, colour in zip(leaves, scale, strict=True)}


def _lighter(colours: Iterable[Colour]) -> list[Colour]:
    red, green, blue = np.array(colours).T * (1 - LIGHTER) + LIGHTER
    return list(zip(red, green, blue, strict=True))


def _span(timeline: pl.DataFrame) -> tuple[float, float]:
    """Return the first start and the last end, in seconds, a moment apart at least."""
    start, end = timeline["start_s"].to_numpy().min(), timeline["end_s"].to_numpy().max()
    return float(start), max(float(end), float(start) + 1e-6)


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts trainer-10 after trainer-9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


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
    start, end = _span(timeline)
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
