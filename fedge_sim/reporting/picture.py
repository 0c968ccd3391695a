"""The picture of a run's timeline: one lane for each worker, a bar for each client."""

import re
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from fedge_sim.errors import TimelineError

TRAINING, EVALUATION = "training", "evaluation"
# Okabe and Ito's colours, told apart by colour-blind readers and in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442")
LIGHTER = 0.65  # share of white in the bars of evaluation
MOST_NAMED_BARS, MOST_EDGED_BARS, MOST_NAMED_ROUNDS, MOST_NAMED_LANES = 400, 1000, 20, 48
PIXELS = 4000  # across the picture, at most; what lies closer together is drawn once

Colour = tuple[float, float, float]


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
        As :mod:`fedge_sim.monitor` reads it; all of its rows are drawn.
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
    start, end = span(timeline)
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
    left, right = span(bars)
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


def span(timeline: pl.DataFrame) -> tuple[float, float]:
    """Return the first start and the last end, in seconds, a moment apart at least."""
    start, end = timeline["start_s"].to_numpy().min(), timeline["end_s"].to_numpy().max()
    return float(start), max(float(end), float(start) + 1e-6)


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts trainer-10 after trainer-9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
