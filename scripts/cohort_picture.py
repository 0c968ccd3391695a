"""The picture of the workload ``cohort``: speed and memory by clients that are trained together."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cohort_point import ALONE, COHORT, MIB, NETWORKS, Point
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter

# Okabe and Ito's colours, told apart by colour-blind readers and in grey; and a form of its own.
STYLES = {
    "reference": {"color": "#000000", "linestyle": (0, (1, 2)), "marker": "D"},
    "single": {"color": "#D55E00", "linestyle": (0, (5, 2)), "marker": "s"},
    "compiled": {"color": "#009E73", "linestyle": (0, (6, 2, 1, 2)), "marker": "^"},
    "cohort": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
}
LABELS = {path: f"one client at a time, {path}" for path in ALONE} | {COHORT: "cohort"}


def draw(found: Mapping[str, Sequence[Point]], where: str, file: Path) -> None:
    """Draw a column of two panels for each network: clients a second, and memory.

    Parameters
    ----------
    found : mapping
        The points of each network.
    where : str
        What they were measured on.
    file : Path
        A ``.png``, ``.pdf`` or ``.svg`` file.
    """
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    panels = figure.subplots(2, len(found), sharex=True, squeeze=False)
    for column, (network, points) in enumerate(found.items()):
        speed, memory = panels[:, column]
        speed.set_title(f"{network} {NETWORKS[network][0]}", loc="left", fontsize=11)
        for path in (*ALONE, COHORT):
            own = [point for point in points if point.path == path]
            sizes = [point.size for point in own]
            _line(speed, path, sizes, [point.rate for point in own])
            _line(memory, path, sizes, [max(point.growth / MIB, 0.1) for point in own])
        memory.set_xlabel("clients trained together")
        for axes in (speed, memory):
            _finish(axes, max((point.size for p in found.values() for point in p), default=1))
    panels[0, 0].set_ylabel("clients a second")
    panels[1, 0].set_ylabel("growth of memory at its peak, MiB")
    handles = [panels[0, 0].plot([], [], label=LABELS[p], **STYLES[p])[0] for p in STYLES]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(f"Ways to train, {where}", x=0.01, ha="left", fontsize=12)
    figure.savefig(file, dpi=150)


def _line(axes: Axes, path: str, sizes: Sequence[int], values: Sequence[float]) -> None:
    """Draw a curve; the one point of a way that trains alone is drawn on as a level line."""
    if path in ALONE and values:
        axes.axhline(values[0], linewidth=1.4, **{**STYLES[path], "marker": None})
    axes.plot(sizes, values, linewidth=1.8, markersize=5, **STYLES[path])


def _finish(axes: Axes, largest: int) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:,g}")
    axes.xaxis.set_major_formatter(plain)
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(LogFormatter())  # where there is less than a decade
    axes.set_xlim(0.85, 1.18 * max(largest, 2))
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
