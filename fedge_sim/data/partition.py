"""Who holds which examples: every client is an index array over one dataset.

Partitions that flwr-datasets has are taken from there, over a table of rows and labels.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from fedge_sim.config import Settings
from fedge_sim.data.base import Dataset
from fedge_sim.data.store import cache_folder, cannot_use, canonical
from fedge_sim.errors import ConfigError, DataError, suggest
from fedge_sim.randomness import stream

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

# BatchNorm cannot normalise a batch of one example, so 2 for training, and 1 for testing.
MIN_EXAMPLES = 3

Rows = NDArray[np.int64]
Partition = Callable[[Dataset, Settings], list[Rows]]


def partition(dataset: Dataset, settings: Settings) -> list[Rows]:
    """Deal the examples out to clients as ``partition`` says, seeded by the run's seed.

    Returns
    -------
    list of int64 array (n,)
        The rows of client 0, 1, ... in ascending order; no row has two clients.

    Raises
    ------
    ConfigError, DataError
        If the partition is unknown or does not fit the dataset and the topology, or a client
        would get too few examples to train and to be tested.
    """
    name = settings.data.partition
    if name not in PARTITIONS:
        raise _problem(settings, f"unknown; {suggest(name, PARTITIONS)}")
    make = PARTITIONS[name]
    rows = _once(make, dataset, settings) if make in LIBRARY else make(dataset, settings)
    for client, own in enumerate(rows):
        if len(own) < MIN_EXAMPLES:
            raise ConfigError.at(
                "hierarchy",
                "clients_per_server",
                list(settings.hierarchy.clients_per_server),
                f"client {client} gets {len(own)} examples; allowed: at least {MIN_EXAMPLES} each, "
                "2 for training (one batch of BatchNorm) and 1 for testing; use fewer clients or "
                "more data",
            )
    return rows


def _once(make: Partition, dataset: Dataset, settings: Settings) -> list[Rows]:
    """Keep what a partition gave beside the stores: the library takes seconds and much memory.

    So only one of the processes that share a dataset needs it.
    """
    config, num_clients = settings.data, settings.hierarchy.num_clients
    made_from = [
        *(dataset.content, config.partition, num_clients, settings.seed),
        *(config.partition_alpha, config.partition_classes, version("flwr-datasets")),
    ]
    cache = cache_folder(config)
    file = cache / f"partition-{hashlib.sha256(canonical(made_from)).hexdigest()[:16]}.npy"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "partition.lock"):
            # The number of rows of every client, then the rows.
            with suppress(FileNotFoundError, ValueError, EOFError):  # none yet, or no such file
                flat = np.load(file, allow_pickle=False)
                sizes = flat[:num_clients]
                if flat.dtype == np.int64 and len(flat) == num_clients + sizes.sum():
                    return np.split(flat[num_clients:], np.cumsum(sizes)[:-1])
            rows = make(dataset, settings)
            aside = file.with_suffix(".tmp")
            with aside.open("wb") as opened:
                np.save(opened, np.concatenate([[len(own) for own in rows], *rows]))
            aside.replace(file)
            return rows
    except OSError as error:
        raise cannot_use(cache, error) from None


def by_user(dataset: Dataset, settings: Settings) -> list[Rows]:
    """Give every client floor(users / clients) users in sorted order, left-overs in turn."""
    return _by_unit(settings, "user", _sorted_codes((dataset.user, dataset.names.users)))


def by_user_device(dataset: Dataset, settings: Settings) -> list[Rows]:
    """Deal out (user, device) pairs as :func:`by_user` deals out users."""
    names = dataset.names
    codes = _sorted_codes((dataset.user, names.users), (dataset.device, names.devices))
    return _by_unit(settings, "user and device", codes)


def by_user_model(dataset: Dataset, settings: Settings) -> list[Rows]:
    """Deal out (user, model of device) pairs as :func:`by_user` deals out users."""
    names = dataset.names
    codes = _sorted_codes((dataset.user, names.users), (dataset.model, names.models))
    return _by_unit(settings, "user and model", codes)


def _sorted_codes(*columns: tuple[NDArray[np.int32], Sequence[str]]) -> NDArray[np.int64] | None:
    """Return the number of each row's names among all that occur; None if they are not known."""
    combined = np.zeros(len(columns[0][0]), np.int64)
    for codes, names in columns:
        if not names:
            return None
        rank = np.argsort(np.argsort(np.asarray(names)))
        combined = combined * len(names) + rank[codes]
    return np.unique(combined, return_inverse=True)[1]


