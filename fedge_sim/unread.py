"""Which settings only some choices read: what is set and not read is refused, or told.

A key that stands in no line of ``READ_WHERE`` is read in every run.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from fedge_sim.errors import ConfigError, as_toml

if TYPE_CHECKING:
    from fedge_sim.config import Settings

ABOVE_0, BELOW_1 = "above 0", "below 1"  # in the place of the values of a choice
_TESTS: dict[object, Callable[[Any], bool]] = {
    ABOVE_0: lambda value: value > 0,
    BELOW_1: lambda value: value < 1,
}
# What a property of the settings stands for, in words.
_WORDS: dict[tuple[str, object], str] = {
    ("by_versions", True): "runs of versions",
    ("by_versions", False): "rounds of all clients",
    ("has_leaf_models", True): 'rounds of all clients, or asynchronous.server = "leaf"',
    ("local_steps", 0): "hierarchy.local_steps = 0",
}


class Read(NamedTuple):
    """Some keys of a table, and the choice with which they are read.

    Attributes
    ----------
    table, keys : str
        Keys as the settings name them, separated by blanks; ``"*"``: all but the choice.
    choice : str
        The path of the setting that decides, or a property of the settings; none: they are read
        in no run under Flower.
    values : tuple
        Of the choice: with any of them the keys are read.
    data : bool
        Whether the run would learn from other examples than the keys ask for, and so is refused.
    """

    table: str
    keys: str
    choice: str
    values: tuple[object, ...]
    data: bool = False

    def holds(self, settings: "Settings") -> bool:
        """Whether the keys are read under these settings."""
        value = _value(settings, self.choice)
        return value in self.values or any(
            _TESTS[test](value) for test in self.values if test in _TESTS
        )

    @property
    def where(self) -> str:
        """What has to be chosen, in words."""
        first = self.values[0]
        if words := _WORDS.get((self.choice, first)):
            return words
        if not self.choice:
            return str(first)
        if first in _TESTS:
            return f"{self.choice} {first}"
        *others, last = map(as_toml, self.values)
        return f"{self.choice} = {', '.join(others)}{' or ' * bool(others)}{last}"


_RULE, _METHOD = "asynchronous.rule", "cloud_cluster.method"
_DATASET, _PARTITION = "app.config.dataset", "app.config.partition"
_CLIENT_RULE = "hierarchy.client_rule"
_PROX_SCHEDULE = "prox_mu_min prox_mu_decay acc_stable_threshold"

_DATASETS = ("hhar-synthetic", "hhar", "uci-har", "cifar10", "digits", "arrays")

READ_WHERE = (
    Read("app.config", "data-root", _DATASET, ("hhar", "uci-har", "cifar10", "arrays"), True),
    Read("app.config", "use-watches", _DATASET, ("hhar",), True),
    Read(
        *("app.config", "sample-rate-hz window-seconds window-stride-seconds", _DATASET),
        *(("hhar", "hhar-synthetic"), True),
    ),
    Read(
        *("app.config", "synthetic-clients synthetic-windows-per-client", _DATASET),
        *(("hhar-synthetic",), True),
    ),
    Read("app.config", "image-size", _DATASET, ("cifar10",), True),
    Read("app.config", "layout", _DATASET, ("arrays",), True),
    Read("app.config", "partition-alpha", _PARTITION, ("dirichlet", "quantity"), True),
    Read("app.config", "partition-balanced", _PARTITION, ("dirichlet",), True),
    Read("app.config", "partition-shards", _PARTITION, ("shards",), True),
    Read("app.config", "partition-classes", _PARTITION, ("classes",), True),
    Read("app.config", "partition-file", _PARTITION, ("file",), True),
    Read("devices", "subset_size", "devices.devices_per_leaf", (ABOVE_0,), True),
    Read("fedrevive", "unlabelled_data", _RULE, ("fedrevive",), True),
    Read("hierarchy", "global_rounds server_rounds_per_global", "by_versions", (False,)),
    Read("hierarchy", "local_epochs", "local_steps", (0,)),
    Read("hierarchy", "es_delta", "hierarchy.es_patience", (ABOVE_0,)),
    Read("hierarchy", "momentum", "hierarchy.optimizer", ("sgd",)),
    Read(
        *("hierarchy", "lr_init lr_gamma momentum clip_norm", _CLIENT_RULE),
        ("sgd", "scaffold", "fedbn", "local", "centralised"),
    ),
    Read(
        *("hierarchy", f"prox_mu {_PROX_SCHEDULE}", _CLIENT_RULE),
        ("sgd", "scaffold", "fedbn"),
    ),
    Read("hierarchy", _PROX_SCHEDULE, "hierarchy.prox_mu", (ABOVE_0,)),
    Read("hierarchy", "prox_mu_min acc_stable_threshold", "hierarchy.prox_mu_decay", (BELOW_1,)),
    Read("hierarchy", "scaffold_warmup_rounds", _CLIENT_RULE, ("scaffold",)),
    Read(
        *("hierarchy", "pfedme_lambda pfedme_steps pfedme_inner_lr pfedme_outer_lr"),
        *(_CLIENT_RULE, ("pfedme",)),
    ),
    Read(
        *("hierarchy", "server_lr global_lr averaging", _CLIENT_RULE),
        ("sgd", "scaffold", "pfedme", "fedbn"),
    ),
    Read("cloud_cluster", "*", "has_leaf_models", (True,)),
    Read("cloud_cluster", "*", "cloud_cluster.enable", (True,)),
    Read(
        *("cloud_cluster", "start_round frequency", _METHOD),
        ("cosine_similarity", "agglomerative", "cfl"),
    ),
    Read("cloud_cluster", "features", _METHOD, ("cosine_similarity", "agglomerative")),
    Read("cloud_cluster", "tau", _METHOD, ("cosine_similarity",)),
    Read("cloud_cluster", "num_clusters", _METHOD, ("agglomerative",)),
    Read("cloud_cluster", "eps_1 eps_2 gamma_max min_cluster_size linkage", _METHOD, ("cfl",)),
    Read("devices", "*", "devices.enable", (True,)),
    Read("devices", "availability.session", "devices.availability.online", (BELOW_1,)),
    Read(
        *("devices", "device_selection_size min_hole_to_fill max_model_version eval_frequency"),
        *("by_versions", (True,)),
    ),
    Read(
        *("devices", "min_hole_to_fill", _RULE),
        ("fedasync", "fedbuff", "downweight", "fedrevive"),
    ),
    Read("asynchronous", "server cloud_interval cloud_versions", "by_versions", (True,)),
    Read("asynchronous", "cloud_interval cloud_versions", "asynchronous.server", ("leaf",)),
    Read("asynchronous", "mixing", _RULE, ("fedasync",)),
    Read("asynchronous", "staleness staleness_a staleness_b", _RULE, ("fedasync", "fedbuff")),
    Read("asynchronous", "staleness_a", "asynchronous.staleness", ("polynomial", "hinge")),
    Read("asynchronous", "staleness_b", "asynchronous.staleness", ("hinge",)),
    Read("asynchronous", "beta beta_factor", _RULE, ("downweight", "fedrevive")),
    Read("fedrevive", "*", _RULE, ("fedrevive",)),
    Read(
        "fedrevive",
        "noise_size generator_width generator_steps synthesis_batch_size generator_lr noise_lr "
        "class_weight one_hot batch_norm adversarial adversarial_start max_samples",
        *("fedrevive.variant", ("generator",)),
    ),
    Read("fedrevive", "adversarial_start", "fedrevive.adversarial", (ABOVE_0,)),
    Read("runtime", "num_cpus_per_actor ray_address", "runtime.backend", ("auto", "ray")),
)
# Of the table runtime, what Flower's own runtime does not heed.
NOT_UNDER_FLOWER = Read(
    "runtime",
    "backend num_workers num_cpus_per_actor cohort_size memory_share memory_cleanup memory_pool "
    "streams ray_address dashboard max_retries",
    *("", ("python -m fedge_sim.orchestrator",)),
)


class Unread(NamedTuple):
    """A key that is set and not read: its path, and what would read it."""

    path: str
    reason: Read


def unread(settings: "Settings", *, under_flower: bool = False) -> Iterator[Unread]:
    """Yield each key that is set and not read, with the first reason for it.

    What is off (0, or no text) asks for nothing, and so does not count; nor does a default beside
    a choice that is named.

    Parameters
    ----------
    settings : Settings
    under_flower : bool
        Whether Flower's own runtime carries the run out.
    """
    found = set()
    for line in (*READ_WHERE, *[NOT_UNDER_FLOWER] * under_flower):
        if line.holds(settings):
            continue
        for key in _keys(settings, line):
            path = f"{line.table}.{key}"
            if path not in found and _is_asked_for(settings, line, path):
                found.add(path)
                yield Unread(path, line)


def refuse_unread_data(settings: "Settings") -> None:
    """Raise ConfigError for keys whose being left unread changes what is learnt from.

    Not for those of a server rule in the place of which another one is named: a file may serve
    several rules.
    """
    problems = []
    for path, line in unread(settings):
        named = _is_set(settings, line.choice)
        if not line.data or (line.choice == _RULE and named):
            continue
        if line.choice == _DATASET and settings.data.dataset not in _DATASETS:
            continue  # what is unknown is refused as that, where it is opened
        table, _, key = path.rpartition(".")
        choice, now = line.choice.rpartition(".")[2], as_toml(_value(settings, line.choice))
        value, how = _value(settings, path), "" if named else " by default"
        problem = (
            f"would not be read, and the run learn from other examples: it goes with {line.where}, "
            f"and {choice} is {now}{how}; set that, or leave {key} out"
        )
        problems.append(str(ConfigError.at(table, key, value, problem)))
    if problems:
        raise ConfigError("; ".join(problems))


def told(keys: Iterator[Unread] | list[Unread]) -> str:
    """Return one line on keys that are set and not read; none, if there are none."""
    by_reason: dict[str, list[str]] = {}
    for path, line in keys:
        by_reason.setdefault(line.where, []).append(path)
    parts = (f"{', '.join(paths)} (only with {where})" for where, paths in by_reason.items())
    everything = "; ".join(parts)
    return everything and f"set, and without effect here: {everything}"


def _keys(settings: "Settings", line: Read) -> list[str]:
    if line.keys != "*":
        return line.keys.split()
    fields = type(_value(settings, line.table)).model_fields
    return [key for key in fields if f"{line.table}.{key}" != line.choice]


def _is_asked_for(settings: "Settings", line: Read, path: str) -> bool:
    value = _value(settings, path)
    table, _, key = path.rpartition(".")
    usual = _value(type(_value(settings, table))(), key)
    if value == usual and _is_set(settings, line.choice):  # a file of all keys, as shipped
        return False
    # What is off asks for nothing, unless it is on by default: data without watches.
    return _is_set(settings, path) and (bool(value) or (usual is True and line.data))


def _is_set(settings: "Settings", path: str) -> bool:
    table, _, key = path.rpartition(".")
    return key.replace("-", "_") in _value(settings, table).model_fields_set


def _value(settings: "Settings", path: str) -> Any:
    value: Any = settings
    for name in path.replace("-", "_").split(".") if path else ():
        value = getattr(value, name)
    return value
