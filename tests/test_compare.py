"""The command that runs methods side by side: what it runs, runs again, refuses, and survives."""

import io
import json
import math
import re
import shutil
import subprocess
import sys

import matplotlib.image
import numpy as np
import polars as pl
import pytest
import tomli
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedge_sim import checkpoint, orchestrator
from fedge_sim.compare import ALL_ROUNDS, compare, deal, parse_seeds, parse_variants, plan_run, toml
from fedge_sim.config import load_settings
from fedge_sim.data import federate
from fedge_sim.errors import ConfigError, RoundError
from fedge_sim.methods import METHODS
from fedge_sim.reporting.base import Callback
from tests.conftest import ROOT, SMALL, clean_environment

ALSO = "Fedge+SCAFFOLD: fedge hierarchy.client_rule=scaffold"
COMMON = (*ALL_ROUNDS, *SMALL, "runtime.backend=inprocess")
RUN = re.compile(r"\[(\d+)/(\d+)\] (\S+) seed (\d+): [\d.]+ % \((\d+ s|done before)\)")


def command(folder, *more, methods="fedavg,fedge", seeds="42,43"):
    """Run the command as a user does."""
    sets = [word for text in COMMON[2:] for word in ("--set", text)]
    given = ["--methods", methods, "--seeds", seeds, "--output-dir", "out", *sets, *more]
    return subprocess.run(
        [sys.executable, "-m", "fedge_sim.compare", *given],
        cwd=folder,
        env=clean_environment(PYTHONPATH=str(ROOT), SEED="7"),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """What the command printed, and the folder that it left."""
    folder = tmp_path_factory.mktemp("compare")
    return command(folder, "--target", "0.25", "--dataset", "hhar-synthetic"), folder / "out"


@pytest.fixture
def copied(done, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(done[1], tmp_path / "out")


def call(folder, methods="fedavg,fedge", seeds="42,43", also=(), more=(), target=None):
    """Compare in this process; return what was printed, and whether a run failed."""
    out = io.StringIO()
    console = Console(file=out, width=160, markup=False)
    variants = parse_variants(methods, also)
    common = [*COMMON, *more]
    failed, hangs = compare(None, common, variants, parse_seeds(seeds), target, folder, console)
    assert not hangs
    return out.getvalue(), failed


def runs_in(folder):
    return {str(f.parent.relative_to(folder / "runs")) for f in folder.glob("runs/*/*/*/run.json")}


# ---------------------------------------------------------------------- the command


def test_the_command_runs_all_and_leaves_tables_and_figures(done):
    printed, folder = done
    assert printed.returncode == 0, printed.stderr
    found = RUN.findall(printed.stdout)
    order = [("fedavg", "42"), ("fedge", "42"), ("fedavg", "43"), ("fedge", "43")]
    assert [(label, seed) for _, _, label, seed, _ in found] == order
    assert [(number, of) for number, of, *_ in found] == [(str(i), "4") for i in range(1, 5)]
    assert "Paired tests" in printed.stdout
    assert "rounds to 25 %" in printed.stdout
    asked = json.loads((folder / "compare.json").read_text())
    assert [method["label"] for method in asked["methods"]] == ["fedavg", "fedge"]
    assert asked["seeds"] == [42, 43]
    table = pl.read_csv(folder / "table.csv")
    assert table["method"].to_list() == ["FedAvg", "Fedge"]
    for label, row in zip(("fedavg", "fedge"), table.iter_rows(named=True), strict=True):
        finals = []
        for seed in (42, 43):
            (file,) = folder.glob(f"runs/{label}/seed_{seed}/*/metrics/seed_{seed}/clients.csv")
            clients = pl.read_csv(file).filter(pl.col("round") == 2)
            assert len(clients) == 9
            finals.append(clients["own_accuracy"].mean())
        assert row["final_accuracy_mean"] == pytest.approx(np.mean(finals))
        assert row["final_accuracy_std"] == pytest.approx(np.std(finals, ddof=1))
        assert math.isnan(float(row["gate_mean"])) == (label == "fedavg")  # which has no gate
    tests = pl.read_csv(folder / "tests.csv")
    assert tests["pairs"].to_list() == [18]
    for name in ("table.md", "table.tex", "tests.md"):
        assert (folder / name).stat().st_size > 200
    picture = matplotlib.image.imread(folder / "figures" / "accuracy.png")
    assert (picture[..., :3].min(axis=-1) < 0.9).mean() > 0.02
    assert (folder / "figures" / "similarity_Fedge.pdf").read_bytes()[:4] == b"%PDF"


def test_every_run_has_the_same_clients_and_all_rounds(done):
    _, folder = done
    for seed in (42, 43):
        rows = []
        for label, servers in (("fedavg", 1), ("fedge", 3)):
            (run,) = (f for f in folder.glob(f"runs/{label}/seed_{seed}/*") if f.is_dir())
            dealt = json.loads((run / "partition.json").read_text())
            assert len(dealt) == servers
            rows.append([own for clients in dealt.values() for own in clients.values()])
            settings = json.loads((run / "run.json").read_text())["settings"]
            assert settings["hierarchy"]["es_patience"] == 0
        assert rows[0] == rows[1]
        assert len(rows[0]) == 9


def test_the_same_command_again_runs_nothing(done):
    before, folder = runs_in(done[1]), done[1]
    times = {f: f.stat().st_mtime_ns for f in folder.glob("runs/**/*") if f.is_file()}
    again = command(folder.parent, "--target", "0.25", "--dataset", "hhar-synthetic")
    assert again.returncode == 0, again.stderr
    assert [took for *_, took in RUN.findall(again.stdout)] == ["done before"] * 4
    assert runs_in(folder) == before
    assert {f: f.stat().st_mtime_ns for f in folder.glob("runs/**/*") if f.is_file()} == times
    table = [line for line in done[0].stdout.splitlines() if line[:1] == "│"]
    assert [line for line in again.stdout.splitlines() if line[:1] == "│"] == table


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--also", "x: fedavgg"), "error: method 'fedavgg': unknown; did you mean 'fedavg'?\n"),
        (("--set", "hierarchy.global_rounds=3"), "global_rounds = 2, now 3"),
    ],
)
def test_the_command_ends_with_one_line_and_a_code(done, more, message):
    refused = command(done[1].parent, *more)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1


