"""The result files: names, columns, values, and what a kill leaves."""

import csv
import json
import math
import os
import pty
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedge_sim.data import federated_data
from fedge_sim.errors import ConfigError
from fedge_sim.reporting.clusters import agreement, agreement_with_groups, new_in
from fedge_sim.reporting.tables import TableWriter, centralized_row, distributed_row
from fedge_sim.reporting.weights import WeightWriter
from fedge_sim.training.local import evaluate
from tests.conftest import ROOT, SMALL, Keep, clean_environment, command_line, run

COLUMNS = {
    "distributed_metrics.csv": "round avg_accuracy avg_loss accuracy_std loss_std acc_ci95_lo "
    "acc_ci95_hi loss_ci95_lo loss_ci95_hi total_bytes_up total_bytes_down total_comp_time_sec "
    "num_servers",
    "centralized_metrics.csv": "round central_train_loss central_train_accuracy central_test_loss "
    "central_test_accuracy central_loss_gap central_accuracy_gap conv_loss_rate conv_acc_rate "
    "conv_loss_stability conv_acc_stability",
    "server_0.csv": "round server_partition_accuracy server_partition_loss bytes_up bytes_down "
    "comp_time_sec round_time_sec",
}


def rows(file):
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def finished(small):
    """A finished run with two clusters in its last round, and the records of its rounds."""
    keep = Keep()
    settings = small("cloud_cluster.start_round=2", "cloud_cluster.tau=0.985")
    result = run(settings, [TableWriter(), WeightWriter(), keep])
    return result, keep.records, settings


def test_every_file_and_column(finished):
    result, records, _ = finished
    metrics = result.folder / "metrics" / "seed_42"
    for name, columns in COLUMNS.items():
        for file in metrics.glob(name.replace("_0", "_?")):
            table = rows(file)
            assert list(table[0])[: len(columns.split())] == columns.split()
            assert [row["round"] for row in table] == ["1", "2"]
    assert {f.name for f in metrics.iterdir()} == {
        *COLUMNS,
        "server_1.csv",
        "server_2.csv",
        "clients.csv",
        "cluster_history.json",
    }
    assert len(rows(metrics / "clients.csv")) == 18
    assert {f.name for f in (result.folder / "clusters").iterdir()} == {
        "clusters_g1.json",
        "clusters_g2.json",
        "similarity_matrix_g2.csv",  # clustering starts in round 2
    }
    history = json.loads((metrics / "cluster_history.json").read_text())
    assert [entry["clustered"] for entry in history] == [False, True]
    assert history[1]["labels"] == list(records[1].cloud.labels)
    matrix = np.loadtxt(
        result.folder / "clusters" / "similarity_matrix_g2.csv", delimiter=",", skiprows=1
    )
    np.testing.assert_allclose(matrix, records[1].cloud.similarity, rtol=1e-6)
    run_file = json.loads((result.folder / "run.json").read_text())
    assert run_file["settings"]["cloud_cluster"]["start_round"] == 2
    assert run_file["clients"][8]["server"] == 2


def test_the_history_says_what_became_of_the_clusters(finished):
    result, records, _ = finished
    metrics = result.folder / "metrics" / "seed_42"
    first, second = json.loads((metrics / "cluster_history.json").read_text())
    assert first["method"] == second["method"] == "cosine_similarity"
    assert (first["births"], first["deaths"]) == ([[0, 1, 2]], [])
    assert first["ari_previous"] is None
    assert second["births"] == sorted(second["clusters"].values())
    assert second["deaths"] == [[0, 1, 2]]
    assert second["ari_previous"] == 0.0  # to one cluster, anything is chance
    # clients 6, 7 and 8, those of leaf 2, carry the device the other way
    assert first["ari_truth"] == 0.0
    assert (second["ari_truth"] == 1.0) == (records[1].cloud.labels == (0, 0, 1))
    assert len(second["clusters"]) == 2
    table = rows(metrics / "distributed_metrics.csv")
    assert list(table[0])[-3:] == ["ari_truth", "gate_judged", "gate_accepted"]
    assert [float(row["ari_truth"]) for row in table] == [first["ari_truth"], second["ari_truth"]]


