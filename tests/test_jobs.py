"""The jobs of the older programs, as files to run: each loads, and says what it is meant to."""

import json
import re

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from fedge_sim.config import load_settings
from fedge_sim.errors import ConfigError
from fedge_sim.models.tracker import MEAN, VARIANCE
from fedge_sim.orchestrator import run
from fedge_sim.reporting import version_callbacks
from fedge_sim.runtime.device_pool import Draws
from tests.conftest import CIFAR_NPZ, ROOT

JOBS = {file.stem: file for file in sorted((ROOT / "scripts" / "jobs").glob("*.toml"))}


@pytest.mark.parametrize("name", JOBS)
def test_a_job_loads_and_names_its_command(name):
    settings = load_settings(JOBS[name])
    assert settings.by_versions
    comment = re.match(r"(#.*\n)+", JOBS[name].read_text()).group()
    assert re.search(r"#   python (-m fedge_sim\.orchestrator --config|scripts/\w+\.py)", comment)
    if "--config" in comment:
        assert f"scripts/jobs/{name}.toml" in comment


@pytest.mark.parametrize(
    ("name", "rule", "devices", "selected", "updates", "server_lr"),
    [
        ("cifar10_fedavg", "fedavg", 40_000, 100, 100, 1.4),
        ("cifar10_fedrevive", "fedrevive", 40_000, 200, 20, 0.1),
        ("cifar10_fedrevive_research", "fedrevive", 1000, 100, 1, 0.1),
        ("cifar10_fedavg_research", "fedavg", 1000, 100, 100, 1.4),
        ("cifar10_fedbuff", "fedbuff", 1000, 100, 2, 0.05),
        ("cifar10_fedasync", "fedasync", 1000, 100, 1, 1.0),
        ("cifar10_downweight", "downweight", 1000, 100, 1, 0.1),
    ],
)
def test_jobs_are_those_of_the_older_programs(name, rule, devices, selected, updates, server_lr):
    settings = load_settings(JOBS[name])
    d, h = settings.devices, settings.hierarchy
    assert (settings.asynchronous.rule, h.num_clients, h.server_lr) == (rule, devices, server_lr)
    assert (d.device_selection_size, settings.updates_for_model) == (selected, updates)
    assert (d.subset_size, settings.local_steps, h.batch_size) == (350, 25, 32)
    assert (h.optimizer, h.learning_rate(200), h.weight_decay) == ("adam", 0.0003, 0.0)
    assert (h.clip_norm, h.label_smoothing, h.prox_mu, h.es_patience) == (0, 0, 0, 0)
    assert d.device_speed.mean == (1.0, 1.3, 1.6)
    assert (settings.asynchronous.beta, settings.asynchronous.beta_factor) == ("cosine", 75.0)


def test_the_research_job_has_the_published_network_sizes_and_delays():
    settings = load_settings(JOBS["cifar10_fedrevive_research"])
    own = settings.fedrevive
    assert settings.data.model == "resnet18-tracked"
    assert (own.generator_width, own.max_samples, own.noise_size) == (128, 16_000, 256)
    assert (own.class_weight, own.adversarial_start, own.batch_norm) == (0.2, 100, 0.003)
    found = 0
    for file in JOBS.values():
        delay = load_settings(file).devices.upload_delay
        if delay.distribution == "uniform":  # of which the half-width is published
            found += 1
            draws, random = Draws(delay), np.random.default_rng(0)
            drawn = [
                [draws.draw(k, random) - mean for _ in range(9999)]
                for k, mean in enumerate(delay.mean)
            ]
            assert np.abs(drawn).max(axis=1) == pytest.approx(0.02, abs=1e-5)
    assert found == 6


@pytest.mark.parametrize("name", JOBS)
def test_a_job_runs(name, shared, saved, tmp_path):
    """With fewer and shorter trainings, down to the last file."""
    images = np.load(shared / CIFAR_NPZ)
    file = saved({key: images[key][:500] if key in "xy" else images[key] for key in images})
    shorter = [
        *(f"app.config.data-root={file}", f"app.config.output-dir={tmp_path / 'results'}"),
        *("devices.local_iters=1", "devices.device_selection_size=3", "devices.min_hole_to_fill=1"),
        *("devices.max_model_version=3", "runtime.backend=inprocess", "runtime.training=single"),
        *("runtime.compile=false", "fedrevive.freeze_versions=0", "fedrevive.warmup_versions=1"),
        *("fedrevive.generator_width=4", "fedrevive.synthesis_batch_size=4"),
        "fedrevive.kd_steps=1",
    ]
    if load_settings(JOBS[name]).data.model == "resnet18-tracked":
        shorter += ["app.config.image-size=8"]
    if load_settings(JOBS[name]).devices.num_updates_for_model > 3:
        shorter += ["devices.num_updates_for_model=2"]
    folder = run(
        load_settings(JOBS[name], assignments=shorter), version_callbacks(Console(quiet=True))
    ).folder
    assert json.loads((folder / "devices.json").read_text())["versions"] == 3
    model = load_file(folder / "models" / "global.safetensors")
    for key, array in model.items():
        if key.endswith((MEAN, VARIANCE)):
            np.testing.assert_array_equal(array, float(key.endswith(VARIANCE)))
    tracked = sum(key.endswith((MEAN, VARIANCE)) for key in model)
    assert tracked == 40 * (load_settings(JOBS[name]).data.model == "resnet18-tracked")


def test_another_beta_in_a_job_asks_for_its_factor():
    with pytest.raises(ConfigError, match="beta is min"):
        load_settings(JOBS["cifar10_downweight"], assignments=["asynchronous.beta=linear"])
