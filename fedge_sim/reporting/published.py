r"""The tables that people publish: Markdown, LaTeX (booktabs), CSV, and on the console.

``\input{table.tex}`` in a document with ``\usepackage{booktabs}`` sets its panels one below the
other; the CSV files have every number unrounded.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Literal, NamedTuple

import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedge_sim.reporting.comparison import Entry, Summary, paired_tests, summaries

NONE = "—"
SMALLEST_P = 0.001


class Column(NamedTuple):
    """How a figure is shown: its factor ``scale``, its decimals, and which value is the best."""

    figure: str
    header: str
    better: Literal["high", "low", "near zero", ""]
    scale: float = 1.0
    decimals: int = 1


PERCENT = 100.0
TARGET = ("rounds_to_target", "seconds_to_target")
PANELS: dict[str, tuple[Column, ...]] = {
    "Accuracy and loss": (
        Column("final_accuracy", "final accuracy, %", "high", PERCENT),
        Column("best_accuracy", "best accuracy, %", "high", PERCENT),
        Column("leaf_accuracy", "leaf servers' own, %", "", PERCENT),
        Column("gate", "accepted by the gate, %", "", PERCENT),
        Column("final_loss", "final loss", "low", decimals=3),
        Column("gap", "generalisation gap, points", "near zero", PERCENT),
    ),
    "Cost": (
        Column("rounds_to_target", "rounds to {target:g} %", "low"),
        Column("seconds_to_target", "simulated s to {target:g} %", "low", decimals=2),
        Column("megabytes", "MB moved", "low", decimals=2),
    ),
    "Fairness over clients in the final round": (
        Column("worst_client", "worst client, %", "high", PERCENT),
        Column("best_minus_worst", "best minus worst, points", "low", PERCENT),
        Column("variation", "coefficient of variation", "low", decimals=3),
        Column("gini", "Gini coefficient", "low", decimals=3),
    ),
    "Clusters in the final round": (
        Column("clusters", "clusters", ""),
        Column("ari", "ARI to truth", "high", decimals=3),
    ),
}
NOTES = (
    "Mean ± standard deviation over seeds, and Student's 95 % interval; one seed has neither. "
    "Bold: the best mean among the methods with values from the most seeds, the bounds (local "
    "only, centralised) left out.",
    "Accuracy and loss are means over clients, each on its own test examples, of the model that "
    "the method gives it: the one that the cloud hands back, or its personal one. Leaf servers' "
    "own: final accuracy of the models before the cloud step, with which they go on where the "
    "accuracy gate rejects the cloud's. Accepted by the gate: share of the cloud's models, over "
    "all rounds and leaf servers; none where there is no gate. Best: of all rounds. Generalisation "
    "gap: accuracy on training examples minus accuracy on test examples.",
    "Simulated seconds: of the virtual clock (devices.enable); without one, a round takes as long "
    "as the training of its slowest client, as if each client had a device of its own, like one "
    "core of the machine that ran this, and the network were free: that is measured, and the "
    "first run of a process has its start in it. MB: 10^6 "
    "bytes, between clients and leaf servers, both ways, over all rounds; centralised training "
    "moves the data instead, which is not counted.",
    "Coefficient of variation: standard deviation of all clients over their mean.",
)
TESTS_NOTE = (
    "Final accuracy, paired by seed and client: Wilcoxon signed-rank test (differences of zero "
    "shared out), and a paired t-test over the seeds' means. Holm: adjusted for all pairs of "
    "methods. Clients of one seed train together and are not independent, so the first test's p "
    "is too small; the second has few values."
)


class Cell(NamedTuple):
    """A figure of a method as text; empty where it has none."""

    mean: str
    std: str = ""
    interval: str = ""
    seeds: str = ""
    best: bool = False


class Panel(NamedTuple):
    """A part of the table: one row for each method."""

    title: str
    header: list[str]
    rows: list[tuple[str, list[Cell]]]


# ---------------------------------------------------------------------- content


def panels(entries: Sequence[Entry], target: float | None) -> list[Panel]:
    """Return the table's panels; a figure that no method has is left out."""
    found = [summaries(entry, target) for entry in entries]
    result = []
    for title, columns in PANELS.items():
        shown = [c for c in columns if _is_shown(c, found, target)]
        rivals = [{} if e.bound else own for e, own in zip(entries, found, strict=True)]
        best = {c: _best(c, rivals) for c in shown}
        rows = []
        for i, (entry, own) in enumerate(zip(entries, found, strict=True)):
            cells = [_cell(c, own.get(c.figure), len(entry.runs), i in best[c]) for c in shown]
            rows.append((_name(entry), cells))
        percent = math.nan if target is None else PERCENT * target
        result.append(Panel(title, [c.header.format(target=percent) for c in shown], rows))
    return result


