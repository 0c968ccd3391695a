"""What no table has: unknown keys and rules, and what they are called here."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from fedge_sim.config_types import Table
from fedge_sim.errors import ConfigError, as_toml, suggest
from fedge_sim.methods import METHODS

# The word of another program, of a paper or of Flower -> the setting here.
_OTHERS = {
    "hierarchy.global_rounds": "num_server_rounds num_rounds rounds n_rounds total_rounds "
    "comm_round comm_rounds communication_rounds num_communication_rounds global_epochs "
    "max_rounds central_num_iterations",
    "hierarchy.server_rounds_per_global": "server_rounds edge_rounds leaf_rounds rounds_per_global",
    "hierarchy.num_servers": "num_leaf_servers num_leaves leaf_servers servers num_edges edges "
    "edge_servers n_servers group_num",
    "hierarchy.clients_per_server": "num_clients n_clients clients num_partitions num_supernodes "
    "total_clients client_num_in_total clients_per_leaf clients_per_edge",
    "hierarchy.lr_init": "learning_rate lr client_lr local_lr client_learning_rate "
    "local_learning_rate client_optimizer_lr lr_local eta_l",
    "hierarchy.lr_gamma": "lr_decay learning_rate_decay decay_rate gamma",
    "hierarchy.server_lr": "server_learning_rate server_optimizer_lr eta eta_g",
    "hierarchy.global_lr": "cloud_lr global_learning_rate",
    "hierarchy.local_epochs": "epochs num_epochs local_epoch num_local_epochs client_epochs "
    "local_num_epochs n_epochs epochs_per_round",
    "hierarchy.local_steps": "num_local_steps local_iterations local_num_steps max_steps "
    "local_updates",
    "hierarchy.batch_size": "train_batch_size local_batch_size client_batch_size bs batchsize "
    "minibatch_size",
    "hierarchy.eval_batch_size": "test_batch_size val_batch_size valid_batch_size "
    "local_batch_size_eval",
    "hierarchy.accumulation": "gradient_accumulation gradient_accumulation_steps grad_accum",
    "hierarchy.participation": "fraction_fit fraction_train client_fraction sample_fraction "
    "fraction frac join_ratio participation_rate client_sampling_rate clients_per_round "
    "client_num_per_round num_clients_per_round",
    "hierarchy.prox_mu": "proximal_mu mu fedprox_mu prox proximal_term",
    "hierarchy.optimizer": "optim client_optimizer local_optimizer",
    "hierarchy.weight_decay": "wd l2 l2_regularization",
    "hierarchy.clip_norm": "clip grad_clip max_grad_norm gradient_clipping clip_grad",
    "hierarchy.es_patience": "patience early_stopping early_stopping_patience",
    "hierarchy.target_accuracy": "target target_acc accuracy_target",
    "hierarchy.client_rule": "algorithm fed_algorithm federated_optimizer fl_algorithm "
    "algorithm_name scaffold pfedme fedbn",
    "hierarchy.leaf_strategy": "strategy aggregator aggregation server_strategy",
    "app.config.dataset": "dataset_flag dataset_name data_name data_set task data",
    "app.config.data-root": "data_dir data_path data_cache_dir dataset_path dataset_dir root "
    "data_folder",
    "app.config.partition": "partition_method partitioner data_split split_method "
    "partitioning heterogeneity",
    "app.config.partition-alpha": "alpha dirichlet_alpha concentration dir_alpha beta_dirichlet",
    "app.config.partition-classes": "classes_per_client n_class num_classes_per_client "
    "labels_per_client",
    "app.config.partition-shards": "shards_per_client num_shards num_shards_per_client",
    "app.config.num-classes": "n_classes num_labels",
    "app.config.model": "model_name net network arch architecture",
    "app.config.seed": "random_seed manual_seed rng_seed",
    "app.config.output-dir": "out_dir save_dir log_dir results_dir output_path",
    "cloud_cluster.tau": "threshold similarity_threshold cluster_threshold",
    "cloud_cluster.num_clusters": "n_clusters clusters number_of_clusters",
    "cloud_cluster.method": "clustering cluster_method clustering_method",
    "runtime.min_clients_per_round": "min_fit_clients min_train_nodes min_available_clients "
    "min_available_nodes min_clients",
    "runtime.num_workers": "workers n_jobs num_processes num_actors",
    "runtime.threads_per_client": "num_threads threads",
    "runtime.num_gpus_per_actor": "gpus num_gpus client_gpus device use_gpu cuda gpu",
    "runtime.num_cpus_per_actor": "cpus num_cpus client_cpus",
    "devices.num_updates_for_model": "buffer_size buffer async_buffer_size",
    "devices.device_selection_size": "concurrency max_concurrency",
    "devices.job_timeout": "timeout device_timeout",
    "devices.dropout": "dropout_rate drop_rate failure_rate",
    "asynchronous.rule": "async_rule server_rule",
    "asynchronous.mixing": "mixing_alpha fedasync_alpha",
}
WORDS = {word: path for path, words in _OTHERS.items() for word in words.split()}
_ONE_OF_THESE = ("hierarchy.client_rule", "asynchronous.rule", "cloud_cluster.method")
_FLOWERS = (
    *("FedAdam", "FedYogi", "FedAdagrad", "FedAvgM", "FedMedian", "FedTrimmedAvg", "Krum"),
    *("MultiKrum", "Bulyan", "QFedAvg"),
)


def unknown_keys(settings: type[BaseModel], tables: Mapping[str, Any]) -> list[str]:
    """Return, of each key that no table of the settings has, a line that says what may be meant.

    Parameters
    ----------
    settings : type
        The model of all tables.
    tables : mapping
        As a file has them below ``tool.flwr``.
    """
    return list(_unknown(settings, settings, tables, ""))


def meant_by(settings: type[BaseModel], key: str) -> str:
    """Return the end of a line on a key without a table: what may be meant; empty if nothing is."""
    meant = _meant(settings, {}, "", key)
    return meant and f"; {meant}"


def _unknown(
    settings: type[BaseModel], model: type[BaseModel], table: Mapping[str, Any], path: str
) -> Iterator[str]:
    fields = _fields(model)
    for key, value in table.items():
        below = f"{path}.{key}".lstrip(".")
        if key in fields:
            kind = fields[key]
            if isinstance(kind, type) and issubclass(kind, Table) and isinstance(value, Mapping):
                yield from _unknown(settings, kind, value, below)
        elif path:
            if below != "hierarchy.scaffold_enabled":  # an older name, which is read
                meant = _meant(settings, fields, path, key)
                yield str(ConfigError.at(path, key, value, f"unknown key; {meant}"))
        elif isinstance(value, Mapping) and not difflib.get_close_matches(key, fields, 1, 0.6):
            for name, own in value.items():
                meant = _meant(settings, {}, key, name)
                problem = f"there is no table {key!r}; {meant or suggest(key, fields)}"
                yield str(ConfigError.at(key, name, own, problem))
            if not value:
                yield f"[{key}]: unknown table; {suggest(key, fields)}"
        elif isinstance(value, Mapping):
            yield f"[{key}]: unknown table; {suggest(key, fields)}"
        else:
            meant = _meant(settings, {}, "", key)
            yield f"{key} = {as_toml(value)}: stands in no table; {meant or suggest(key, fields)}"


def _meant(settings: type[BaseModel], here: Mapping[str, Any], path: str, key: str) -> str:
    """Say which setting may be meant: here, by another word, in another table, or much alike."""
    word = key.lower().replace("-", "_")
    same = [own for own in here if own.lower().replace("-", "_") == word]
    everywhere = {own: f"{table}.{own}" for table, own in _all_keys(settings)}
    elsewhere = [
        f"{table}.{own}" for table, own in _all_keys(settings) if own.replace("-", "_") == word
    ]
    if same:
        return f"did you mean {same[0]!r}?"
    if word in WORDS:
        table, _, name = WORDS[word].rpartition(".")
        return f"did you mean {repr(name) if table == path else WORDS[word]}?"
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    if close := difflib.get_close_matches(key, here, 1, 0.6):
        return f"did you mean {close[0]!r}?"
    if close := difflib.get_close_matches(key, everywhere, 1, 0.75):
        return f"did you mean {everywhere[close[0]]}?"
    return suggest(key, here) if here else ""


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _all_keys(settings: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Yield table and key of every setting."""
    for name, kind in _fields(settings).items():
        if name == "app":
            name, kind = "app.config", _fields(kind)["config"]
        yield from ((name, key) for key in _fields(kind))