# ---------------------------------------------------------------------- again, and more


def test_an_extended_call_runs_only_what_is_new(copied):
    before = runs_in(copied)
    printed, failed = call(copied, "fedge,hierfl", "43,44", [ALSO])
    assert not failed
    took = {(label, int(seed)): took for _, _, label, seed, took in RUN.findall(printed)}
    assert len(took) == 6
    assert [key for key, how in took.items() if how == "done before"] == [("fedge", 43)]
    assert before < runs_in(copied)
    assert len(runs_in(copied)) == len(before) + 5
    table = pl.read_csv(copied / "table.csv")
    assert table["method"].to_list() == ["Fedge", "HierFL", "Fedge+SCAFFOLD"]
    assert table["runs"].to_list() == [2, 2, 2]
    assert not (copied / "figures" / "similarity_HierFL.png").exists()
    assert (copied / "figures" / "clusters_Fedge+SCAFFOLD.png").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("hierarchy.momentum=0.5", r"hierarchy.momentum = 0.9, now 0.5\); choose another"),
        ("app.config.partition=iid", r"partitions.*clients have other examples there"),
    ],
)
def test_other_settings_are_a_conflict(copied, more, message):
    before = {f: f.read_bytes() for f in copied.rglob("*") if f.is_file()}
    with pytest.raises(ConfigError, match=message):
        call(copied, more=[more])
    assert {f: f.read_bytes() for f in copied.rglob("*") if f.is_file()} == before


def test_other_data_are_a_conflict(copied):
    (file,) = copied.glob(f"runs/fedge/seed_42/*/{checkpoint.NAME}")
    tree = checkpoint.load(file)
    for key in ("data", "clients"):
        checkpoint.save(file, {**tree, "began": {**tree["began"], key: "0" * 64}})
        with pytest.raises(ConfigError, match="had other data; choose another --output-dir"):
            call(copied)


def why_failed(folder):
    """Compare again; return why Fedge's first run is not taken."""
    assert call(folder)[1]
    return pl.read_csv(folder / "table.csv")["failed"][1]


def test_a_run_in_the_place_of_another_is_no_run_of_this_one(copied):
    """Its folder was copied there, or what says which run it is was lost."""
    (other,) = copied.glob("runs/fedavg/seed_42/*/")
    (own,) = copied.glob("runs/fedge/seed_42/*/")
    shutil.rmtree(own)
    shutil.copytree(other, own)
    message = r"seed 42: .*there is a run with other settings \(hierarchy\.num_servers = 1, now 3"
    assert re.match(message, why_failed(copied))
    (copied / "runs/fedge/seed_42/state.json").unlink()
    assert re.match(message, why_failed(copied))


def test_results_that_lost_rows_are_not_taken(copied):
    (file,) = copied.glob("runs/fedge/seed_42/*/metrics/seed_42/clients.csv")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-3]))
    place = copied / "runs" / "fedge" / "seed_42"
    message = rf"seed 42: .*clients\.csv: has .* \(to have it run anew, delete {place}"
    assert re.match(message, why_failed(copied))
    shutil.rmtree(place)
    assert not call(copied)[1]
    assert pl.read_csv(copied / "table.csv")["runs"].to_list() == [2, 2]