def _is_shown(column: Column, found: Sequence[dict[str, Summary]], target: float | None) -> bool:
    if column.figure in TARGET:
        return target is not None
    return any(own[column.figure].n for own in found if own)


def _best(column: Column, found: Sequence[dict[str, Summary]]) -> set[int]:
    """Return which methods' means are set in bold: the best ones, as they are rounded in the table.

    Only methods with the largest number of values are compared. If all of them are equally good,
    none is bold.
    """
    own = {i: f[column.figure] for i, f in enumerate(found) if f and f[column.figure].n}
    most = max((s.n for s in own.values()), default=0)
    means = {
        i: round(column.scale * s.mean, column.decimals) for i, s in own.items() if s.n == most
    }
    if not column.better or not means:
        return set()
    rank = {"high": lambda x: -x, "low": lambda x: x, "near zero": abs}[column.better]
    first = min(rank(mean) for mean in means.values())
    best = {i for i, mean in means.items() if rank(mean) == first}
    return best if len(best) < len(means) else set()


def _name(entry: Entry) -> str:
    if not entry.failed:
        return entry.title
    tried = len(entry.runs) + len(entry.failed)
    return f"{entry.title} (failed: {len(entry.failed)} of {tried})"


def _cell(column: Column, summary: Summary | None, runs: int, best: bool) -> Cell:
    if summary is None:
        return Cell(NONE)
    seeds = f"({summary.n} of {runs})" if column.figure in TARGET else ""
    mean, std, low, high = (f"{column.scale * value:z.{column.decimals}f}" for value in summary[:4])
    if not summary.n:
        return Cell(NONE, seeds=seeds)
    if summary.n == 1:
        return Cell(mean, seeds=seeds, best=best)
    return Cell(mean, std, f"[{low}, {high}]", seeds, best)


def failures(entries: Sequence[Entry]) -> list[str]:
    """Return a sentence for each run that failed."""
    return [
        f"Failed: {entry.title}, seed {seed}: {reason}"
        for entry in entries
        for seed, reason in entry.failed.items()
    ]


# ---------------------------------------------------------------------- Markdown, LaTeX, CSV


def markdown(entries: Sequence[Entry], target: float | None) -> str:
    """Return the table in Markdown."""
    lines = []
    for panel in panels(entries, target):
        rows = [[name, *(_markdown_cell(cell) for cell in cells)] for name, cells in panel.rows]
        lines += [f"**{panel.title}**", "", *_markdown_table(["method", *panel.header], rows), ""]
    return "\n\n".join(["\n".join(lines).strip(), *NOTES, *failures(entries)]) + "\n"


def _markdown_cell(cell: Cell) -> str:
    mean = f"**{cell.mean}**" if cell.best else cell.mean
    std = f"± {cell.std}" if cell.std else ""
    return " ".join(part for part in (mean, std, cell.interval, cell.seeds) if part)


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    bar = r"\|"
    return [f"| {' | '.join(cell.replace('|', bar) for cell in line)} |" for line in lines]


