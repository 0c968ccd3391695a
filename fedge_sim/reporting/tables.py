"""The result files: CSV and JSON, written after every round, so that a kill loses nothing."""

import csv
import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.special import stdtrit

from fedge_sim.cloud import CloudState
from fedge_sim.reporting.base import Callback, LeafRound, RoundRecord, RunInfo, mean_accuracy
from fedge_sim.reporting.clusters import agreement, agreement_with_groups, new_in

CONFIDENCE = 0.95
RATES_FOR_STABILITY = 5
DISTRIBUTED = "distributed_metrics.csv"


class TableWriter(Callback):
    """Writes ``run.json``, ``metrics/seed_<S>/`` and ``clusters/`` into the results folder."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._accuracies: list[float] = []

    def on_run_start(self, info: RunInfo) -> None:
        """Write down what is about to run; in a run that is resumed, read what was written."""
        self._metrics = info.folder / "metrics" / f"seed_{info.settings.seed}"
        if not info.accuracies:
            self._metrics.mkdir(parents=True)
            write_run(info)
        self._clusters = ClusterFiles(info)
        if info.accuracies:
            self._read_back()

    def _read_back(self) -> None:
        """Take in the rounds that are done."""
        with (self._metrics / "centralized_metrics.csv").open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                self._losses.append(float(row["central_test_loss"]))
                self._accuracies.append(float(row["central_test_accuracy"]))

    def on_round_end(self, record: RoundRecord) -> None:
        """Add the round to every file."""
        truth = self._clusters.write(record.global_round, record.cloud, record.simulated_seconds)
        row = distributed_row(record) | {"ari_truth": math.nan if truth is None else truth}
        append_rows(self._metrics / DISTRIBUTED, [row | gate_row(record)])
        self._losses.append(record.central_test.loss)
        self._accuracies.append(record.central_test.accuracy)
        central = centralized_row(record, self._losses, self._accuracies)
        append_rows(self._metrics / "centralized_metrics.csv", [central])
        for leaf in record.leaves:
            row = server_row(record, leaf)
            append_rows(self._metrics / f"server_{leaf.leaf}.csv", [row])
        append_rows(self._metrics / "clients.csv", client_rows(record))


class ClusterFiles:
    """``clusters/`` and ``cluster_history.json``: how the cloud grouped the leaf servers.

    Parameters
    ----------
    info : RunInfo
        Of a run that may be resumed: it has an accuracy for each of the cloud's steps that are
        done, whose files are read; what it wrote later is written anew.
    """

    def __init__(self, info: RunInfo) -> None:
        self._info = info
        self._folder = info.folder / "clusters"
        self._folder.mkdir(exist_ok=True)
        self._file = info.folder / "metrics" / f"seed_{info.settings.seed}" / "cluster_history.json"
        steps = range(1, len(info.accuracies) + 1)
        files = (self._folder / f"clusters_g{number}.json" for number in steps)
        self._history = [json.loads(file.read_text("utf-8")) for file in files]

    def write(self, number: int, state: CloudState, simulated_seconds: float) -> float | None:
        """Add the cloud's step of a number, from 1; return its agreement with planted groups."""
        settings, data = self._info.settings, self._info.data
        cluster = settings.cloud_cluster
        before = self._history[-1]["labels"] if self._history else []
        truth = agreement_with_groups(state.labels, settings.hierarchy.leaf_clients, data.groups)
        entry: dict[str, Any] = {
            "round": number,
            "clustered": state.similarity is not None,
            "num_clusters": len(state.cluster_models),
            "labels": list(state.labels),
            "clusters": {str(k): list(state.members(k)) for k in range(len(state.cluster_models))},
            "method": cluster.method if cluster.enable else "none",
            "births": new_in(state.labels, before),
            "deaths": new_in(before, state.labels),
            "ari_previous": agreement(state.labels, before) if before else None,
            "ari_truth": truth,
        }
        if not math.isnan(simulated_seconds):
            entry["simulated_seconds"] = simulated_seconds
        if state.similarity is not None:
            header = [f"server_{leaf}" for leaf in range(len(state.labels))]
            with (self._folder / f"similarity_matrix_g{number}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([header, *state.similarity.tolist()])
            entry["similarity"] = state.similarity.tolist()
        write_json(self._folder / f"clusters_g{number}.json", entry)
        self._history.append(entry)
        write_json(self._file, self._history)
        return truth


def write_run(info: RunInfo) -> None:
    """Write ``run.json``, what runs, and ``partition.json``; the second if clients are listed.

    Devices whose examples are drawn when they are used are too many for a list.
    """
    drawn = info.settings.devices.devices_per_leaf > 0
    write_json(
        info.folder / "run.json",
        {
            "settings": info.settings.model_dump(mode="json", by_alias=True),
            "num_parameters": info.num_parameters,
            "classes": info.data.classes,
            "dataset_sha256": info.data.content,
            "clients": [
                {
                    "client": client,
                    "server": leaf,
                    "num_train": info.data.num_train[client],
                    "num_test": info.data.num_test[client],
                }
                for leaf, clients in enumerate(info.settings.hierarchy.leaf_clients)
                for client in clients
                if not drawn
            ],
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("flwr", "numpy", "ray", "torch")},
            },
        },
    )
    if not drawn:
        write_json(info.folder / "partition.json", partition_of(info), indent=None)


