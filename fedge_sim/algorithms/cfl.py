"""Clustered Federated Learning (CFL): a cluster whose members pull apart is split in two.

Sattler, Müller, Samek, "Clustered Federated Learning: Model-Agnostic Distributed Multitask
Optimization Under Privacy Constraints", IEEE TNNLS 2020 (arXiv:1910.01991). Its clients are
leaf servers here, and every call does one step of its recursion. Clusters are never joined.
"""

from collections.abc import Collection, Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage as joined

from fedge_sim.algorithms import FloatArray
from fedge_sim.algorithms.clustering import cosines, finite, in_order

Linkage: TypeAlias = Literal["complete", "single"]


def split_clusters(
    labels: Sequence[int],
    updates: Sequence[FloatArray],
    examples: Sequence[int],
    *,
    eps_1: float,
    eps_2: float,
    gamma_max: float,
    min_cluster_size: int,
    linkage: Linkage,
    present: Collection[int] | None = None,
) -> tuple[NDArray[np.int64], FloatArray]:
    """Split every cluster that has come to rest while its members still move, in two.

    With D_i the update of member i, that is where |mean_i D_i| < eps_1 and max_i |D_i| > eps_2
    (the mean by examples), and gamma_max < sqrt((1 - a) / 2), a being the largest similarity
    across the cut.

    Who is absent from a round has no part in that, and stays in its cluster. Where that is
    split, it goes with the part that has the update most similar to its own last one, as the
    paper has it of clients that join later; so nothing is split before all members have trained.

    Parameters
    ----------
    labels : sequence of int
        The cluster of each leaf in the round before.
    updates : sequence of float array (P,)
        Each leaf model less the model that it was handed, when it last trained; NaN and infinite
        entries count as 0.
    examples : sequence of int
        Training examples behind each.
    eps_1, eps_2 : float
        Lengths, in the units of the parameters.
    gamma_max : float
        Least distance of the two halves, 0 to 1.
    min_cluster_size : int
    linkage : {"complete", "single"}
        How a cluster is cut; see :func:`bipartition`.
    present : collection of int, optional
        The leaves that trained in this round; none: all.

    Returns
    -------
    labels : int64 array (leaves,)
        0, 1, ... in order of each cluster's lowest member.
    similarity : float array (leaves, leaves)
        cos between all pairs of updates, -1 to 1, ones on the diagonal.
    """
    similarity = cosines(updates)
    moves, halves = finite(updates), np.array(labels)
    weights = np.asarray(examples, moves.dtype)
    here = np.zeros(len(halves), bool)
    here[slice(None) if present is None else list(present)] = True
    for cluster in np.unique(halves):
        absent = np.flatnonzero((halves == cluster) & ~here)
        members = np.flatnonzero((halves == cluster) & here)
        if not len(members) or not np.linalg.norm(moves[absent], axis=1).all():
            continue
        own, share = moves[members], weights[members] / weights[members].sum()
        at_rest = np.linalg.norm(share @ own) < eps_1
        if not at_rest or np.linalg.norm(own, axis=1).max() <= eps_2:
            continue
        cut = bipartition(similarity[np.ix_(members, members)], min_cluster_size, linkage)
        if cut is not None and gamma_max < np.sqrt(max(0.0, 1 - cut[1]) / 2):
            parts = members[cut[0]], members[~cut[0]]
            closest, other = (similarity[np.ix_(absent, part)].max(axis=1) for part in parts)
            halves[[*parts[0], *absent[closest > other]]] = halves.max() + 1
    return in_order(halves), similarity


def bipartition(
    similarity: FloatArray, min_size: int, linkage: Linkage
) -> tuple[NDArray[np.bool_], float] | None:
    """Cut a cluster in two by agglomerative clustering of its members.

    With ``"single"`` linkage the largest similarity across the cut is the least of all cuts
    (Algorithm 1 of the paper); with ``"complete"`` the two parts are those whose joining would
    bring together the least similar pair (the authors' code).

    Where a part would be too small, the cut is made further down, where both are large enough
    for the first time; the few that were cut off on the way go each to the part that they are
    more alike to, by the same linkage.

    Parameters
    ----------
    similarity : float array (n, n)
        -1 to 1.
    min_size : int
        Least members of a part.
    linkage : {"complete", "single"}

    Returns
    -------
    part : bool array (n,)
        The members of one part.
    across : float
        The largest similarity across the cut.
    None if no part may be so small.
    """
    n = len(similarity)
    if n < 2 * min_size:
        return None
    # Row i joins nodes a and b to node n + i; nodes 0..n-1 are the members.
    rows = joined(-similarity[np.triu_indices(n, 1)].astype(np.float64), linkage)
    joins = rows[:, :2].astype(np.int64)
    sizes = np.concatenate([np.ones(n), rows[:, 3]])
    large = np.flatnonzero(sizes[joins].min(axis=1) >= min_size)
    if not len(large):
        return None
    halves = [_members(joins, node) for node in joins[large[-1]]]
    closest = {"complete": np.min, "single": np.max}[linkage]
    first, second = (closest(similarity[:, half], axis=1) for half in halves)
    part = first > second
    part[halves[0]], part[halves[1]] = True, False
    return part, float(similarity[np.ix_(part, ~part)].max())


def _members(joins: NDArray[np.int64], node: int) -> list[int]:
    """Return the members below a node of the tree."""
    members, nodes = [], [int(node)]
    while nodes:
        node = nodes.pop()
        if node <= len(joins):
            members.append(node)
        else:
            nodes += joins[node - len(joins) - 1].tolist()
    return members