HEADER_WIDTH, LINE = 14, r" \\ "
LATEX = {
    **{c: rf"\{c}" for c in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$"},
    **{NONE: "---"},
}


def escape(text: str) -> str:
    """Return text that LaTeX sets as it stands."""
    return re.sub("|".join(map(re.escape, LATEX)), lambda found: LATEX[found.group()], text)


def latex(entries: Sequence[Entry], target: float | None) -> str:
    """Return the table in LaTeX: one tabular for each panel."""
    lines = [r"% needs \usepackage{booktabs}"]
    lines += [f"% {note}" for note in (*NOTES, *failures(entries))]
    lines += [r"\begingroup\footnotesize\setlength{\tabcolsep}{3pt}"]
    for panel in panels(entries, target):
        header = ["method", *panel.header]
        heading = rf"\multicolumn{{{len(header)}}}{{l}}{{\textbf{{{escape(panel.title)}}}}} \\"
        lines += [
            rf"\noindent\begin{{tabular}}{{l{'r' * len(panel.header)}}}",
            r"\toprule",
            heading,
        ]
        lines += [" & ".join(_latex_header(text) for text in header) + r" \\", r"\midrule"]
        rows = [[escape(name), *map(_latex_cell, cells)] for name, cells in panel.rows]
        lines += ["\\addlinespace\n".join(" & ".join(row) + " \\\\\n" for row in rows).rstrip()]
        lines += [r"\bottomrule", r"\end{tabular}\par\medskip"]
    return "\n".join([*lines, r"\endgroup"]) + "\n"


def _latex_header(text: str) -> str:
    """Return a header in lines short enough for narrow columns."""
    return rf"\shortstack{{{LINE.join(map(escape, wrap(text, HEADER_WIDTH)))}}}"


def _latex_cell(cell: Cell) -> str:
    if cell.mean == NONE:
        return escape(f"{NONE} {cell.seeds}".strip())
    mean = rf"\mathbf{{{cell.mean}}}" if cell.best else cell.mean
    first = rf"${mean} \pm {cell.std}$" if cell.std else f"${mean}$"
    more = [text for text in (cell.interval and f"${cell.interval}$", cell.seeds) if text]
    return rf"\shortstack[r]{{{LINE.join([first, *more])}}}" if more else first


CSV_KEYS = ("mean", "std", "ci95_lo", "ci95_hi", "n")


def csv_table(entries: Sequence[Entry], target: float | None) -> pl.DataFrame:
    """Return every figure of every method unrounded: mean, std, interval and number of seeds."""
    names = [column.figure for columns in PANELS.values() for column in columns]
    empty = Summary(math.nan, math.nan, math.nan, math.nan, 0)
    rows = []
    for entry in entries:
        own = summaries(entry, target)
        row: dict[str, object] = {"method": entry.title, "runs": len(entry.runs)}
        row["failed"] = "; ".join(f"seed {s}: {why}" for s, why in entry.failed.items())
        for name in names:
            values = zip(CSV_KEYS, own.get(name, empty), strict=True)
            row |= {f"{name}_{key}": value for key, value in values}
        rows.append(row)
    return pl.DataFrame(rows)


def _p(value: float) -> str:
    if math.isnan(value):
        return NONE
    return f"< {SMALLEST_P}" if value < SMALLEST_P else f"{value:.3f}"


TESTS_HEADER = (
    *("method", "other", "pairs", "mean difference, points", "Wilcoxon p", "Holm"),
    *("seeds", "t-test p", "Holm"),
)


def _test_rows(tests: pl.DataFrame) -> list[list[str]]:
    return [
        [
            *(one, other, str(pairs), _points(difference), _p(wilcoxon), _p(wilcoxon_holm)),
            *(str(seeds), _p(t_test), _p(t_test_holm)),
        ]
        for one, other, pairs, difference, wilcoxon, wilcoxon_holm, seeds, t_test, t_test_holm
        in tests.iter_rows()
    ]  # fmt: skip


def _points(difference: float) -> str:
    return NONE if math.isnan(difference) else f"{PERCENT * difference:+z.1f}"


def write_tables(folder: Path, entries: Sequence[Entry], target: float | None) -> None:
    """Write table.md, .tex and .csv, tests.md and .csv into a folder."""
    tests = paired_tests(entries)
    texts = {"table.md": markdown(entries, target), "table.tex": latex(entries, target)}
    table = _markdown_table(TESTS_HEADER, _test_rows(tests))
    texts["tests.md"] = "\n".join([*table, "", TESTS_NOTE]) + "\n"
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name, frame in {"table": csv_table(entries, target), "tests": tests}.items():
        frame.fill_nan(None).write_csv(folder / f"{name}.csv", null_value="nan")


# ---------------------------------------------------------------------- console


def show(entries: Sequence[Entry], target: float | None, console: Console) -> None:
    """Print the table, the tests, and what they mean."""
    for panel in panels(entries, target):
        shown = Table(title=panel.title)
        shown.add_column("method", overflow="fold")
        for header in panel.header:
            shown.add_column(header, justify="right")
        for name, cells in panel.rows:
            shown.add_row(Text(name), *(_rich_cell(cell) for cell in cells))
        console.print(shown)
    tests = paired_tests(entries)
    if len(tests):
        shown = Table(*TESTS_HEADER, title="Paired tests")
        for row in _test_rows(tests):
            shown.add_row(*(Text(cell) for cell in row))
        console.print(shown)
    for note in (*NOTES, *([TESTS_NOTE] if len(tests) else []), *failures(entries)):
        console.print(Text(note))


def _rich_cell(cell: Cell) -> Text:
    text = Text(cell.mean, style="bold" if cell.best else "")
    return text.append(
        _markdown_cell(cell._replace(best=False)).removeprefix(cell.mean), "not bold"
    )
