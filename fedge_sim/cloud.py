"""The cloud: groups leaf servers that learn alike, and averages each group. Pure functions.

One step goes from the leaf models of a round to the next frozen state; who sent the models
is not known here.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass

from fedge_sim.algorithms import Arrays, FloatArray, cfl
from fedge_sim.algorithms.aggregation import step_towards, weighted_mean
from fedge_sim.algorithms.clustering import agglomerative, clusters, features, similarity
from fedge_sim.config import CloudCluster


@dataclass(frozen=True)
class CloudState:
    """What the cloud knows after a global round.

    Attributes
    ----------
    global_round : int
        0 before the first round.
    labels : tuple of int
        The cluster of each leaf server.
    cluster_models : tuple of Arrays
        A model for each cluster.
    global_model : Arrays
        The average over all leaf servers.
    similarity : float array (leaves, leaves), optional
        What the clusters were made from; None in a round without clustering.
    """

    global_round: int
    labels: tuple[int, ...]
    cluster_models: tuple[Arrays, ...]
    global_model: Arrays
    similarity: FloatArray | None = None

    def model_for(self, leaf: int) -> Arrays:
        """Return the model that a leaf server starts from: that of its cluster."""
        return self.cluster_models[self.labels[leaf]]

    def members(self, cluster: int) -> tuple[int, ...]:
        """Return the leaf servers of a cluster, in ascending order."""
        return tuple(leaf for leaf, label in enumerate(self.labels) if label == cluster)


def initial_state(model: Arrays, num_leaves: int) -> CloudState:
    """Return the state before the first round: one cluster, one model."""
    return CloudState(0, (0,) * num_leaves, (model,), model)


def step(
    state: CloudState,
    leaf_models: Sequence[Arrays],
    examples: Sequence[int],
    settings: CloudCluster,
    *,
    global_lr: float,
    trainable: Set[str],
    started_from: Sequence[Arrays] | None = None,
    present: Sequence[int] | None = None,
) -> CloudState:
    """Do the cloud's part of one global round.

    Parameters
    ----------
    state : CloudState
        The state after the round before.
    leaf_models : sequence of Arrays
        The model of each leaf server after its last training, in leaf order.
    examples : sequence of int
        Training examples behind each leaf model.
    settings : CloudCluster
    global_lr : float
        Step from the models that the leaves were given towards their new average.
    trainable : set of str
        Names of the arrays to which ``global_lr`` applies; the others are averaged.
    started_from : sequence of Arrays, optional
        The model from which each leaf server began that; none: those that the cloud handed out,
        which the accuracy gate may have rejected.
    present : sequence of int, optional
        The leaf servers that trained in this round: averages are theirs, and a cluster that has
        none of them keeps its model. None: all.
    """
    everyone = range(len(leaf_models)) if present is None else present
    handed_out = [state.model_for(leaf) for leaf in range(len(leaf_models))]
    starts = handed_out if started_from is None else started_from
    labels, matrix = cluster(state, leaf_models, starts, examples, settings, trainable, everyone)

    def average(leaves: Sequence[int]) -> Arrays:
        weights = [examples[leaf] for leaf in leaves]
        mean = weighted_mean([leaf_models[leaf] for leaf in leaves], weights)
        start = weighted_mean([handed_out[leaf] for leaf in leaves], weights)
        return step_towards(start, mean, global_lr, trainable)

    global_model = average(everyone)
    members = [[leaf for leaf in everyone if labels[leaf] == k] for k in range(max(labels) + 1)]
    models: tuple[Arrays, ...] = (global_model,)
    if len(members) > 1:
        models = tuple(
            average(own) if own else handed_out[labels.index(k)] for k, own in enumerate(members)
        )
    return CloudState(state.global_round + 1, labels, models, global_model, matrix)


def cluster(
    state: CloudState,
    leaf_models: Sequence[Arrays],
    started_from: Sequence[Arrays],
    examples: Sequence[int],
    settings: CloudCluster,
    trainable: Set[str],
    present: Sequence[int] | None = None,
) -> tuple[tuple[int, ...], FloatArray | None]:
    """Return the cluster of each leaf, and the similarities where any were computed.

    In a round in which none is due CFL keeps its clusters; the other methods have one.
    """
    is_cfl = settings.method == "cfl"
    if not settings.due(state.global_round + 1):
        return state.labels if is_cfl else (0,) * len(leaf_models), None
    kind = "updates" if is_cfl else settings.features
    vectors = features(leaf_models, started_from, kind, trainable)
    if is_cfl:
        labels, matrix = cfl.split_clusters(
            state.labels,
            vectors,
            examples,
            eps_1=settings.eps_1,
            eps_2=settings.eps_2,
            gamma_max=settings.gamma_max,
            min_cluster_size=settings.min_cluster_size,
            linkage=settings.linkage,
            present=present,
        )
    else:
        matrix = similarity(vectors)
        labels = (
            clusters(matrix, settings.tau)
            if settings.method == "cosine_similarity"
            else agglomerative(matrix, settings.num_clusters)
        )
    return tuple(labels.tolist()), matrix