def test_two_comparisons_at_a_time(copied):
    with FileLock(copied / ".lock"), pytest.raises(ConfigError, match="another comparison"):
        call(copied)


class Stop(Callback):
    """Fails in round 2, as a leaf server without updates does."""

    def on_round_end(self, record):
        if record.global_round == 2:
            raise RoundError("leaf server 0 got\nno update")


def test_a_failed_run_is_named_and_later_gone_on_with(copied, monkeypatch):
    (metrics,) = copied.glob("runs/fedge/seed_43/*/metrics/seed_43/clients.csv")
    at_once = pl.read_csv(metrics).drop("comp_time_sec")
    shutil.rmtree(copied / "runs" / "fedge" / "seed_43")
    real = orchestrator.run
    monkeypatch.setattr(orchestrator, "run", lambda s, callbacks: real(s, [*callbacks, Stop()]))
    printed, failed = call(copied)
    assert failed
    assert "Failed: Fedge, seed 43: leaf server 0 got no update" in printed
    table = pl.read_csv(copied / "table.csv")
    assert table["runs"].to_list() == [2, 1]
    assert table["failed"][1] == "seed 43: leaf server 0 got no update"
    assert "Fedge (failed: 1 of 2)" in (copied / "table.md").read_text()
    monkeypatch.setattr(orchestrator, "run", real)
    before = runs_in(copied)
    resumed, failed = call(copied)
    assert not failed
    assert runs_in(copied) == before  # in the folder that it had begun
    assert [took for *_, took in RUN.findall(resumed)][:3] == ["done before"] * 3
    (metrics,) = copied.glob("runs/fedge/seed_43/*/metrics/seed_43/clients.csv")
    assert pl.read_csv(metrics).drop("comp_time_sec").equals(at_once)


def test_a_run_that_ended_without_its_mark_is_not_run_again(copied):
    file = copied / "runs" / "fedge" / "seed_43" / "state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps({**state, "finished": None}))
    before = runs_in(copied)
    assert not call(copied)[1]
    assert runs_in(copied) == before
    assert json.loads(file.read_text()) == state


def test_a_run_without_a_round_is_begun_anew(copied):
    place = copied / "runs" / "fedge" / "seed_43"
    (run,) = (f for f in place.iterdir() if f.is_dir())
    shutil.rmtree(run)
    (place / "state.json").unlink()
    (place / "20200101-000000_hhar-synthetic_seed43").mkdir()
    assert not call(copied)[1]
    assert len(list(place.glob("*/run.json"))) == 1


# ---------------------------------------------------------------------- what is asked for


def test_variants():
    avg, own = parse_variants("fedavg", ["A b: fedge hierarchy.momentum=0.5 a.b=[1, 2]"])
    assert (avg.label, avg.title, avg.method) == ("fedavg", "FedAvg", METHODS["fedavg"])
    assert (own.label, own.title, own.method) == ("A b", "A b", METHODS["fedge"])
    assert own.more == ("hierarchy.momentum=0.5", "a.b=[1, 2]")


