"""The figures of runs, the statistics over them, and what tables and figures make of them."""

import io
import json
import math
import re

import matplotlib.image
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from fedge_sim.errors import FedgeError
from fedge_sim.reporting.comparison import (
    Entry,
    Run,
    by_round,
    curve,
    figures_of,
    gini,
    holm,
    paired_tests,
    read_run,
    summaries,
    summarise,
)
from fedge_sim.reporting.figures import DPI, WIDTH, draw_figures
from fedge_sim.reporting.published import PANELS, TESTS_NOTE, escape, latex, show, write_tables

nan = math.nan


def clients(*accuracies, loss=1.0, gap=0.1, seconds=0.5, clock=None):
    """Return clients.csv: one list of client accuracies for each round."""
    return pl.DataFrame(
        [
            {
                "round": number,
                "server": client // 2,
                "client": client,
                "num_test": 10,
                "own_accuracy": float(value),
                "leaf_accuracy": float(value) / 2,
                "own_loss": loss / number,
                "own_train_accuracy": value + gap,
                "comp_time_sec": seconds * (client + 1),
                "simulated_seconds": nan if clock is None else clock * number,
                "bytes_up": 1e6,
                "bytes_down": 2e6,
            }
            for number, row in enumerate(accuracies, 1)
            for client, value in enumerate(row)
        ]
    )


def history(*labels, similar=False, ari=None):
    """Return cluster_history.json: one list of labels for each round."""
    entries = [
        {"round": g, "labels": list(own), "num_clusters": len(set(own)), "ari_truth": ari}
        for g, own in enumerate(labels, 1)
    ]
    for entry in entries if similar else ():
        n = len(entry["labels"])
        entry["similarity"] = (np.eye(n) * 0.5 + 0.5 - 0.01 * entry["round"]).tolist()
    return tuple(entries)


def run(seed, *accuracies, servers=2, clustered=False):
    labels = [[leaf % 2 if clustered else 0 for leaf in range(servers)]] * len(accuracies)
    return Run(seed, clients(*accuracies), history(*labels, similar=clustered))


# ---------------------------------------------------------------------- one run


def test_rounds_by_hand():
    table = by_round(clients([0.2, 0.4], [0.5, 0.7], seconds=0.5))
    assert table["round"].to_list() == [1, 2]
    assert table["accuracy"].to_list() == pytest.approx([0.3, 0.6])
    assert table["loss"].to_list() == pytest.approx([1.0, 0.5])
    assert table["gap"].to_list() == pytest.approx([0.1, 0.1])
    assert table["bytes"].to_list() == [6e6, 12e6]  # two clients, 3 MB each
    assert table["seconds"].to_list() == [1.0, 2.0]  # of the slower client
    on_clock = by_round(clients([0.2, 0.4], [0.5, 0.7], seconds=0.5, clock=7.0))
    assert on_clock["seconds"].to_list() == [7.0, 14.0]


def test_clients_that_did_not_answer_do_not_count():
    table = clients([0.2, 0.9, 0.4], [0.5, 0.7, 0.3])
    silent = (pl.col("client") == 1) & (pl.col("round") == 1)
    for column, value in (("num_test", 0), ("own_accuracy", nan), ("comp_time_sec", nan)):
        left_out = table.with_columns(
            pl.when(silent).then(pl.lit(value)).otherwise(pl.col(column)).alias(column)
        )
        rounds = by_round(left_out)
        expected = np.mean([0.2, 0.9, 0.4] if column == "comp_time_sec" else [0.2, 0.4])
        assert rounds["accuracy"].to_list() == pytest.approx([expected, 0.5])
        assert rounds["seconds"].to_list() == [1.5, 3.0]
    nobody = by_round(table.with_columns(num_test=0))
    assert nobody["accuracy"].is_nan().all()
    figures = figures_of(Run(1, table.with_columns(num_test=0), ()), target=0.1)
    assert figures.pop("megabytes") == 18.0
    assert all(math.isnan(value) for value in figures.values())


