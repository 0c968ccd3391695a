"""Who holds which examples: every client is an index array over one dataset."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedge_sim.config import Settings
from fedge_sim.data.base import ClientData, Dataset
from fedge_sim.errors import ConfigError, DataError, suggest
from fedge_sim.randomness import stream

# BatchNorm cannot normalise a batch of one example, so 2 for training, and 1 for testing.
MIN_TRAIN, MIN_TEST = 2, 1
MIN_EXAMPLES = MIN_TRAIN + MIN_TEST
ENOUGH = (
    f"allowed: at least {MIN_EXAMPLES} each, {MIN_TRAIN} for training (one batch of BatchNorm) "
    f"and {MIN_TEST} for testing"
)
# Draws of a Dirichlet partition, in shares and beside them, that take about a second.
SHARES_A_SECOND, SHARES_BESIDE = 10_000_000, 200
LEAST_TRIES = 11
SIDES = ("train", "test")  # of a client, in a file

Rows = NDArray[np.int64]
Dealt = Sequence[Rows | ClientData]
Partition = Callable[[Dataset, Settings], Dealt]


def partition(dataset: Dataset, settings: Settings) -> Dealt:
    """Deal the examples out to clients as ``partition`` says, seeded by the run's seed.

    Returns
    -------
    sequence of int64 array (n,), or of ClientData
        The rows of client 0, 1, ... in ascending order; no row has two clients. ClientData
        where a file says which of them are held out.

    Raises
    ------
    ConfigError, DataError
        If the partition is unknown or does not fit the dataset and the topology, or a client
        would get too few examples to train and to be tested.
    """
    name = settings.data.partition
    if name not in PARTITIONS:
        raise _problem(settings, f"unknown; {suggest(name, PARTITIONS)}")
    dealt = PARTITIONS[name](dataset, settings)
    for client, own in enumerate(dealt):
        if not isinstance(own, ClientData) and len(own) < MIN_EXAMPLES:
            raise ConfigError.at(
                "hierarchy",
                "clients_per_server",
                list(settings.hierarchy.clients_per_server),
                f"{_too_few(client, len(own))}; use fewer clients or more data",
            )
    return dealt


def _too_few(client: int, size: int) -> str:
    return f"client {client} gets {size} examples; {ENOUGH}"


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
        rank = np.argsort(in_order(names))
        combined = combined * len(names) + rank[codes]
    return np.unique(combined, return_inverse=True)[1]


def in_order(names: Sequence[str]) -> list[int]:
    """Return the places of names in their order: as numbers if all are whole, else as text."""
    whole = [re.fullmatch(r"([+-]?[0-9]{1,999})(?:\.0*)?", name) for name in names]
    numbers = [int(match[1]) for match in whole if match]
    if len(numbers) < len(names):
        return sorted(range(len(names)), key=names.__getitem__)
    return sorted(range(len(names)), key=lambda place: (numbers[place], names[place]))


def _by_unit(settings: Settings, unit: str, unit_of_row: NDArray[np.int64] | None) -> list[Rows]:
    """Give every client floor(units / clients) units in order, left-overs in turn.

    Left-over unit i (counted from 0) goes to server i mod servers, and there to client
    i mod clients of that server.
    """
    if unit_of_row is None:
        raise _problem(
            settings,
            f"dataset {settings.data.dataset!r} does not say the {unit} of an example; "
            "allowed: iid, dirichlet, shards, classes, quantity, file",
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
    return _owned(np.asarray(owner)[unit_of_row], num_clients)


def iid(dataset: Dataset, settings: Settings) -> list[Rows]:
    """Deal shuffled examples out evenly."""
    num_clients = settings.hierarchy.num_clients
    return _dealt(_shuffled(dataset, settings), _even(len(dataset), num_clients), num_clients)


def dirichlet(dataset: Dataset, settings: Settings) -> list[Rows]:
    """Share each class out over clients by the symmetric Dirichlet(alpha), as NIID-Bench does.

    (Yurochkin et al. 2019, Li et al. 2022.)
    It is drawn until every client has enough examples, so often at most as takes a second.
    With ``partition-balanced`` a client with n / clients examples gets none of the classes that
    come after, as in the code of both.
    """
    config, num_clients = settings.data, settings.hierarchy.num_clients
    sizes = np.unique(dataset.y, return_counts=True)[1]
    rng = _rng(settings)
    tries = max(LEAST_TRIES, SHARES_A_SECOND // (len(sizes) * (num_clients + SHARES_BESIDE)))
    enough = len(dataset) >= MIN_EXAMPLES * num_clients
    tries = tries if enough else 1
    alpha, balanced = config.partition_alpha, config.partition_balanced
    best = np.zeros(num_clients, np.int64)
    for _ in range(tries):
        counts = dirichlet_counts(rng, sizes, num_clients, alpha, balanced=balanced)
        best = max(best, counts.sum(axis=0), key=np.min)
        if best.min() >= MIN_EXAMPLES:
            owners = np.tile(np.arange(num_clients), len(sizes))
            return _dealt(_by_label(dataset, settings), counts.ravel(), num_clients, owners)
    raise ConfigError.at(
        "app.config",
        "partition-alpha",
        alpha,
        f"{_too_few(int(best.argmin()), int(best.min()))} ({len(dataset)} for {num_clients} "
        f"clients, the best of {tries:,} draws); use "
        + ("a larger partition-alpha, " if enough else "")
        + ("partition-balanced = true, " if enough and not balanced else "")
        + "fewer clients or more data",
    )


def dirichlet_counts(
    rng: np.random.Generator,
    sizes: NDArray[np.int64],
    num_clients: int,
    alpha: float,
    *,
    balanced: bool,
) -> NDArray[np.int64]:
    """Draw how many examples of each class a client gets.

    Parameters
    ----------
    rng : numpy Generator
    sizes : int64 array (classes,)
        Examples of each class, at least one.
    num_clients : int
    alpha : float
        Concentration, the same for all clients.
    balanced : bool
        Whether a client that has sum(sizes) / num_clients examples gets no more of later classes.

    Returns
    -------
    int64 array (classes, clients)
        Each row adds up to its class.
    """
    concentration = np.full(num_clients, alpha)
    if not balanced:  # at once: the stream is the same
        ends = (np.cumsum(rng.dirichlet(concentration, len(sizes)), axis=1).T * sizes).T.astype(int)
        ends[:, -1] = sizes
        return np.diff(ends, prepend=0)
    counts = np.zeros((len(sizes), num_clients), np.int64)
    for label, size in enumerate(sizes):
        shares = rng.dirichlet(concentration)
        free = counts[:label].sum(axis=0) * num_clients < sizes.sum()
        shares = shares[free]
        # Those of clients that are not free can be all of it.
        shares = shares / shares.sum() if shares.any() else np.full(len(shares), 1 / len(shares))
        ends = (np.cumsum(shares) * size).astype(int)
        ends[-1] = size
        counts[label, free] = np.diff(ends, prepend=0)
    return counts


def shards(dataset: Dataset, settings: Settings) -> list[Rows]:
    """Sort by label, cut into equal shards, and give each client some (McMahan et al. 2017).

    Each gets ``partition-shards`` of them, drawn at random; where they cannot be equal, sizes
    differ by one. In each class examples are shuffled.
    """
    wanted, num_clients = settings.data.partition_shards, settings.hierarchy.num_clients
    num_shards = wanted * num_clients
    if num_shards > len(dataset):
        problem = f"{num_clients} clients have {num_shards} shards, and there are {len(dataset)} "
        most = len(dataset) // num_clients
        problem += f"examples; allowed: at most {most}, with fewer clients or more data more"
        if most < MIN_EXAMPLES:
            problem = f"{num_clients} clients cannot share {len(dataset)} examples; {ENOUGH}; use "
            problem += "fewer clients or more data"
        raise ConfigError.at("app.config", "partition-shards", wanted, problem)
    owners = np.empty(num_shards, np.int64)
    drawn = stream(settings.seed, "partition/shards").permutation(num_shards)
    owners[drawn] = np.repeat(np.arange(num_clients), wanted)
    sizes = _even(len(dataset), num_shards)
    return _dealt(_by_label(dataset, settings), sizes, num_clients, owners)


def classes(dataset: Dataset, settings: Settings) -> list[Rows]:
    """Give every client ``partition-classes`` classes (Li et al. 2022, quantity of labels).

    Client i has class i mod classes and others drawn at random; a class is shared out evenly
    among its clients. Classes that no client drew are left out.
    """
    config, num_clients = settings.data, settings.hierarchy.num_clients
    found, sizes = np.unique(dataset.y, return_counts=True)
    wanted = config.partition_classes
    if wanted > len(found):
        raise ConfigError.at(
            "app.config",
            "partition-classes",
            wanted,
            f"the dataset has examples of {len(found)} classes; allowed: 1 to {len(found)}",
        )
    rng = _rng(settings)
    has = np.zeros((num_clients, len(found)), bool)
    for client, own in enumerate(has):
        own[client % len(found)] = True
        while own.sum() < wanted:
            own[rng.integers(len(found))] = True
    counts = np.zeros((len(found), num_clients + 1), np.int64)  # the last column: of nobody
    for of_class, label, size, theirs in zip(counts, found, sizes, has.T, strict=True):
        drawn = np.flatnonzero(theirs)
        of_class[drawn] = _even(size, len(drawn))
        of_class[-1] = size - of_class.sum()
        if len(drawn) > size:
            problem = f"client {drawn[-1]} gets 0 of {size} examples of class "
            problem += f"{dataset.names.classes[label]!r}, which {len(drawn)} clients share; "
            problem += "allowed: at least 1 for each; use fewer clients or more data"
            raise ConfigError.at("app.config", "partition-classes", wanted, problem)
    owners = np.tile(np.r_[:num_clients, -1], len(found))
    return _dealt(_by_label(dataset, settings), counts.ravel(), num_clients, owners)


def quantity(dataset: Dataset, settings: Settings) -> list[Rows]:
    """Deal shuffled examples out in sizes drawn from Dirichlet(alpha) (Li et al. 2022)."""
    num_clients = settings.hierarchy.num_clients
    spare = len(dataset) - MIN_EXAMPLES * num_clients
    if spare < 0:
        problem = f"{num_clients} clients cannot share {len(dataset)} examples; {ENOUGH}"
        raise _problem(settings, f"{problem}; use fewer clients or more data")
    rng = stream(settings.seed, "partition/quantity")
    shares = rng.dirichlet(np.full(num_clients, settings.data.partition_alpha))
    ends = np.round(np.cumsum(shares) * spare).astype(int)
    ends[-1] = spare
    sizes = MIN_EXAMPLES + np.diff(ends, prepend=0)
    return _dealt(_shuffled(dataset, settings), sizes, num_clients)


def _rng(settings: Settings) -> np.random.Generator:
    """Return what draws classes: as flwr-datasets, from which they once came, does."""
    return np.random.default_rng(int(stream(settings.seed, "partition/library").integers(2**32)))


def _shuffled(dataset: Dataset, settings: Settings) -> Rows:
    return stream(settings.seed, "partition/order").permutation(len(dataset))


def _by_label(dataset: Dataset, settings: Settings) -> Rows:
    """Return the rows by label, and shuffled within one."""
    order = _shuffled(dataset, settings)
    return order[np.argsort(dataset.y[order], kind="stable")]


def _even(total: int, parts: int) -> NDArray[np.int64]:
    """Return sizes that add up to a total and differ by one at most, larger ones first."""
    parts_or_one = max(1, parts)
    return total // parts_or_one + (np.arange(parts) < total % parts_or_one)


def _dealt(
    rows: Rows,
    sizes: NDArray[np.int64],
    num_clients: int,
    owners: NDArray[np.int64] | None = None,
) -> list[Rows]:
    """Cut rows into parts, and give each to its owner; that of part i is client i if not given.

    Parts of owner -1 are left out.
    """
    owner_of_row = np.empty(len(rows), np.int64)
    owner_of_row[rows] = np.repeat(np.arange(num_clients) if owners is None else owners, sizes)
    return _owned(owner_of_row, num_clients)


def _owned(owner_of_row: NDArray[np.int64], num_clients: int) -> list[Rows]:
    """Return each client's rows in ascending order, from the owner of every row; -1 is nobody."""
    by_owner = np.argsort(owner_of_row, kind="stable")
    ends = np.cumsum(np.bincount(owner_of_row + 1, minlength=num_clients + 1))
    return np.split(by_owner, ends[:-1])[1:]