@pytest.mark.parametrize(
    ("methods", "also", "message"),
    [
        ("fedavg,fegde", (), "method 'fegde': unknown; did you mean 'fedge'"),
        ("", (), "method '': unknown; allowed: "),
        ("fedavg,fedavg", (), "'fedavg' is named twice"),
        ("fedavg", ["FedAvg: fedge"], "'FedAvg' is named twice"),
        ("fedavg", ["a/b: fedge", "a_b: fedge"], "'a_b' is named twice"),
        ("fedavg", ["..: fedge"], "expected \"LABEL: METHOD"),
        ("fedavg", ["label fedge"], "expected \"LABEL: METHOD"),
        ("fedavg", ["label:"], "expected \"LABEL: METHOD"),
        ("fedavg", ["a\nb: fedge"], "expected \"LABEL: METHOD"),
        ("fedavg", [": fedge"], "expected \"LABEL: METHOD"),
    ],
)  # fmt: skip
def test_variants_that_are_none(methods, also, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_variants(methods, also)


@pytest.mark.parametrize("text", ["", "a", "1,", "1,1", "1,01", "-1", "1.5", "٣"])
def test_seeds_that_are_none(text):
    with pytest.raises(ConfigError, match="expected different integers from 0"):
        parse_seeds(text)


@pytest.mark.parametrize(
    ("also", "message"),
    [
        ("x: fedge hierarchy.nothing=1", r"method x: \[hierarchy\] nothing = 1: unknown key"),
        ("x: fedavg hierarchy.client_rule=fedbn app.config.model=mlp", "method x: .*BatchNorm"),
        ("x: fedge hierarchy.leaf_strategy=FedNothing", "method x: .*leaf_strategy"),
        (
            "x: fedge hierarchy.clients_per_server=[1,1,1]",
            r"method x: needs \[3, 3, 3\] clients, as the others",
        ),
        (
            "x: fedavg hierarchy.num_servers=3 hierarchy.clients_per_server=[3,3,3]",
            "method x: needs one leaf server for all clients",
        ),
        ("x: fedge app.config.label-swap=0.5", "method x: app.config.label-swap must be the same"),
        ("x: fedge app.config.split=blocked", "method x: app.config.split must be the same"),
        ("x: fedge app.config.model=cnn2d", r"method x: \[app.config\] model = \"cnn2d\": takes"),
    ],
)
def test_what_is_refused_is_refused_before_the_first_run(tmp_path, also, message):
    with pytest.raises(ConfigError, match=message):
        call(tmp_path / "out", also=[also])
    assert not (tmp_path / "out" / "runs").exists()


def test_all_methods_that_are_refused_are_named(tmp_path):
    with pytest.raises(ConfigError) as caught:
        call(tmp_path, also=["x: fedge hierarchy.a=1", "y: hierfl runtime.b=1"])
    assert str(caught.value).count("method ") == 2
    assert "method x: [hierarchy] a" in str(caught.value)
    assert "; method y: [runtime] b" in str(caught.value)


def test_the_order_of_settings(tmp_path):
    (variant,) = parse_variants("fedprox", [])
    (also,) = parse_variants("fedprox", ["x: fedprox hierarchy.prox_mu=0.5"])[1:]
    common = [*ALL_ROUNDS, "hierarchy.es_patience=3"]
    otherwise = [*common, "hierarchy.prox_mu=0.7"]
    with pytest.raises(ConfigError, match=r"--set hierarchy.prox_mu: the method has 0.01"):
        plan_run(None, otherwise, variant, 43, tmp_path)
    assert plan_run(None, otherwise, also, 43, tmp_path).settings.hierarchy.prox_mu == 0.5
    with pytest.raises(ConfigError, match="give seeds with --seeds"):
        plan_run(None, common, also._replace(more=("app.config.seed=1",)), 43, tmp_path)
    plain, own = (plan_run(None, common, v, 43, tmp_path).settings for v in (variant, also))
    assert plain.hierarchy.prox_mu == variant.method.settings["hierarchy.prox_mu"]
    assert own.hierarchy.prox_mu == 0.5
    assert own.hierarchy.es_patience == 3
    assert own.seed == 43
    assert plan_run(None, ALL_ROUNDS, variant, 1, tmp_path).settings.hierarchy.es_patience == 0


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_the_clients_that_are_set(tmp_path, name):
    (variant,) = parse_variants(name, [])
    common = [*ALL_ROUNDS, "hierarchy.num_servers=2", "hierarchy.clients_per_server=[3, 5]"]
    h = plan_run(None, common, variant, 42, tmp_path).settings.hierarchy
    servers = {"hierarchy": (3, 5), "flat": (8,), "clients": (1,) * 8}[variant.method.topology]
    assert h.clients_per_server == servers


@pytest.mark.parametrize("split", ["random", "blocked"])
@pytest.mark.parametrize("partition", ["user", "dirichlet"])
def test_clients_and_their_test_examples_are_the_same_in_all_topologies(tmp_path, partition, split):
    common = [
        *(*SMALL, "app.config.synthetic-clients=11", "app.config.label-swap=0.3"),
        *(f"app.config.partition={partition}", f"app.config.split={split}"),
    ]
    variants = parse_variants("fedge,fedavg,cfl", [])
    plan = [plan_run(None, common, variant, 42, tmp_path) for variant in variants]
    base = load_settings(assignments=common)
    deal(base, plan)
    expected = federate(base)
    assert len({p.settings.hierarchy.clients_per_server for p in plan}) == 3
    for planned in plan:
        data = federate(planned.settings)
        for client in range(9):
            for part in ("train", "test", "left_out"):
                rows = (getattr(d.clients[client], part) for d in (data, expected))
                np.testing.assert_array_equal(*rows)
            rows = data.clients[client].test
            assert data.dataset.x[rows].tobytes() == expected.dataset.x[rows].tobytes()
            np.testing.assert_array_equal(data.labels_of(client), expected.labels_of(client))
    deal(base, plan)  # what is written down is what would be


values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(values.filter(lambda v: "\\x7f" not in repr(v) and "inf" not in repr(v)))
def test_values_are_written_as_toml_reads_them(value):
    try:
        repr(value).encode()
    except UnicodeEncodeError:
        return
    assert tomli.loads(f"value = {toml(value)}")["value"] == value
