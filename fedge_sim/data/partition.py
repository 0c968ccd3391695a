"""Who holds which windows: every client is an index array over one dataset."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedge_sim.data.base import WindowDataset
from fedge_sim.errors import ConfigError
from fedge_sim.randomness import stream

TEST_SHARE = 0.2
# BatchNorm cannot normalise a batch of one window, so 2 for training, and 1 for testing.
MIN_WINDOWS = 3


@dataclass(frozen=True)
class ClientData:
    """A client's windows, as row numbers of the dataset.

    Attributes
    ----------
    train, test : int64 array (n,)
        Disjoint rows, in ascending order.
    """

    train: NDArray[np.int64]
    test: NDArray[np.int64]


def by_user(dataset: WindowDataset, clients_per_server: Sequence[int]) -> list[NDArray[np.int64]]:
    """Give every client floor(users / clients) users in sorted order, left-overs in turn.

    Left-over user i (counted from 0) goes to server i mod servers, and there to client
    i mod clients of that server.

    Returns
    -------
    list of int64 array (n,)
        The rows of client 0, 1, ... in ascending order.

    Raises
    ------
    ConfigError
        If there are more clients than users.
    """
    num_clients, num_users = sum(clients_per_server), len(dataset.users)
    if num_clients > num_users:
        raise ConfigError.at(
            "hierarchy",
            "clients_per_server",
            list(clients_per_server),
            f"asks for {num_clients} clients, but partition 'user' needs a user for each and "
            f"the dataset has {num_users}; allowed: at most {num_users} clients in all",
        )
    share = num_users // num_clients
    owner = np.repeat(np.arange(num_clients), share).tolist()
    first_client = np.cumsum([0, *clients_per_server])
    for i in range(num_users - share * num_clients):
        server = i % len(clients_per_server)
        owner.append(first_client[server] + i % clients_per_server[server])
    owner_of_window = np.asarray(owner)[dataset.user]
    return [np.flatnonzero(owner_of_window == client) for client in range(num_clients)]


Partition = Callable[[WindowDataset, Sequence[int]], list[NDArray[np.int64]]]
PARTITIONS: dict[str, Partition] = {"user": by_user}


def check_sizes(rows: Sequence[NDArray[np.int64]], clients_per_server: Sequence[int]) -> None:
    """Check that every client has enough windows to train and to be tested.

    Raises
    ------
    ConfigError
        If one has fewer than a batch of BatchNorm and a test window.
    """
    for client, own in enumerate(rows):
        if len(own) < MIN_WINDOWS:
            raise ConfigError.at(
                "hierarchy",
                "clients_per_server",
                list(clients_per_server),
                f"client {client} gets {len(own)} windows; allowed: at least {MIN_WINDOWS} each, "
                "2 for training (one batch of BatchNorm) and 1 for testing; "
                "use fewer clients or more data",
            )


def split(rows: NDArray[np.int64], seed: int, client: int) -> ClientData:
    """Hold out 20 % of a client's windows at random, at least one, seeded by (seed, client)."""
    num_test = max(1, round(TEST_SHARE * len(rows)))
    shuffled = stream(seed, "split", client).permutation(rows)
    return ClientData(train=np.sort(shuffled[num_test:]), test=np.sort(shuffled[:num_test]))