def test_without_planted_groups_there_is_no_truth(small):
    result = run(small("hierarchy.global_rounds=1", "app.config.partition=iid"), [TableWriter()])
    metrics = result.folder / "metrics" / "seed_42"
    assert json.loads((metrics / "cluster_history.json").read_text())[0]["ari_truth"] is None
    assert rows(metrics / "distributed_metrics.csv")[0]["ari_truth"] == "nan"


def test_births_deaths_and_agreement_by_hand():
    before, now = (0, 0, 1, 1, 2), (0, 0, 1, 2, 2)
    assert new_in(now, before) == [[2], [3, 4]]
    assert new_in(before, now) == [[2, 3], [4]]
    assert new_in(before, (1, 1, 0, 0, 5)) == []  # numbers do not matter
    assert agreement((0, 0, 1, 1), (1, 1, 0, 0)) == 1.0
    # Hubert, Arabie: pairs together in both 1, in each 2, of 10: (1 - .4) / (2 - .4)
    assert agreement(before, now) == pytest.approx(0.375)
    leaf_clients = ((0, 1), (2,), (3, 4))
    assert agreement_with_groups((0, 1, 1), leaf_clients, (0, 0, 1, 1, 1)) == 1.0
    assert agreement_with_groups((0, 1, 1), leaf_clients, (0, -1, 1, 1, -1)) == 1.0
    assert agreement_with_groups((0, 0, 0), leaf_clients, (0, 0, 1, 1, 1)) == 0.0
    assert agreement_with_groups((0, 0, 0), leaf_clients, (-1,) * 5) is None
    assert agreement_with_groups((0, 0, 0), leaf_clients, ()) is None


def test_values_of_the_tables(finished):
    result, records, _ = finished
    metrics = result.folder / "metrics" / "seed_42"
    record = records[1]
    accuracies = [leaf.leaf_test.accuracy for leaf in record.leaves]
    row = rows(metrics / "distributed_metrics.csv")[1]
    assert float(row["avg_accuracy"]) == pytest.approx(np.mean(accuracies))
    assert float(row["accuracy_std"]) == pytest.approx(np.std(accuracies, ddof=1))
    half = 4.302653 * np.std(accuracies, ddof=1) / math.sqrt(3)  # Student's t, 2 degrees, 97.5 %
    assert float(row["acc_ci95_hi"]) == pytest.approx(np.mean(accuracies) + half, rel=1e-6)
    # nine clients, one model each way
    model_bytes = int(rows(metrics / "clients.csv")[0]["bytes_up"])
    assert model_bytes > 4 * 23_174
    assert int(row["total_bytes_up"]) == 9 * model_bytes
    server = rows(metrics / "server_1.csv")[1]
    assert float(server["server_partition_accuracy"]) == accuracies[1]
    assert int(server["bytes_down"]) == 3 * model_bytes
    central = rows(metrics / "centralized_metrics.csv")
    change = float(central[1]["central_test_loss"]) - float(central[0]["central_test_loss"])
    assert float(central[1]["conv_loss_rate"]) == pytest.approx(change)
    assert central[0]["conv_loss_rate"] == "nan"


def test_convergence_columns_by_hand(finished):
    record = finished[1][1]
    losses = [9.0, 5.0, 4.0, 4.0, 3.0, 3.5, 3.0]
    row = centralized_row(record, losses, losses)
    assert row["conv_loss_rate"] == -0.5
    assert row["conv_loss_stability"] == pytest.approx(np.std([-1.0, 0.0, -1.0, 0.5, -0.5]))


def test_one_server_has_no_interval(small):
    one = run(small("hierarchy.num_servers=1", "hierarchy.clients_per_server=[2]")).last
    row = distributed_row(one)
    assert math.isnan(row["acc_ci95_lo"])
    assert row["avg_accuracy"] == one.leaves[0].leaf_test.accuracy


