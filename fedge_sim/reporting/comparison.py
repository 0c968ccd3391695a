"""What runs say beside each other: each run's figures, statistics over seeds, paired tests.

An accuracy is that of the model that the method gives a client, on its own test
examples; a run's is the plain mean over clients. Clients that did not answer do not count.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from fedge_sim.errors import FedgeError
from fedge_sim.reporting.tables import gate_decisions, mean_std_interval

OWN = ("own_accuracy", "own_loss", "own_train_accuracy")
_SEED_MEANS = 2  # what a t-test over seeds needs


@dataclass(frozen=True)
class Run:
    """What one finished run wrote down.

    Attributes
    ----------
    seed : int
    clients : DataFrame
        ``clients.csv``: one row for each client and round.
    history : tuple of mapping
        ``cluster_history.json``: one entry a round.
    gate : tuple of int
        How many of the cloud's models the accuracy gates judged, and accepted.
    """

    seed: int
    clients: pl.DataFrame
    history: tuple[Mapping[str, Any], ...]
    gate: tuple[int, int] = (0, 0)

    @property
    def final(self) -> pl.DataFrame:
        """The rows of the last round, of clients that answered."""
        return answered(self.clients.filter(pl.col("round") == pl.col("round").max()))

    @property
    def is_clustered(self) -> bool:
        """Whether leaf servers were compared, or more than one cluster was found."""
        return any(e.get("similarity") is not None or e["num_clusters"] > 1 for e in self.history)


@dataclass(frozen=True)
class Entry:
    """One method of the comparison: its finished runs, and why others failed, by seed.

    A bound is there to be compared with, and not to be the best.
    """

    title: str
    runs: tuple[Run, ...]
    failed: Mapping[int, str] = field(default_factory=dict)
    bound: bool = False


class Summary(NamedTuple):
    """Mean, sample deviation and Student's 95 % interval of the ``n`` values that there are."""

    mean: float
    std: float
    low: float
    high: float
    n: int


def read_run(folder: Path, seed: int) -> Run:
    """Read a run's results folder.

    Raises
    ------
    FedgeError
        If a file is missing or damaged, or lacks a column.
    """
    metrics = folder / "metrics" / f"seed_{seed}"
    numbers = (*OWN, "comp_time_sec", "bytes_up", "bytes_down", "simulated_seconds")
    try:
        clients = pl.read_csv(
            metrics / "clients.csv", schema_overrides=dict.fromkeys(numbers, pl.Float64)
        )
        clients.select("round", "server", "client", "num_test", *numbers)
        history = json.loads((metrics / "cluster_history.json").read_text(encoding="utf-8"))
        gate = gate_decisions(metrics)
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        problem = str(error).splitlines()[0]
        raise FedgeError(f"{metrics}: no results of a finished run ({problem})") from None
    if clients.is_empty():
        raise FedgeError(f"{metrics}: clients.csv has no round")
    return Run(seed, clients, tuple(history), gate)


def answered(clients: pl.DataFrame) -> pl.DataFrame:
    """Return the rows of clients that answered: tested, and with a number."""
    return clients.filter(pl.col("num_test") > 0, pl.col("own_accuracy").is_not_nan())


# ---------------------------------------------------------------------- one run


def by_round(clients: pl.DataFrame) -> pl.DataFrame:
    """Return a run's rounds, in order.

    Returns
    -------
    DataFrame
        ``round``; ``accuracy`` and ``loss``, means over clients; ``gap``, the mean accuracy on
        training examples minus ``accuracy``; ``bytes`` and ``seconds`` since the run's start: by
        the virtual clock, or without one as if a round took as long as its slowest client's
        training.
    """
    means = (
        answered(clients)
        .group_by("round")
        .agg(
            accuracy=pl.col("own_accuracy").mean(),
            loss=pl.col("own_loss").mean(),
            train=pl.col("own_train_accuracy").fill_nan(None).mean(),
        )
    )
    cost = clients.group_by("round").agg(
        bytes=(pl.col("bytes_up") + pl.col("bytes_down")).sum(),
        slowest=pl.col("comp_time_sec").fill_nan(None).max().fill_null(0.0),
        clock=pl.col("simulated_seconds").fill_nan(None).max(),
    )
    rounds = cost.join(means, on="round", how="left").sort("round")
    return rounds.select(
        "round",
        pl.col("accuracy", "loss").fill_null(math.nan),
        (pl.col("train") - pl.col("accuracy")).fill_null(math.nan).alias("gap"),
        pl.col("bytes").cum_sum(),
        pl.col("clock").fill_null(pl.col("slowest").cum_sum()).alias("seconds"),
    )


def gini(values: ArrayLike) -> float:
    """Return Gini's coefficient: the mean absolute difference of two, over twice the mean.

    0 where all are equal, (n - 1) / n where one of n has everything.
    """
    x = np.sort(np.asarray(values, dtype=np.float64))
    n, total = len(x), float(x.sum())
    if not total:
        return 0.0 if n else math.nan
    return max(0.0, float((2 * np.arange(1, n + 1) - n - 1) @ x) / (n * total))


