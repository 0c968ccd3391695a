"""Which leaf servers learn alike: cosine similarity of their classifier heads."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from fedge_sim.algorithms import FloatArray


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
    flat = np.stack([head.ravel() for head in heads])
    flat = np.nan_to_num(flat, nan=0.0, posinf=0.0, neginf=0.0)
    unit = flat / (np.linalg.norm(flat, axis=1, keepdims=True) + 1e-12)
    cosines: FloatArray = np.abs(unit @ unit.T)
    np.fill_diagonal(cosines, 1.0)
    return cosines


def clusters(similarity_matrix: FloatArray, tau: float) -> NDArray[np.int64]:
    """Group leaves joined by a chain of similarities of at least ``tau``.

    Returns
    -------
    int64 array (leaves,)
        Labels 0, 1, ... in order of each cluster's lowest member.
    """
    _, labels = connected_components(csr_array(similarity_matrix >= tau), directed=False)
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
