"""The figures that the project promises: clustering helps, and parity with the older program."""

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedge_sim.config import Settings, load_settings
from fedge_sim.data import federated_data
from fedge_sim.methods import METHODS
from fedge_sim.orchestrator import Result
from fedge_sim.reporting.base import RoundRecord
from fedge_sim.reporting.tables import TableWriter
from tests.conftest import Keep, run
from tests.test_golden import golden

SEEDS = (42, 43, 44)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_default_run_shows_that_clustering_helps(tmp_path, seed):
    def default(*more):
        keep = Keep()
        output = f"app.config.output-dir={tmp_path}"
        settings = load_settings(assignments=[f"app.config.seed={seed}", output, *more])
        last = run(settings, [keep]).last
        return last, [[leaf.leaf_test.accuracy for leaf in r.leaves] for r in keep.records]

    clustered, by_round = default()
    assert clustered.cloud.labels == (0, 0, 1)
    plain, _ = default("cloud_cluster.enable=false")
    assert clustered.mean_client_accuracy >= plain.mean_client_accuracy + 0.10
    # Not trivially easy, and still rising after round 3.
    assert all(0.85 <= accuracy <= 0.99 for accuracy in by_round[-1])
    assert sum(by_round[-1]) > sum(by_round[2])


# ------------------------------------------------------------------- the older program
# With equal settings the two are the same, to 1e-12 in float64: test_golden.py. Here they train on
# all windows of UCI HAR, in float32. Figures are those of evaluation mode, with the accuracy gate
# off and without the proximal term, as the older program had neither in effect.

OLDER = "older_program_uci_har"
HALF_BAND = 0.008  # 95 % of a difference of two means of three seeds, whose deviation is 0.005


def older_runs(kind: str) -> list[Any]:
    """Return (partition, seed) of the older program's runs of a kind, "own" or "imposed"."""
    names = [name.split("_") for name in golden(OLDER)["runs"].tolist()]
    return [(partition, int(seed)) for partition, own, seed in names if own == kind]


def rows_of(name: str) -> list[NDArray[np.int64]]:
    """Return the rows of each client, ascending, of a flat list of the older program's."""
    file = golden(OLDER)
    ends = np.cumsum(file[f"{name}_sizes"].astype(int))[:-1]
    return [np.sort(own.astype(np.int64)) for own in np.split(file[name], ends)]


@pytest.fixture(scope="module")
def uci_settings(shared, tmp_path_factory):
    """Return a function from more settings to those of a run that can be compared."""

    def settings(*more: str) -> Settings:
        return load_settings(
            assignments=[
                *("app.config.dataset=uci-har", "hierarchy.prox_mu=0.0"),
                f"app.config.data-root={shared / 'data' / 'uci_har'}",
                f"app.config.output-dir={tmp_path_factory.mktemp('uci')}",
                "hierarchy.cluster_better_delta=-1.0",
                *("runtime.training=single", "runtime.compile=true"),  # the fastest for one client
                *more,
            ]
        )

    return settings


@pytest.fixture(scope="module")
def ours(uci_settings, tmp_path_factory):
    """Return a function from a partition and a seed to our run, which is done once."""

    @cache
    def run_once(partition: str, seed: int) -> tuple[Result, list[RoundRecord]]:
        file, keep = tmp_path_factory.mktemp("partition") / "rows.json", Keep()
        rows = iter(rows_of(f"{partition}_partition"))
        servers = {s: {c: next(rows).tolist() for c in range(3)} for s in range(3)}
        file.write_text(json.dumps(servers))
        settings = uci_settings(
            *("app.config.partition=file", f"app.config.partition-file='{file}'"),
            f"app.config.seed={seed}",
        )
        assert settings.hierarchy.global_rounds == 10
        assert settings.hierarchy.local_epochs == 5
        return run(settings, [keep, TableWriter()]), keep.records

    return run_once


def test_users_as_numbers_are_the_default_partition(uci_settings):
    data = federated_data(uci_settings())
    for client, expected in zip(data.clients, rows_of("numeric_partition"), strict=True):
        np.testing.assert_array_equal(client.rows, expected)


def test_round_by_round_with_the_older_program_on_our_split(ours):
    """It was given our partition, split, first model, order of batches and scale."""
    [(partition, seed)] = older_runs("imposed")
    file, name = golden(OLDER), f"{partition}_imposed_{seed}"
    result, told = ours(partition, seed)
    clients = json.loads((result.folder / "run.json").read_text())["clients"]
    assert [c["num_train"] for c in clients] == file[f"{name}_train_sizes"].tolist()
    assert [c["num_test"] for c in clients] == file[f"{name}_test_sizes"].tolist()
    older = file[f"{name}_leaf_accuracy"].mean(axis=1)
    mean = [record.mean_leaf_accuracy for record in told[: len(older)]]
    np.testing.assert_allclose(mean, older, rtol=0, atol=0.005)


@pytest.mark.parametrize("partition", ["text", "numeric"])
def test_in_distribution_with_the_older_program_on_its_own(ours, partition):
    """Its own random streams, and ours: rounds 6 to 10, mean over the same seeds."""
    seeds = [seed for name, seed in older_runs("own") if name == partition]
    older = [golden(OLDER)[f"{partition}_own_{seed}_leaf_accuracy"][5:10] for seed in seeds]
    accuracies = []
    for seed in seeds:
        result, told = ours(partition, seed)
        assert {record.cloud.labels for record in told} == {(0, 0, 0)}
        accuracies.append([record.mean_leaf_accuracy for record in told[5:10]])
        # The model after the cloud step is recorded beside it.
        table = result.folder / "metrics" / f"seed_{seed}" / "distributed_metrics.csv"
        columns = table.read_text().splitlines()[0].split(",")
        assert {"avg_accuracy", "cloud_avg_accuracy"} <= set(columns)
    assert np.shape(accuracies) == (len(seeds), 5)
    assert np.mean(accuracies) == pytest.approx(np.mean(older), abs=HALF_BAND)


SWAPPED = (
    *("app.config.dataset=digits", "app.config.num-classes=0", "app.config.partition=iid"),
    *("app.config.model=mlp", "app.config.label-swap=0.5", "hierarchy.num_servers=4"),
    *("hierarchy.clients_per_server=[3, 3, 3, 3]", "hierarchy.global_rounds=12"),
)


def test_clusters_recover_swapped_labels_and_one_model_cannot_serve_both_halves(tmp_path):
    def swapped(method, *more):
        own = METHODS[method].assignments((3, 3, 3, 3))
        output = f"app.config.output-dir={tmp_path}"
        return run(load_settings(assignments=[output, *SWAPPED, *own, *more]))

    for method, *more in (
        ("cfl",),
        ("fedge", "cloud_cluster.tau=0.9"),
        ("fedge", "cloud_cluster.method=agglomerative"),
    ):
        result = swapped(method, *more)
        file = result.folder / "metrics" / "seed_42" / "cluster_history.json"
        assert [entry["ari_truth"] for entry in json.loads(file.read_text())[-2:]] == [1.0, 1.0]
        assert result.last.mean_client_accuracy > 0.9
    for method in ("centralised", "fedavg", "scaffold", "hierfl"):
        assert swapped(method).last.mean_client_accuracy < 0.58  # a half, and noise
