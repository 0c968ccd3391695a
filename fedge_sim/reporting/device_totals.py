"""What a run of versions sums up to, read back from its tables, and drawn."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import polars as pl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedge_sim.errors import FedgeError
from fedge_sim.reporting.figures import DPI, LINE_COLOURS, LINE_STYLES, STYLE, WIDTH

MOST_LINES = 20  # of leaf servers, in one figure


def totals(metrics: Path, places: int) -> dict[str, Any]:
    """Return the sums over all jobs and versions.

    Parameters
    ----------
    metrics : Path
        Of ``versions.csv`` and ``jobs.csv``, which are not read as a whole.
    places : int
        Devices that can be at work together.

    Returns
    -------
    dict
        ``versions``, ``updates``; ``simulated_seconds`` up to the last version; ``seconds`` of
        wall time, over all parts of a run that was resumed; ``jobs`` by fate;
        ``places``; ``mean_concurrency``, the jobs under way on average over simulated time, up to
        the end of the last job;
        ``idle_share`` of the time of all places, but for jobs under way at the end, in which no
        device computes: it waits for its link, or for others, or there is none;
        ``devices_used``; and ``staleness``, how many updates had each.
    """
    jobs = pl.scan_csv(metrics / "jobs.csv", schema_overrides={"staleness": pl.Int64})
    versions = pl.scan_csv(metrics / "versions.csv")
    took, over = pl.col("ended") - pl.col("started"), pl.col("fate") != "under way"
    sums = jobs.select(
        at_work=took.sum(),
        under_way=took.filter(~over).sum(),
        computed=pl.col("training").filter(over).sum(),
        devices=pl.col("client").n_unique(),
        last=pl.col("ended").max(),
    ).collect(engine="streaming")
    ends = versions.select(
        versions=pl.len(),
        updates=pl.col("updates").sum(),
        simulated_seconds=pl.col("simulated_seconds").max(),
        seconds=pl.col("seconds").max(),
    ).collect(engine="streaming")
    at_work, under_way, computed, devices, last = sums.row(0)
    seconds = max(ends["simulated_seconds"].item(), last)
    known = places * seconds - under_way
    return {
        **ends.row(0, named=True),
        "jobs": _counts(jobs, "fate"),
        "places": places,
        "mean_concurrency": at_work / seconds if seconds else 0.0,
        "idle_share": 1 - computed / known if known > 0 else 0.0,
        "devices_used": devices,
        "staleness": _counts(jobs.filter(pl.col("fate") == "update"), "staleness"),
    }


def _counts(jobs: pl.LazyFrame, column: str) -> dict[str, int]:
    """Return how many jobs have each value, in its order."""
    table = jobs.group_by(column).len().collect(engine="streaming").sort(column)
    return {str(value): count for value, count in table.iter_rows()}


def draw_accuracy(held_out: Path, file: Path) -> None:
    """Draw accuracy on held-out examples against simulated time: the cloud's, and leaf servers'.

    Parameters
    ----------
    held_out : Path
        ``held_out.csv``.
    file : Path
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.4), layout="constrained")
        axes = figure.subplots()
        own = pl.read_csv(held_out).filter((pl.col("server") < 0) | (pl.col("what") == "leaf"))
        for server, points in sorted(own.partition_by("server", as_dict=True).items()):
            number = int(server[0]) + 1
            if number > MOST_LINES:
                break
            axes.plot(
                points["simulated_seconds"],
                100 * points["accuracy"],
                color=LINE_COLOURS[number % len(LINE_COLOURS)],
                linestyle=LINE_STYLES[number % len(LINE_STYLES)],
                linewidth=0.7 if number else 1.4,
                marker="." if len(points) < 3 else None,
                label=f"leaf server {number - 1}" if number else "cloud",
            )
        axes.set_xlabel("simulated seconds")
        axes.set_ylabel("held-out accuracy, %")
        axes.grid(alpha=0.3, linewidth=0.5)
        if len(axes.lines) > 1:
            figure.legend(loc="outside lower center", ncols=3, frameon=False)
        _save(figure, file)


def draw_staleness(counts: Mapping[str, int], file: Path) -> None:
    """Draw how many updates had which staleness.

    Parameters
    ----------
    counts : mapping from staleness, in versions, to updates
    file : Path
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.0), layout="constrained")
        axes = figure.subplots()
        values = np.array([int(value) for value in counts])
        axes.bar(values, list(counts.values()), width=1.0, color=LINE_COLOURS[0])
        axes.set_xlabel("staleness: versions made since the device began")
        axes.set_ylabel("updates")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    for axes in figure.axes:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    try:
        figure.savefig(file, dpi=DPI)
    except OSError as error:
        raise FedgeError(f"{file}: cannot be written ({error.strerror})") from None
