"""Settings that make no sense together, and why."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

from fedge_sim.errors import ConfigError, as_toml

if TYPE_CHECKING:
    from fedge_sim.config import Settings


# Of each form of beta but the cosine, with f = beta_factor and s the staleness.
BETA_FACTORS = {
    "constant": "beta is f",
    "linear": "beta is min(1, f s), so 0.01 makes it 1 from staleness 100 on",
    "exponential": "beta is 1 - exp(-f s), so 0.01 makes it 0.63 at staleness 100",
    "stepwise": "beta goes up by 0.25 four times, up to f times the mean staleness",
    "sqrt": "beta is min(1, f / (1 + sqrt(s))), and 0 at staleness 0",
}

Case: TypeAlias = tuple[bool, str, str, str]  # whether it is wrong, table, key, the problem


def refuse_what_makes_no_sense(settings: "Settings") -> None:
    """Raise ConfigError with the reason if settings contradict each other."""
    for wrong, table, key, problem in (*_of_methods(settings), *_of_devices(settings)):
        if wrong:
            value = settings.model_dump(by_alias=True)
            for part in (*table.split("."), key):
                value = value[part]
            raise ConfigError.at(table, key, value, problem)


def _of_methods(settings: "Settings") -> Iterable[Case]:
    h, cluster = settings.hierarchy, settings.cloud_cluster
    rule, servers = h.client_rule, h.num_servers
    clusters = cluster.enable and cluster.method != "none"
    compared = settings.num_training if settings.draws_leaf_servers else servers
    accumulation = h.accumulation
    if accumulation == "profile":
        accumulation = 2 if settings.runtime.gpu_profile == "aggressive" else 1
    own_average = rule in ("scaffold", "pfedme", "local", "centralised")
    return (
        (
            rule == "centralised" and servers > 1,
            *("hierarchy", "client_rule"),
            f"is flat, one server trains on all data: needs num_servers = 1, not {servers}",
        ),
        (
            rule == "centralised" and h.participation < 1,
            *("hierarchy", "participation"),
            'all data are trained on with client_rule = "centralised": must be 1',
        ),
        (
            h.participation < 1 and not settings.by_versions and not _can_be_carried_out(settings),
            *("hierarchy", "participation"),
            _who_would_train(settings),
        ),
        (
            rule == "centralised" and (h.server_lr, h.global_lr) != (1, 1),
            *("hierarchy", "server_lr"),
            "and global_lr must be 1 where all data are trained on: there is no average",
        ),
        (
            rule == "scaffold" and set(h.clients_per_server) == {1},
            *("hierarchy", "clients_per_server"),
            "must have more than one client somewhere: with one under each leaf server c is "
            "c_i, and SCAFFOLD changes nothing",
        ),
        (
            rule == "scaffold"
            and h.scaffold_warmup_rounds >= h.global_rounds * h.server_rounds_per_global,
            *("hierarchy", "scaffold_warmup_rounds"),
            "leaves no round to use the variates in: must be less than all server rounds",
        ),
        (
            rule in ("local", "centralised") and clusters,
            *("hierarchy", "client_rule"),
            "has no leaf models that the cloud could group: set cloud_cluster.enable = false",
        ),
        (
            bool(h.leaf_strategy) and own_average,
            *("hierarchy", "leaf_strategy"),
            f"client_rule = {rule!r} says itself how a leaf server averages; allowed with it: "
            '"", and a leaf_strategy with client_rule "sgd" or "fedbn"',
        ),
        (
            bool(h.leaf_strategy) and h.server_lr != 1,
            *("hierarchy", "server_lr"),
            f"{h.leaf_strategy} has a rate of its own (leaf_strategy_options): must be 1.0",
        ),
        (
            bool(h.leaf_strategy_options) and not h.leaf_strategy,
            *("hierarchy", "leaf_strategy_options"),
            "are options of a leaf_strategy, and none is named",
        ),
        (
            rule == "pfedme" and settings.runtime.training == "cohort",
            *("runtime", "training"),
            'pFedMe trains one client at a time: allowed: "auto", "single", "reference"',
        ),
        (
            settings.runtime.compile is True and accumulation > 1,
            *("runtime", "compile"),
            f"a step of several batches is not compiled (hierarchy.accumulation = "
            f'{as_toml(h.accumulation)}): set accumulation = 1, or compile = "auto"',
        ),
        (
            clusters and cluster.method == "cfl" and compared < 2 * cluster.min_cluster_size,
            *("cloud_cluster", "min_cluster_size"),
            f"CFL can never split {compared} leaf servers into two clusters of this size; use "
            "more leaf servers (one for each client is CFL of clients), or smaller clusters",
        ),
        (
            clusters and cluster.method == "agglomerative" and servers < cluster.num_clusters,
            *("cloud_cluster", "num_clusters"),
            f"must be at most num_servers = {servers}, as leaf servers are grouped",
        ),
        (
            h.optimizer == "adam" and rule in ("scaffold", "pfedme"),
            *("hierarchy", "optimizer"),
            f"client_rule = {rule!r} is about steps of SGD: must be \"sgd\"",
        ),
    )  # fmt: skip


def _can_be_carried_out(settings: "Settings") -> bool:
    """Whether there is a server of which some of those who are drawn train, and not all."""
    h = settings.hierarchy
    sizes = (h.num_servers,) if settings.draws_leaf_servers else h.clients_per_server
    return any(1 <= h.rounded_share(size) < size for size in set(sizes))


def _who_would_train(settings: "Settings") -> str:
    h = settings.hierarchy
    most = max(h.clients_per_server)
    if settings.draws_leaf_servers:
        of = f"the {h.num_servers} leaf servers, each of one client,"
    elif most == 1:
        return (
            "each leaf server has one client, who trains in every round: must be 1, or have "
            'leaf servers with more clients (with cloud_cluster.method = "cfl" leaf servers are '
            "drawn)"
        )
    else:
        of = f"the clients of a leaf server ({most} at most)"
    rounded = "all" if h.participation >= 0.5 else "none"
    return f"of {of} it rounds to {rounded}: must be 1, or round to at least one and not to all"


def _of_devices(settings: "Settings") -> Iterable[Case]:
    d, a, h = settings.devices, settings.asynchronous, settings.hierarchy
    rule = a.rule
    if not d.enable:
        yield (
            rule != "fedavg",
            *("asynchronous", "rule"),
            "needs a virtual clock: set devices.enable = true",
        )
        yield (
            d.devices_per_leaf > 0,
            *("devices", "devices_per_leaf"),
            "needs devices.enable = true: without it there are the hierarchy's clients only",
        )
        return
    yield (
        not d.device_speed.mean,
        *("devices", "device_speed"),
        "is missing: the simulated seconds that a device trains, for example "
        '{distribution = "exponential", mean = [1.0, 1.3, 1.6], shares = [0.25, 0.5, 0.25]}',
    )
    yield (
        not d.job_timeout and (d.dropout > 0 or d.availability.online < 1),
        *("devices", "job_timeout"),
        "must be above 0 where devices drop out or go offline: servers would wait for ever",
    )
    yield (
        d.local_iters > 0 and h.local_steps > 0,
        *("devices", "local_iters"),
        "is hierarchy.local_steps by the name of older programs: set one of them",
    )
    if settings.by_versions:
        yield from _of_versions(settings)
        return
    yield (
        d.over_selection > 0 and h.participation == 1,
        *("devices", "over_selection"),
        "all clients are selected already: must be 0 with hierarchy.participation = 1",
    )
    yield (
        d.over_selection > 0 and settings.draws_leaf_servers,
        *("devices", "over_selection"),
        "leaf servers of one client each are drawn, and each waits for its own: must be 0",
    )
    yield (
        not d.device_reuse,
        *("devices", "device_reuse"),
        "must be true in rounds of all clients, which train in every round",
    )
    yield (
        h.client_rule == "centralised",
        *("devices", "enable"),
        'is about clients, and with client_rule = "centralised" one server has all data',
    )
    for table, key, value, default in (
        ("devices", "num_updates_for_model", d.num_updates_for_model, 0),
        ("asynchronous", "server", a.server, "cloud"),
    ):
        yield (
            value != default,
            *(table, key),
            'is about versions: rounds of all clients (rule = "fedavg", devices_per_leaf = 0) '
            "have none",
        )


def _of_versions(settings: "Settings") -> Iterable[Case]:
    d, a, h, config = settings.devices, settings.asynchronous, settings.hierarchy, settings.data
    rule, of_leaf = a.rule, a.server == "leaf"
    pool = min(h.clients_per_server) if of_leaf else h.num_clients
    selected, updates = d.device_selection_size, settings.updates_for_model
    whose = "under a leaf server" if of_leaf else "in all"
    if rule == "fedavg":
        selected = d.selected_for(selected)
    yield (
        selected > pool,
        *("devices", "device_selection_size"),
        f"{selected} devices are selected and there are {pool} {whose}: select fewer",
    )
    yield (
        rule != "fedavg" and d.over_selection > 0,
        *("devices", "over_selection"),
        'is for rounds that wait for all (rule = "fedavg"): must be 0',
    )
    yield (
        rule == "fedavg" and d.num_updates_for_model not in (0, d.device_selection_size),
        *("devices", "num_updates_for_model"),
        f"FedAvg waits for all {d.device_selection_size} selected devices: leave it out",
    )
    yield (
        rule == "fedasync" and updates != 1,
        *("devices", "num_updates_for_model"),
        "FedAsync makes a version of every update: must be 1",
    )
    yield (
        rule == "fedasync" and h.server_lr != 1,
        *("hierarchy", "server_lr"),
        "FedAsync mixes by asynchronous.mixing: must be 1",
    )
    yield (
        rule == "fedrevive" and config.standardise == "none",
        *("app.config", "standardise"),
        "examples that FedRevive makes up have mean 0 and variance 1, so clients' must be "
        'standardised: allowed: "global", "client"',
    )
    yield (
        rule in ("downweight", "fedrevive")
        and a.beta != "cosine"
        and "beta_factor" not in a.model_fields_set,
        *("asynchronous", "beta_factor"),
        f'is for beta = "cosine": set another (f) for "{a.beta}", where '
        + BETA_FACTORS.get(a.beta, ""),
    )
    yield (
        updates > d.device_selection_size,
        *("devices", "num_updates_for_model"),
        f"a version would wait for {updates} updates of {d.device_selection_size} active devices: "
        "must be at most device_selection_size",
    )
    yield (
        rule != "fedavg" and d.min_hole_to_fill > d.device_selection_size,
        *("devices", "min_hole_to_fill"),
        f"is more than there are places: at most {d.device_selection_size} (device_selection_size)",
    )
    versions, each = d.max_model_version, selected if rule == "fedavg" else updates
    yield (
        not d.device_reuse and versions * each > pool,
        *("devices", "device_reuse"),
        f"{versions} versions of {each} devices each take {versions * each} devices, and there "
        f"are {pool} {whose}: use more devices or fewer versions, or let devices be used again",
    )
    yield (
        of_leaf and (a.cloud_interval > 0) == (a.cloud_versions > 0),
        *("asynchronous", "cloud_interval"),
        "or cloud_versions must be set, and not both: when the cloud meets the leaf servers",
    )
    yield (
        not of_leaf and (a.cloud_interval > 0 or a.cloud_versions > 0),
        *("asynchronous", "cloud_interval"),
        'and cloud_versions are for versions made by leaf servers (server = "leaf")',
    )
    yield (
        rule == "fedrevive"
        and (settings.fedrevive.variant == "light") != bool(settings.fedrevive.unlabelled_data),
        *("fedrevive", "unlabelled_data"),
        'is the .npz file of examples that variant = "light" distils on, and only that variant',
    )
    for key, value, allowed, reason in (
        ("client_rule", h.client_rule, "sgd", "devices keep nothing from one job to the next"),
        ("leaf_strategy", h.leaf_strategy, "", "asynchronous.rule says how a server averages"),
        ("participation", h.participation, 1.0, "devices.device_selection_size says how many"),
    ):
        yield (value != allowed, "hierarchy", key, f"{reason}: must be {allowed!r}")
    yield (
        h.cluster_better_delta not in (0, -1),
        *("hierarchy", "cluster_better_delta"),
        "is of the accuracy gate, which servers that make versions have not: must be 0 or -1",
    )
    yield (
        h.averaging == "uniform" and (rule == "fedavg" or not of_leaf),
        *("hierarchy", "averaging"),
        'is about leaf servers here: must be "weighted" with FedAvg, or without leaf versions',
    )
    yield (
        h.global_lr != 1 and not of_leaf,
        *("hierarchy", "global_lr"),
        "is of the cloud's step over leaf servers that make versions: must be 1",
    )
    yield (
        settings.runtime.min_clients_per_round > 1,
        *("runtime", "min_clients_per_round"),
        "is about rounds, and a version is made of the updates that are usable: must be 1",
    )
    if d.devices_per_leaf:
        yield (
            config.partition not in ("iid", "dirichlet"),
            *("app.config", "partition"),
            "examples of devices are drawn when they are used (devices.devices_per_leaf): "
            'allowed: "iid", "dirichlet"',
        )
        yield (
            config.standardise == "client",
            *("app.config", "standardise"),
            'devices are too many to each have a scale: allowed: "global", "none"',
        )
        yield (
            config.label_swap > 0,
            *("app.config", "label-swap"),
            "is for the clients of a hierarchy (devices.devices_per_leaf = 0): must be 0",
        )
