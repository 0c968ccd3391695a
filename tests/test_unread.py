"""Settings that are set and not read: refused where data would be others, else told."""

import logging
import subprocess
from pathlib import Path
from typing import get_args
from unittest import mock

import pytest
import tomli
from rich.console import Console

from fedge_sim import config, orchestrator, server_app
from fedge_sim import unread as unread_module
from fedge_sim.compare import parse_variants, plan_run, tell_without_effect
from fedge_sim.config import AppConfig, load_settings
from fedge_sim.config_types import Table
from fedge_sim.data import DATASETS
from fedge_sim.data.partition import PARTITIONS
from fedge_sim.errors import ConfigError
from fedge_sim.methods import METHODS
from fedge_sim.reporting import callbacks_of
from fedge_sim.unread import NOT_UNDER_FLOWER, READ_WHERE, told, unread
from tests.conftest import ROOT, SMALL, clean_environment, command_line

JOBS = sorted((ROOT / "scripts" / "jobs").glob("*.toml"))
CLOCK = ("devices.enable=true", "devices.device_speed={mean=[1.0, 3.0], std=0.2}")
VERSIONS = (*CLOCK, "devices.device_selection_size=2", "devices.max_model_version=4")
DRAWN = (
    *("devices.devices_per_leaf=5", "devices.subset_size=30", "app.config.partition=iid"),
    "devices.max_model_version=2",
)
CASES = {
    "rounds": (),
    "rounds on a clock": CLOCK,
    "fedbuff": (*VERSIONS, "asynchronous.rule=fedbuff"),
    "drawn devices": (*VERSIONS, *DRAWN),
}
TABLES = {
    type(config.Settings().app.config): "app.config",
    **{
        field.annotation: name
        for name, field in config.Settings.model_fields.items()
        if name != "app"
    },
}


def of(*assignments: str) -> str:
    """Return what is told of settings beside those of the application's own file."""
    return told(unread(load_settings(assignments=assignments)))


def paths(settings) -> list[str]:
    return [path for path, _ in unread(settings)]


# ---------------------------------------------------------------------- data are not made up


@pytest.mark.parametrize(
    ("text", "key", "choice"),
    [
        ('[app.config]\ndata-root = "/my/data"', "data-root", 'dataset is "hhar-synthetic" by'),
        ('[app.config]\ndata-root = "data"', "data-root", 'dataset is "hhar-synthetic" by'),
        ('[app.config]\ndataset = "digits"\ndata-root = "x"', "data-root", 'dataset is "digits";'),
        ("[app.config]\nuse-watches = false", "use-watches", 'dataset = "hhar",'),
        ("[app.config]\nuse-watches = true", "use-watches", 'dataset = "hhar",'),
        ('[app.config]\ndataset = "uci-har"\nsample-rate-hz = 20', "sample-rate-hz", '"uci-har";'),
        ('[app.config]\ndataset = "digits"\nwindow-seconds = 1.0', "window-seconds", '"digits";'),
        ('[app.config]\ndataset = "arrays"\nsynthetic-clients = 12', "synthetic-clients", "arrays"),
        ("[app.config]\nimage-size = 16", "image-size", 'dataset = "cifar10",'),
        ("[app.config]\npartition-alpha = 0.5", "partition-alpha", 'partition is "user" by'),
        ("[app.config]\npartition-shards = 2", "partition-shards", 'partition = "shards",'),
        ("[app.config]\npartition-balanced = true", "partition-balanced", '= "dirichlet",'),
        ('[app.config]\nlayout = "channels-last"', "layout", 'dataset = "arrays",'),
        ("[app.config]\npartition-classes = 3", "partition-classes", 'partition is "user" by'),
        ('[app.config]\npartition-file = "p.json"', "partition-file", 'partition = "file",'),
        ("[devices]\nsubset_size = 100", "subset_size", "devices.devices_per_leaf above 0"),
        ('[fedrevive]\nunlabelled_data = "x.npz"', "unlabelled_data", 'rule is "fedavg" by'),
    ],
)
def test_a_key_of_data_that_is_not_read_is_refused(tmp_path, text, key, choice):
    file = tmp_path / "job.toml"
    file.write_text(text.replace("[", "[tool.flwr.", 1))
    with pytest.raises(ConfigError) as caught:
        load_settings(file)
    message = str(caught.value)
    assert f"] {key} = " in message
    assert "would not be read, and the run learn from other examples" in message
    assert choice in message
    assert "\n" not in message


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_keys_of_a_dataset_are_those_that_its_recipe_reads(dataset, tmp_path):
    """What a dataset's module asks of the settings is what may be set with it."""
    import importlib

    read = set()

    def get(self, name):
        if name in type(self).model_fields:
            read.add(AppConfig.model_fields[name].alias)
        return object.__getattribute__(self, name)

    settings = load_settings(assignments=[f"app.config.dataset={dataset}"])
    about_data = {
        key for line in READ_WHERE if line.choice.endswith("dataset") for key in keys(line)
    }
    with mock.patch.object(AppConfig, "__getattribute__", get, create=True):
        module = importlib.import_module(f"fedge_sim.data.{DATASETS[dataset]}")
        try:
            recipe = module.recipe(settings.data)
        except Exception:  # there are no such files: whatever it read before, it read
            recipe = None
        if dataset.startswith("hhar"):  # the files' keys are read first, the windows' after
            _ = (settings.data.sample_rate_hz, settings.data.window_seconds)
    assert recipe is not None or "data-root" in read
    unread_here = {
        key
        for line in READ_WHERE
        if line.choice.endswith("dataset") and not line.holds(settings)
        for key in keys(line)
    }
    assert not read & unread_here
    assert about_data - unread_here >= read & about_data


