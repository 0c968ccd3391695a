import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedge_sim import cloud
from fedge_sim.algorithms.clustering import (
    agglomerative,
    classifier_head,
    clusters,
    features,
    similarity,
    weight_clustering,
)
from fedge_sim.config import CloudCluster


def test_one_leaf_is_one_cluster():
    labels, matrix, _ = weight_clustering([[np.zeros((2, 3), np.float32)]], tau=0.9)
    assert labels.tolist() == [0]
    assert matrix.tolist() == [[1.0]]


def test_the_head_is_the_last_matrix():
    first, last = np.zeros((2, 2)), np.ones((3, 2))
    assert classifier_head([first, np.zeros(2), last, np.zeros(3)]) is last
    with pytest.raises(ValueError, match="two dimensions"):
        classifier_head([np.zeros(3)])


def test_clusters_are_chains_numbered_by_lowest_member():
    matrix = np.eye(5)
    for i, j in ((0, 3), (3, 4)):  # 0 - 3 - 4 is a chain: 0 and 4 are not alike themselves
        matrix[i, j] = matrix[j, i] = 0.8
    assert clusters(matrix, 0.7).tolist() == [0, 1, 2, 0, 0]
    assert clusters(matrix, 0.81).tolist() == [0, 1, 2, 3, 4]


HEADS = arrays(np.float32, (5, 2, 3), elements=st.floats(-10, 10, width=32))


@given(HEADS)
def test_bounds_of_tau(heads):
    matrix = similarity(list(heads))
    assert clusters(matrix, 0.0).tolist() == [0] * 5
    assert clusters(matrix, 1.1).tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(matrix, matrix.T)


@given(HEADS, st.permutations(range(5)), st.sampled_from([0.3, 0.7, 0.9]))
def test_groups_do_not_depend_on_the_order_of_leaves(heads, order, tau):
    matrix = similarity(list(heads))
    straight = clusters(matrix, tau)
    shuffled = clusters(matrix[np.ix_(order, order)], tau)
    for i in range(5):
        for j in range(5):
            together = straight[order[i]] == straight[order[j]]
            assert together == (shuffled[i] == shuffled[j])


@given(st.integers(0, 10**6), st.permutations(range(5)), st.integers(1, 5))
def test_agglomerative_gives_as_many_clusters_as_asked_for(seed, order, num_clusters):
    heads = np.random.default_rng(seed).normal(size=(5, 4))
    matrix = similarity(list(heads))
    straight = agglomerative(matrix, num_clusters)
    assert list(dict.fromkeys(straight.tolist())) == list(range(num_clusters))
    shuffled = agglomerative(matrix[np.ix_(order, order)], num_clusters)
    together = np.equal.outer(straight, straight)[np.ix_(order, order)]
    np.testing.assert_array_equal(np.equal.outer(shuffled, shuffled), together)


def test_agglomerative_joins_by_mean_distance():
    matrix = np.eye(4)
    # 0 - 1 - 2 - 3 is a chain, which tau = 0.6 makes one; by mean distance 3 stays alone
    for i, j, value in ((0, 1, 0.9), (1, 2, 0.8), (2, 3, 0.6), (0, 2, 0.8)):
        matrix[i, j] = matrix[j, i] = value
    assert clusters(matrix, 0.6).tolist() == [0, 0, 0, 0]
    assert agglomerative(matrix, 2).tolist() == [0, 0, 0, 1]
    assert agglomerative(np.ones((1, 1)), 1).tolist() == [0]


MODELS = [
    {"w": np.float32([[1, k]]), "mean": np.float32([9]), "b": np.float32([k]), "n": np.array(k)}
    for k in range(3)
]


def test_features_by_hand():
    start, trainable = [MODELS[1]] * 3, {"b", "w"}
    heads = features(MODELS, start, "head", trainable)
    assert [head.tolist() for head in heads] == [[[1, 0]], [[1, 1]], [[1, 2]]]
    weights = features(MODELS, start, "weights", trainable)  # in the model's order
    assert [vector.tolist() for vector in weights] == [[1, 0, 0], [1, 1, 1], [1, 2, 2]]
    updates = features(MODELS, start, "updates", trainable)
    assert [vector.tolist() for vector in updates] == [[0, -1, -1], [0, 0, 0], [0, 1, 1]]


def test_the_cloud_compares_heads_as_the_golden_cases_do():
    def step(**settings):
        state, table = cloud.initial_state(MODELS[1], 3), CloudCluster(tau=0.9, **settings)
        return cloud.step(state, MODELS, [1] * 3, table, global_lr=1.0, trainable={"b", "w"})

    labels, matrix, _ = weight_clustering([list(m.values()) for m in MODELS], tau=0.9)
    assert step().labels == tuple(labels) == (0, 1, 1)
    np.testing.assert_array_equal(step().similarity, matrix)
    assert step(features="weights").labels == (0, 1, 1)
    # the leaf that did not move is like no other; opposite moves are alike in |cos|
    assert step(features="updates").labels == (0, 1, 0)
    assert step(method="agglomerative", num_clusters=3).labels == (0, 1, 2)
