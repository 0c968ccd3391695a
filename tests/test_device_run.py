"""Runs of versions: the real loop, over real grids, against strictly sequential processing."""

import gc
import hashlib
import json
import math
import subprocess
import sys

import numpy as np
import polars as pl
import psutil
import pytest
from flwr.app import MetricRecord

from fedge_sim import checkpoint, client_app, device_run, records
from fedge_sim.config import load_settings
from fedge_sim.device_run import DeviceRun
from fedge_sim.errors import CheckpointError, RoundError
from fedge_sim.orchestrator import resume
from fedge_sim.reporting.base import Callback
from fedge_sim.reporting.stopping import TargetAccuracy
from fedge_sim.reporting.versions import VersionWriter
from fedge_sim.reporting.weights import WeightWriter
from fedge_sim.runtime.in_process import InProcessGrid
from fedge_sim.runtime.trainings import Start, Trainings
from tests.conftest import clean_environment, ray_grid

DEVICES = [
    *("app.config.dataset=digits", "app.config.num-classes=10", "app.config.model=mlp"),
    *("app.config.partition=dirichlet", "hierarchy.num_servers=2", "hierarchy.prox_mu=0.0"),
    *("hierarchy.server_lr=0.5", "cloud_cluster.enable=false", "runtime.training=single"),
    *("runtime.compile=false", "devices.enable=true", "devices.devices_per_leaf=20"),
    *("devices.subset_size=40", "devices.local_iters=3", "devices.device_selection_size=8"),
    *("devices.num_updates_for_model=2", "devices.max_model_version=8"),
    'devices.device_speed={distribution="exponential", mean=[1.0, 3.0]}',
    "devices.communication_delay={mean=0.1, std=0.02}",
]
REVIVE = [
    *("fedrevive.freeze_versions=1", "fedrevive.warmup_versions=2", "fedrevive.generator_steps=2"),
    *("fedrevive.generator_width=4", "fedrevive.synthesis_batch_size=8", "fedrevive.kd_steps=2"),
    *("fedrevive.kd_batch_size=8", "fedrevive.noise_size=8", "asynchronous.beta_factor=2.0"),
    "fedrevive.batch_norm=0.0",
]
RULES = {
    "fedavg": ["asynchronous.rule=fedavg", "devices.num_updates_for_model=0"],
    "fedasync": [
        *("asynchronous.rule=fedasync", "asynchronous.staleness=polynomial"),
        *("devices.num_updates_for_model=1", "hierarchy.server_lr=1.0"),
    ],
    "fedbuff": ["asynchronous.rule=fedbuff"],
    "downweight": ["asynchronous.rule=downweight", "asynchronous.beta_factor=2.0"],
    "fedrevive": ["asynchronous.rule=fedrevive", *REVIVE],
    "leaf": [
        *("asynchronous.rule=fedbuff", "asynchronous.server=leaf", "asynchronous.cloud_versions=3"),
        "devices.leaf_cloud_bandwidth={down=1e5, up=1e5}",
    ],
}
# Of one server for each leaf: the rules that keep something, or weigh by staleness.
RULES |= {
    f"leaf {rule}": [*RULES["leaf"], *RULES[rule]]
    for rule in ("fedavg", "fedasync", "downweight", "fedrevive")
}
FALLING = ["hierarchy.prox_mu=0.4", "hierarchy.prox_mu_decay=0.5", "hierarchy.prox_mu_min=0.1"]
FALLING += ["hierarchy.acc_stable_threshold=1.0", "devices.eval_frequency=2"]
RULES |= {"falling mu": [*RULES["fedbuff"], *FALLING]}
LIGHT = ["fedrevive.variant=light", "fedrevive.unlabelled_data=unlabelled.npz"]
RULES |= {"light": [*RULES["fedrevive"], *LIGHT]}


class Models(Callback):
    """Keeps what a run tells, and the newest model of each server at each version."""

    def __init__(self):
        self.versions, self.held_out, self.steps, self.left = [], [], [], []

    def on_version(self, record):
        self.versions.append(record)

    def on_held_out(self, record):
        self.held_out.append(record)

    def on_cloud_step(self, event, state):
        self.steps.append((event, state))

    def on_versions_end(self, state, left):
        self.left = left


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("unlabelled.npz", x=np.random.default_rng(0).random((64, 1, 8, 8), np.float32))

    def make(*assignments, base=DEVICES):
        output = f"app.config.output-dir={tmp_path / 'results'}"
        return load_settings(assignments=[output, *base, *assignments])

    return make


