"""Settings of devices, asynchronous rules and FedRevive: what is refused, in which words."""

import re

import pytest

from fedge_sim.config import Settings, load_settings, settings_from_json
from fedge_sim.config_devices import Devices
from fedge_sim.errors import ConfigError

CLOCK = ("devices.enable=true", "devices.device_speed={mean=1.0}")
DRAWN = (
    *(*CLOCK, "devices.devices_per_leaf=50", "app.config.partition=iid"),
    *("asynchronous.rule=fedbuff", "devices.device_selection_size=10"),
)
LEAF = (*DRAWN, "asynchronous.server=leaf", "asynchronous.cloud_versions=5")

REFUSED = {
    # distributions
    ("devices.device_speed={mean=-1.0}",): "[devices.device_speed] mean[0] = -1.0: must be greater",
    ("devices.device_speed={std=1.0}",): "has no mean: give one in seconds",
    (
        "devices.upload_delay={mean=[1.0, 2.0], shares=[0.5, 0.4]}",
    ): "shares must add up to 1, not 0.9",
    ("devices.upload_delay={mean=[1.0, 2.0], shares=[1.0]}",): "shares must have 2 values",
    ("devices.device_speed={mean=[1.0, 2.0, 3.0], std=[0.1, 0.2]}",): "std must have 3 values",
    (
        'devices.device_speed={distribution="exponential", mean=1.0, std=0.2}',
    ): "a delay that is exponential has none; leave it out",
    ('devices.device_speed={distribution="log-normal", mean=0.0}',): "mean must be above 0",
    (
        'devices.device_speed={distribution="uniform", mean=1.0, std=0.6}',
    ): "std must be at most mean / sqrt(3)",
    ('devices.device_speed={distribution="gamma", mean=1.0}',): "must be 'constant', 'normal'",
    ("devices.enable=true",): "[devices] device_speed = {'distribution': 'normal', 'mean': ()",
    ("devices.device_speed=3",): "[devices.device_speed]: must be a table, but it is 3",
    ('devices.device_speed={mean="a"}',): "must be a number, or a list of one for each class of",
    ("devices.device_speed={mean=true}",): "must be a number, or a list of one for each class of",
    ("devices.device_speed={mean=1e10}",): "mean[0] = 10000000000.0: must be less than or equal",
    (
        'devices.device_speed={distribution="log-normal", mean=1e-200, std=1.0}',
    ): "std must be at most a million times mean",
    ("devices.client_leaf_bandwidth={up=1e-308}",): "must be 0 (no limit), or at least 1 byte a",
    # devices and servers that cannot be
    (*DRAWN, "hierarchy.num_servers=1000000000000"): "num_servers = 1000000000000: must be less",
    (*DRAWN, "asynchronous.rule=fedavg", "devices.over_selection=1e308"): "less than or equal to",
    (*DRAWN, "devices.device_selection_size=151"): "151 devices are selected and there are 150 in",
    (*LEAF, "devices.device_selection_size=51"): "there are 50 under a leaf server: select fewer",
    (*DRAWN, "devices.num_updates_for_model=11"): "would wait for 11 updates of 10 active devices",
    (*DRAWN, "devices.min_hole_to_fill=11"): "is more than there are places: at most 10",
    (
        *(*DRAWN, "devices.device_reuse=false", "devices.num_updates_for_model=2"),
        "devices.max_model_version=76",
    ): "76 versions of 2 devices each take 152 devices, and there are 150 in all",
    (
        *(*DRAWN, "asynchronous.rule=fedavg", "devices.device_reuse=false"),
        "devices.max_model_version=16",
    ): "16 versions of 10 devices each take 160 devices",
    (*DRAWN, "asynchronous.rule=fedavg", "devices.num_updates_for_model=9"): "waits for all 10",
    (*DRAWN, "asynchronous.rule=fedasync", "devices.num_updates_for_model=2"): "must be 1",
    (*DRAWN, "asynchronous.rule=fedasync", "hierarchy.server_lr=0.5"): "mixes by asynchronous.mix",
    (*DRAWN, "devices.over_selection=0.5"): 'rounds that wait for all (rule = "fedavg")',
    (*CLOCK, "devices.over_selection=0.5"): "all clients are selected already",
    (*CLOCK, "devices.device_reuse=false"): "must be true in rounds of all clients",
    (*CLOCK, "devices.dropout=0.1", "devices.job_timeout=0.0"): "servers would wait for ever",
    (*CLOCK, "devices.local_iters=5", "hierarchy.local_steps=5"): "set one of them",
    (*CLOCK, "devices.update_timeout=1e-9"): "must be 0 (never), or at least 0.001 seconds",
    (*CLOCK, "devices.num_updates_for_model=2"): "rounds of all clients",
    ("asynchronous.rule=fedbuff",): "needs a virtual clock: set devices.enable = true",
    ("devices.devices_per_leaf=50",): "needs devices.enable = true",
    # the cloud of leaf servers
    (*DRAWN, "asynchronous.server=leaf"): "cloud_versions must be set, and not both",
    (*LEAF, "asynchronous.cloud_interval=2.0"): "cloud_versions must be set, and not both",
    (*DRAWN, "asynchronous.cloud_interval=2.0"): "for versions made by leaf servers",
    # what versions have not
    (*DRAWN, "hierarchy.client_rule=scaffold"): "devices keep nothing from one job to the next",
    (*DRAWN, "hierarchy.participation=0.5"): "device_selection_size says how many: must be 1.0",
    (*DRAWN, "hierarchy.leaf_strategy=FedAdam"): "asynchronous.rule says how a server averages",
    (*DRAWN, "hierarchy.cluster_better_delta=0.1"): "have not: must be 0 or -1",
    (*DRAWN, "hierarchy.averaging=uniform"): 'must be "weighted"',
    (*DRAWN, "hierarchy.global_lr=0.5"): "must be 1",
    (*DRAWN, "runtime.min_clients_per_round=2"): "updates that are usable: must be 1",
    (*DRAWN, "app.config.partition=user"): 'allowed: "iid", "dirichlet"',
    (*DRAWN, "app.config.standardise=client"): 'allowed: "global", "none"',
    (*DRAWN, "app.config.label-swap=0.5"): "must be 0",
    # FedRevive
    ("fedrevive.teacher_buffer_size=0",): "teacher_buffer_size = 0: must be greater than or equal",
    (*DRAWN, "asynchronous.rule=fedrevive", "fedrevive.variant=light"): 'variant = "light"',
    (*DRAWN, "asynchronous.rule=fedrevive", "fedrevive.unlabelled_data=x.npz"): "only that",
    (*DRAWN, "asynchronous.rule=fedrevive", "app.config.standardise=none"): "mean 0 and variance 1",
    ("asynchronous.beta=constant", "asynchronous.beta_factor=2.0"): "it is beta itself",
    (*DRAWN, "asynchronous.rule=downweight", "asynchronous.beta=linear"): "beta is min(1, f s)",
    (*DRAWN, "asynchronous.rule=fedrevive", "asynchronous.beta=sqrt"): "f / (1 + sqrt(s))",
    ("hierarchy.optimizer=adam", "hierarchy.client_rule=scaffold"): "steps of SGD",
}