def keys(line) -> list[str]:
    return line.keys.split()


def test_every_way_that_sets_a_key_counts(tmp_path):
    asked = 'app.config.data-root="/my data"'
    for refused in (
        {"assignments": [asked]},
        {"app_config": {"data-root": "/my data"}},
        {"app_config": {"overrides": asked}},
    ):
        with pytest.raises(ConfigError, match=r'data-root = "/my data": would not be read'):
            load_settings(**refused)
    with pytest.raises(ConfigError, match=r"data-root .*; .*use-watches .*; .*partition-alpha"):
        load_settings(
            assignments=[asked, "app.config.use-watches=false", "app.config.partition-alpha=0.5"]
        )
    # all keys stand in the application's own file, as flwr run takes and passes on no others
    text = tomli.loads((ROOT / "pyproject.toml").read_text())
    assert text["tool"]["flwr"]["app"]["config"].keys() == set(
        AppConfig().model_dump(by_alias=True)
    )
    own = load_settings().data.model_dump(by_alias=True)
    assert paths(load_settings(app_config={**own, "seed": 7})) == []


def test_the_command_trains_on_no_other_data(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(f'[tool.flwr.app.config]\ndata-root = "{tmp_path}/mine.npz"\n')
    done = subprocess.run(
        command_line("--config", str(file), "--output-dir", str(tmp_path / "out")),
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f'error: [app.config] data-root = "{tmp_path}/mine.npz": would')
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_of_several_rules_may_name_the_data_of_one():
    rule = (*VERSIONS, "asynchronous.rule=fedbuff", "fedrevive.unlabelled_data=x.npz")
    assert of(*rule).endswith(
        'fedrevive.unlabelled_data (only with asynchronous.rule = "fedrevive")'
    )


# ---------------------------------------------------------------------- nothing without reason


def test_the_default_run_and_the_jobs_tell_nothing():
    settings = load_settings()
    assert paths(settings) == []
    assert told(unread(settings, under_flower=True)) == ""
    for job in JOBS:
        assert paths(load_settings(job)) == [], job.name


@pytest.mark.parametrize("name", METHODS)
def test_methods_tell_nothing(name, tmp_path, caplog):
    [variant] = parse_variants(name, [])
    planned = plan_run(None, ["hierarchy.es_patience=0"], variant, 42, tmp_path)
    tell_without_effect([planned])
    assert caplog.text == ""


def test_a_comparison_tells_what_no_method_reads(tmp_path, caplog):
    common = ["hierarchy.pfedme_lambda=3.0", "hierarchy.scaffold_warmup_rounds=1"]
    common += ["app.config.partition=dirichlet", "app.config.partition-alpha=0.1"]
    variants = parse_variants("fedavg,pfedme", ["Odd: fedavg cloud_cluster.num_clusters=3"])
    tell_without_effect([plan_run(None, common, v, 42, tmp_path) for v in variants])
    first, second = (record.message for record in caplog.records)
    assert first == (
        "set, and without effect here: hierarchy.scaffold_warmup_rounds "
        '(only with hierarchy.client_rule = "scaffold")'
    )
    assert second.startswith("Odd: set, and without effect here: cloud_cluster.num_clusters")


def test_a_copy_of_the_applications_own_file_is_no_other_run(tmp_path):
    """All keys stand there; where the dataset and partition are named, defaults ask for nothing."""
    text = (ROOT / "pyproject.toml").read_text()
    copy = tmp_path / "copy.toml"
    copy.write_text(text.replace("seed = 42", "seed = 43"))
    assert told(unread(load_settings(copy))) == ""
    for old, new, key in (
        ("partition-alpha = 0.5", "partition-alpha = 0.1", "partition-alpha"),
        ('layout = "auto"', 'layout = "channels-last"', "layout"),
        ('data-root = "data"', 'data-root = "elsewhere"', "data-root"),
        ('dataset = "hhar-synthetic"\n', "", "data-root"),
    ):
        assert old in text
        copy.write_text(text.replace(old, new))
        with pytest.raises(ConfigError, match=key):
            load_settings(copy)


def test_what_is_off_asks_for_nothing():
    assert of("hierarchy.optimizer=adam", "hierarchy.momentum=0.0", "hierarchy.local_steps=0") == ""
    assert "hierarchy.momentum" in of("hierarchy.optimizer=adam", "hierarchy.momentum=0.5")


# ---------------------------------------------------------------------- told, once


def test_what_has_no_effect_is_told_in_one_line():
    line = of(
        *("hierarchy.pfedme_lambda=3.0", "hierarchy.pfedme_steps=2", "asynchronous.mixing=0.5"),
        *("devices.dropout=0.1", "cloud_cluster.num_clusters=3"),
    )
    assert line == (
        "set, and without effect here: hierarchy.pfedme_lambda, hierarchy.pfedme_steps (only with "
        'hierarchy.client_rule = "pfedme"); cloud_cluster.num_clusters (only with '
        'cloud_cluster.method = "agglomerative"); devices.dropout (only with devices.enable = '
        'true); asynchronous.mixing (only with asynchronous.rule = "fedasync")'
    )


def test_a_table_in_a_table():
    session = "devices.availability={session=5.0}"
    assert "devices.availability.session (only with" in of(*CLOCK, session)
    assert of(*CLOCK, "devices.availability={session=5.0, online=0.5}") == ""


def test_the_command_tells_it_at_the_start(tmp_path):
    done = subprocess.run(
        command_line(
            *("--output-dir", str(tmp_path / "out"), "--set", "hierarchy.pfedme_steps=2"),
            *(word for text in (*SMALL, "hierarchy.global_rounds=1") for word in ("--set", text)),
        ),
        cwd=ROOT,
        env=clean_environment(COLUMNS="300"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("set, and without effect here: hierarchy.pfedme_steps (only") == 1


def test_what_flowers_runtime_does_not_heed_is_told_there(monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    conducted = []
    monkeypatch.setattr(server_app, "start_logging", lambda _: None)
    monkeypatch.setattr(server_app, "conduct", lambda settings, *_: conducted.append(settings))
    context = mock.Mock(run_config={"overrides": "runtime.max_retries=5 runtime.precision=float32"})
    server_app.main(mock.Mock(), context)
    assert conducted
    text = "set, and without effect here: runtime.max_retries (only with python -m fedge_sim.orch"
    assert text in caplog.text
    assert set(keys(NOT_UNDER_FLOWER)) < set(config.Runtime.model_fields)


# ---------------------------------------------------------------------- it is true

# Never read in some of the cases, and refused there if they are anything but the default, or as
# the machine has no GPU.
KNOWN = {
    *("app.config.overrides", "app.config.label-swap", "hierarchy.leaf_strategy_options"),
    *("hierarchy.global_lr", "hierarchy.averaging", "hierarchy.cluster_better_delta"),
    *("devices.device_reuse", "devices.num_updates_for_model", "runtime.num_cpus_per_actor"),
    "asynchronous.rule",
    *("runtime.caching", "runtime.memory_pool", "runtime.streams", "runtime.pipelining"),
    *("hierarchy.prox_mu_min", "hierarchy.prox_mu_decay"),  # where accuracy is never stable
}


def run_of(settings) -> dict[str, bytes]:
    """Return the models that a run ends with."""
    folder = orchestrator.run(settings, callbacks_of(settings, Console(quiet=True))).folder
    return {file.name: file.read_bytes() for file in (folder / "models").glob("*.safetensors")}


@pytest.mark.parametrize("case", CASES)
def test_what_a_run_never_asks_for_is_declared_and_changes_nothing(case, small):
    settings, read = small(*CASES[case]), set()

    def get(self, name):
        if name in type(self).model_fields and type(self) in TABLES:
            read.add(f"{TABLES[type(self)]}.{type(self).model_fields[name].alias or name}")
        return object.__getattribute__(self, name)

    with (
        mock.patch.object(Table, "__getattribute__", get, create=True),
        mock.patch.object(config, "refuse_what_makes_no_sense"),  # which asks for everything
    ):
        models = run_of(settings)
    everything = {
        f"{table}.{field.alias or name}"
        for kind, table in TABLES.items()
        for name, field in kind.model_fields.items()
    }
    assert everything - read - KNOWN <= everything_declared(settings)

    others = dict(changed(settings))
    assert len(others) > 20
    with_them = small(*CASES[case], *(f"{path}={value}" for path, value in others.items()))
    assert set(paths(with_them)) == set(others)
    assert run_of(with_them) == models


def everything_declared(settings, data=(False, True)) -> set[str]:
    found = set()
    for line in READ_WHERE:
        if not line.holds(settings) and line.data in data:
            kind = next(k for k, table in TABLES.items() if table == line.table)
            own = kind.model_fields if line.keys == "*" else keys(line)
            found |= {f"{line.table}.{key}" for key in own}
    return found


def changed(settings) -> list[tuple[str, object]]:
    """Return other values of the keys that are not read and not refused, as far as they go."""
    found, refused = [], everything_declared(settings, data=(True,))
    for kind, table in TABLES.items():
        for name, field in kind.model_fields.items():
            path = f"{table}.{field.alias or name}"
            if path not in everything_declared(settings) - refused:
                continue
            now = getattr(kind(), name)
            others = [value for value in get_args(field.annotation) if value != now]
            if isinstance(now, bool) or table == "app.config":
                continue
            if isinstance(now, int | float):
                others = [now + 1] if isinstance(now, int) else [now / 2 or 0.5]
            for other in others[:1]:
                if isinstance(other, int | float | str):
                    value = f'"{other}"' if isinstance(other, str) else other
                    if allowed(settings, f"{path}={value}"):
                        found.append((path, value))
    return found


def allowed(settings, assignment: str) -> bool:
    """Whether a value is allowed beside what a case has, in the settings' own folder."""
    own = settings.model_dump(mode="json", by_alias=True)
    table, _, key = assignment.partition("=")[0].rpartition(".")
    value = config._value(assignment.partition("=")[2])
    own[table] = own[table] | {key: value}
    try:
        config.Settings.from_tables(own)
    except ConfigError:
        return False
    return True


def test_every_line_names_settings_and_values_that_there_are():
    settings = load_settings()
    for line in (*READ_WHERE, NOT_UNDER_FLOWER):
        kind = next(k for k, table in TABLES.items() if table == line.table)
        names = {field.alias or name for name, field in kind.model_fields.items()}
        for key in keys(line):
            assert key == "*" or key.split(".")[0] in names, line
        assert isinstance(line.holds(settings), bool)
        assert line.where
        known = {"app.config.dataset": DATASETS, "app.config.partition": PARTITIONS}
        assert set(line.values) <= set(known.get(line.choice, line.values))


def test_a_file_that_is_read_may_be_named(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text(
        '[tool.flwr.app.config]\ndataset = "hhar"\ndata-root = "x"\nuse-watches = false\n'
        'partition = "dirichlet"\npartition-alpha = 0.1\n'
    )
    assert load_settings(file).data.data_root == str(Path("x").absolute())


def test_the_datasets_that_are_known_here_are_all():
    assert sorted(unread_module._DATASETS) == sorted(DATASETS)