def from_file(dataset: Dataset, settings: Settings) -> Dealt:
    """Read ``partition-file``: JSON {server: {client: [rows]}}, servers and clients by number.

    {client: [rows]} does where there is one server. A client may have {"train": [rows], "test":
    [rows]} in the place of [rows], if all have: then these are trained on and held out.
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
    expected = settings.hierarchy.clients_per_server
    if isinstance(servers, dict) and servers and all(map(_is_of_a_client, servers.values())):
        if len(expected) > 1:
            raise DataError(
                f"{file}: is {{client: [rows]}}, which does for one server, but [hierarchy] "
                f"num_servers = {len(expected)}; make it {{server: {{client: [rows]}}}}"
            )
        servers = {"0": servers}
    clients = [
        (f"server {server}, client {client}", own)
        for server, of_server in _in_order(file, servers)
        for client, own in _in_order(file, of_server)
    ]
    found = [len(of_server) for _, of_server in _in_order(file, servers)]
    if found != list(expected):
        raise DataError(
            f"{file}: has {found} clients per server, but [hierarchy] clients_per_server = "
            f"{list(expected)}; make them the same"
        )
    sides = {where: _sides(file, where, own, len(dataset)) for where, own in clients}
    _refuse_what_is_given_twice(file, sides)
    split = {where: len(own) == 2 for where, own in sides.items()}
    if len(set(split.values())) > 1:
        raise DataError(
            f"{file}: {min(split, key=split.__getitem__)} has one list, and "
            f"{max(split, key=split.__getitem__)} has train and test: give all clients the same"
        )
    if not any(split.values()):
        return [np.sort(own) for (own,) in sides.values()]
    if settings.data.split != "random":
        problem = f"{file} says itself what is held out (train and test): leave split at "
        raise ConfigError.at("app.config", "split", settings.data.split, problem + '"random"')
    return [ClientData(train=np.sort(train), test=np.sort(test)) for train, test in sides.values()]


def _is_of_a_client(value: object) -> bool:
    return isinstance(value, list) or (isinstance(value, dict) and not value.keys() - SIDES)


def _in_order(file: Path, mapping: object) -> list[tuple[int, Any]]:
    """Return the numbers at the end of a mapping's keys, in order, with the values."""
    numbered = {}
    if isinstance(mapping, Mapping):
        numbered = {re.search(r"\d{1,9}$", key): value for key, value in mapping.items()}
    numbers = [int(match.group()) for match in numbered if match]
    if not numbers or len(set(numbers)) < len(numbered):
        raise DataError(
            f"{file}: must be {{server: {{client: [rows]}}}}, with different numbers as keys, "
            'for example {"0": {"0": [0, 1, 2]}}'
        )
    return sorted(zip(numbers, numbered.values(), strict=True), key=lambda pair: pair[0])