def test_figures_by_hand():
    one = Run(42, clients([0.2, 0.4], [0.9, 0.7], [0.8, 0.6]), history([0, 0], [0, 1], ari=0.25))
    figures = figures_of(one, target=0.8)
    assert figures["final_accuracy"] == pytest.approx(0.7)
    assert figures["best_accuracy"] == pytest.approx(0.8)
    assert figures["final_loss"] == pytest.approx(1 / 3)
    assert figures["rounds_to_target"] == 2
    assert figures["seconds_to_target"] == 2.0
    assert figures["megabytes"] == 18.0
    assert (figures["clusters"], figures["ari"]) == (2, 0.25)
    assert figures["worst_client"] == 0.6
    assert figures["best_minus_worst"] == pytest.approx(0.2)
    assert figures["variation"] == pytest.approx(0.1 / 0.7)
    assert figures["gini"] == pytest.approx(0.2 * 2 / (2 * 4 * 0.7))  # |xi - xj| over 2 n^2 mean
    assert math.isnan(figures_of(one, target=0.81)["rounds_to_target"])
    assert math.isnan(figures_of(one)["rounds_to_target"])
    names = [column.figure for columns in PANELS.values() for column in columns]
    assert sorted(names) == sorted(figures)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.5, 0.5, 0.5], 0.0),
        ([0, 0, 0, 1], 0.75),
        ([1, 2, 3, 4], 0.25),
        ([0, 0], 0.0),
        ([7], 0.0),
        ([1, 3], 0.25),
    ],
)
def test_gini_known_values(values, expected):
    assert gini(values) == pytest.approx(expected)


shares = st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=30)


@given(shares)
def test_gini_is_the_mean_difference_over_twice_the_mean(values):
    x = np.array(values)
    mean = x.mean()
    expected = abs(x[:, None] - x).mean() / (2 * mean) if mean > 1e-200 else None
    if expected is not None:
        assert gini(x) == pytest.approx(expected, abs=1e-9)
        assert gini(3 * x[::-1]) == pytest.approx(gini(x), abs=1e-9)
    assert 0 <= gini(x) <= 1


# ---------------------------------------------------------------------- over seeds


def test_summary_by_hand_and_by_scipy():
    # Of 1, 2, 3: deviation 1, and Student's t with 2 degrees at 97.5 % is 4.302653.
    mean, std, low, high, n = summarise([3.0, 1.0, nan, 2.0])
    assert (mean, std, n) == (2.0, 1.0, 3)
    assert high == pytest.approx(2 + 4.302653 / math.sqrt(3), rel=1e-6)
    interval = stats.t.interval(0.95, 2, loc=2, scale=1 / math.sqrt(3))
    assert (low, high) == pytest.approx(interval)
    assert summarise([0.5, 0.5]) == (0.5, 0.0, 0.5, 0.5, 2)
    one, nothing = summarise([0.5]), summarise([nan])
    assert one[0] == 0.5
    assert one.n == 1
    assert np.isnan(one[1:4]).all()
    assert nothing.n == 0
    assert np.isnan(nothing[:4]).all()


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=10))
def test_the_interval_is_that_of_a_t_test(values):
    summary = summarise(values)
    assert summary.low <= summary.mean <= summary.high
    if np.std(values) > 1e-6:
        interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (summary.low, summary.high) == pytest.approx(tuple(interval), abs=1e-6)


def test_summaries_count_the_seeds_that_reached_the_target():
    entry = Entry("A", (run(1, [0.5], [0.9]), run(2, [0.5], [0.6]), run(3, [0.95], [0.9])))
    assert summaries(entry, 0.9)["rounds_to_target"][:2] == (1.5, pytest.approx(math.sqrt(0.5)))
    assert summaries(entry, 0.9)["rounds_to_target"].n == 2
    assert summaries(Entry("B", (), {1: "died"})) == {}


def test_a_curve_over_runs_of_different_lengths():
    entry = Entry("A", (run(1, [0.2], [0.4]), run(2, [0.4])))
    table = curve(entry, "accuracy")
    assert table["round"].to_list() == [1, 2]
    assert table["mean"].to_list() == pytest.approx([0.3, 0.4])
    half = 12.7062 * math.sqrt(0.02) / math.sqrt(2)  # one degree of freedom
    assert table["high"][0] == pytest.approx(0.3 + half, rel=1e-4)
    assert math.isnan(table["low"][1])  # one seed has no band


