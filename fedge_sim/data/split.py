"""Which of a client's examples are held out for testing: a fifth of them."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedge_sim.data.base import ClientData, Dataset
from fedge_sim.randomness import stream

TEST_SHARE = 0.2


def random_split(_dataset: Dataset, rows: NDArray[np.int64], seed: int, client: int) -> ClientData:
    """Hold out 20 % of a client's examples at random, at least one, seeded by (seed, client).

    Windows that overlap can come to stand on both sides: a model is then tested on samples
    that it has seen.
    """
    num_test = max(1, round(TEST_SHARE * len(rows)))
    shuffled = stream(seed, "split", client).permutation(rows)
    return ClientData(train=np.sort(shuffled[num_test:]), test=np.sort(shuffled[:num_test]))


def blocked_split(dataset: Dataset, rows: NDArray[np.int64], seed: int, client: int) -> ClientData:
    """Hold out one contiguous block of each class, a fifth of it, seeded by (seed, client).

    The windows of a class are put in order of recording and time, and the block begins at a
    random place. Windows that share samples with a held-out one are left out of training: the
    gap on either side of a block. At least one example is held out.
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
    leaks = _overlaps(dataset, order, held_out)
    return ClientData(train=np.sort(order[~held_out & ~leaks]), test=np.sort(order[held_out]))


def _overlaps(
    dataset: Dataset, order: NDArray[np.int64], chosen: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Tell which windows share samples with a chosen one; rows in order of recording and time."""
    length = dataset.x.shape[-1]
    recording, position = dataset.recording[order], dataset.position[order].astype(np.int64)
    # A line on which windows of different recordings never come near each other.
    stretch = int(position.max()) + length
    place = recording.astype(np.int64) * stretch + position
    of_chosen = place[chosen]
    after = np.searchsorted(of_chosen, place)
    before = np.maximum(after - 1, 0)
    after = np.minimum(after, len(of_chosen) - 1)
    distance = np.minimum(abs(of_chosen[after] - place), abs(of_chosen[before] - place))
    return np.asarray(distance < length)


SPLITS: dict[str, Callable[[Dataset, NDArray[np.int64], int, int], ClientData]] = {
    "random": random_split,
    "blocked": blocked_split,
}