def partition_of(info: RunInfo) -> dict[str, dict[str, Any]]:
    """Return the rows of the dataset by server and client, as ``partition-file`` takes them.

    All that were dealt out: the split follows from them, the seed and ``split``; or what is
    trained on and what is held out, where a file said that.
    """
    given, data = info.data.sides_given, info.data.clients
    return {
        str(leaf): {str(client): data[client].listed(given) for client in clients}
        for leaf, clients in enumerate(info.settings.hierarchy.leaf_clients)
    }


def distributed_row(record: RoundRecord) -> dict[str, Any]:
    """Return the round over all leaf servers: mean, deviation and 95 % interval.

    The first columns are of the leaves' own models, before the cloud step, each on the
    pooled test windows of its clients; ``cloud_*`` of the models that the cloud handed back,
    averaged over leaves, and ``client_*`` of those or the clients' own, over clients.
    """
    answered = [leaf for leaf in record.leaves if leaf.leaf_test.num_examples > 0]
    accuracy = mean_std_interval([leaf.leaf_test.accuracy for leaf in answered])
    loss = mean_std_interval([leaf.leaf_test.loss for leaf in answered])
    return {
        "round": record.global_round,
        "avg_accuracy": accuracy[0],
        "avg_loss": loss[0],
        "accuracy_std": accuracy[1],
        "loss_std": loss[1],
        "acc_ci95_lo": accuracy[2],
        "acc_ci95_hi": accuracy[3],
        "loss_ci95_lo": loss[2],
        "loss_ci95_hi": loss[3],
        "total_bytes_up": sum(c.bytes_up for c in record.clients),
        "total_bytes_down": sum(c.bytes_down for c in record.clients),
        "total_comp_time_sec": sum(c.seconds for c in record.clients),
        "num_servers": len(record.leaves),
        "cloud_avg_accuracy": mean_accuracy(leaf.cloud_test for leaf in record.leaves),
        "client_avg_accuracy": record.mean_client_accuracy,
        "num_clusters": len(record.cloud.cluster_models),
        "lr": record.lr,
        "simulated_seconds": record.simulated_seconds,
        "num_lost": sum(c.lost for c in record.clients),
    }


def gate_row(record: RoundRecord) -> dict[str, int]:
    """Return how many of the cloud's models of the round before the gates judged, and accepted."""
    judged = [leaf.gate for leaf in record.leaves if leaf.gate.judged]
    return {
        "gate_judged": len(judged),
        "gate_accepted": sum(gate.accepted for gate in judged),
    }


def gate_decisions(metrics: Path) -> tuple[int, int]:
    """Return how many of the cloud's models a run's gates judged, and how many they accepted.

    Raises
    ------
    OSError, ValueError, polars.exceptions.PolarsError
        If the table of that is missing or damaged.
    """
    table = pl.read_csv(metrics / DISTRIBUTED, columns=["gate_judged", "gate_accepted"])
    return int(table["gate_judged"].sum()), int(table["gate_accepted"].sum())


