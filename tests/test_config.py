import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tomli
from flwr.common.config import get_fused_config_from_dir, parse_config_args
from hypothesis import given
from hypothesis import strategies as st

from fedge_sim.config import (
    AppConfig,
    Settings,
    load_settings,
    settings_from_json,
    split_overrides,
)
from fedge_sim.data import federate
from fedge_sim.errors import ConfigError, FedgeError
from fedge_sim.methods import METHODS
from fedge_sim.models import build_model
from fedge_sim.runtime.gpu import PROFILES
from fedge_sim.unknown import WORDS, _all_keys
from tests.conftest import OVER_SEVERAL_LINES, ROOT, clean_environment, command_line

REFERENCE = {
    "hierarchy": {
        "num_servers": 3,
        "clients_per_server": (3, 3, 3),
        "global_rounds": 100,
        "server_rounds_per_global": 1,
        "lr_init": 0.05,
        "lr_gamma": 0.99,
        "server_lr": 1.0,
        "global_lr": 1.0,
        "local_epochs": 5,
        "batch_size": 32,
        "accumulation": 1,
        "eval_batch_size": 64,
        "momentum": 0.9,
        "weight_decay": 0.0001,
        "clip_norm": 1.0,
        "prox_mu": 0.001,
        "prox_mu_min": 0.0001,
        "prox_mu_decay": 0.9,
        "acc_stable_threshold": 0.002,
        "client_rule": "sgd",
        "scaffold_warmup_rounds": 0,
        "pfedme_lambda": 15.0,
        "pfedme_steps": 5,
        "pfedme_inner_lr": 0.05,
        "pfedme_outer_lr": 0.01,
        "participation": 1.0,
        "averaging": "weighted",
        "leaf_strategy": "",
        "leaf_strategy_options": {},
        "target_accuracy": 0.0,
        "es_patience": 5,
        "es_delta": 0.001,
        "cluster_better_delta": 0.0,
    },
    "cloud_cluster": {
        "enable": True,
        "start_round": 1,
        "frequency": 1,
        "method": "cosine_similarity",
        "features": "head",
        "tau": 0.7,
        "num_clusters": 2,
        "eps_1": 0.4,
        "eps_2": 1.6,
        "gamma_max": 0.0,
        "min_cluster_size": 2,
    },
    "runtime": {
        "backend": "auto",
        "num_workers": "auto",
        "threads_per_client": 1,
        "num_cpus_per_actor": "auto",
        "num_gpus_per_actor": "auto",
        "cohort_size": "auto",
        "gpu_profile": "conservative",
        **dict.fromkeys(["memory_share", "memory_cleanup", "caching", "memory_pool"], "profile"),
        **dict.fromkeys(["streams", "pipelining", "keep_warm"], "profile"),
        "ray_address": "",
        "dashboard": False,
        "node_timeout_s": 120,
        "client_timeout_s": 0,
        "progress_timeout_s": 1800,
        "max_retries": 2,
        "min_clients_per_round": 1,
    },
    "data": {
        "use_watches": True,
        "sample_rate_hz": 50,
        "window_seconds": 2,
        "window_stride_seconds": 1,
        "num_classes": 6,
        "model": "cnn1d",
        "seed": 42,
    },
}


def test_defaults_are_the_references():
    settings = Settings.from_tables({})
    for table, values in REFERENCE.items():
        found = getattr(settings, table).model_dump()
        assert {key: found[key] for key in values} == values


