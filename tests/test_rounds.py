"""What a round is made of: who takes part, how leaves average, the gate, mu, and when it ends."""

import io
import json
import logging
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedge_sim import cloud
from fedge_sim.algorithms.aggregation import weighted_mean
from fedge_sim.algorithms.fedprox import proximal_mu
from fedge_sim.client_app import app as client_app
from fedge_sim.config import Hierarchy
from fedge_sim.errors import ConfigError
from fedge_sim.leaf import LeafServer
from fedge_sim.methods import METHODS
from fedge_sim.orchestrator import Orchestrator
from fedge_sim.orchestrator import run as run_on_backend
from fedge_sim.reporting.base import Callback, RunInfo
from fedge_sim.reporting.comparison import figures_of, read_run
from fedge_sim.reporting.progress import ConsoleReporter
from fedge_sim.reporting.stopping import EarlyStopping, TargetAccuracy
from fedge_sim.reporting.tables import TableWriter
from fedge_sim.runtime.in_process import InProcessGrid
from tests.conftest import Keep, clean_environment, command_line, run
from tests.test_methods import KilledInRound, files_of

# ------------------------------------------------------------------ who takes part


def trained(keep):
    """Return the clients that trained, in each round."""
    return [tuple(c.client for c in record.clients if c.bytes_up) for record in keep.records]


def test_a_share_of_each_leafs_clients_takes_part(small):
    settings = small(
        *("hierarchy.num_servers=2", "hierarchy.clients_per_server=[6, 3]"),
        *("hierarchy.participation=0.5", "hierarchy.global_rounds=4"),
    )
    keep, again, other = Keep(), Keep(), Keep()
    run(settings, [keep])
    run(settings, [again], workers=1)
    run(settings.model_copy(update=dict(small("app.config.seed=7"))), [other])
    for clients in trained(keep):
        assert [sum(c < 6 for c in clients), sum(c >= 6 for c in clients)] == [3, 2]
    assert len(set(trained(keep))) > 1  # drawn anew in every round
    assert trained(keep) == trained(again)
    assert trained(keep) != trained(other)
    # and all are evaluated
    assert all(c.own_test.num_examples for c in keep.records[-1].clients)


@pytest.mark.parametrize(
    ("share", "clients", "training"),
    [
        *((0.5, 3, 2), (0.5, 5, 3), (0.5, 9, 5), (0.4, 9, 4), (0.25, 10, 3), (0.35, 10, 4)),
        *((0.29, 50, 15), (0.34, 3, 1), (0.1, 3, 1), (1.0, 7, 7), (1e-7, 10_000_000, 1)),
    ],
)
def test_a_half_is_rounded_up(share, clients, training):
    assert Hierarchy(participation=share).participants(clients) == training


def test_the_log_says_how_many_train(small, caplog):
    uneven = ("hierarchy.num_servers=2", "hierarchy.clients_per_server=[8, 1]")
    with caplog.at_level(logging.INFO):
        run(
            small(*uneven, "hierarchy.participation=0.4", "hierarchy.global_rounds=1"),
            [keep := Keep(), ConsoleReporter(Console(file=io.StringIO()))],
        )
    assert "4 of 9 clients train in a round" in caplog.text
    assert len(trained(keep)[0]) == 4