# ---------------------------------------------------------------------- tests


def test_holm_known_values():
    # Holm 1979: the smallest times 4, the next times 3, ..., none below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]).tolist() == [1.0, 1.0]
    with_nan = holm([0.02, nan, 0.01])
    assert with_nan[[0, 2]] == pytest.approx([0.02, 0.02])
    assert math.isnan(with_nan[1])
    assert holm([]).tolist() == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_p_and_bonferroni_and_keeps_the_order(p):
    adjusted = holm(p)
    assert (adjusted >= p).all()
    assert (adjusted <= np.minimum(np.array(p) * len(p), 1) + 1e-12).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()
    assert min(adjusted) == pytest.approx(min(1, len(p) * min(p)))


def test_paired_tests_are_scipys():
    rng = np.random.default_rng(1)
    a, b = rng.random((3, 12)).round(2), rng.random((3, 12)).round(2)
    a[0, :3] = b[0, :3]  # some differences of zero
    one = Entry("A", tuple(run(seed, own) for seed, own in enumerate(a)))
    other = Entry("B", tuple(run(seed, own) for seed, own in enumerate(b)))
    (row,) = paired_tests([one, other]).iter_rows(named=True)
    assert (row["method"], row["other"], row["pairs"], row["seeds"]) == ("A", "B", 36, 3)
    assert row["mean_difference"] == pytest.approx((a - b).mean())
    expected = stats.wilcoxon((a - b).round(12).ravel(), zero_method="zsplit").pvalue
    assert row["wilcoxon_p"] == pytest.approx(expected)
    expected = stats.ttest_rel(a.mean(axis=1), b.mean(axis=1)).pvalue
    assert row["t_test_p"] == pytest.approx(expected)
    assert row["wilcoxon_p_holm"] == row["wilcoxon_p"]


def test_paired_tests_at_the_edges():
    same = Entry("same", (run(1, [0.5, 0.6]), run(2, [0.1, 0.3])))
    up = Entry("up", (run(1, [0.6, 0.7]), run(2, [0.2, 0.4])))
    failed = Entry("failed", (), {1: "died"})
    alone = Entry("alone", (run(2, [0.1]),))
    table = paired_tests([same, same, up, failed, alone])
    rows = {(row["method"], row["other"]): row for row in table.iter_rows(named=True)}
    equal = rows["same", "same"]
    assert (equal["wilcoxon_p"], equal["t_test_p"], equal["mean_difference"]) == (1, 1, 0)
    constant = rows["same", "up"]  # by 0.1 in every pair: nothing varies
    assert constant["mean_difference"] == pytest.approx(-0.1)
    assert constant["wilcoxon_p"] == pytest.approx(0.125)  # 2 of the 16 signs, as ties say
    assert constant["t_test_p"] == 0
    assert rows["same", "failed"]["pairs"] == 0
    assert math.isnan(rows["same", "failed"]["wilcoxon_p"])
    # 0.3 - 0.2 and 0.2 - 0.1 are ties, whatever the last bit says.
    (tied,) = paired_tests(
        [Entry("a", (run(1, [0.3, 0.2, 0.6, 0.1]),)), Entry("b", (run(1, [0.2, 0.1, 0.5, 0.3]),))]
    ).iter_rows(named=True)
    expected = stats.wilcoxon([1, 1, 1, -2], zero_method="zsplit").pvalue
    assert tied["wilcoxon_p"] == expected
    one = rows["up", "alone"]  # one seed, and one client that both have
    assert (one["pairs"], one["seeds"]) == (1, 1)
    assert math.isnan(one["t_test_p"])
    assert one["wilcoxon_p"] == 1
    assert len(paired_tests([same])) == 0


# ---------------------------------------------------------------------- files


