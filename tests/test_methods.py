"""Every method of the registry: it learns, repeats itself, can be resumed, and is one everywhere.

A new method joins by its line in ``fedge_sim.methods``.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import polars as pl
import pytest

from fedge_sim import checkpoint, records
from fedge_sim.algorithms.personal import personal_names
from fedge_sim.client_app import app as client_app
from fedge_sim.config import load_settings
from fedge_sim.errors import CheckpointError, ConfigError
from fedge_sim.member import is_stateful, keeps_a_model
from fedge_sim.methods import METHODS
from fedge_sim.models import build_model
from fedge_sim.orchestrator import Orchestrator, resume
from fedge_sim.reporting.base import Callback
from fedge_sim.reporting.tables import TableWriter
from fedge_sim.reporting.timeline import TimelineWriter
from fedge_sim.reporting.weights import WeightWriter
from fedge_sim.runtime.in_process import InProcessGrid
from fedge_sim.runtime.turns import send_in_turn
from tests.conftest import Keep, clean_environment, command_line, ray_grid, run
from tests.test_flower import TIME_COLUMNS

CLIENTS = (3, 3, 3)
# Beside the methods, CFL where five of nine leaf servers are drawn in a round, and split.
SUITE = {name: method.assignments(CLIENTS) for name, method in METHODS.items()} | {
    "cfl, drawn": [
        *METHODS["cfl"].assignments(CLIENTS),
        *("hierarchy.participation=0.5", "cloud_cluster.eps_1=9.0", "cloud_cluster.eps_2=0.1"),
    ]
}


@pytest.fixture(params=SUITE)
def method(request, small):
    """Return a function from overrides to the settings of each method in turn."""

    def settings(*more: str):
        return small(*SUITE[request.param], *more)

    settings.name = request.param
    return settings


def outcome(records):
    """Return what a run came to, but for times: models and each client's evaluations, as bytes."""
    models = [
        {name: array.tobytes() for name, array in model.items()}
        for model in (records[-1].cloud.global_model, *records[-1].cloud.cluster_models)
    ]
    evaluations = [
        (c.client, c.leaf_test, c.cloud_test, c.own_test, c.own_train, c.bytes_up, c.bytes_down)
        for record in records
        for c in record.clients
    ]
    return models, repr(evaluations), [record.cloud.labels for record in records]


def outcome_of(settings, workers=2):
    keep = Keep()
    run(settings, [keep], workers)
    return outcome(keep.records)


def test_it_learns(method, saved):
    """Six classes, each loud on a channel of its own, dealt out evenly."""
    rng = np.random.default_rng(0)
    y = np.arange(1080) % 6
    x = rng.normal(0, 1, (1080, 6, 20)) + 1.5 * np.eye(6)[y][:, :, None]
    toy = saved({"X": x, "y": y}, "toy")
    settings = method(
        *("app.config.dataset=arrays", f"app.config.data-root='{toy}'", "app.config.partition=iid"),
        *("app.config.num-classes=0", "hierarchy.global_rounds=4", "hierarchy.local_epochs=2"),
        "hierarchy.lr_init=0.02",
    )
    keep = Keep()
    run(settings, [keep])
    assert keep.records[-1].mean_client_accuracy > 0.8


def test_it_repeats_itself_whatever_the_number_of_threads(method):
    assert outcome_of(method(), workers=1) == outcome_of(method(), workers=3)


class KilledInRound(Callback):
    """Ends the run when the results of a round are written, and its checkpoint is not."""

    def __init__(self, number):
        self.number = number

    def on_round_end(self, record):
        if record.global_round == self.number:
            raise KeyboardInterrupt


def files_of(folder: Path):
    """Return all results but for times: rows of each CSV, text of each JSON, bytes of models."""
    content = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.suffix == ".csv" and file.name != "timeline.csv":
            table = pl.read_csv(file, infer_schema_length=None)
            content[name] = table.drop(TIME_COLUMNS, strict=False).rows()
        elif file.suffix == ".json" and file.name not in ("run.json", "workers.json"):
            content[name] = file.read_text()
        elif file.parent.name == "models":
            content[name] = file.read_bytes()
    return content


