"""SCAFFOLD: control variates against client drift (Karimireddy et al. 2020, alg. 1, option II).

A client corrects every gradient by c - c_i (eq. 3), where c_i is its variate and c its leaf
server's. All variates begin at zero, so that the first round is FedAvg's.
"""

from collections.abc import Sequence

import numpy as np

from fedge_sim.algorithms import Arrays


def correction(server: Arrays, client: Arrays | None) -> Arrays:
    """Return what is added to a client's gradients: c - c_i (eq. 3); c_i is 0 if there is none."""
    return server if client is None else {name: c - client[name] for name, c in server.items()}


def new_variate(
    start: Arrays, trained: Arrays, correction: Arrays, *, steps: int, lr: float, momentum: float
) -> Arrays:
    """Return a client's variate after its local steps: c_i+ (eq. 4, option II).

    ``(x - y_i) / (K lr) - (c - c_i)``: the mean of the gradients along the path, less what was
    added to them. With momentum :func:`path_length` takes the place of K: each gradient counts
    as often as it moved the model.

    Parameters
    ----------
    start, trained : Arrays
        x and y_i; of both only the arrays of ``correction`` count.
    correction : Arrays
        c - c_i as it was used: zeros in rounds that warm up.
    steps : int
        K, local steps (not epochs), at least 1.
    lr, momentum : float
    """
    path = path_length(steps, momentum) * lr
    return {
        name: (start[name] - trained[name]) / path - added for name, added in correction.items()
    }


def path_length(steps: int, momentum: float) -> float:
    """Return how many plain steps are as long as K steps with momentum b, which begins at 0.

    The gradient of a step moves the model in that step and all later ones, by 1, b, b^2, ...;
    over all steps that sums up to a = (K - b (1 - b^K) / (1 - b)) / (1 - b), FedNova's a_i (Wang
    et al. 2020, "Tackling the Objective Inconsistency Problem in Heterogeneous Federated
    Optimization"). It is K where b = 0.
    """
    # The same sum by powers of b, sum_j (K - j) b^j: nothing cancels, however near b is to 1.
    return float(np.arange(steps, 0, -1) @ momentum ** np.arange(steps))


def server_variate(server: Arrays, changes: Sequence[Arrays], clients: int) -> Arrays:
    """Return the leaf server's variate after a round: c + |S|/N mean of (c_i+ - c_i) (eq. 5).

    Parameters
    ----------
    server : Arrays
        c.
    changes : sequence of Arrays
        c_i+ - c_i of the clients S that took part, in client order.
    clients : int
        N, of the leaf server in all: so that c stays the mean of all c_i.
    """
    return {
        name: np.asarray(
            c + sum(change[name].astype(np.float64) for change in changes) / clients, c.dtype
        )
        for name, c in server.items()
    }