@pytest.mark.parametrize("assignments", REFUSED)
def test_what_is_refused(assignments):
    with pytest.raises(ConfigError, match=re.escape(REFUSED[assignments])) as caught:
        load_settings(assignments=assignments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("good", [CLOCK, DRAWN, LEAF])
def test_good_settings_travel_as_json(good):
    settings = load_settings(assignments=good)
    assert settings_from_json(settings.to_json()) == settings


@pytest.mark.parametrize(
    ("wanted", "share", "selected"), [(100, 0.1, 110), (5, 0.2, 6), (3, 0.25, 4), (7, 0.0, 7)]
)
def test_over_selection_is_not_rounded_up_by_a_float(wanted, share, selected):
    assert Devices(over_selection=share).selected_for(wanted) == selected


def test_drawn_devices_are_the_clients():
    settings = load_settings(assignments=DRAWN)
    assert settings.hierarchy.clients_per_server == (50, 50, 50)
    assert settings.by_versions
    assert not load_settings(assignments=CLOCK).by_versions


def test_versions_keep_the_learning_rate_and_have_no_patience_unless_asked():
    table = {"devices": {"enable": True, "device_speed": {"mean": 1.0}}}
    rounds = Settings.from_tables(table).hierarchy
    assert (rounds.lr_gamma, rounds.es_patience) == (0.99, 5)
    table |= {"asynchronous": {"rule": "fedasync"}}
    table["devices"] |= {"device_selection_size": 9}
    versions = Settings.from_tables(table).hierarchy
    assert (versions.lr_gamma, versions.es_patience) == (1.0, 0)
    asked = Settings.from_tables({**table, "hierarchy": {"es_patience": 3}}).hierarchy
    assert asked.es_patience == 3
    # And so it is beside the project's own tables.
    assert load_settings().hierarchy.lr_gamma == 0.99
    assert load_settings(assignments=DRAWN).hierarchy.learning_rate(1000) == 0.05
