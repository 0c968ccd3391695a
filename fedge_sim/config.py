"""Every setting, typed and checked, read from the ``[tool.flwr.*]`` tables of a TOML file.

A setting's path is the one below ``tool.flwr``: ``app.config.dataset``,
``hierarchy.global_rounds``, ``cloud_cluster.tau``. The defaults here are the reference ones
(100 rounds); the tables in ``pyproject.toml`` are the quick default.
"""

import os
import re
from collections.abc import Iterable, Mapping
from decimal import ROUND_HALF_UP, Decimal
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli
from pydantic import (
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fedge_sim.combinations import refuse_what_makes_no_sense
from fedge_sim.config_devices import Asynchronous, Delay, Devices, FedRevive
from fedge_sim.config_types import (
    AbsolutePath,
    AutoCount,
    AutoCpus,
    AutoGpus,
    AutoSwitch,
    Count,
    Fraction,
    NonNegative,
    OptionalPath,
    Positive,
    ProfileBatch,
    ProfileCount,
    ProfileShare,
    ProfileSwitch,
    Seconds,
    Share,
    Similarity,
    Table,
    absolute,
)
from fedge_sim.errors import ConfigError, as_toml
from fedge_sim.unknown import meant_by, other_rule, unknown_keys
from fedge_sim.unread import refuse_unread_data

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
MAX_SERVERS = 100_000
_QUICK = {"global_rounds": 10}  # what else PYPROJECT has as it is shipped

# Of overrides: what parts one from the next; text in quotes that begins a value; a comment.
_GAP = re.compile(r"\s+(?=[\w\-]+\.[\w.\-]+\s*=)")
_QUOTED = re.compile(
    r'''(?<=[=\[{,\s])(?:"""(?:\\.|[^\\])*?"""|"(?:\\.|[^"\\\n])*"|'''
    r"""'''.*?'''|'[^'\n]*')""",
    re.DOTALL,
)
_COMMENT = re.compile(r"#[^\n]*")

# What belongs to Flower itself under tool.flwr, and in its table app.
_FLOWER_TABLES = {"federations"}
_FLOWER_APP_KEYS = {
    *("publisher", "components", "display-name", "color"),
    *("fab-include", "fab-exclude", "fab-format-version", "flwr-version-target"),
}


class AppConfig(Table):
    """``[tool.flwr.app.config]``: the data, the model, the seed and where results go.

    Keys are written with dashes, as Flower's own are. Paths are made absolute when read.
    """

    model_config = ConfigDict(
        alias_generator=lambda name: name.replace("_", "-"), validate_default=True
    )

    dataset: str = "hhar-synthetic"
    data_root: AbsolutePath = "data"
    cache_dir: OptionalPath = ""
    partition: str = "user"
    partition_alpha: Annotated[float, Field(gt=0, le=1e6)] = 0.5
    partition_balanced: bool = False
    partition_classes: Count = 2
    partition_shards: Count = 2
    partition_file: OptionalPath = ""
    split: Literal["random", "blocked"] = "random"
    layout: Literal["auto", "channels-first", "channels-last"] = "auto"
    standardise: Literal["global", "client", "none"] = "global"
    image_size: Annotated[int, Field(ge=0, le=4096)] = 0
    use_watches: bool = True
    sample_rate_hz: Annotated[int, Field(ge=5, le=10_000)] = 50
    window_seconds: Seconds = 2.0
    window_stride_seconds: Seconds = 1.0
    synthetic_clients: Annotated[int, Field(ge=1, le=10_000_000)] = 9
    synthetic_windows_per_client: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    num_classes: Annotated[int, Field(ge=0)] = 6
    model: str = "cnn1d"
    label_swap: Share = 0.0
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 42
    output_dir: AbsolutePath = "results"
    overrides: str = ""

    @property
    def window_samples(self) -> tuple[int, int]:
        """Samples of a window, and from one window to the next."""
        stride = round(self.sample_rate_hz * self.window_stride_seconds)
        return round(self.sample_rate_hz * self.window_seconds), max(1, stride)


class Hierarchy(Table):
    """``[tool.flwr.hierarchy]``: the topology and how clients, leaves and cloud learn."""

    num_servers: Annotated[int, Field(ge=1, le=MAX_SERVERS)] = 3
    clients_per_server: Annotated[
        tuple[Annotated[StrictInt, Field(ge=1, le=10_000_000)], ...], Field(strict=False)
    ] = (3, 3, 3)
    global_rounds: Count = 100
    server_rounds_per_global: Count = 1
    lr_init: Positive = 0.05
    lr_gamma: Annotated[float, Field(gt=0, le=1)] = 0.99
    server_lr: Positive = 1.0
    global_lr: Positive = 1.0
    local_epochs: Count = 5
    local_steps: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    batch_size: ProfileBatch = 32
    accumulation: ProfileCount = 1
    eval_batch_size: Count = 64
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: Fraction = 0.9
    weight_decay: NonNegative = 0.0001
    clip_norm: NonNegative = 1.0
    label_smoothing: Fraction = 0.1
    prox_mu: NonNegative = 0.001
    prox_mu_min: NonNegative = 0.0001
    prox_mu_decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    acc_stable_threshold: Share = 0.002
    client_rule: Literal["sgd", "scaffold", "pfedme", "fedbn", "local", "centralised"] = "sgd"
    scaffold_warmup_rounds: Annotated[int, Field(ge=0)] = 0
    pfedme_lambda: Positive = 15.0
    pfedme_steps: Count = 5
    pfedme_inner_lr: Positive = 0.05
    pfedme_outer_lr: Positive = 0.01
    participation: Annotated[float, Field(gt=0, le=1)] = 1.0
    averaging: Literal["weighted", "uniform"] = "weighted"
    leaf_strategy: str = ""
    leaf_strategy_options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    es_patience: Annotated[int, Field(ge=0)] = 5
    es_delta: Share = 0.001
    target_accuracy: Share = 0.0
    cluster_better_delta: Annotated[float, Field(ge=-1, le=1)] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _older_name_of_scaffold(cls, table: Any) -> Any:
        """Read ``scaffold_enabled = true``, the older name of ``client_rule = "scaffold"``."""
        if not isinstance(table, Mapping) or "scaffold_enabled" not in table:
            return table
        table = dict(table)
        enabled = table.pop("scaffold_enabled")
        if not isinstance(enabled, bool):
            problem = "must be true or false"
            raise ConfigError.at("hierarchy", "scaffold_enabled", enabled, problem)
        if enabled and table.get("client_rule", "scaffold") != "scaffold":
            rule = table["client_rule"]
            problem = f"SCAFFOLD is a client rule, and client_rule = {rule!r} is another"
            raise ConfigError.at("hierarchy", "scaffold_enabled", enabled, problem)
        return table | ({"client_rule": "scaffold"} if enabled else {})

    @field_validator("clients_per_server")
    @classmethod
    def _one_entry_per_server(
        cls, clients: tuple[int, ...], info: ValidationInfo
    ) -> tuple[int, ...]:
        servers = info.data.get("num_servers", len(clients))
        if len(clients) != servers:
            raise ValueError(
                f"must have one entry for each of the {servers} leaf servers (num_servers), "
                f"has {len(clients)}"
            )
        return clients

    @property
    def leaf_clients(self) -> tuple[range, ...]:
        """The client ids of every leaf server: client 0, 1, ... in leaf order."""
        ends = accumulate(self.clients_per_server, initial=0)
        return tuple(range(*span) for span in pairwise(ends))

    @property
    def num_clients(self) -> int:
        """How many clients there are under all leaf servers."""
        return sum(self.clients_per_server)

    def participants(self, clients: int) -> int:
        """Return how many of a server's clients train in a round, at least one."""
        return max(1, self.rounded_share(clients))

    def rounded_share(self, clients: int) -> int:
        """Return ``participation`` times a number of clients, a half rounded up."""
        share = Decimal(str(self.participation)) * clients  # 0.29 of 50 is 14.5, not less
        return int(share.to_integral_value(ROUND_HALF_UP))

    def learning_rate(self, global_round: int) -> float:
        """Learning rate of a global round, counted from 1: lr_init * lr_gamma^(g-1)."""
        return self.lr_init * self.lr_gamma ** (global_round - 1)


class CloudCluster(Table):
    """``[tool.flwr.cloud_cluster]``: when and how the cloud groups the leaf servers."""

    enable: bool = True
    start_round: Count = 1
    frequency: Count = 1
    method: Literal["cosine_similarity", "agglomerative", "cfl", "none"] = "cosine_similarity"
    features: Literal["head", "weights", "updates"] = "head"
    tau: Similarity = 0.7
    num_clusters: Count = 2
    eps_1: NonNegative = 0.4
    eps_2: NonNegative = 1.6
    gamma_max: Share = 0.0
    min_cluster_size: Count = 2
    linkage: Literal["complete", "single"] = "complete"

    def due(self, global_round: int) -> bool:
        """Whether the cloud clusters in this global round (counted from 1)."""
        since_start = global_round - self.start_round
        on_time = since_start >= 0 and since_start % self.frequency == 0
        return self.enable and self.method != "none" and on_time


class Runtime(Table):
    """``[tool.flwr.runtime]``: how the work is carried out; never changes a result's meaning.

    What is ``"auto"`` follows from the machine, what is ``"profile"`` from ``gpu_profile``.
    """

    backend: Literal["auto", "inprocess", "ray"] = "auto"
    num_workers: AutoCount = "auto"
    threads_per_client: Annotated[int, Field(ge=1, le=1024)] = 1
    num_cpus_per_actor: AutoCpus = "auto"
    num_gpus_per_actor: AutoGpus = "auto"
    training: Literal["auto", "reference", "single", "cohort"] = "auto"
    compile: AutoSwitch = "auto"
    cohort_size: AutoCount = "auto"
    precision: Literal["float32", "tf32", "bf16"] = "tf32"
    gpu_profile: Literal["conservative", "high", "aggressive"] = "conservative"
    memory_share: ProfileShare = "profile"
    memory_cleanup: Literal["profile", "round", "end", "never"] = "profile"
    caching: ProfileSwitch = "profile"
    memory_pool: ProfileSwitch = "profile"
    streams: ProfileCount = "profile"
    pipelining: ProfileSwitch = "profile"
    keep_warm: ProfileSwitch = "profile"
    ray_address: str = ""
    dashboard: bool = False
    node_timeout_s: Positive = 120.0
    client_timeout_s: NonNegative = 0.0
    progress_timeout_s: Positive = 1800.0
    max_retries: Annotated[int, Field(ge=0)] = 2
    min_clients_per_round: Count = 1

    @model_validator(mode="after")
    def _compiled_steps_are_float32(self) -> Self:
        if self.compile is True and self.precision == "bf16":
            problem = "steps are compiled in float32; set compile = false, or another precision"
            raise ConfigError.at("runtime", "precision", self.precision, problem)
        return self

    @model_validator(mode="after")
    def _steps_of_one_client_are_compiled(self) -> Self:
        if self.compile is not True:
            return self
        together = self.cohort_size not in ("auto", 1)
        if together or self.training in ("reference", "cohort"):
            key = "cohort_size" if together else "training"
            why = f"{key} = {as_toml(getattr(self, key))}"
            problem = (
                f"steps of one client at a time are compiled, and with {why} there would be none: "
                'use training = "single" or "auto" and no cohort_size, or compile = "auto"'
            )
            raise ConfigError.at("runtime", "compile", self.compile, problem)
        return self

    @model_validator(mode="after")
    def _a_client_is_given_up_before_the_run(self) -> Self:
        if self.client_timeout_s >= self.progress_timeout_s:
            problem = f"must be less than progress_timeout_s = {self.progress_timeout_s}"
            raise ConfigError.at("runtime", "client_timeout_s", self.client_timeout_s, problem)
        return self


class _AppTable(Table):
    """``[tool.flwr.app]``; what else stands there is Flower's, and left out before."""

    config: AppConfig = Field(default_factory=AppConfig)


class Settings(Table):
    """All settings of a run, frozen."""

    app: _AppTable = Field(default_factory=_AppTable)
    hierarchy: Hierarchy = Hierarchy()
    cloud_cluster: CloudCluster = CloudCluster()
    devices: Devices = Devices()
    asynchronous: Asynchronous = Asynchronous()
    fedrevive: FedRevive = FedRevive()
    runtime: Runtime = Runtime()

    @model_validator(mode="before")
    @classmethod
    def _what_devices_change_elsewhere(cls, tables: Any) -> Any:
        """Let ``devices_per_leaf`` take the place of ``clients_per_server``.

        And in a run of versions, which are many and small, the learning rate and mu stay and no
        patience ends the run, unless asked for.
        """
        tables = dict(tables) if isinstance(tables, Mapping) else {}
        parts = [tables.get(name, {}) for name in ("devices", "hierarchy", "asynchronous")]
        if not all(isinstance(part, Mapping) for part in parts) or not parts[0].get("enable"):
            return tables
        devices, hierarchy, asynchronous = parts
        per_leaf, servers = devices.get("devices_per_leaf"), hierarchy.get("num_servers", 3)
        whole = type(per_leaf) is type(servers) is int
        drawn = whole and per_leaf > 0 and servers <= MAX_SERVERS
        if drawn:
            hierarchy = {**hierarchy, "clients_per_server": (per_leaf,) * servers}
        if drawn or asynchronous.get("rule", "fedavg") != "fedavg":
            still = {"lr_gamma": 1.0, "prox_mu_decay": 1.0, "es_patience": 0}
            hierarchy = {**still, **hierarchy}
        tables["hierarchy"] = hierarchy
        return tables

    @model_validator(mode="after")
    def _every_leaf_has_enough_clients(self) -> Self:
        needed, h = self.runtime.min_clients_per_round, self.hierarchy
        central = h.client_rule == "centralised"  # then one client has all data
        smallest = 1 if central else h.participants(min(h.clients_per_server))
        if needed > smallest:
            problem = f"must be at most {smallest}, the clients of the smallest leaf server"
            if h.participation < 1:
                problem += f" that train in a round (participation = {h.participation})"
            raise ConfigError.at("runtime", "min_clients_per_round", needed, problem)
        return self

    @model_validator(mode="after")
    def _the_methods_go_together(self) -> Self:
        refuse_what_makes_no_sense(self)
        return self

    @property
    def by_versions(self) -> bool:
        """Whether servers make versions of updates of devices, not rounds of all clients."""
        drawn = self.devices.devices_per_leaf > 0
        return self.devices.enable and (drawn or self.asynchronous.rule != "fedavg")

    @property
    def draws_leaf_servers(self) -> bool:
        """Whether those who train in a round are drawn among the leaf servers.

        In CFL of clients, where each is alone under a leaf server.
        """
        h, cluster = self.hierarchy, self.cloud_cluster
        is_cfl = cluster.enable and cluster.method == "cfl"
        return is_cfl and h.participation < 1 and set(h.clients_per_server) == {1}

    @property
    def num_training(self) -> int:
        """How many clients train in a round, under all leaf servers; 1 if one has all data."""
        h = self.hierarchy
        if h.client_rule == "centralised":
            return 1
        if self.draws_leaf_servers:
            return h.participants(h.num_servers)
        return sum(map(h.participants, h.clients_per_server))

    @property
    def has_leaf_models(self) -> bool:
        """Whether leaf servers have models of their own, which the cloud can group."""
        return not self.by_versions or self.asynchronous.server == "leaf"

    @property
    def local_steps(self) -> int:
        """Steps after which a client's training ends; 0: after ``hierarchy.local_epochs``."""
        return (self.devices.enable and self.devices.local_iters) or self.hierarchy.local_steps

    @property
    def updates_for_model(self) -> int:
        """How many updates make a version."""
        devices, rule = self.devices, self.asynchronous.rule
        default = devices.device_selection_size if rule == "fedavg" else 1
        return devices.num_updates_for_model or default

    @property
    def clients_at_a_time(self) -> int:
        """How many clients can be at work at a time."""
        d, h = self.devices, self.hierarchy
        if not self.by_versions:
            return h.num_clients
        servers = h.num_servers if self.asynchronous.server == "leaf" else 1
        return min(servers * d.selected_for(d.device_selection_size), h.num_clients)

    @property
    def data(self) -> AppConfig:
        """The table ``app.config``."""
        return self.app.config

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.app.config.seed

    @classmethod
    def from_tables(cls, tables: Mapping[str, Any]) -> Self:
        """Check the tables found under ``tool.flwr`` and return the settings.

        Raises
        ------
        ConfigError
            For all unknown keys, or the first wrong setting: table, key, value, what is allowed.
        """
        known = {name: table for name, table in tables.items() if name not in _FLOWER_TABLES}
        if isinstance(app := known.get("app"), Mapping):
            known["app"] = {k: v for k, v in app.items() if k not in _FLOWER_APP_KEYS}
        if unknown := unknown_keys(cls, known):
            raise ConfigError("; ".join(unknown))
        try:
            settings = cls.model_validate(known)
        except ValidationError as error:
            raise _config_error(error) from None
        # What devices change elsewhere nobody has set; client_rule has an older name.
        given = {*known.get("hierarchy", ()), "client_rule"}
        settings.hierarchy.model_fields_set.intersection_update(given)
        return settings

    def with_data_root(self, path: str) -> Self:
        """Return the settings with the data somewhere else: a node's own folder."""
        return self.with_data(data_root=absolute(path))

    def with_data(self, **values: object) -> Self:
        """Return the settings with other values in the table ``app.config``."""
        config = self.app.config.model_copy(update=values)
        return self.model_copy(update={"app": self.app.model_copy(update={"config": config})})

    def with_runtime(self, **values: object) -> Self:
        """Return the settings with other values in the table ``runtime``."""
        return self.model_copy(update={"runtime": self.runtime.model_copy(update=values)})

    def to_json(self) -> str:
        """Return the settings as JSON that :func:`settings_from_json` reads back."""
        return self.model_dump_json(by_alias=True)


@lru_cache(maxsize=8)
def settings_from_json(text: str) -> Settings:
    """Read back what :meth:`Settings.to_json` wrote; what is none is a ConfigError."""
    try:
        return Settings.model_validate_json(text)
    except ValidationError as error:
        raise _config_error(error) from None


def load_settings(
    file: Path | None = None,
    *,
    app_config: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
    output_dir: Path | None = None,
    seed: str | None = None,
    lenient: bool = False,
) -> Settings:
    """Read the settings of a run from a file and what overrides it.

    Parameters
    ----------
    file : Path, optional
        A TOML file with ``[tool.flwr.*]`` tables; the application's own ``pyproject.toml``
        if not given. A key that it leaves out takes its default.
    app_config : mapping, optional
        Replaces ``[tool.flwr.app.config]``: what ``flwr run`` made of the table and of ``-c``.
    assignments : iterable of str
        ``table.key=value`` pairs, later ones winning; the key ``overrides`` of the table
        ``app.config`` holds more of them, which are applied first.
    output_dir : Path, optional
        Overrides ``app.config.output-dir``.
    seed : str, optional
        The value of the environment variable ``SEED``; overrides ``app.config.seed``.
    lenient : bool
        Whether settings of data may be left unread, as something else takes their place.

    Raises
    ------
    ConfigError
        If the file cannot be read, a setting is wrong, or one of data would not be read.
    """
    tables = _read_tables(file or PYPROJECT)
    shipped = _read_tables(PYPROJECT) if (file or PYPROJECT).resolve() == PYPROJECT else {}
    config = _table(tables, "app.config")
    if app_config is not None:
        config.clear()
        config.update(app_config)
    for assignment in (*split_overrides(config.get("overrides", "")), *assignments):
        path = _assign(tables, assignment)
        table, _, key = path.rpartition(".")
        _table(shipped, table).pop(key, None)
    if output_dir is not None:
        config["output-dir"] = str(output_dir)
    if seed is not None:
        if not re.fullmatch(r"\d{1,18}", seed.strip()):
            raise ConfigError(
                f'SEED = "{seed}": the environment variable must be an integer from 0, '
                "of at most 18 digits"
            )
        config["seed"] = int(seed)
    settings = Settings.from_tables(tables)
    _forget_defaults(settings, shipped)
    if not lenient:
        refuse_unread_data(settings)
    return settings


def _forget_defaults(settings: Settings, shipped: dict[str, Any]) -> None:
    """Count as not set what the application's own file names and leaves as it is by default.

    All keys of its table ``app.config`` stand there, as ``flwr run -c`` takes no others.
    """
    for path in ("app.config", "hierarchy", "cloud_cluster", "runtime"):
        table: Any = settings
        for name in path.split("."):
            table = getattr(table, name)
        usual = type(table)()
        for key in _table(shipped, path):
            name = key.replace("-", "_")
            now = getattr(table, name, None)
            if now in (getattr(usual, name, None), _QUICK.get(name, ())):
                table.model_fields_set.discard(name)


def environment_seed() -> str | None:
    """Return the environment variable ``SEED``, or None if it is unset or empty."""
    return os.environ.get("SEED") or None


def split_overrides(text: object) -> list[str]:
    """Split ``"a.b=1 c.d=[1, 2]"`` into its assignments; blanks inside values are kept."""
    if not isinstance(text, str):
        raise ConfigError.at("app.config", "overrides", text, "must be text of table.key=value")
    text = text.strip()
    pairs, begin, at, depth = [], 0, 0, 0
    while at < len(text):
        if not depth and (gap := _GAP.match(text, at)):
            pairs.append(text[begin:at])
            begin = at = gap.end()
        elif whole := _QUOTED.match(text, at) or (depth and _COMMENT.match(text, at)):
            at = whole.end()
        else:
            opens = text[at] in "[{" and (depth or text[:at].rstrip().endswith("="))
            depth += bool(opens) - bool(depth and text[at] in "]}")
            at += 1
    return [pair for pair in (*pairs, text[begin:]) if pair]


def _read_tables(file: Path) -> dict[str, Any]:
    try:
        document = tomli.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot read the configuration ({error.strerror})") from None
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not a TOML file: {error}") from None
    tool = document.get("tool")
    tables = tool.get("flwr") if isinstance(tool, dict) else None
    if not isinstance(tables, dict):
        raise ConfigError(f"{file}: has no [tool.flwr.*] tables, such as [tool.flwr.hierarchy]")
    above = {**document, **document["tool"]}
    if lost := [name for name in Settings.model_fields if name in above]:
        named = ", ".join(f"[{name}]" for name in lost)
        raise ConfigError(f"{file}: {named} would not be read: write [tool.flwr.{lost[0]}]")
    return tables


def _assign(tables: dict[str, Any], assignment: str) -> str:
    """Carry out one ``table.key=value`` on the tables, in place, and return its path."""
    path, equals, text = assignment.partition("=")
    table, _, key = path.strip().rpartition(".")
    if not equals or not all(path.strip().split(".")) or not table:
        raise ConfigError(
            f"{assignment!r}: an override has the form table.key=value, for example "
            f"hierarchy.global_rounds=5{meant_by(Settings, path.strip())}"
        )
    if path.strip() == "app.config.overrides":
        raise ConfigError(
            f"{assignment!r}: an override cannot hold overrides; give them one by one"
        )
    _table(tables, table)[key] = _value(text.strip())
    if (table, key) == ("hierarchy", "client_rule"):  # takes the place of its older name, too
        _table(tables, table).pop("scaffold_enabled", None)
    return path.strip()


def _table(tables: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the table at a dotted path, made if it is missing."""
    for name in path.split("."):
        tables = tables.setdefault(name, {})
        if not isinstance(tables, dict):
            raise ConfigError(f"[{path}]: must be a table, but {name} = {tables!r} is a value")
    return tables


def _value(text: str) -> Any:
    """Read a TOML value; a word that is none, such as uci-har, is taken as text."""
    try:
        document = tomli.loads(f"value = {text}")
    except tomli.TOMLDecodeError:
        if text[:1] in ("'", '"'):
            problem = "begins with a quote, and is no text in quotes: close it, or leave it out"
            raise ConfigError(f"{text}: {problem}") from None
        return text
    return document["value"] if len(document) == 1 else text  # a second line, or table


def _config_error(error: ValidationError) -> ConfigError:
    """Turn what pydantic found first into one line for the user."""
    first = error.errors()[0]
    if first["type"] == "model_type":
        table = ".".join(str(part) for part in first["loc"])
        return ConfigError(f"[{table}]: must be a table, but it is {first['input']!r}")
    *path, key = (str(part) for part in first["loc"])
    if allowed := _allowed(path):  # one side of a union: say what the whole allows
        *path, key = path
        return ConfigError.at(".".join(path), key, first["input"], f"must be {allowed}")
    if path and key.isdigit():  # an entry of a list: name the list
        key = f"{path.pop()}[{key}]"
    table = ".".join(path)
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if first["type"] == "tuple_type":
        message = "must be a list of integers"
        if key in Delay.model_fields:
            message = "must be a number, or a list of one for each class of devices"
    if other := other_rule(Settings, f"{table}.{key}", first["input"]):
        message += f"; {other}"
    return ConfigError.at(table, key, first["input"], message)


def _allowed(path: list[str]) -> str | None:
    """Return the description of the field ``table.key`` at a path, if it has one."""
    tables = {name: field.annotation for name, field in Settings.model_fields.items()}
    table: Any = tables.get(path[0]) if len(path) == 2 else None
    field = table.model_fields.get(path[1]) if table else None
    return field.description if field else None