def _by_unit(settings: Settings, unit: str, unit_of_row: NDArray[np.int64] | None) -> list[Rows]:
    """Give every client floor(units / clients) units in order, left-overs in turn.

    Left-over unit i (counted from 0) goes to server i mod servers, and there to client
    i mod clients of that server.
    """
    if unit_of_row is None:
        raise _problem(
            settings,
            f"dataset {settings.data.dataset!r} does not say the {unit} of an example; "
            "allowed: iid, dirichlet, shards, quantity, file",
        )
    clients_per_server = settings.hierarchy.clients_per_server
    num_clients, num_units = sum(clients_per_server), int(unit_of_row.max()) + 1
    if num_clients > num_units:
        raise ConfigError.at(
            "hierarchy",
            "clients_per_server",
            list(clients_per_server),
            f"asks for {num_clients} clients, but partition {settings.data.partition!r} needs a "
            f"{unit} for each and the dataset has {num_units}; allowed: at most {num_units} "
            "clients in all",
        )
    share = num_units // num_clients
    owner = np.repeat(np.arange(num_clients), share).tolist()
    first_client = np.cumsum([0, *clients_per_server])
    for i in range(num_units - share * num_clients):
        server = i % len(clients_per_server)
        owner.append(first_client[server] + i % clients_per_server[server])
    owner_of_row = np.asarray(owner)[unit_of_row]
    by_owner = np.argsort(owner_of_row, kind="stable")
    return np.split(by_owner, np.cumsum(np.bincount(owner_of_row, minlength=num_clients))[:-1])


def iid(dataset: Dataset, settings: Settings) -> list[Rows]:
    """Deal shuffled examples out evenly."""
    from flwr_datasets.partitioner import IidPartitioner

    return _from_library(dataset, settings, IidPartitioner(settings.hierarchy.num_clients))


def dirichlet(dataset: Dataset, settings: Settings) -> list[Rows]:
    """Share each class out over clients by Dirichlet(alpha) (Yurochkin et al. 2019)."""
    from flwr_datasets.partitioner import DirichletPartitioner

    partitioner = DirichletPartitioner(
        settings.hierarchy.num_clients,
        partition_by="label",
        alpha=settings.data.partition_alpha,
        min_partition_size=MIN_EXAMPLES,
        shuffle=False,
        seed=_seed(settings),
    )
    return _from_library(dataset, settings, partitioner)


def shards(dataset: Dataset, settings: Settings) -> list[Rows]:
    """Give every client ``partition-classes`` classes (Li et al. 2022, quantity of labels).

    Client i has class i mod classes and others drawn at random; a class is shared out evenly
    among its clients. Classes that no client drew are left out.
    """
    from flwr_datasets.partitioner import PathologicalPartitioner

    num_classes, wanted = len(np.unique(dataset.y)), settings.data.partition_classes
    if wanted > num_classes:
        raise ConfigError.at(
            "app.config",
            "partition-classes",
            wanted,
            f"the dataset has examples of {num_classes} classes; allowed: 1 to {num_classes}",
        )
    partitioner = PathologicalPartitioner(
        settings.hierarchy.num_clients,
        partition_by="label",
        num_classes_per_partition=wanted,
        class_assignment_mode="first-deterministic",
        shuffle=False,
        seed=_seed(settings),
    )
    return _from_library(dataset, settings, partitioner)


def quantity(dataset: Dataset, settings: Settings) -> list[Rows]:
    """Deal shuffled examples out in sizes drawn from Dirichlet(alpha) (Li et al. 2022)."""
    from flwr_datasets.partitioner import SizePartitioner

    num_clients = settings.hierarchy.num_clients
    spare = len(dataset) - MIN_EXAMPLES * num_clients
    if spare < 0:
        raise _problem(settings, f"{num_clients} clients cannot share {len(dataset)} examples")
    rng = stream(settings.seed, "partition/quantity")
    shares = rng.dirichlet(np.full(num_clients, settings.data.partition_alpha))
    ends = np.round(np.cumsum(shares) * spare).astype(int)
    ends[-1] = spare
    sizes = MIN_EXAMPLES + np.diff(ends, prepend=0)
    return _from_library(dataset, settings, SizePartitioner(sizes.tolist()))


