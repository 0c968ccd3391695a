import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedge_sim.algorithms.clustering import classifier_head, clusters, similarity, weight_clustering


def test_golden_cases(shared):
    with np.load(shared / "golden" / "weight_clustering.npz") as golden:
        cases = sorted(name.removesuffix("_tau") for name in golden.files if name.endswith("_tau"))
        assert len(cases) == 150
        for case in cases:
            models = [[np.ones(3, np.float32), head] for head in golden[f"{case}_head"]]
            tau = float(golden[f"{case}_tau"])
            labels, matrix, returned_tau = weight_clustering(models, tau=tau)
            np.testing.assert_array_equal(labels, golden[f"{case}_labels"], err_msg=case)
            np.testing.assert_allclose(matrix, golden[f"{case}_similarity"], atol=1e-5)
            assert returned_tau == tau


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