def test_what_a_run_wrote_is_read(tmp_path):
    metrics = tmp_path / "metrics" / "seed_7"
    metrics.mkdir(parents=True)
    with pytest.raises(FedgeError, match="seed_7: no results of a finished run"):
        read_run(tmp_path, 7)
    table = clients([0.5, 0.25], [1, 0]).with_columns(own_train_accuracy=nan)
    table.write_csv(metrics / "clients.csv", float_precision=2)
    (metrics / "cluster_history.json").write_text(json.dumps(history([0, 1], [0, 0])))
    with pytest.raises(FedgeError, match="no results of a finished run"):
        read_run(tmp_path, 7)
    gates = pl.DataFrame({"round": [1, 2], "gate_judged": [0, 3], "gate_accepted": [0, 1]})
    gates.write_csv(metrics / "distributed_metrics.csv")
    read = read_run(tmp_path, 7)
    assert by_round(read.clients)["accuracy"].to_list() == [0.375, 0.5]
    assert math.isnan(figures_of(read)["gap"])
    assert figures_of(read)["gate"] == 1 / 3
    assert read.is_clustered
    table.drop("own_loss").write_csv(metrics / "clients.csv")
    with pytest.raises(FedgeError, match="own_loss"):
        read_run(tmp_path, 7)
    table.clear().write_csv(metrics / "clients.csv")
    with pytest.raises(FedgeError, match="has no round"):
        read_run(tmp_path, 7)


@pytest.fixture
def entries():
    """Three methods with two seeds each, one of which failed once; and one that always failed."""
    low, high = ([0.4, 0.5], [0.6, 0.5]), ([0.5, 0.6], [0.9, 0.95])
    return [
        Entry("Low_1 & 50%", (run(1, *low), run(2, *low[::-1]))),
        Entry("High", tuple(run(s, *high, clustered=True) for s in (1, 2))),
        Entry("Once", (run(1, *high),), {2: "leaf server 0 got no update"}),
        Entry("Never", (), {1: "died", 2: "died too"}),
    ]


def test_the_markdown_table(tmp_path, entries):
    write_tables(tmp_path, entries, 0.9)
    text = (tmp_path / "table.md").read_text()
    rows = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line[:1] == "|"]
    by_panel = [[row for row in rows if row[0] == name] for name in ("Low_1 & 50%", "High")]
    low, high = (panel[0] for panel in by_panel)
    assert low[1] == "50.0 ± 7.1 [-13.5, 113.5]"
    assert high[1] == "**92.5** ± 0.0 [92.5, 92.5]"  # the best of those with two seeds
    assert high[5] == low[5] == "10.0 ± 0.0 [10.0, 10.0]"  # all the same: nobody is best
    assert by_panel[0][1][1] == "— (0 of 2)"
    assert by_panel[1][1][1] == "2.0 ± 0.0 [2.0, 2.0] (2 of 2)"
    once = next(row for row in rows if row[0].startswith("Once"))
    assert once[:2] == ["Once (failed: 1 of 2)", "92.5"]
    never = next(row for row in rows if row[0].startswith("Never"))
    assert never == ["Never (failed: 2 of 2)", *["—"] * 5]
    assert "Failed: Once, seed 2: leaf server 0 got no update\n" in text
    assert "ARI" not in text  # no truth is known
    assert all(len(row) == len(rows[0]) for row in rows[: 2 + len(entries)])
    without = write_tables(tmp_path, entries, None) or (tmp_path / "table.md").read_text()
    assert "rounds to" not in without


def test_the_csv_tables_are_unrounded(tmp_path, entries):
    write_tables(tmp_path, entries, 0.9)
    table = pl.read_csv(tmp_path / "table.csv")
    assert table["method"].to_list() == [entry.title for entry in entries]
    for entry, row in zip(entries[:3], table.iter_rows(named=True), strict=False):
        for name, summary in summaries(entry, 0.9).items():
            keys = ("mean", "std", "ci95_lo", "ci95_hi", "n")
            values = [float(row[f"{name}_{key}"]) for key in keys]
            np.testing.assert_array_equal(values, summary)
    assert table["failed"][3] == "seed 1: died; seed 2: died too"
    tests = pl.read_csv(tmp_path / "tests.csv")
    np.testing.assert_array_equal(
        tests["wilcoxon_p"].cast(float), paired_tests(entries)["wilcoxon_p"]
    )
    assert (tmp_path / "tests.md").read_text().count("\n| ") == 1 + 6
    assert TESTS_NOTE in (tmp_path / "tests.md").read_text()