def test_pyproject_is_the_quick_default():
    settings = load_settings()
    assert settings.hierarchy.global_rounds == 10
    assert settings.data.dataset == "hhar-synthetic"
    assert [*map(list, settings.hierarchy.leaf_clients)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_each_key_of_app_config_can_be_given_to_flwr_run():
    """Flower's ``-c`` takes the keys that stand in the application's own file, and no others."""
    flags = ['dataset="arrays" data-root="/x.npz" layout="channels-last" partition="shards"']
    flags.append("partition-shards=3 label-swap=0.5")
    fused = get_fused_config_from_dir(ROOT, parse_config_args(flags))
    assert set(fused) == {field.alias for field in AppConfig.model_fields.values()}
    data = load_settings(app_config=fused).data
    assert (data.layout, data.partition_shards, data.label_swap) == ("channels-last", 3, 0.5)


def test_learning_rate_of_a_round():
    h = load_settings().hierarchy
    assert h.learning_rate(1) == 0.05
    assert h.learning_rate(3) == pytest.approx(0.05 * 0.99**2)


def test_scaffold_has_an_older_name():
    older = load_settings(assignments=["hierarchy.scaffold_enabled=true"])
    assert older == load_settings(assignments=["hierarchy.client_rule=scaffold"])
    off = load_settings(assignments=["hierarchy.scaffold_enabled=false"])
    assert off == load_settings()
    # what is assigned takes the place of what a file says by the older name
    both = ["hierarchy.scaffold_enabled=true", "hierarchy.client_rule=pfedme"]
    assert load_settings(assignments=both).hierarchy.client_rule == "pfedme"
    with pytest.raises(ConfigError, match="client_rule = 'pfedme' is another"):
        load_settings(assignments=reversed(both))


FLAT = ("hierarchy.num_servers=1", "hierarchy.clients_per_server=[9]", "cloud_cluster.enable=false")
ALONE = ("hierarchy.num_servers=9", "hierarchy.clients_per_server=[1,1,1,1,1,1,1,1,1]")
CFL = ("cloud_cluster.method=cfl", *ALONE)
TOGETHER = {
    ("hierarchy.client_rule=centralised", *FLAT, "hierarchy.global_lr=0.5"): "there is no average",
    ("hierarchy.client_rule=centralised", *FLAT, "hierarchy.participation=0.5"): "must be 1",
    ("hierarchy.participation=0.1",): r"a leaf server \(3 at most\) it rounds to none: must be 1",
    ("hierarchy.participation=0.9",): "it rounds to all: must be 1, or round to at least one and n",
    (*ALONE, "hierarchy.participation=0.5"): "has one client, who trains in every round: must be 1",
    (*CFL, "hierarchy.participation=0.05"): "of the 9 leaf servers, each of one client, it rounds",
    (*CFL, "hierarchy.participation=0.3"): "CFL can never split 3 leaf servers",
    (
        *(*CFL, "hierarchy.participation=0.5", "devices.over_selection=0.5"),
        *("devices.enable=true", "devices.device_speed.mean=1.0"),
    ): "leaf servers of one client each are drawn",
    (
        *("hierarchy.client_rule=scaffold", "hierarchy.clients_per_server=[1, 1, 1]"),
    ): "must have more than one client somewhere",
    (
        *("hierarchy.client_rule=scaffold", "hierarchy.global_rounds=2"),
        "hierarchy.scaffold_warmup_rounds=2",
    ): "leaves no round to use the variates in",
    ("hierarchy.client_rule=pfedme", "runtime.training=cohort"): "one client at a time",
    ("hierarchy.leaf_strategy=FedAdam", "hierarchy.server_lr=0.5"): "has a rate of its own",
    (
        "cloud_cluster.method=agglomerative",
        "cloud_cluster.num_clusters=4",
    ): "at most num_servers = 3",
}


@pytest.mark.parametrize("assignments", TOGETHER)
def test_what_makes_no_sense_together_is_refused(assignments):
    with pytest.raises(ConfigError, match=TOGETHER[assignments]):
        load_settings(assignments=assignments)


def test_one_reply_is_enough_where_one_client_has_all_data():
    rule = ("hierarchy.client_rule=centralised", *FLAT)
    with pytest.raises(ConfigError, match="must be at most 1"):
        load_settings(assignments=[*rule, "runtime.min_clients_per_round=2"])


def test_json_round_trip():
    settings = load_settings(assignments=["cloud_cluster.tau=0.25"])
    assert settings_from_json(settings.to_json()) == settings


def test_what_overrides_what(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text(
        '[tool.flwr.app.config]\noverrides = "cloud_cluster.tau=0.5 hierarchy.prox_mu=0"\n'
        "[tool.flwr.hierarchy]\nglobal_rounds = 7\nprox_mu = 0.5\n"
        "[tool.flwr.federations]\ndefault = 'local'\n"
    )
    settings = load_settings(file, assignments=["cloud_cluster.tau=0.6"], seed="43")
    assert settings.hierarchy.global_rounds == 7
    assert settings.hierarchy.local_epochs == 5  # left out: the default
    assert settings.hierarchy.prox_mu == 0
    assert settings.cloud_cluster.tau == 0.6
    assert settings.seed == 43
    assert settings.data.output_dir.startswith("/")
    flower = load_settings(file, app_config={"seed": 7, "overrides": ""})
    assert flower.seed == 7
    assert flower.hierarchy.prox_mu == 0.5


def test_uneven_topology():
    settings = load_settings(
        assignments=["hierarchy.num_servers=4", "hierarchy.clients_per_server=[1, 4, 2, 1]"]
    )
    assert [*map(list, settings.hierarchy.leaf_clients)] == [[0], [1, 2, 3, 4], [5, 6], [7]]


@given(
    st.lists(
        st.tuples(
            st.from_regex(r"[a-z_]+\.[a-z][a-z\-]*", fullmatch=True),
            st.sampled_from(["1", "0.5", "[3, 3, 3]", '"a b"', "true", "uci-har"]),
        ),
        max_size=5,
    )
)
def test_overrides_split_into_their_assignments(pairs):
    text = " ".join(f"{path}={value}" for path, value in pairs)
    assert split_overrides(text) == [f"{path}={value}" for path, value in pairs]


def test_a_table_in_an_override_may_have_blanks():
    speed = "devices.device_speed={mean=[1.0, 2.0], std=0.2, shares=[0.5, 0.5]}"
    assert split_overrides(f"devices.enable=true {speed} devices.dropout=0.1") == [
        *("devices.enable=true", speed, "devices.dropout=0.1")
    ]


def test_files_and_assignments_are_toml_1_1(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text(OVER_SEVERAL_LINES)
    settings = load_settings(file)
    assert settings.devices.device_speed.mean == (1.0, 1.3, 1.6)
    assert settings.devices.device_speed.std == (0.2,)
    table = OVER_SEVERAL_LINES.partition("device_speed = ")[2]
    both = ["devices.enable=true", f"devices.device_speed={table}"]
    assert load_settings(assignments=both).devices == settings.devices
    overrides = f"[tool.flwr.app.config]\noverrides = '''{' '.join(both)}'''"
    file.write_text(overrides)
    assert load_settings(file).devices == settings.devices


def test_the_applications_own_file_is_toml_1_0():
    """The tools that install it read no other: pip and hatchling, by Python's own module."""
    if sys.version_info < (3, 15):  # which reads TOML 1.1
        with pytest.raises(tomllib.TOMLDecodeError):
            tomllib.loads(OVER_SEVERAL_LINES)
    text = (ROOT / "pyproject.toml").read_text()
    assert tomllib.loads(text) == tomli.loads(text)


def test_all_unknown_keys_are_told_at_once(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text(
        "[tool.flwr]\nseed = 1\n[tool.flwr.app.config]\nnum-server-rounds = 3\nlr = 0.1\n"
        "[tool.flwr.hierarchy]\nseed = 7\nlocal-epochs = 2\nclient_rule = 'fedprox'\n"
        "[tool.flwr.devices.availability]\nonlin = 0.5\n"
        "[tool.flwr.dat]\nalpha = 0.3\n[tool.flwr.run_time]\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_settings(file)
    assert str(caught.value).split("; [") == [
        "seed = 1: stands in no table; did you mean app.config.seed?",
        "app.config] num-server-rounds = 3: unknown key; did you mean hierarchy.global_rounds?",
        "app.config] lr = 0.1: unknown key; did you mean hierarchy.lr_init?",
        "hierarchy] seed = 7: unknown key; did you mean app.config.seed?",
        "hierarchy] local-epochs = 2: unknown key; did you mean 'local_epochs'?",
        "devices.availability] onlin = 0.5: unknown key; did you mean 'online'?",
        "dat] alpha = 0.3: there is no table 'dat'; did you mean app.config.partition-alpha?",
        "run_time]: unknown table; did you mean 'runtime'?",
    ]


WORDS_OF_OTHERS = {
    "num-server-rounds": "hierarchy.global_rounds",
    "learning_rate": "hierarchy.lr_init",
    "learning-rate": "hierarchy.lr_init",
    "lr": "hierarchy.lr_init",
    "local-epochs": "hierarchy.local_epochs",
    "fraction_fit": "hierarchy.participation",
    "fraction-train": "hierarchy.participation",
    "proximal_mu": "hierarchy.prox_mu",
    "num_clients": "hierarchy.clients_per_server",
    "client_num_per_round": "hierarchy.participation",
    "comm_round": "hierarchy.global_rounds",
    "central_num_iterations": "hierarchy.global_rounds",
    "alpha": "app.config.partition-alpha",
    "dataset_flag": "app.config.dataset",
    "data_dir": "app.config.data-root",
    "batch-size": "hierarchy.batch_size",
    "min_available_clients": "runtime.min_clients_per_round",
    "federated_optimizer": "hierarchy.client_rule",
    "cohort-size": "runtime.cohort_size",
}


@pytest.mark.parametrize(("word", "meant"), WORDS_OF_OTHERS.items())
@pytest.mark.parametrize("table", ["app.config", "hierarchy", "runtime", "fedrevive"])
def test_what_people_call_settings(table, word, meant):
    with pytest.raises(ConfigError) as caught:
        load_settings(assignments=[f"{table}.{word}=1"])
    own = meant.removeprefix(f"{table}.")
    said = meant if own == meant else repr(own)
    assert str(caught.value) == f"[{table}] {word} = 1: unknown key; did you mean {said}?"


def test_the_words_of_others_mean_settings_that_there_are():
    fields = {f"{t}.{k}" for t, k in _all_keys(Settings)}
    assert set(WORDS.values()) <= fields
    names = {path.rpartition(".")[2].replace("-", "_") for path in fields}
    assert not names & WORDS.keys()  # a setting's own name means itself


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("hierarchy.client_rule=fedprox", "FedProx is made by hierarchy.num_servers = 1, "),
        ("hierarchy.client_rule=FedAvg", "python -m fedge_sim.compare --methods fedavg"),
        ("hierarchy.client_rule=cfl", 'cloud_cluster.method = "cfl"'),
        ("hierarchy.client_rule=hierfl", "cloud_cluster.enable = false, and by python -m"),
        ("hierarchy.client_rule=fedbuff", 'did you mean asynchronous.rule = "fedbuff"?'),
        ("hierarchy.client_rule=FedAdam", 'did you mean hierarchy.leaf_strategy = "FedAdam"?'),
        ("asynchronous.rule=scaffold", 'hierarchy.client_rule = "scaffold"'),
        ("cloud_cluster.method=fedavg", "FedAvg is made by "),
    ],
)
def test_a_method_that_is_no_rule_says_what_makes_it(assignment, said):
    with pytest.raises(ConfigError, match="must be '") as caught:
        load_settings(assignments=[assignment])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", METHODS)
def test_what_makes_a_method_makes_it(name):
    """The settings that are told, given to the defaults, are the method's."""
    other = "asynchronous.rule" if name == "cfl" else "cloud_cluster.method"
    with pytest.raises(ConfigError) as caught:
        load_settings(assignments=[f"{other}={name}"])
    told = re.search(r"is made by (.*), and by python", str(caught.value)).group(1)
    method, pairs = METHODS[name], re.split(r", (?=\w+\.)", told)
    pairs = [pair for pair in pairs if "=" in pair]
    servers = method.clients_per_server((3, 3, 3))
    topology = [f"hierarchy.clients_per_server={list(servers)}"]
    topology += [f"hierarchy.num_servers={len(servers)}"] * ("num_servers" not in told)
    made = load_settings(assignments=[*topology, *pairs])
    assert made == load_settings(assignments=method.assignments((3, 3, 3)))


def test_overrides_keep_what_stands_in_quotes(tmp_path):
    text = (
        """app.config.data-root="/a b.c=d/e" hierarchy.global_rounds=2 app.config.dataset=arrays """
        """app.config.output-dir='/x y.z=1' app.config.model=it's cloud_cluster.tau=0.5"""
    )
    assert split_overrides(text) == [
        *('app.config.data-root="/a b.c=d/e"', "hierarchy.global_rounds=2"),
        *("app.config.dataset=arrays", "app.config.output-dir='/x y.z=1'"),
        *("app.config.model=it's", "cloud_cluster.tau=0.5"),
    ]
    settings = load_settings(app_config={"overrides": text})
    assert settings.data.data_root == "/a b.c=d/e"
    assert (settings.hierarchy.global_rounds, settings.cloud_cluster.tau) == (2, 0.5)
    table = 'hierarchy.x={a.b = 1, # not "closed\n c.d = "} e.f=2"} hierarchy.y=[1,\n z.a=2] a.b=3'
    assert split_overrides(table) == [
        'hierarchy.x={a.b = 1, # not "closed\n c.d = "} e.f=2"}',
        *("hierarchy.y=[1,\n z.a=2]", "a.b=3"),
    ]
    with pytest.raises(ConfigError, match=r'^"/a b: begins with a quote'):
        load_settings(app_config={"overrides": 'app.config.data-root="/a b hierarchy.lr_init=1.0'})


SHARES = {
    "hierarchy": "participation lr_gamma momentum label_smoothing prox_mu_decay target_accuracy "
    "acc_stable_threshold es_delta cluster_better_delta",
    "cloud_cluster": "tau gamma_max",
    "app.config": "label-swap",
    "devices": "dropout availability.online",
    "asynchronous": "mixing",
    "runtime": "memory_share num_gpus_per_actor",
}


@pytest.mark.parametrize(
    "path", [f"{table}.{key}" for table, keys in SHARES.items() for key in keys.split()]
)
def test_a_share_is_at_most_1(path):
    for value in (1.001, -1.001):
        with pytest.raises(ConfigError, match=re.escape(path.rpartition(".")[2])):
            load_settings(assignments=[f"{path}={value}"])


def test_compiled_steps_are_of_one_client_and_one_batch():
    auto = ["runtime.compile=true"]
    assert load_settings(assignments=auto).runtime.compile is True
    assert load_settings(assignments=[*auto, "runtime.training=single"]).runtime.compile is True
    one = [*auto, "runtime.cohort_size=1", "hierarchy.accumulation=profile"]
    assert load_settings(assignments=one).runtime.compile is True
    for wrong in (
        *("runtime.training=reference", "runtime.training=cohort", "runtime.cohort_size=4"),
        "hierarchy.accumulation=2",
    ):
        with pytest.raises(ConfigError, match=r"\[runtime\] compile = true: "):
            load_settings(assignments=[*auto, wrong])
    for name, profile in PROFILES.items():
        by_profile = [*one, f"runtime.gpu_profile={name}"]
        if profile.accumulation == 1:
            assert load_settings(assignments=by_profile).runtime.compile is True
        else:
            with pytest.raises(ConfigError, match=r'hierarchy.accumulation = "profile"'):
                load_settings(assignments=by_profile)


WRONG = {
    "cloud_cluster.tau=1.1": "[cloud_cluster] tau = 1.1: must be at most 1, as no similarity is "
    "more: with 1 only what is equal belongs together, and with cloud_cluster.enable = false "
    "nothing is grouped",
    "hierarchy.global_round=5": "[hierarchy] global_round = 5: unknown key; did you mean 'global_rounds'?",
    "hierachy.global_rounds=5": "[hierachy]: unknown table; did you mean 'hierarchy'?",
    "app.config.data_root=x": "[app.config] data_root = \"x\": unknown key; did you mean 'data-root'?",
    "hierarchy.global_rounds=5.5": "[hierarchy] global_rounds = 5.5: must be a valid integer",
    "hierarchy.global_rounds=many": '[hierarchy] global_rounds = "many": must be a valid integer',
    "hierarchy.lr_init=true": "[hierarchy] lr_init = true: must be a valid number",
    "hierarchy.global_rounds=0": "[hierarchy] global_rounds = 0: must be greater than or equal to 1",
    "hierarchy.scaffold_enabled=1": "[hierarchy] scaffold_enabled = 1: must be true or false",
    "hierarchy.participation=0.0": "[hierarchy] participation = 0.0: must be greater than 0",
    "hierarchy.leaf_strategy_options={eta = 0.1}": "[hierarchy] leaf_strategy_options = "
    "{'eta': 0.1}: are options of a leaf_strategy, and none is named",
    "hierarchy.client_rule=centralised": '[hierarchy] client_rule = "centralised": is flat, one '
    "server trains on all data: needs num_servers = 1, not 3",
    "hierarchy.client_rule=local": '[hierarchy] client_rule = "local": has no leaf models that the '
    "cloud could group: set cloud_cluster.enable = false",
    "cloud_cluster.method=cfl": "[cloud_cluster] min_cluster_size = 2: CFL can never split 3 leaf "
    "servers into two clusters of this size; use more leaf servers (one for each client is CFL of "
    "clients), or smaller clusters",
    "hierarchy.num_servers=2": "[hierarchy] clients_per_server = [3, 3, 3]: must have one entry for "
    "each of the 2 leaf servers (num_servers), has 3",
    "hierarchy.clients_per_server=[3, 0, 3]": "[hierarchy] clients_per_server[1] = 0: must be "
    "greater than or equal to 1",
    "hierarchy.clients_per_server=9": "[hierarchy] clients_per_server = 9: must be a list of integers",
    "cloud_cluster.tau=-0.1": "[cloud_cluster] tau = -0.1: must be greater than or equal to 0",
    "cloud_cluster.tau=nan": "[cloud_cluster] tau = nan: must be a finite number",
    "cloud_cluster.tau=high": '[cloud_cluster] tau = "high": must be a valid number',
    "cloud_cluster.method=magic": "[cloud_cluster] method = \"magic\": must be 'cosine_similarity', 'agglomerative', 'cfl' or 'none'",
    "app.confg.seed=3": "[app] confg = {'seed': 3}: unknown key; did you mean 'config'?",
    "app.config.window-seconds=1e308": "[app.config] window-seconds = 1e+308: must be less than or "
    "equal to 3600",
    "app.config.output-dir=~nobody-here/x": '[app.config] output-dir = "~nobody-here/x": is no path: '
    "Could not determine home directory.",
    "hierarchy.batch_size=100000000000000000000": "[hierarchy] batch_size = 100000000000000000000: "
    'must be "profile" or an integer from 2 to 2147483647',
    "hierarchy.batch_size=1": '[hierarchy] batch_size = 1: must be "profile" or an integer from 2 '
    "to 2147483647",
    "hierarchy.accumulation=0": '[hierarchy] accumulation = 0: must be "profile" or an integer '
    "from 1",
    "hierarchy.batch_size=true": '[hierarchy] batch_size = true: must be "profile" or an integer '
    "from 2 to 2147483647",
    "runtime.num_worker=2": "[runtime] num_worker = 2: unknown key; did you mean 'num_workers'?",
    "runtime.backend=rai": "[runtime] backend = \"rai\": must be 'auto', 'inprocess' or 'ray'",
    "runtime.num_workers=0": '[runtime] num_workers = 0: must be "auto" or an integer from 1',
    "runtime.num_workers=true": '[runtime] num_workers = true: must be "auto" or an integer from 1',
    "runtime.num_workers=1.0": '[runtime] num_workers = 1.0: must be "auto" or an integer from 1',
    "runtime.num_workers=all": '[runtime] num_workers = "all": must be "auto" or an integer from 1',
    "runtime.num_cpus_per_actor=0": '[runtime] num_cpus_per_actor = 0: must be "auto" or a number '
    "above 0",
    "runtime.num_gpus_per_actor=1.5": '[runtime] num_gpus_per_actor = 1.5: must be "auto" or a '
    "number from 0 to 1",
    "runtime.num_gpus_per_actor=true": '[runtime] num_gpus_per_actor = true: must be "auto" or a '
    "number from 0 to 1",
    "runtime.cohort_size=[2]": '[runtime] cohort_size = [2]: must be "auto" or an integer from 1',
    "runtime.gpu_profile=higher": "[runtime] gpu_profile = \"higher\": must be 'conservative', "
    "'high' or 'aggressive'",
    "runtime.memory_share=0": '[runtime] memory_share = 0: must be "profile" or a number above 0, '
    "up to 1",
    "runtime.memory_cleanup=auto": "[runtime] memory_cleanup = \"auto\": must be 'profile', "
    "'round', 'end' or 'never'",
    "runtime.caching=1": '[runtime] caching = 1: must be "profile", true or false',
    "runtime.memory_pool=on": '[runtime] memory_pool = "on": must be "profile", true or false',
    "runtime.pipelining=0": '[runtime] pipelining = 0: must be "profile", true or false',
    "runtime.keep_warm=auto": '[runtime] keep_warm = "auto": must be "profile", true or false',
    "runtime.streams=0": '[runtime] streams = 0: must be "profile" or an integer from 1',
    "runtime.ray_address=3": "[runtime] ray_address = 3: must be a valid string",
    "runtime.dashboard=1": "[runtime] dashboard = 1: must be a valid boolean",
    "runtime.max_retries=-1": "[runtime] max_retries = -1: must be greater than or equal to 0",
    "runtime.client_timeout_s=-1": "[runtime] client_timeout_s = -1: must be greater than or equal "
    "to 0",
    "runtime.client_timeout_s=1800": "[runtime] client_timeout_s = 1800.0: must be less than "
    "progress_timeout_s = 1800.0",
    "runtime.progress_timeout_s=0": "[runtime] progress_timeout_s = 0: must be greater than 0",
    "runtime.min_clients_per_round=0": "[runtime] min_clients_per_round = 0: must be greater than "
    "or equal to 1",
    "runtime.min_clients_per_round=4": "[runtime] min_clients_per_round = 4: must be at most 3, the "
    "clients of the smallest leaf server",
    "hierarchy.global_rounds=5\nhierarchy.local_epochs=2": "[hierarchy] global_rounds = "
    '"5\nhierarchy.local_epochs=2": must be a valid integer',
    "hierarchy..x=1": "'hierarchy..x=1': an override has the form table.key=value, "
    "for example hierarchy.global_rounds=5",
    'app.config.overrides="cloud_cluster.tau=1"': "'app.config.overrides=\"cloud_cluster.tau=1\"': "
    "an override cannot hold overrides; give them one by one",
    "tau=1": "'tau=1': an override has the form table.key=value, "
    "for example hierarchy.global_rounds=5; did you mean cloud_cluster.tau?",
    "hierarchy.prox_mu.x=1": "[hierarchy.prox_mu]: must be a table, but prox_mu = 0.001 is a value",
}


@pytest.mark.parametrize(("assignment", "message"), WRONG.items())
def test_wrong_settings(assignment, message):
    with pytest.raises(ConfigError) as caught:
        load_settings(assignments=[assignment])
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


GOOD = {
    "hierarchy": {"batch_size": ["profile", 2, 64], "accumulation": ["profile", 1, 4]},
    "runtime": {
        "backend": ["inprocess", "ray"],
        "num_workers": ["auto", 1, 64],
        "num_cpus_per_actor": ["auto", 1, 0.5],
        "num_gpus_per_actor": ["auto", 0, 0.25, 1],
        "cohort_size": ["auto", 1, 8],
        "gpu_profile": ["conservative", "high", "aggressive"],
        "memory_share": ["profile", 0.1, 1],
        "memory_cleanup": ["profile", "round", "end", "never"],
        "caching": ["profile", True, False],
        "memory_pool": ["profile", True, False],
        "streams": ["profile", 1, 4],
        "pipelining": ["profile", True, False],
        "keep_warm": ["profile", True, False],
        "ray_address": ["", "auto", "10.0.0.1:6379"],
        "dashboard": [True, False],
        "client_timeout_s": [0, 0.5, 60],
        "progress_timeout_s": [1, 0.5],
        "max_retries": [0, 5],
        "min_clients_per_round": [1, 3],
    },
}


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [(t, key, v) for t, keys in GOOD.items() for key, values in keys.items() for v in values],
)
def test_good_settings_travel_as_json(table, key, value):
    settings = Settings.from_tables({table: {key: value}})
    found = getattr(getattr(settings, table), key)
    assert found == value
    assert isinstance(found, bool) == isinstance(value, bool)
    assert settings_from_json(settings.to_json()) == settings


def test_the_smallest_leaf_server_bounds_the_clients_that_must_reply():
    topology = ["hierarchy.clients_per_server=[4, 2, 3]", "runtime.min_clients_per_round=3"]
    with pytest.raises(ConfigError, match=r"= 3: must be at most 2, the clients of the smallest"):
        load_settings(assignments=topology)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the configuration"),
        ("a = = 1", "not a TOML file"),
        ("[project]\nname = 'x'", "has no [tool.flwr.*] tables"),
        ("tool = 3", "has no [tool.flwr.*] tables"),
        ("[tool.flwr]\napp = 3", "[app.config]: must be a table, but app = 3 is a value"),
        ("[tool.flwr]\nhierarchy = 3", "[hierarchy]: must be a table, but it is 3"),
    ],
)
def test_wrong_files(tmp_path, content, message):
    file = tmp_path / "job.toml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_settings(file)
    assert message in str(caught.value)


