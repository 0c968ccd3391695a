"""Which of a client's examples are held out for testing: a fifth of them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedge_sim.data.base import ClientData, Dataset
from fedge_sim.errors import ConfigError
from fedge_sim.randomness import stream

TEST_SHARE = 0.2
Rows = NDArray[np.int64]


def split(
    dataset: Dataset, dealt: Sequence[Rows | ClientData], kind: str, seed: int
) -> tuple[ClientData, ...]:
    """Hold out a fifth of every client's examples, at least one.

    Parameters
    ----------
    dataset : Dataset
    dealt : sequence of int64 array (n,), or of ClientData
        The examples of client 0, 1, ...; ClientData, of which it is known what is held out,
        stay as they are.
    kind : str
        ``"random"``: any of them. Windows that overlap can come to stand on both sides: a model
        is then tested on samples that it has seen. ``"blocked"``: one contiguous block of each
        class; and windows that overlap with a held-out one, of whichever client, are left out
        of training, as all clients train one model.
    seed : int
        Each client's draw is named by it and the client.

    Raises
    ------
    ConfigError
        If it is ``"blocked"``, and the dataset does not say which windows overlap.
    """
    if known := tuple(own for own in dealt if isinstance(own, ClientData)):
        return known
    rows = [own for own in dealt if not isinstance(own, ClientData)]
    if kind == "random":
        return tuple(random_split(own, seed, client) for client, own in enumerate(rows))
    if not dataset.recorded:
        problem = "the dataset does not say which windows overlap: give the arrays recording and "
        problem += 'position of each (see README, Your own data), or set split = "random"'
        raise ConfigError.at("app.config", "split", kind, problem)
    held_out = [blocks(dataset, own, seed, client) for client, own in enumerate(rows)]
    leaks = overlapping(dataset, np.concatenate(held_out))
    parts = []
    for own, test in zip(rows, held_out, strict=True):
        others = np.setdiff1d(own, test)
        leaking = leaks[others]
        parts.append(ClientData(train=others[~leaking], test=test, left_out=others[leaking]))
    return tuple(parts)


def random_split(rows: Rows, seed: int, client: int) -> ClientData:
    """Hold out 20 % of a client's examples at random, at least one."""
    num_test = max(1, round(TEST_SHARE * len(rows)))
    shuffled = stream(seed, "split", client).permutation(rows)
    return ClientData(train=np.sort(shuffled[num_test:]), test=np.sort(shuffled[:num_test]))


def blocks(dataset: Dataset, rows: Rows, seed: int, client: int) -> Rows:
    """Return one block of each class, a fifth of it, or one example where that is none.

    The windows of a class are put in order of recording and time, and the block begins at a
    random place.
    """
    rng = stream(seed, "split/blocked", client)
    order = rows[np.lexsort((dataset.position[rows], dataset.recording[rows]))]
    labels = dataset.y[order]
    held_out = np.zeros(len(order), bool)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        num_test = round(TEST_SHARE * len(own))
        begin = rng.integers(len(own) - num_test + 1)
        held_out[own[begin : begin + num_test]] = True
    if not held_out.any():
        held_out[rng.integers(len(order))] = True
    return np.sort(order[held_out])


def overlapping(dataset: Dataset, rows: Rows) -> NDArray[np.bool_]:
    """Tell of each window of the dataset whether it shares samples, or time, with one of these."""
    length = dataset.x.shape[-1]
    position = dataset.position.astype(np.int64) - dataset.position.min()
    # A line on which windows of different recordings never come near each other.
    stretch = int(position.max()) + length
    place = dataset.recording.astype(np.int64) * stretch + position
    of_these = np.sort(place[rows])
    after = np.searchsorted(of_these, place)
    distances = [
        abs(of_these[near.clip(0, len(of_these) - 1)] - place) for near in (after - 1, after)
    ]
    return np.asarray(np.minimum(*distances) < length)