def test_cfl_of_clients_draws_leaf_servers(small):
    """Who is not drawn keeps model and cluster, and nobody's average has anything of it."""
    settings = small(
        *(*METHODS["cfl"].assignments((3, 3, 3)), "hierarchy.participation=0.5"),
        *("cloud_cluster.eps_1=9.0", "cloud_cluster.eps_2=0.1", "hierarchy.global_rounds=4"),
    )
    steps, real = [], cloud.step

    def step(state, models, examples, *args, **kwargs):
        after = real(state, models, examples, *args, **kwargs)
        steps.append((state, list(models), list(examples), kwargs["present"], after))
        return after

    keep, again, other = Keep(), Keep(), Keep()
    with mock.patch.object(cloud, "step", step):
        run(settings, [keep])
    run(settings, [again], workers=1)
    assert trained(again) == trained(keep)
    run(settings.model_copy(update=dict(small("app.config.seed=7"))), [other])
    assert trained(other) != trained(keep)
    assert len(set(trained(keep))) > 1
    assert [max(after.labels) for *_, after in steps][-1] > 0  # a cluster was split
    before = [steps[0][0].global_model] * 9
    for record, (state, models, examples, present, after) in zip(keep.records, steps, strict=True):
        assert [c.client for c in record.clients if c.bytes_up] == present
        assert len(present) == 5
        for leaf in range(9):
            kept = all(np.array_equal(a, before[leaf][n]) for n, a in models[leaf].items())
            assert kept == (leaf not in present)
            group = [k for k in present if after.labels[k] == after.labels[leaf]]
            if not group:
                assert after.model_for(leaf) is state.model_for(leaf)
                continue
            mean = weighted_mean([models[k] for k in group], [examples[k] for k in group])
            for name, array in after.model_for(leaf).items():
                np.testing.assert_array_equal(array, mean[name])
        before = models
    # all are evaluated, and a gate has judged nobody
    assert all(c.own_test.num_examples for c in keep.records[-1].clients)
    accepted = [leaf.leaf for leaf in keep.records[-1].leaves if leaf.gate.accepted]
    assert tuple(accepted) == trained(keep)[-1]


def test_too_few_participants_for_the_least_number_of_replies(small):
    with pytest.raises(ConfigError, match=r"must be at most 1, .* \(participation = 0.4\)"):
        small("hierarchy.participation=0.4", "runtime.min_clients_per_round=2")


def test_uniform_averaging_counts_clients_and_leaves_alike(small):
    weights = []
    real = cloud.step

    def step(state, models, examples, *args, **kwargs):
        weights.append(list(examples))
        return real(state, models, examples, *args, **kwargs)

    uneven = ("hierarchy.num_servers=2", "hierarchy.clients_per_server=[4, 2]")
    seen = []
    aggregate = LeafServer._aggregate

    def spy(self, server_round, updates, given, losses):
        seen.append(list(given.values()))
        return aggregate(self, server_round, updates, given, losses)

    with mock.patch.object(cloud, "step", step), mock.patch.object(LeafServer, "_aggregate", spy):
        run(small(*uneven, "hierarchy.averaging=uniform", "hierarchy.global_rounds=1"), [])
        assert weights == [[1, 1]]
        assert seen == [[1] * 4, [1] * 2]
        run(small(*uneven, "hierarchy.global_rounds=1"), [])
    assert weights[1][0] == sum(seen[2])
    assert len(set(seen[2])) > 1