def other_rule(settings: type[BaseModel], path: str, value: object) -> str:
    """Return what makes the method of this name, where a rule is set to what is none of its own.

    Parameters
    ----------
    settings : type
        The model of all tables.
    path : str
        Of the setting.
    value : object
    """
    if path not in _ONE_OF_THESE or not isinstance(value, str):
        return ""
    word = value.lower().replace("-", "").replace("_", "")
    if word in METHODS:
        method, usual = METHODS[word], settings()
        flat = {"flat": ["hierarchy.num_servers = 1"], "clients": ["a leaf server for each client"]}
        made = flat.get(method.topology, []) + [
            f"{path} = {as_toml(own)}"
            for path, own in method.settings.items()
            if getattr(getattr(usual, path.split(".")[0]), path.split(".")[1]) != own
        ]
        return (
            f"{method.title} is made by {', '.join(made) or 'the defaults'}, and by "
            f"python -m fedge_sim.compare --methods {word}"
        )
    for other in _ONE_OF_THESE:
        table, _, key = other.rpartition(".")
        if word in get_args(_fields(_fields(settings)[table])[key]):
            return f'did you mean {other} = "{word}"?'
    names = [name for name in _FLOWERS if name.lower() == word]
    return f'did you mean hierarchy.leaf_strategy = "{names[0]}"?' if names else ""