def _without_repeats(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object's dict, but not if a key's second value would replace its first."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"{file}: key {twice!r} stands twice in one place; give it one list")
    return mapping


def _sides(file: Path, where: str, own: Any, num_examples: int) -> list[Rows]:
    """Return a client's rows, or those to train on and those to test on."""
    lists = {"": own}
    if isinstance(own, dict):
        if own.keys() != set(SIDES):
            keys = ", ".join(map(repr, own)) or "nothing"
            raise DataError(f'{file}: {where} has {keys}; allowed: "train" and "test", or a list')
        lists = {f" {side}": own[side] for side in SIDES}
    rows = [_checked_rows(file, where + s, lists[s], num_examples) for s in lists]
    sizes = [len(own) for own in rows]
    least = [MIN_EXAMPLES] if len(rows) == 1 else [MIN_TRAIN, MIN_TEST]
    if any(size < enough for size, enough in zip(sizes, least, strict=True)):
        raise DataError(f"{file}: {where} gets {' and '.join(map(str, sizes))} examples; {ENOUGH}")
    return rows


def _checked_rows(file: Path, where: str, rows: Any, num_examples: int) -> Rows:
    allowed = f"whole numbers from 0 to {num_examples - 1}, the examples of this dataset"
    if not isinstance(rows, list):
        raise DataError(f"{file}: {where} has {_short(rows)}; must be a list of {allowed}")
    for row in rows:
        if type(row) is not int or not 0 <= row < num_examples:
            raise DataError(f"{file}: {where} has row {_short(row)}; rows must be {allowed}")
    return np.asarray(rows, np.int64)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _refuse_what_is_given_twice(file: Path, sides: Mapping[str, Sequence[Rows]]) -> None:
    everything = np.concatenate([rows for own in sides.values() for rows in own])
    values, counts = np.unique(everything, return_counts=True)
    if len(twice := values[counts > 1]):
        whose = [w for w, own in sides.items() for rows in own for r in rows if r == twice[0]]
        raise DataError(
            f"{file}: row {twice[0]} is given to a client more than once: {' and '.join(whose)}"
        )


def _problem(settings: Settings, problem: str) -> ConfigError:
    return ConfigError.at("app.config", "partition", settings.data.partition, problem)


PARTITIONS: dict[str, Partition] = {
    "user": by_user,
    "user-device": by_user_device,
    "user-model": by_user_model,
    "iid": iid,
    "dirichlet": dirichlet,
    "shards": shards,
    "classes": classes,
    "quantity": quantity,
    "file": from_file,
}