def test_the_latex_table(entries):
    text = latex(entries, 0.9)
    body = "\n".join(line for line in text.splitlines() if line[:1] != "%")
    assert r"Low\_1 \& 50\% & \shortstack[r]{$50.0 \pm 7.1$ \\ $[-13.5, 113.5]$}" in body
    assert r"$\mathbf{92.5} \pm 0.0$" in body
    assert "---" in body
    assert not re.search(r"(?<!\\)[%#_]", body)
    assert body.isascii()
    for tabular in re.findall(r"\\begin{tabular}{(l?r+)}(.*?)\\end{tabular}", body, re.DOTALL):
        columns, rows = len(tabular[0]), tabular[1]
        assert rows.count(r"\toprule") == rows.count(r"\midrule") == rows.count(r"\bottomrule") == 1
        for line in rows.splitlines():
            if re.search(r"(?<!\\)&", line):
                assert len(re.findall(r"(?<!\\)&", line)) == columns - 1
                assert line.endswith(r"\\")
    assert body.count("{") == body.count("}")
    assert body.count(r"\begin{tabular}") == body.count(r"\end{tabular}") == 4


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a_b & 5%", r"a\_b \& 5\%"),
        ("$#{}", r"\$\#\{\}"),
        (r"\x", r"\textbackslash{}x"),
        ("~^", r"\textasciitilde{}\textasciicircum{}"),
        ("plain+text-1", "plain+text-1"),
        ("< ±", r"\textless{} $\pm$"),
    ],
)
def test_latex_escapes(text, escaped):
    assert escape(text) == escaped


def test_the_console_shows_all_of_it(entries):
    out = io.StringIO()
    show(entries, 0.9, Console(file=out, width=200, markup=False))
    shown = out.getvalue()
    for text in ("Low_1 & 50%", "92.5 ± 0.0 [92.5, 92.5]", "Wilcoxon", "Failed: Never, seed 1"):
        assert text in shown


# ---------------------------------------------------------------------- figures


def test_figures_are_drawn_one_column_wide(tmp_path, entries):
    (tmp_path / "clusters_old.png").write_text("")
    (tmp_path / "mine.png").write_text("")
    draw_figures(tmp_path, entries)
    names = {"accuracy", "loss", "clients", "clusters_High", "similarity_High"}
    files = {file.name for file in tmp_path.iterdir()} - {"mine.png"}
    assert files == {f"{name}.{suffix}" for name in names for suffix in ("pdf", "png")}
    for name in names:
        picture = matplotlib.image.imread(tmp_path / f"{name}.png")
        assert picture.shape[1] == round(WIDTH * DPI)
        assert 0.02 < (picture[..., :3].min(axis=-1) < 0.9).mean() < 0.9
        pdf = (tmp_path / f"{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF")
        assert b"/FontFile2" in pdf  # TrueType, embedded
        assert b"/Type3" not in pdf


@pytest.mark.parametrize("servers", [1, 5, 13, 40])
def test_figures_of_many_leaf_servers_methods_and_rounds(tmp_path, servers):
    accuracies = [[0.5 + 0.01 * g, 0.6] for g in range(30)]
    many = [
        Entry(f"m{i}", tuple(run(s, *accuracies, servers=servers, clustered=True) for s in (1, 2)))
        for i in range(1 if servers > 1 else 11)
    ]
    draw_figures(tmp_path, many)
    for name in ("accuracy", "clients", "clusters_m0", "similarity_m0"):
        picture = matplotlib.image.imread(tmp_path / f"{name}.png")
        assert picture.shape[1] == round(WIDTH * DPI)
        assert (picture[..., :3].min(axis=-1) < 0.9).mean() > 0.01


def test_nothing_is_drawn_of_nothing(tmp_path):
    draw_figures(tmp_path, [Entry("failed", (), {1: "died"})])
    assert list(tmp_path.iterdir()) == []