def test_models_load_as_their_note_says(finished):
    result, records, settings = finished
    folder = result.folder / "models"
    note = json.loads((folder / "models.json").read_text())
    state = records[1].cloud
    assert len(state.cluster_models) > 1
    assert set(note["clusters"]) == {f.name for f in folder.glob("cluster_*.safetensors")}
    expected = {"global": state.global_model}
    expected |= {f"cluster_{k}": model for k, model in enumerate(state.cluster_models)}
    for name, model in expected.items():
        loaded = load_file(folder / f"{name}.safetensors")
        assert {k: v.tobytes() for k, v in loaded.items()} == {
            k: v.tobytes() for k, v in model.items()
        }
    code = note["load"]
    for word, value in {
        "NAME": repr(note["name"]),
        "EXAMPLE_SHAPE": repr(note["example_shape"]),
        "NUM_CLASSES": repr(note["num_classes"]),
        "FILE": repr(str(folder / "global.safetensors")),
        "MEAN": repr(note["mean"]),
        "STD": repr(note["std"]),
    }.items():
        code = code.replace(word, value)
    data = federated_data(settings)
    scope = {"x": torch.tensor(data.dataset.x)}
    exec(code, scope)
    everything = np.arange(len(data.dataset))
    accuracy = np.mean(scope["logits"].argmax(1).numpy() == data.dataset.y)
    assert accuracy == pytest.approx(
        evaluate(scope["model"], data.examples(0), everything).accuracy, abs=1e-3
    )


def test_clusters_that_vanish_leave_no_file(small):
    # three clusters in round 1, and one in round 2, in which no clustering is due
    three = ("cloud_cluster.method=agglomerative", "cloud_cluster.num_clusters=3")
    result = run(small(*three, "cloud_cluster.frequency=2"))
    assert result.last.cloud.labels == (0, 0, 0)
    names = {f.name for f in (result.folder / "models").iterdir()}
    assert names == {"global.safetensors", "cluster_0.safetensors", "models.json"}


def test_a_run_never_writes_into_another(small):
    first, second = run(small()), run(small())
    assert first.folder != second.folder
    assert first.folder.parent == second.folder.parent


def test_a_folder_that_cannot_be_written_to(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"\[app.config\] output-dir = .*cannot be written to"):
        run(small(f"app.config.output-dir={tmp_path}/file/results"))


# ------------------------------------------------------------- the command line

SETS = [argument for override in SMALL for argument in ("--set", override)]


def test_a_log_and_a_closing_table_without_a_terminal(tmp_path):
    done = subprocess.run(
        command_line(*SETS, "--output-dir", "out"),
        cwd=tmp_path,
        env=clean_environment(SEED="43", PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "seed 43" in done.stdout
    assert "round 2/2  leaf accuracy" in done.stdout
    assert "mean client accuracy of the models handed back" in done.stdout
    assert "\x1b" not in done.stdout
    (folder,) = (tmp_path / "out").iterdir()
    assert f"results: {folder}" in done.stdout
    assert (folder / "metrics" / "seed_43").is_dir()


def test_a_progress_bar_on_a_terminal(tmp_path):
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        command_line(*SETS, "--output-dir", str(tmp_path)),
        cwd=ROOT,
        env=clean_environment(TERM="xterm", COLUMNS="140"),
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    screen = b""
    while True:
        try:
            screen += os.read(main, 65536)
        except OSError:  # the other end is closed
            break
    assert process.wait(60) == 0
    text = screen.decode()
    assert "round 2/2" in text
    assert "9/9 clients" in text
    assert "clusters {" in text
    assert "left" in text


def test_a_killed_run_keeps_all_finished_rounds(tmp_path):
    process = subprocess.Popen(
        command_line(*SETS, "--set", "hierarchy.global_rounds=500", "--output-dir", str(tmp_path)),
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 300
        tables = []
        while not tables or len(rows(tables[0])) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
            tables = list(tmp_path.glob("*/metrics/seed_42/distributed_metrics.csv"))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (folder,) = tmp_path.iterdir()
    finished = len(rows(folder / "metrics" / "seed_42" / "distributed_metrics.csv"))
    assert finished >= 3
    for i in range(3):
        assert len(rows(folder / "metrics" / "seed_42" / f"server_{i}.csv")) in (
            finished,
            finished - 1,  # killed between two files of the round
        )
    json.loads((folder / "metrics" / "seed_42" / "cluster_history.json").read_text())
    load_file(folder / "models" / "global.safetensors")