def test_it_is_resumed_to_the_same_bytes(method):
    settings = method("hierarchy.global_rounds=3", "hierarchy.server_rounds_per_global=2")
    callbacks = [TableWriter(), WeightWriter(), TimelineWriter()]
    keep = Keep()
    whole = run(settings, [*callbacks, keep])
    with pytest.raises(KeyboardInterrupt):
        run(settings, [TableWriter(), WeightWriter(), TimelineWriter(), KilledInRound(2)])
    [killed] = (f for f in whole.folder.parent.iterdir() if f != whole.folder)
    assert len(pl.read_csv(killed / "metrics/seed_42/centralized_metrics.csv")) == 2
    after = Keep()
    with InProcessGrid(client_app, 2) as grid:
        callbacks = [TableWriter(), WeightWriter(), TimelineWriter(), after]
        Orchestrator(settings, grid, callbacks, killed).run()
    assert [record.global_round for record in after.records] == [2, 3]
    assert outcome(after.records) == outcome(keep.records[1:])
    assert files_of(killed) == files_of(whole.folder)


@pytest.fixture(scope="module")
def two_cores(start_ray):
    with start_ray(num_cpus=2):
        yield


def test_it_is_the_same_on_actors(method, two_cores):
    settings, keep = method("runtime.num_workers=2"), Keep()
    with ray_grid(settings) as grid:
        Orchestrator(grid.settings, grid, [keep]).run()
    assert outcome(keep.records) == outcome_of(settings)


FLOWER = """
import json, sys
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation
from fedge_sim.client_app import app as client_app
from fedge_sim.config import settings_from_json
from fedge_sim.orchestrator import Orchestrator
from tests.conftest import Keep
from tests.test_methods import outcome

server_app, outcomes = ServerApp(), []

@server_app.main()
def main(grid, context):
    for text in json.load(open(sys.argv[1])):
        keep = Keep()
        Orchestrator(settings_from_json(text), grid, [keep]).run()
        outcomes.append(repr(outcome(keep.records)))

run_simulation(server_app=server_app, client_app=client_app, num_supernodes=2,
               backend_config={"client_resources": {"num_cpus": 1.0}})
json.dump(outcomes, open(sys.argv[2], "w"))
"""