def figures_of(run: Run, target: float | None = None) -> dict[str, float]:
    """Return a run's figures by name; nan where there is none.

    Parameters
    ----------
    run : Run
    target : float, optional
        The accuracy, as a fraction, up to which rounds and seconds are counted.
    """
    rounds, final = by_round(run.clients), run.final["own_accuracy"]
    last, cluster = rounds.row(-1, named=True), run.history[-1] if run.history else {}
    enough = pl.col("accuracy").fill_nan(None) >= (math.inf if target is None else target)
    reached = rounds.filter(enough)
    first = reached.row(0, named=True) if len(reached) else {}
    judged, accepted = run.gate
    return {
        "final_accuracy": last["accuracy"],
        "best_accuracy": _number(rounds["accuracy"].fill_nan(None).max()),
        "leaf_accuracy": _number(run.final["leaf_accuracy"].mean()),
        "gate": accepted / judged if judged else math.nan,
        "final_loss": last["loss"],
        "gap": last["gap"],
        "rounds_to_target": _number(first.get("round")),
        "seconds_to_target": _number(first.get("seconds")),
        "megabytes": last["bytes"] / 1e6,
        "clusters": _number(cluster.get("num_clusters")),
        "ari": _number(cluster.get("ari_truth")),
        "worst_client": _number(final.min()),
        "best_minus_worst": _number(final.max()) - _number(final.min()),
        "variation": _variation(final.to_numpy()),
        "gini": gini(final),
    }


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _variation(values: NDArray[np.float64]) -> float:
    """Return the standard deviation of all clients over their mean; nan for no mean."""
    mean = float(values.mean()) if len(values) else 0.0
    return float(values.std()) / mean if mean else math.nan


# ---------------------------------------------------------------------- over seeds


def summarise(values: ArrayLike) -> Summary:
    """Summarise the values that are not nan; one has no deviation and no interval."""
    x = np.asarray(values, dtype=np.float64)
    x = x[~np.isnan(x)]
    return Summary(*mean_std_interval(x.tolist()), len(x))


def summaries(entry: Entry, target: float | None = None) -> dict[str, Summary]:
    """Summarise each figure over a method's seeds; without a run there is none."""
    figures = [figures_of(run, target) for run in entry.runs]
    return {name: summarise([f[name] for f in figures]) for name in (figures or [{}])[0]}


def curve(entry: Entry, figure: str) -> pl.DataFrame:
    """Return ``round``, ``mean``, ``low``, ``high`` of a column of :func:`by_round` over seeds."""
    table = pl.concat([by_round(run.clients).select("round", figure) for run in entry.runs])
    rows = [
        (number, *summarise(own[figure])[:4])
        for (number,), own in table.partition_by("round", as_dict=True).items()
    ]
    schema = {"round": pl.Int64, **dict.fromkeys(("mean", "std", "low", "high"), pl.Float64)}
    return pl.DataFrame(rows, schema=schema, orient="row").sort("round").drop("std")


# ---------------------------------------------------------------------- tests


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Adjust p-values for their number (Holm 1979); nan stay nan, and are not counted."""
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(len(p), math.nan)
    order = [i for i in np.argsort(p, kind="stable") if not math.isnan(p[i])]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def paired_tests(entries: Sequence[Entry]) -> pl.DataFrame:
    """Compare all pairs of methods over the (seed, client) pairs that both have.

    Returns
    -------
    DataFrame
        ``method`` and ``other``; ``pairs``, their number; ``mean_difference`` of final accuracy;
        ``wilcoxon_p`` of the signed-rank test (Wilcoxon 1945, differences of zero shared out);
        ``seeds`` that both have, and ``t_test_p`` of a paired t-test over the seeds' means, nan
        for one seed; of both p the Holm-adjusted one.
    """
    finals = [_final_accuracies(entry) for entry in entries]
    rows = []
    for (one, a), (other, b) in combinations(zip(entries, finals, strict=True), 2):
        both = a.join(b, on=["seed", "client"], how="inner").sort("seed", "client")
        both = both.with_columns(difference=pl.col("accuracy") - pl.col("accuracy_right"))
        seeds = both.group_by("seed", maintain_order=True).agg(pl.col("difference").mean())
        # Rounded, so that shares of examples that are the same number are ties.
        d = both["difference"].round(12).to_numpy()
        of_seeds = seeds["difference"].round(12).to_numpy()
        mean = float(d.mean()) if len(d) else math.nan
        tests = (_wilcoxon(d), _t_test(of_seeds))
        rows.append((one.title, other.title, len(d), mean, tests[0], len(of_seeds), tests[1]))
    names = ("method", "other", "pairs", "mean_difference", "wilcoxon_p", "seeds", "t_test_p")
    kinds = (pl.String, pl.String, pl.Int64, pl.Float64, pl.Float64, pl.Int64, pl.Float64)
    schema = dict(zip(names, kinds, strict=True))
    table = pl.DataFrame(rows, schema=schema, orient="row")
    adjusted = [pl.Series(f"{p}_holm", holm(table[p])) for p in ("wilcoxon_p", "t_test_p")]
    return table.with_columns(adjusted).select(
        *(*names[:5], "wilcoxon_p_holm", *names[5:], "t_test_p_holm")
    )


def _final_accuracies(entry: Entry) -> pl.DataFrame:
    schema = {"seed": pl.Int64, "client": pl.Int64, "accuracy": pl.Float64}
    tables = [
        run.final.select(
            pl.lit(run.seed, pl.Int64).alias("seed"),
            pl.col("client").cast(pl.Int64),
            pl.col("own_accuracy").alias("accuracy"),
        )
        for run in entry.runs
    ]
    return pl.concat([pl.DataFrame(schema=schema), *tables])


def _wilcoxon(differences: NDArray[np.float64]) -> float:
    if not len(differences):
        return math.nan
    if not differences.any():
        return 1.0
    return float(stats.wilcoxon(differences, zero_method="zsplit").pvalue)


def _t_test(means: NDArray[np.float64]) -> float:
    """Return p of the seeds' mean differences; 0 or 1 where they do not vary at all."""
    if len(means) < _SEED_MEANS:
        return math.nan
    if not means.any():
        return 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of differences that are all the same
        return float(stats.ttest_1samp(means, 0.0).pvalue)