def test_a_strategy_of_flowers_aggregates_at_the_leaf(small):
    plain, same, adam, refused = Keep(), Keep(), Keep(), "hierarchy.leaf_strategy=FedAdm"
    run(small(), [plain])
    run(small("hierarchy.leaf_strategy=FedAvg"), [same])
    for a, b in zip(
        plain.records[-1].cloud.global_model.values(),
        same.records[-1].cloud.global_model.values(),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    run(
        small("hierarchy.leaf_strategy=FedAdam", "hierarchy.leaf_strategy_options={eta = 0.01}"),
        [adam],
    )
    heads = [k.records[-1].cloud.global_model["head.weight"] for k in (plain, adam)]
    assert not np.allclose(*heads)
    assert np.isfinite(heads[1]).all()
    with pytest.raises(ConfigError, match="did you mean 'FedAdam'"):
        run_on_backend(small(refused), [])


@pytest.mark.parametrize("rule", ["scaffold", "pfedme"])
def test_scaffold_with_adam_makes_no_sense(small, rule):
    with pytest.raises(ConfigError, match=f"client_rule = '{rule}' says itself how"):
        small("hierarchy.leaf_strategy=FedAdam", f"hierarchy.client_rule={rule}")


def test_a_strategy_is_resumed_with_what_it_remembers(small):
    settings = small(
        "hierarchy.global_rounds=3", "hierarchy.leaf_strategy=FedAdam",
        "hierarchy.leaf_strategy_options={eta = 0.01}",
    )  # fmt: skip
    whole = run(settings, [TableWriter()])
    with pytest.raises(KeyboardInterrupt):
        run(settings, [TableWriter(), KilledInRound(3)])
    [killed] = (f for f in whole.folder.parent.iterdir() if f != whole.folder)

    with InProcessGrid(client_app, 2) as grid:
        Orchestrator(settings, grid, [TableWriter()], killed).run()
    assert files_of(killed) == files_of(whole.folder)


@pytest.mark.parametrize("features", ["head", "weights", "updates"])
def test_a_chosen_number_of_clusters(small, features):
    settings = small("cloud_cluster.method=agglomerative", f"cloud_cluster.features={features}")
    keep = Keep()
    run(settings, [keep])
    for record in keep.records:
        assert len(record.cloud.cluster_models) == 2
        assert record.cloud.similarity.shape == (3, 3)


# ------------------------------------------------------------------ the gate


def test_a_poisoned_cloud_model_is_rejected_and_the_leafs_survives(small):
    real = cloud.step

    def poisoned(state, *args, **kwargs):
        """Hand leaf server 1 the negative of its model, after the third round."""
        after = real(state, *args, **kwargs)
        if after.global_round != 3:
            return after
        bad = {name: -array for name, array in after.global_model.items() if "weight" in name}
        return replace(after, labels=(0, 1, 0), cluster_models=(
            after.global_model, {**after.global_model, **bad},
        ))  # fmt: skip

    rounds = ("hierarchy.global_rounds=4", "hierarchy.local_epochs=3", "cloud_cluster.enable=false")
    with mock.patch.object(cloud, "step", poisoned):
        kept = run(small(*rounds))
        taken = run(small(*rounds, "hierarchy.cluster_better_delta=-1.0"))
    decisions = pl.read_csv(kept.folder / "metrics/seed_42/server_1.csv").cast(float)
    decision = decisions.row(3, named=True)
    assert decision["gate_accepted"] == 0
    assert decision["gate_acc_new"] < decision["gate_acc_old"]
    assert decision["gate_acc_old"] == decisions["server_partition_accuracy"][2]
    assert decision["gate_acc_new"] == decisions["cloud_accuracy"][2]
    poisoned_leaf = taken.last.leaves[1]
    assert poisoned_leaf.gate.accepted
    assert kept.last.leaves[1].leaf_test.accuracy > poisoned_leaf.leaf_test.accuracy
    assert decisions["gate_accepted"][0] == 1
    assert np.isnan(decisions["gate_acc_old"][0])  # nothing to compare yet
    assert not poisoned_leaf.gate.judged


def test_the_closing_table_says_how_many_cloud_models_the_gate_accepted(small):
    """Those of a run that was resumed as well."""
    settings = small("hierarchy.global_rounds=4", "hierarchy.cluster_better_delta=0.02")
    keep, shown = Keep(), io.StringIO()
    console = ConsoleReporter(Console(file=shown, width=200))
    with pytest.raises(KeyboardInterrupt):
        run(settings, [TableWriter(), keep, KilledInRound(3)])
    [folder] = Path(settings.data.output_dir).iterdir()
    del keep.records[-1]  # done again
    with InProcessGrid(client_app, 2) as grid:
        Orchestrator(settings, grid, [TableWriter(), keep, console], folder).run()
    gates = [leaf.gate for record in keep.records[1:] for leaf in record.leaves]
    accepted = sum(gate.accepted for gate in gates)
    assert 0 < accepted < len(gates) == 9
    share = f"{accepted / 9:.0%}"
    assert f"accuracy gate: accepted {accepted} of 9 cloud models ({share})\n" in shown.getvalue()
    assert figures_of(read_run(folder, 42))["gate"] == accepted / 9


def test_without_a_gate_there_is_no_share_of_accepted_models(small):
    settings, shown = small("hierarchy.cluster_better_delta=-1.0"), io.StringIO()
    console = ConsoleReporter(Console(file=shown, width=200))
    folder = run(settings, [TableWriter(), console]).folder
    assert "mean leaf accuracy" in shown.getvalue()
    assert "accuracy gate" not in shown.getvalue()
    assert np.isnan(figures_of(read_run(folder, 42))["gate"])


# ------------------------------------------------------------------ FedProx's mu


@given(
    st.lists(st.floats(0, 1) | st.just(float("nan")), max_size=30),
    st.floats(0, 1),
    st.floats(0, 0.1),
    st.floats(0.1, 1),
)
def test_mu_decays_while_accuracy_is_stable(accuracies, mu, least, decay):
    h = Hierarchy(prox_mu=mu, prox_mu_min=least, prox_mu_decay=decay)
    values = [proximal_mu(accuracies[:n], h) for n in range(len(accuracies) + 1)]
    assert values[0] == mu
    for n, (before, after) in enumerate(pairwise(values)):
        stable = n > 0 and abs(accuracies[n] - accuracies[n - 1]) <= h.acc_stable_threshold
        expected = min(before, max(least, before * decay)) if stable else before
        assert after == expected
        assert min(mu, least) <= after <= mu


def test_mu_reaches_the_clients_of_a_round(small):
    from fedge_sim import records

    seen = []
    real = records.train_config

    def spy(settings, lr, prox_mu):
        seen.append(prox_mu)
        return real(settings, lr, prox_mu)

    with mock.patch.object(records, "train_config", spy):
        run(
            small(
                *("hierarchy.global_rounds=3", "hierarchy.prox_mu=0.1"),
                *("hierarchy.acc_stable_threshold=1.0", "hierarchy.prox_mu_min=0.085"),
            ),
            [],
        )
    assert seen == [0.1, 0.1, pytest.approx(0.09)]


# ------------------------------------------------------------------ when it ends


class Fake:
    """A record as the callbacks see it."""

    def __init__(self, accuracy):
        self.mean_client_accuracy = accuracy


def reasons(callback, settings, accuracies, done=()):
    callback.on_run_start(RunInfo(settings, None, None, 0, done))
    return [callback.on_round_end(Fake(accuracy)) for accuracy in accuracies]


def test_early_stopping_waits_its_patience_and_counts_from_the_best(small):
    settings = small("hierarchy.es_patience=2", "hierarchy.es_delta=0.01")
    told = reasons(EarlyStopping(), settings, [0.5, 0.6, 0.605, 0.62, 0.5, 0.629])
    assert told[:-1] == [None] * 5
    assert "0.6200 for 2 rounds" in told[-1]
    # a resumed run has waited as long
    again = reasons(EarlyStopping(), settings, [0.629], done=[0.5, 0.6, 0.605, 0.62, 0.5])
    assert again == told[-1:]
    off = small("hierarchy.es_patience=0")
    assert reasons(EarlyStopping(), off, [0.5] * 50) == [None] * 50


def test_target_accuracy_ends_a_run_when_it_is_reached(small):
    settings = small("hierarchy.target_accuracy=0.9")
    told = reasons(TargetAccuracy(), settings, [0.5, 0.89, 0.9])
    assert told[:2] == [None, None]
    assert "0.9000" in told[2]
    assert reasons(TargetAccuracy(), small(), [1.0]) == [None]


class EndsInRound(Callback):
    def __init__(self, number):
        self.number = number

    def on_round_end(self, record):
        return "enough" if record.global_round == self.number else None


def test_a_callback_ends_the_run_and_all_are_told(small):
    keep, tables = Keep(), TableWriter()
    ended = []

    class Told(Callback):
        def on_run_end(self, last):
            ended.append(last.global_round)

    result = run(small("hierarchy.global_rounds=5"), [EndsInRound(2), tables, keep, Told()])
    assert [record.global_round for record in keep.records] == [1, 2]
    assert ended == [result.last.global_round] == [2]
    history = json.loads((result.folder / "metrics/seed_42/cluster_history.json").read_text())
    assert len(history) == 2


def test_the_command_stops_early_and_says_why(small, tmp_path):
    assignments = ("hierarchy.target_accuracy=0.01", "hierarchy.global_rounds=3",
                   "hierarchy.local_epochs=1", "app.config.sample-rate-hz=20",
                   "app.config.window-stride-seconds=4.0")  # fmt: skip
    done = subprocess.run(
        command_line(
            *(part for a in assignments for part in ("--set", a)), "--output-dir", str(tmp_path)
        ),
        env=clean_environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ended after round 1: client accuracy" in done.stdout