def test_all_are_the_same_on_flowers_own_runtime(small, tmp_path):
    """Clients' states are in Flower's contexts there; one simulation runs all methods in turn."""
    all_settings = [small(*assignments) for assignments in SUITE.values()]
    asked, told = tmp_path / "settings.json", tmp_path / "outcomes.json"
    asked.write_text(json.dumps([settings.to_json() for settings in all_settings]))
    done = subprocess.run(
        [sys.executable, "-c", FLOWER, str(asked), str(told)],
        capture_output=True,
        text=True,
        timeout=600,
        env=clean_environment(FLWR_TELEMETRY_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0"),
    )
    assert told.exists(), done.stderr[-4000:]
    for name, settings, got in zip(SUITE, all_settings, json.loads(told.read_text()), strict=True):
        assert got == repr(outcome_of(settings)), name


# ------------------------------------------------------------------ what sets each apart


def test_local_training_sends_nothing_and_no_client_learns_from_another(small):
    settings = small(*METHODS["local"].assignments((3, 3, 3)))
    alone = Keep()
    run(settings, [alone])
    assert all(c.bytes_up == c.bytes_down == 0 for c in alone.records[-1].clients)
    # Who trains beside it makes no difference to a client.
    half = small(*METHODS["local"].assignments((3, 3, 3)), "hierarchy.averaging='uniform'")
    other = Keep()
    run(half, [other])
    assert outcome(alone.records)[1] == outcome(other.records)[1]


def test_centralised_training_is_one_clients_on_all_examples(small):
    keep = Keep()
    run(small(*METHODS["centralised"].assignments((3, 3, 3))), [keep])
    [record, _] = keep.records
    assert [c.client for c in record.clients if c.seconds] == [0]
    assert not any(c.bytes_up or c.bytes_down for c in record.clients)  # no model is moved
    assert all(c.own_test.num_examples for c in record.clients)


def test_fedbn_keeps_only_batchnorm_with_the_client(small):
    settings = small(*METHODS["fedbn"].assignments((3, 3, 3)))
    result = run(settings, [TableWriter()])
    layout = json.loads((result.folder / "state" / "layout.json").read_text())[1]
    names = {name for name, _, _ in layout}
    assert names == personal_names("fedbn", build_model("cnn1d", (6, 40), 6))
    assert {n.rpartition(".")[2] for n in names} == {
        *("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    plain = run(small(*METHODS["fedavg"].assignments((3, 3, 3))), [])
    fewer = result.last.clients[0].bytes_up
    assert 0 < fewer < plain.last.clients[0].bytes_up


def test_fedbn_needs_a_model_with_batchnorm(small):
    settings = small(*METHODS["fedbn"].assignments((3, 3, 3)), "app.config.model=mlp")
    with pytest.raises(ConfigError, match="model 'mlp' has none"):
        run(settings, [])


def test_pfedme_evaluates_personal_models_beside_the_shared_one(small):
    keep = Keep()
    run(small(*METHODS["pfedme"].assignments((3, 3, 3))), [keep])
    clients = keep.records[-1].clients
    assert all(c.own_test != c.cloud_test for c in clients)
    assert np.mean([c.own_test.accuracy for c in clients]) > np.mean(
        [c.cloud_test.accuracy for c in clients]
    )


def test_which_methods_keep_what():
    settings = {
        name: load_settings(assignments=method.assignments((3, 3, 3)))
        for name, method in METHODS.items()
    }
    assert {n for n, s in settings.items() if is_stateful(s)} == {
        *("scaffold", "pfedme", "fedbn", "local")
    }
    assert {n for n, s in settings.items() if keeps_a_model(s)} == {"pfedme", "fedbn", "local"}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_itself_whatever_a_file_says(name):
    other = [
        *("hierarchy.scaffold_enabled=true", "hierarchy.leaf_strategy=FedAdam"),
        *("cloud_cluster.enable=false", "cloud_cluster.method=agglomerative"),
    ]
    method = METHODS[name]
    plain, set_otherwise = (
        load_settings(assignments=[*before, *method.assignments((3, 3, 3))])
        for before in ([], other)
    )
    assert set_otherwise.hierarchy == plain.hierarchy
    if plain.cloud_cluster.enable:
        assert set_otherwise.cloud_cluster == plain.cloud_cluster
    else:
        assert not set_otherwise.cloud_cluster.enable


def test_only_fedge_judges_the_clouds_models(method):
    keep = Keep()
    run(method(), [keep])
    leaves = [leaf for record in keep.records for leaf in record.leaves]
    trained = [leaf.gate for leaf in leaves if any(client.seconds for client in leaf.clients)]
    assert sum(leaf.gate.judged for leaf in leaves) == (3 if method.name == "fedge" else 0)
    assert all(gate.accepted for gate in trained if not gate.judged)


def test_a_hierarchy_without_clusters_is_one_model(small):
    """HierFL averages twice by examples, which is FedAvg's average, in every round."""
    common = ("hierarchy.global_rounds=4", "hierarchy.prox_mu=0.0")
    flat, hierarchy = Keep(), Keep()
    run(small(*METHODS["fedavg"].assignments((3, 3, 3)), *common), [flat])
    run(small(*METHODS["hierfl"].assignments((3, 3, 3)), *common), [hierarchy])
    for one, other in zip(flat.records, hierarchy.records, strict=True):
        for name, array in one.cloud.global_model.items():
            ours = other.cloud.global_model[name]
            np.testing.assert_allclose(ours, array, atol=1e-3, err_msg=name)


def test_fedprox_keeps_mu(small):
    seen, real = [], records.train_config

    def spy(settings, lr, prox_mu):
        seen.append(prox_mu)
        return real(settings, lr, prox_mu)

    stable = ("hierarchy.global_rounds=4", "hierarchy.acc_stable_threshold=1.0")
    with mock.patch.object(records, "train_config", spy):
        run(small(*METHODS["fedprox"].assignments((3, 3, 3)), *stable), [])
    assert seen == [0.01] * 4


# ------------------------------------------------------------------ Flower's nodes, in turn


class Nodes:
    """A Grid whose nodes reply one poll later."""

    def __init__(self):
        self.at_work, self.most, self.log = {}, 0, []

    def push_messages(self, messages):
        [message] = messages
        node = message.metadata.dst_node_id
        assert node not in [m.metadata.dst_node_id for m in self.at_work.values()]
        name = f"{len(self.log)}"
        self.log.append((node, message.content))
        self.at_work[name] = message
        return [name]

    def pull_messages(self, ids):
        done, self.at_work = self.at_work, {}
        assert set(done) == set(ids)
        return [
            SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id=i), of=m.content)
            for i, m in done.items()
        ]


def test_a_node_gets_its_next_message_when_it_has_replied():
    messages = [
        SimpleNamespace(metadata=SimpleNamespace(dst_node_id=node), content=content)
        for node, content in ((1, "a"), (2, "b"), (1, "c"))
    ]
    grid = Nodes()
    assert sorted(reply.of for reply in send_in_turn(grid, messages)) == ["a", "b", "c"]
    assert grid.log == [(1, "a"), (2, "b"), (1, "c")]
    assert send_in_turn(grid, []) == []


# ------------------------------------------------------------------ resuming, by command


def test_a_killed_run_is_resumed_by_command(small, tmp_path):
    """SIGKILL in the middle of a run of SCAFFOLD; then ``--resume``."""
    assignments = [
        *("--set", "hierarchy.client_rule=scaffold", "--set", "runtime.training=reference"),
        *("--set", "app.config.sample-rate-hz=20", "--set", "hierarchy.local_epochs=1"),
        *("--set", "app.config.window-stride-seconds=4.0", "--set", "hierarchy.global_rounds=6"),
    ]
    environment = clean_environment()

    def start(*args):
        return subprocess.Popen(
            command_line(*args), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip

    whole = start(*assignments, "--output-dir", str(tmp_path / "whole"))
    whole.communicate(timeout=300)
    assert whole.returncode == 0
    killed = start(*assignments, "--output-dir", str(tmp_path / "killed"))
    for line in killed.stdout:
        if "round 2/6" in line:
            break
    killed.kill()
    killed.communicate()
    [folder] = (tmp_path / "killed").iterdir()
    again = start("--resume", str(folder))
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    [expected] = (tmp_path / "whole").iterdir()
    assert files_of(folder) == files_of(expected)
    assert "resumed after round" in output
    with pytest.raises(CheckpointError, match="the run is finished"):
        resume(folder, lambda _: [])


def test_what_cannot_be_resumed_is_said(small, tmp_path):
    with pytest.raises(ConfigError, match="is no results folder"):
        resume(tmp_path, lambda _: [])
    settings = small("hierarchy.global_rounds=3")
    with pytest.raises(KeyboardInterrupt):
        run(settings, [TableWriter(), KilledInRound(2)])
    [folder] = Path(settings.data.output_dir).iterdir()
    for more, message in (
        ("app.config.seed=43", r"began with app\.config\.seed = 42, now 43"),
        ("hierarchy.client_rule=scaffold", r'client_rule = "sgd", now "scaffold"'),
    ):
        other = small("hierarchy.global_rounds=3", more)
        with InProcessGrid(client_app, 2) as grid, pytest.raises(CheckpointError, match=message):
            Orchestrator(other, grid, [], folder).run()
    with checkpoint.at_work(folder), pytest.raises(CheckpointError, match="another process"):
        resume(folder, lambda _: [])
    file = folder / checkpoint.NAME
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="damaged"):
        resume(folder, lambda _: [])
    done = subprocess.run(
        command_line("--resume", str(folder), "--set", "app.config.seed=1"),
        env=clean_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no other option goes with it" in done.stderr