def _seed(settings: Settings) -> int:
    return int(stream(settings.seed, "partition/library").integers(2**32))


def _from_library(dataset: Dataset, settings: Settings, partitioner: "Partitioner") -> list[Rows]:
    """Run a partitioner of flwr-datasets over a shuffled table of rows and labels."""
    from datasets import Dataset as Table

    order = stream(settings.seed, "partition/order").permutation(len(dataset))
    partitioner.dataset = Table.from_dict({"row": order, "label": dataset.y[order]})
    clients = range(settings.hierarchy.num_clients)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tries that are repeated; what fails is raised
            parts = [partitioner.load_partition(client)["row"] for client in clients]
    except (ValueError, IndexError) as error:
        problem = " ".join(str(error).split())
        raise _problem(
            settings,
            f"cannot deal {len(dataset)} examples out to {len(clients)} clients: {problem}",
        ) from None
    return [np.sort(np.asarray(part, np.int64)) for part in parts]


def from_file(dataset: Dataset, settings: Settings) -> list[Rows]:
    """Read ``partition-file``: JSON {server: {client: [rows]}}, servers and clients by number.

    A key may be a number or end in one, as "server_0" does; they count in numerical order.
    """
    file = Path(settings.data.partition_file)
    if not settings.data.partition_file:
        raise _problem(settings, "needs partition-file, the JSON file {server: {client: [rows]}}")
    try:
        text = file.read_text(encoding="utf-8-sig")
        servers = json.loads(text, object_pairs_hook=partial(_without_repeats, file))
    except OSError as error:
        raise DataError(f"{file}: cannot read the partition ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: no JSON file: {error}") from None
    clients = [_in_order(file, server) for server in _in_order(file, servers)]
    found = tuple(len(server) for server in clients)
    expected = settings.hierarchy.clients_per_server
    if found != expected:
        raise DataError(
            f"{file}: has {list(found)} clients per server, but [hierarchy] clients_per_server = "
            f"{list(expected)}; make them the same"
        )
    rows = [_checked_rows(file, own, len(dataset)) for server in clients for own in server]
    everything = np.concatenate(rows)
    values, counts = np.unique(everything, return_counts=True)
    if len(twice := values[counts > 1]):
        raise DataError(f"{file}: row {twice[0]} is given to a client more than once")
    return [np.sort(own) for own in rows]


def _in_order(file: Path, mapping: object) -> list[Any]:
    """Return a mapping's values in the order of the numbers at the end of its keys."""
    numbered = {}
    if isinstance(mapping, Mapping):
        numbered = {re.search(r"\d{1,9}$", key): value for key, value in mapping.items()}
    numbers = [int(match.group()) for match in numbered if match]
    if not numbers or len(set(numbers)) < len(numbered):
        raise DataError(
            f"{file}: must be {{server: {{client: [rows]}}}}, with different numbers as keys, "
            'for example {"0": {"0": [0, 1, 2]}}'
        )
    return [value for _, value in sorted(zip(numbers, numbered.values(), strict=True))]


def _without_repeats(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object's dict, but not if a key's second value would replace its first."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"{file}: key {twice!r} stands twice in one place; give it one list")
    return mapping


def _checked_rows(file: Path, rows: Any, num_examples: int) -> Rows:
    whole = isinstance(rows, list) and all(type(row) is int for row in rows)
    if not whole or not all(0 <= row < num_examples for row in rows):
        raise DataError(
            f"{file}: a client's rows must be whole numbers from 0 to {num_examples - 1}, the "
            "examples of this dataset"
        )
    return np.asarray(rows, np.int64)


def _problem(settings: Settings, problem: str) -> ConfigError:
    return ConfigError.at("app.config", "partition", settings.data.partition, problem)


PARTITIONS: dict[str, Partition] = {
    "user": by_user,
    "user-device": by_user_device,
    "user-model": by_user_model,
    "iid": iid,
    "dirichlet": dirichlet,
    "shards": shards,
    "quantity": quantity,
    "file": from_file,
}
LIBRARY = (iid, dirichlet, shards, quantity)
