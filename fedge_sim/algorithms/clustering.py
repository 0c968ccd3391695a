"""Which leaf servers learn alike: cosine similarity of their heads, weights or updates."""

from collections.abc import Iterable, Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from fedge_sim.algorithms import Arrays, FloatArray


def features(
    models: Sequence[Arrays], started_from: Sequence[Arrays], kind: str, trainable: Set[str]
) -> list[FloatArray]:
    """Return what leaf models are compared by.

    Parameters
    ----------
    models, started_from : sequence of Arrays
        The model of each leaf after its training, and before.
    kind : str
        ``"head"``, ``"weights"`` (all trainable values) or ``"updates"`` (what training
        changed of them).
    trainable : set of str
        Names of the trainable arrays.

    Returns
    -------
    list of float array (classes, width), or (P,) of all P trainable values
    """
    if kind == "head":
        return [classifier_head(np.asarray(a) for a in model.values()) for model in models]
    weights = [_flat(model, trainable) for model in models]
    if kind == "weights":
        return weights
    starts = (_flat(model, trainable) for model in started_from)
    return [after - before for after, before in zip(weights, starts, strict=True)]


def _flat(model: Arrays, trainable: Set[str]) -> FloatArray:
    return np.concatenate([array.ravel() for name, array in model.items() if name in trainable])


def classifier_head(arrays: Iterable[FloatArray]) -> FloatArray:
    """Return the last two-dimensional array of a model: the weights of its classifier head.

    Raises
    ------
    ValueError
        If no array has two dimensions.
    """
    matrices = [array for array in arrays if array.ndim == 2]
    if not matrices:
        raise ValueError("clustering needs a classifier head: a weight array of two dimensions")
    return matrices[-1]


def similarity(heads: Sequence[FloatArray]) -> FloatArray:
    """Return |cos| between all pairs of heads, ones on the diagonal.

    NaN and infinite entries count as 0; a head of zeros is like no other. Computed in the
    heads' own type: in float32 two parallel heads can come out just below 1, so at
    ``tau = 1`` the type decides.

    Parameters
    ----------
    heads : sequence of float array (classes, width)

    Returns
    -------
    float array (leaves, leaves)
    """
    return np.abs(cosines(heads))


def cosines(vectors: Sequence[FloatArray]) -> FloatArray:
    """Return cos between all pairs, with its sign, as :func:`similarity` does without."""
    flat = finite(vectors)
    unit = flat / (np.linalg.norm(flat, axis=1, keepdims=True) + 1e-12)
    matrix: FloatArray = unit @ unit.T
    np.fill_diagonal(matrix, 1.0)
    return matrix


def finite(vectors: Sequence[FloatArray]) -> FloatArray:
    """Return arrays of one shape as rows (n, size), 0 for NaN and infinity."""
    flat = np.stack([vector.ravel() for vector in vectors])
    return np.nan_to_num(flat, nan=0.0, posinf=0.0, neginf=0.0)


def clusters(similarity_matrix: FloatArray, tau: float) -> NDArray[np.int64]:
    """Group leaves joined by a chain of similarities of at least ``tau``.

    Returns
    -------
    int64 array (leaves,)
        Labels 0, 1, ... in order of each cluster's lowest member.
    """
    _, labels = connected_components(csr_array(similarity_matrix >= tau), directed=False)
    return in_order(labels)


def agglomerative(similarity_matrix: FloatArray, num_clusters: int) -> NDArray[np.int64]:
    """Join the most alike clusters, by mean distance 1 - similarity, down to a number of them.

    Returns
    -------
    int64 array (leaves,)
        Labels as :func:`clusters` numbers them.
    """
    if len(similarity_matrix) == 1:  # too few for scikit-learn
        return np.zeros(1, np.int64)
    from sklearn.cluster import AgglomerativeClustering  # takes long to load

    method = AgglomerativeClustering(num_clusters, metric="precomputed", linkage="average")
    return in_order(method.fit_predict(1 - similarity_matrix))


def in_order(labels: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Return labels 0, 1, ... in order of each one's lowest member."""
    _, first_member, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first_member))[inverse].astype(np.int64)


def weight_clustering(
    server_weights_list: Sequence[Sequence[FloatArray]], *, tau: float
) -> tuple[NDArray[np.int64], FloatArray, float]:
    """Cluster leaf servers by their models.

    Parameters
    ----------
    server_weights_list : sequence of sequence of arrays
        Each leaf model's arrays, in the model's order.
    tau : float
        Least similarity that joins two leaves.

    Returns
    -------
    labels : int64 array (leaves,)
    similarity_matrix : float array (leaves, leaves)
    tau : float
        As given.
    """
    matrix = similarity([classifier_head(arrays) for arrays in server_weights_list])
    return clusters(matrix, tau), matrix, tau