def test_seed_must_be_a_number():
    for wrong in ("x", "-1", "1.5", "9" * 5000):
        with pytest.raises(ConfigError, match=r"^SEED = "):
            load_settings(seed=wrong)


def test_the_command_takes_a_table_over_several_lines(tmp_path):
    file = tmp_path / "job.toml"
    file.write_text(OVER_SEVERAL_LINES + "[tool.flwr.runtime]\nmin_clients_per_round = 4\n")
    done = subprocess.run(
        command_line("--config", str(file)),
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    # read to the end: what is wrong in it is its last table
    assert done.stderr.startswith("error: [runtime] min_clients_per_round = 4: must be at most 3")


def test_an_output_folder_may_have_any_name():
    for name in ("2026-11-20", "5", "true"):
        assert load_settings(output_dir=Path(name)).data.output_dir.endswith(f"/{name}")


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["app.config.dataset=hhar-syntetic"], "did you mean 'hhar-synthetic'?"),
        (["app.config.partition=users"], "did you mean 'user'?"),
        (["app.config.num-classes=5"], "dataset 'hhar-synthetic' has 6 classes; allowed: 6, or 0"),
        (
            ["app.config.dataset=uci-har", "app.config.data-root=/nowhere"],
            'data-root = "/nowhere": dataset "uci-har" needs the file uci_har_21_subjects.npz',
        ),
        (
            ["app.config.dataset=arrays", f"app.config.data-root=/{'x' * 300}"],
            "cannot be read (File name too long)",
        ),
        (["hierarchy.clients_per_server=[4, 3, 3]"], "asks for 10 clients"),
        (["app.config.window-seconds=70"], "last at most 60 s"),
        (["app.config.window-seconds=0.001"], "at least 2 samples"),
    ],
)
def test_settings_that_do_not_fit_the_data(assignments, message):
    settings = load_settings(assignments=assignments)
    with pytest.raises(FedgeError) as caught:
        federate(settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_unknown_model():
    with pytest.raises(ConfigError, match=r"model = \"cn1d\": unknown; did you mean 'cnn1d'"):
        build_model("cn1d", (6, 100), 6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--set", "cloud_cluster.tau=-1"], "error: [cloud_cluster] tau = -1: must be"),
        (["--set", "app.config.model=resnet"], 'error: [app.config] model = "resnet": unknown'),
        (["--set", "app.config.dataset=uci-har"], "error: [app.config] data-root = "),
        (["--config", "missing.toml"], "error: missing.toml: cannot read"),
    ],
)
def test_the_command_line_ends_with_2_and_one_line(tmp_path, args, message):
    done = subprocess.run(
        command_line("--output-dir", str(tmp_path / "out"), *args),
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["hierarchy", "runtime", "tool.cloud_cluster", "app.config"])
def test_a_table_beside_those_that_are_read_is_refused(tmp_path, name):
    file = tmp_path / "job.toml"
    file.write_text(f"[tool.flwr.hierarchy]\nglobal_rounds = 3\n\n[{name}]\nx = 1\n")
    first = name.removeprefix("tool.").split(".")[0]
    with pytest.raises(ConfigError, match=rf"\[{first}\] would not be read: write \[tool\.flwr\."):
        load_settings(file)


def test_an_override_without_a_table_says_which_may_be_meant():
    for word, meant in (("lr", "hierarchy.lr_init"), ("num_shards", "app.config.partition-shards")):
        with pytest.raises(ConfigError, match=f"table.key=value.* did you mean {meant}?"):
            load_settings(assignments=[f"{word}=1"])