def follow(
    settings, workers=2, ahead=None, cohort=1, app=client_app.app, callbacks=(), folder=None
):
    """Run in this process; return what was told and the servers' last models."""
    told = Models()
    together = client_app.answer_together if cohort > 1 else None
    with InProcessGrid(
        app, workers, settings.runtime, together=together, cohort_size=cohort
    ) as grid:
        run = DeviceRun(settings, grid, [told, *callbacks], folder, ahead)
        run.run()
    return told, [server.model.arrays for server in run._servers]


def same(a, b):
    return all(
        {n: x.tobytes() for n, x in one.items()} == {n: x.tobytes() for n, x in other.items()}
        for one, other in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("rule", RULES)
def test_parallel_is_strictly_sequential_to_the_last_byte(settings, rule):
    made = settings(*RULES[rule])
    one, one_models = follow(made, workers=1, ahead=0)
    two, two_models = follow(made, workers=2)
    assert same(one_models, two_models)
    assert [r.event for r in one.versions] == [r.event for r in two.versions]
    assert [r.train_loss for r in one.versions] == [r.train_loss for r in two.versions]
    assert [h.test for h in one.held_out] == [h.test for h in two.held_out]
    stale = [r.event.version - 1 - j.version for r in one.versions for j in r.event.jobs]
    assert (max(stale) > 0) == (rule != "fedavg")


JOB = ["app.config.model=cnn2d-small", "hierarchy.optimizer=adam", "hierarchy.lr_init=0.0003"]


@pytest.mark.parametrize(
    ("rule", "more"), [("fedbuff", []), ("fedavg", []), ("leaf", []), ("fedbuff", JOB)]
)
def test_cohorts_are_sequential_to_1e_5_and_the_same_each_time(settings, monkeypatch, rule, more):
    together = []

    def answer(messages, *rest):
        together.append(len(messages))
        return answer_together(messages, *rest)

    answer_together = client_app.answer_together
    monkeypatch.setattr(client_app, "answer_together", answer)
    made = settings(*RULES[rule], *more, "runtime.training=cohort", "runtime.cohort_size=4")
    _, one = follow(settings(*RULES[rule], *more), workers=1, ahead=0)
    _, cohorts = follow(made, workers=2, cohort=4)
    _, again = follow(made, workers=2, cohort=4)
    assert max(together) == 4
    assert same(cohorts, again)
    for alone, model in zip(one, cohorts, strict=True):
        for name, array in alone.items():
            np.testing.assert_allclose(model[name], array, atol=1e-5)


def test_actors_do_as_threads_do(settings, start_ray):
    made = settings(*RULES["fedbuff"], "runtime.num_workers=2", "runtime.backend=ray")
    _, here = follow(made)
    with start_ray(num_cpus=2), ray_grid(made) as grid:
        run = DeviceRun(grid.settings, grid)
        run.run()
    assert same(here, [server.model.arrays for server in run._servers])


FLOWER = """
import json, sys
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation
from fedge_sim.client_app import app as client_app
from fedge_sim.config import settings_from_json
from fedge_sim.device_run import DeviceRun
from tests.test_device_run import digests

server_app, found = ServerApp(), []

@server_app.main()
def main(grid, context):
    for text in json.load(open(sys.argv[1])):
        run = DeviceRun(settings_from_json(text), grid)
        run.run()
        found.append(digests([server.model.arrays for server in run._servers]))

run_simulation(server_app=server_app, client_app=client_app, num_supernodes=2,
               backend_config={"client_resources": {"num_cpus": 1.0}})
json.dump(found, open(sys.argv[2], "w"))
"""


def digests(models):
    return [
        hashlib.sha256(b"".join(model[name].tobytes() for name in sorted(model))).hexdigest()
        for model in models
    ]


def test_flowers_own_runtime_does_as_threads_do(settings, tmp_path):
    all_settings = [settings(*RULES[rule]) for rule in ("fedbuff", "leaf")]
    asked, told = tmp_path / "settings.json", tmp_path / "digests.json"
    asked.write_text(json.dumps([each.to_json() for each in all_settings]))
    done = subprocess.run(
        [sys.executable, "-c", FLOWER, str(asked), str(told)],
        capture_output=True,
        text=True,
        timeout=300,
        env=clean_environment(FLWR_TELEMETRY_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0"),
    )
    assert told.exists(), done.stderr[-4000:]
    here = [digests(follow(each)[1]) for each in all_settings]
    assert json.loads(told.read_text()) == here


@pytest.mark.parametrize("times", [10.0, 1e7])  # years, were any of it waited for
def test_slower_devices_take_simulated_time_and_change_nothing_else(settings, times):
    fast, one = follow(settings(*RULES["fedbuff"], "devices.job_timeout=0.0"))
    means = f"mean=[{times}, {3 * times}]"
    slower = [
        f'devices.device_speed={{distribution="exponential", {means}}}',
        f"devices.communication_delay={{mean={0.1 * times}, std={0.02 * times}}}",
        *("devices.job_timeout=0.0", f"devices.update_timeout={500 * times}"),
    ]
    slow, ten = follow(settings(*RULES["fedbuff"], *slower))
    assert same(one, ten)
    made = [np.array([r.event.time for r in told.versions]) for told in (fast, slow)]
    np.testing.assert_allclose(made[1], times * made[0])


def test_equal_devices_that_all_wait_are_fedavg(settings):
    """FedBuff of as many updates as there are devices at work, all of one version."""
    equal = [
        *(
            'devices.device_speed={distribution="constant", mean=1.0}',
            "devices.max_model_version=3",
        ),
        "devices.communication_delay={}",
    ]
    whole = ["devices.num_updates_for_model=8", "devices.min_hole_to_fill=8"]
    buffered, one = follow(settings(*RULES["fedbuff"], *equal, *whole))
    rounds, two = follow(settings(*RULES["fedavg"], *equal))
    assert [r.event.time for r in buffered.versions] == [1.0, 2.0, 3.0]
    assert [r.event.time for r in rounds.versions] == [1.0, 2.0, 3.0]
    clients = [{j.client for r in t.versions for j in r.event.jobs} for t in (buffered, rounds)]
    assert clients[0] == clients[1]
    for name, array in one[0].items():
        np.testing.assert_allclose(two[0][name], array, atol=1e-6)


def test_lost_jobs_cost_no_real_work(settings):
    trained = []

    def app(message, context):
        if message.metadata.message_type == "train":
            trained.append(records.config_of(message)[records.JOB])
        return client_app.app(message, context)

    told, _ = follow(
        settings(*RULES["fedavg"], "devices.dropout=0.3", "devices.over_selection=0.5"),
        app=app,
    )
    lost = {job.number for r in told.versions for job in r.event.lost}
    came = {job.number for r in told.versions for job in r.event.jobs}
    fates = {job.fate for r in told.versions for job in r.event.lost}
    assert {"dropped out", "too late"} <= fates
    assert set(trained) == came
    assert not lost & came


@pytest.mark.parametrize("rule", ["fedavg", "fedbuff", "leaf"])
def test_bytes_down_are_those_of_all_models_that_were_sent(settings, monkeypatch, rule):
    """Also to jobs that no version is made of, because the run ends before they do."""
    begun, begin = [], Trainings.begin

    def spy(self, jobs, start, prox_mu):
        begun.extend((job, start.record.count_bytes()) for job in jobs)
        begin(self, jobs, start, prox_mu)

    monkeypatch.setattr(Trainings, "begin", spy)
    told, _ = follow(settings(*RULES[rule], "devices.dropout=0.3"))
    for server in {record.event.server for record in told.versions}:
        own = [record for record in told.versions if record.event.server == server]
        sent = [size for job, size in begun if job.server == server]
        assert sum(record.bytes_down for record in own) == sum(sent)
        assert sum(record.bytes_up for record in own) == sent[0] * sum(
            record.num_updates for record in own
        )


def test_devices_send_their_model_and_counts_and_nothing_else(settings):
    sent = []

    def app(message, context):
        reply = client_app.app(message, context)
        if message.metadata.message_type == "train":
            sent.append((message.content, reply.content))
        return reply

    follow(settings(*RULES["fedrevive"]), app=app)
    assert len(sent) >= 16
    for asked, told in sent:
        [(_, start)], [(_, arrays)] = asked.array_records.items(), told.array_records.items()
        shapes = [{n: (a.shape, a.dtype) for n, a in r.items()} for r in (start, arrays)]
        assert shapes[0] == shapes[1]
        [(_, metrics)], [(_, config)] = told.metric_records.items(), told.config_records.items()
        assert len(metrics.pop(records.CLASS_COUNTS)) == 10
        assert metrics.keys() == {records.NUM_EXAMPLES, records.LOSS, records.SECONDS}
        assert config.keys() == {records.PATH}


def test_a_device_that_fails_is_left_out_by_name(settings, caplog):
    victims = {0, 3}

    def app(message, context):
        config = records.config_of(message)
        if config.get(records.JOB) in victims:
            raise RuntimeError("broken")
        return client_app.app(message, context)

    made = settings(*RULES["fedbuff"], "runtime.max_retries=0")
    told, models = follow(made, app=app)
    assert len(told.versions) == 8
    assert told.held_out[-1].updates == 14
    assert "left out: RuntimeError: broken" in caplog.text
    assert all(np.isfinite(a).all() for a in models[0].values())


def test_devices_that_all_fail_end_the_run(settings):
    def app(message, context):
        if records.JOB in records.config_of(message):
            raise RuntimeError("broken")
        return client_app.app(message, context)

    with pytest.raises(RoundError, match=r"10 devices one after the other .* RuntimeError: broken"):
        follow(settings(*RULES["fedbuff"], "runtime.max_retries=0"), app=app)


def test_a_target_ends_a_run_at_the_same_version_however_it_is_carried_out(settings):
    made = settings(
        *RULES["fedbuff"], "hierarchy.target_accuracy=0.2", "devices.max_model_version=60"
    )
    ends = []
    for workers, ahead in ((1, 0), (2, None)):
        told, _ = follow(made, workers=workers, ahead=ahead, callbacks=[TargetAccuracy()])
        ends.append(len(told.versions))
    assert ends[0] == ends[1] < 60


@pytest.mark.parametrize("rule", ["fedbuff", "leaf"])
def test_mu_falls_while_accuracy_is_stable(settings, monkeypatch, rule):
    """With each evaluation of all but the first, for the jobs that are dispatched from then on."""
    of_job, real = {}, Trainings._message

    def spy(self, number):
        message = real(self, number)
        of_job[number] = records.config_of(message)[records.PROX_MU]
        return message

    monkeypatch.setattr(Trainings, "_message", spy)
    made = settings(*RULES[rule], *FALLING, "devices.max_model_version=16")
    told, _ = follow(made)
    found = set()
    times = [h.simulated_seconds for h in told.held_out if (h.what, h.server) == ("cloud", -1)]
    jobs = [job for version in told.versions for job in version.event.jobs]
    assert jobs
    for job in jobs:
        falls = max(0, sum(time <= job.started for time in times) - 1)
        assert of_job[job.number] == max(0.1, 0.4 * 0.5**falls)
        found.add(of_job[job.number])
    assert found == {0.4, 0.2, 0.1}


def test_mu_stays_unless_it_is_asked_to_fall(settings):
    assert settings("asynchronous.rule=fedbuff").hierarchy.prox_mu_decay == 1.0
    assert settings(*RULES["fedbuff"], *FALLING).hierarchy.prox_mu_decay == 0.5


def test_asynchronous_leaf_servers_are_clustered(tmp_path):
    """hhar-synthetic: the users of leaf server 2 carry the device another way."""
    told, servers = follow(
        load_settings(
            assignments=[
                *(f"app.config.output-dir={tmp_path}", "devices.enable=true"),
                *("devices.device_selection_size=3", "devices.num_updates_for_model=3"),
                *("devices.max_model_version=4", "asynchronous.rule=fedbuff"),
                *("asynchronous.server=leaf", "asynchronous.cloud_interval=4.0"),
                'devices.device_speed={distribution="uniform", mean=1.0, std=0.2}',
                *("hierarchy.local_epochs=3", "runtime.training=single", "runtime.compile=false"),
            ]
        ),
        callbacks=[VersionWriter(), WeightWriter()],
    )
    assert [state.labels for _, state in told.steps][-1] == (0, 0, 1)
    [folder] = tmp_path.iterdir()
    history = json.loads((folder / "metrics/seed_42/cluster_history.json").read_text())
    assert history[-1]["labels"] == [0, 0, 1]
    assert history[-1]["ari_truth"] == 1.0
    assert [e["simulated_seconds"] for e in history] == [event.time for event, _ in told.steps]
    models = json.loads((folder / "models/models.json").read_text())
    assert models["clusters"]["cluster_0.safetensors"]["leaf_servers"] == [0, 1]
    assert len(servers) == 3
    last = [h for h in told.held_out if (h.what, h.server) == ("cloud", -1)][-1]
    assert last.test.accuracy > 0.6


class Stop(Callback):
    """Kills a run after so many versions of all servers."""

    def __init__(self, after):
        self.left = after

    def on_version(self, record):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def tables(folder):
    """Return a run's tables without the columns of wall time."""
    files = sorted(folder.glob("metrics/*/*.csv"))
    return {f.name: pl.read_csv(f).drop("seconds", strict=False).rows() for f in files}


def totals(folder):
    """Return what a run sums up to, but for wall time, and how leaf servers were grouped."""
    found = json.loads((folder / "devices.json").read_text())
    assert found.pop("seconds") > 0
    history = folder / "metrics/seed_42/cluster_history.json"
    return found, history.exists() and json.loads(history.read_text())


@pytest.fixture
def saved_each_time(monkeypatch):
    monkeypatch.setattr(device_run, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(device_run, "SAVE_SHARE", math.inf)


@pytest.mark.parametrize("rule", ["fedrevive", "light", "leaf", "leaf fedavg", "falling mu"])
@pytest.mark.usefixtures("saved_each_time")
def test_a_run_that_was_killed_ends_with_the_same_bytes(settings, tmp_path, rule):
    made = settings(*RULES[rule], f"app.config.output-dir={tmp_path / 'whole'}")
    _, whole = follow(made, callbacks=[VersionWriter()])
    made = settings(*RULES[rule], f"app.config.output-dir={tmp_path / 'killed'}")
    with pytest.raises(KeyboardInterrupt):
        follow(made, callbacks=[VersionWriter(), Stop(5)])
    [folder] = (tmp_path / "killed").iterdir()
    with pytest.raises(KeyboardInterrupt):
        follow(made, callbacks=[VersionWriter(), Stop(2)], folder=folder)
    _, models = follow(made, callbacks=[VersionWriter()], folder=folder)
    assert same(whole, models)
    [other] = (tmp_path / "whole").iterdir()
    assert tables(folder) == tables(other)
    assert totals(folder) == totals(other)
    with pytest.raises(CheckpointError, match="finished"):
        resume(folder, lambda _: [])


class FullDisk(Callback):
    """Fails where a run's last files are written."""

    def on_versions_end(self, state, left):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("target", [0.0, 0.01])  # none, and one that ends the run early
@pytest.mark.usefixtures("saved_each_time")
def test_a_run_whose_last_files_failed_is_resumed_to_write_them(settings, tmp_path, target):
    wanted = f"hierarchy.target_accuracy={target}"
    folders = []
    for name in ("whole", "failed"):
        made = settings(*RULES["fedbuff"], wanted, f"app.config.output-dir={tmp_path / name}")
        own = [VersionWriter(), TargetAccuracy()]
        if name == "whole":
            follow(made, callbacks=own)
        else:
            with pytest.raises(OSError, match="No space"):
                follow(made, callbacks=[*own, FullDisk(), WeightWriter()])
        [folder] = (tmp_path / name).iterdir()
        folders.append(folder)
    assert not (folder / "models" / "global.safetensors").exists()
    resume(folder, lambda _: [VersionWriter(), TargetAccuracy(), WeightWriter()])
    assert (folder / "models" / "global.safetensors").exists()
    assert tables(folders[0]) == tables(folders[1])
    assert totals(folders[0]) == totals(folders[1])
    assert (totals(folder)[0]["versions"] < 8) == (target > 0)


@pytest.mark.usefixtures("saved_each_time")
def test_wall_time_is_that_of_all_parts(settings, tmp_path):
    made = settings(*RULES["fedbuff"])
    with pytest.raises(KeyboardInterrupt):
        follow(made, callbacks=[VersionWriter(), Stop(2)])
    [folder] = (tmp_path / "results").iterdir()
    tree = checkpoint.load(folder / checkpoint.NAME)
    checkpoint.save(folder / checkpoint.NAME, {**tree, "seconds": 1000.0})  # as if it had been slow
    follow(made, callbacks=[VersionWriter()], folder=folder)
    assert 1000 < json.loads((folder / "devices.json").read_text())["seconds"] < 2000


@pytest.mark.usefixtures("saved_each_time")
def test_a_killed_run_goes_on_with_the_same_cohorts(settings, tmp_path):
    cohorts = [*RULES["fedbuff"], "runtime.training=cohort", "runtime.cohort_size=4"]
    made = settings(*cohorts, f"app.config.output-dir={tmp_path / 'whole'}")
    _, whole = follow(made, cohort=4)
    made = settings(*cohorts, f"app.config.output-dir={tmp_path / 'killed'}")
    with pytest.raises(KeyboardInterrupt):
        follow(made, cohort=4, callbacks=[VersionWriter(), Stop(5)])
    [folder] = (tmp_path / "killed").iterdir()
    _, models = follow(made, cohort=4, callbacks=[VersionWriter()], folder=folder)
    assert same(whole, models)


def test_what_the_cloud_makes_reaches_leaf_servers_that_wait_for_all(settings):
    """FedAvg's next round is under way when the cloud answers: what it learns is added to that."""
    leaf = [
        "asynchronous.server=leaf",
        "devices.device_selection_size=4",
        "hierarchy.server_lr=1.0",
    ]
    met, apart = (
        follow(settings(*RULES["fedavg"], *leaf, f"asynchronous.cloud_versions={every}"))[0]
        for every in (2, 1000)
    )
    losses = [[h.test.loss for h in told.held_out if h.what == "leaf"] for told in (met, apart)]
    assert losses[0][:2] == losses[1][:2]
    assert np.mean(losses[0][4:]) < np.mean(losses[1][4:]) - 0.05


def test_a_variance_is_the_clouds():
    """-2 were it treated as a parameter: 1 + (1 - 4)."""
    model = {"w": np.ones(1, np.float32), "var": np.ones(1, np.float32)}
    sent = {"w": np.zeros(1, np.float32), "var": 4 * np.ones(1, np.float32)}
    cloud = {"w": 5 * np.ones(1, np.float32), "var": np.ones(1, np.float32)}
    server = device_run.Server(Start(model), rule=None, sent=Start(sent))
    server.take(Start(cloud), {"w"})
    assert {name: float(a[0]) for name, a in server.model.arrays.items()} == {"w": 6, "var": 1}
    assert server.sent is None


def test_versions_are_counted_without_the_clouds_and_one_leaf_server_is_all(settings):
    told, _ = follow(
        settings(
            *(*RULES["leaf"], "hierarchy.num_servers=1", "devices.eval_frequency=3"),
            "asynchronous.cloud_versions=2",
        )
    )
    own = [h.version for h in told.held_out if h.what == "leaf"]
    by_number = {r.event.version: r.event.made for r in told.versions}
    assert [by_number[version] for version in own] == [3, 6, 8]
    of_all = [h.version for h in told.held_out if (h.what, h.server) == ("cloud", -1)]
    assert of_all == [event.step for event, _ in told.steps] == [1, 2]


def test_a_run_that_is_out_of_devices_is_evaluated(settings):
    few = ["devices.devices_per_leaf=9", "devices.device_reuse=false", "devices.dropout=0.5"]
    few += ["devices.num_updates_for_model=4", "devices.max_model_version=4"]
    few += ["devices.update_timeout=0.0", "devices.eval_frequency=100"]
    told, _ = follow(settings(*RULES["fedbuff"], *few))
    assert 0 < len(told.versions) < 4
    assert [h.version for h in told.held_out] == [len(told.versions)]
    over = [job for record in told.versions for job in (*record.event.jobs, *record.event.lost)]
    assert len(over) + len(told.left) == 18  # nobody is forgotten
    assert {job.fate for job in told.left} == {"dropped out", "unused"}
    assert max(job.ended for job in told.left) > told.versions[-1].event.time


def test_jobs_of_a_server_that_is_done_are_forgotten(settings):
    done, ends = set(), {}

    class Look(Callback):
        def on_version(self, record):
            assert not done & {own.job.server for own in run._trainings._begun.values()}
            if record.event.last:
                done.add(record.event.server)
                ends[record.event.server] = record.event.time

        def on_versions_end(self, state, left):
            self.left = left

    made = settings(*RULES["leaf"], "devices.max_model_version=4")
    look = Look()
    with InProcessGrid(client_app.app, 2, made.runtime) as grid:
        run = DeviceRun(made, grid, [look])
        run.run()
    assert run._trainings._begun == {}
    first, last = sorted(ends, key=lambda server: ends[server])
    assert ends[first] < ends[last]
    fates = {job.fate for job in look.left if job.server == first}
    assert "unused" in fates  # they came while the other went on
    assert all(job.ended <= run._now for job in look.left)


def test_a_client_that_cannot_be_evaluated_is_left_out(settings, caplog):
    def app(message, context):
        config = records.config_of(message)
        evaluates = message.metadata.message_type == "evaluate"
        if evaluates and config[records.CLIENT_ID] in broken:
            raise RuntimeError("broken")
        return client_app.app(message, context)

    clients = ["devices.devices_per_leaf=0", "hierarchy.clients_per_server=[10,10]"]
    base = [assignment for assignment in DEVICES if "subset_size" not in assignment]
    made = settings(*RULES["fedbuff"], *clients, "runtime.max_retries=0", base=base)
    broken = {4}
    told, _ = follow(made, app=app)
    assert "client 4 left out of an evaluation: RuntimeError: broken" in caplog.text
    [tested] = {h.test.num_examples for h in told.held_out}
    assert 300 < tested < 360
    broken = set(range(20))
    with pytest.raises(RoundError, match="no part of the held-out examples"):
        follow(made, app=app)


def test_a_callbacks_reason_ends_the_run_however_often_it_is_saved(settings, monkeypatch):
    class Third(Callback):
        def on_held_out(self, record):
            return "enough" if record.version == 3 else None

    ends = []
    for seconds in (1000.0, 0.0):
        monkeypatch.setattr(device_run, "SAVE_SECONDS", seconds)
        monkeypatch.setattr(device_run, "SAVE_SHARE", math.inf)
        told, _ = follow(settings(*RULES["fedbuff"]), callbacks=[Third()])
        ends.append(len(told.held_out))
    assert set(ends) <= {3, 4}  # evaluations go on beside the next version


def test_memory_is_flat_over_10_000_versions(settings):
    """One update a version, 30 devices at work: old versions go when no job has them."""

    def app(message, context):
        if message.metadata.message_type == "train":
            metrics = {records.NUM_EXAMPLES: 1, records.LOSS: 0.0, records.SECONDS: 0.0}
            return records.reply(
                message, arrays=records.arrays_of(message), metrics=MetricRecord(metrics)
            )
        return client_app.app(message, context)

    alive, memory = [], []

    class Count(Callback):
        def on_version(self, record):
            if record.event.version in (1_000, 10_000):
                gc.collect()
                alive.append(sum(type(o) is Start for o in gc.get_objects()))
                memory.append(psutil.Process().memory_info().rss)

    made = settings(
        *("asynchronous.rule=fedbuff", "devices.num_updates_for_model=1"),
        *("devices.device_selection_size=30", "devices.max_model_version=10000"),
        "devices.eval_frequency=10000",
    )
    with InProcessGrid(app, 2, made.runtime) as grid:
        DeviceRun(made, grid, [Count()]).run()
    assert max(alive) <= 30 + 2
    assert memory[1] - memory[0] < 30 * 2**20  # a version has 80 KB: all would take 800 MB


BIG = """
import resource, sys
from fedge_sim.config import load_settings
from fedge_sim.reporting.base import Callback
from fedge_sim import orchestrator

class Stop(Callback):
    def on_version(self, record):
        raise SystemExit(print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))

orchestrator.run(load_settings(assignments=sys.argv[1:]), [Stop()])
"""


def test_a_million_devices_start_in_4_gib(settings, tmp_path):
    assignments = [
        *(f"app.config.output-dir={tmp_path}", *DEVICES, *RULES["fedbuff"]),
        *("devices.devices_per_leaf=500000", "devices.device_selection_size=1000"),
        *("runtime.backend=inprocess", "devices.num_updates_for_model=2"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", BIG, *assignments],
        capture_output=True,
        text=True,
        timeout=300,
        env=clean_environment(),
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 4 * 2**20  # KiB