def centralized_row(
    record: RoundRecord, losses: Sequence[float], accuracies: Sequence[float]
) -> dict[str, Any]:
    """Return the average of all leaves on all windows, and how it converges.

    A rate is the change of the test value since the round before; stability is the standard
    deviation of the last 5 rates. Both are nan where there is no earlier round.

    Parameters
    ----------
    record : RoundRecord
    losses, accuracies : sequence of float
        Central test values of all rounds so far, this one included.
    """
    train, test = record.central_train, record.central_test
    loss_rate, loss_stability = _convergence(losses)
    acc_rate, acc_stability = _convergence(accuracies)
    return {
        "round": record.global_round,
        "central_train_loss": train.loss,
        "central_train_accuracy": train.accuracy,
        "central_test_loss": test.loss,
        "central_test_accuracy": test.accuracy,
        "central_loss_gap": test.loss - train.loss,
        "central_accuracy_gap": train.accuracy - test.accuracy,
        "conv_loss_rate": loss_rate,
        "conv_acc_rate": acc_rate,
        "conv_loss_stability": loss_stability,
        "conv_acc_stability": acc_stability,
        "simulated_seconds": record.simulated_seconds,
    }


def server_row(record: RoundRecord, leaf: LeafRound) -> dict[str, Any]:
    """Return one leaf server's round; ``server_partition_*`` is before the cloud step.

    ``simulated_seconds`` is when the global round ended, here and in the other tables, on the
    virtual clock; nan without one.

    ``round_time_sec`` is the wall time of the global round, in which all leaves train at once.
    """
    return {
        "round": record.global_round,
        "server_partition_accuracy": leaf.leaf_test.accuracy,
        "server_partition_loss": leaf.leaf_test.loss,
        "bytes_up": sum(c.bytes_up for c in leaf.clients),
        "bytes_down": sum(c.bytes_down for c in leaf.clients),
        "comp_time_sec": sum(c.seconds for c in leaf.clients),
        "round_time_sec": record.seconds,
        "cloud_accuracy": leaf.cloud_test.accuracy,
        "cloud_loss": leaf.cloud_test.loss,
        "cluster": leaf.cluster,
        "gate_accepted": int(leaf.gate.accepted),
        "gate_acc_old": leaf.gate.acc_old,
        "gate_acc_new": leaf.gate.acc_new,
        "simulated_seconds": record.simulated_seconds,
        "num_lost": sum(c.lost for c in leaf.clients),
    }


def client_rows(record: RoundRecord) -> list[dict[str, Any]]:
    """Return one row for each client of the round."""
    return [
        {
            "round": record.global_round,
            "server": client.leaf,
            "client": client.client,
            "cluster": leaf.cluster,
            "num_train": client.num_train,
            "num_test": client.leaf_test.num_examples,
            "train_loss": client.train_loss,
            "leaf_accuracy": client.leaf_test.accuracy,
            "leaf_loss": client.leaf_test.loss,
            "cloud_accuracy": client.cloud_test.accuracy,
            "cloud_loss": client.cloud_test.loss,
            "global_accuracy": client.global_test.accuracy,
            "global_loss": client.global_test.loss,
            "bytes_up": client.bytes_up,
            "bytes_down": client.bytes_down,
            "comp_time_sec": client.seconds,
            "own_accuracy": client.own_test.accuracy,
            "own_loss": client.own_test.loss,
            "own_train_accuracy": client.own_train.accuracy,
            "own_train_loss": client.own_train.loss,
            "simulated_seconds": record.simulated_seconds,
            "waited_simulated_sec": client.simulated_seconds,
            "fate": client.fate,
            "num_lost": client.lost,
        }
        for leaf in record.leaves
        for client in leaf.clients
    ]


def write_json(file: Path, value: object, indent: int | None = 1) -> None:
    """Write JSON aside and rename it, so that a reader never sees half a file."""
    aside = file.with_suffix(".tmp")
    aside.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
    aside.replace(file)


def append_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows, at least one, to a CSV file; a new one begins with their keys."""
    is_new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def mean_std_interval(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Return mean, sample deviation, and Student's t interval; nan for one value."""
    n = len(values)
    mean = float(np.mean(values)) if values else math.nan
    if n < 2:
        return mean, math.nan, math.nan, math.nan
    std = float(np.std(values, ddof=1))
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * std / math.sqrt(n)
    return mean, std, mean - half, mean + half


def _convergence(values: Sequence[float]) -> tuple[float, float]:
    rates = np.diff(values)
    if len(rates) == 0:
        return math.nan, math.nan
    return float(rates[-1]), float(np.std(rates[-RATES_FOR_STABILITY:]))
