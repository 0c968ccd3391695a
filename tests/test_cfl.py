"""CFL's split of clusters: the cut against all cuts, planted groups, and every gate."""

import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.cluster import AgglomerativeClustering

from fedge_sim import cloud
from fedge_sim.algorithms.cfl import bipartition, split_clusters
from fedge_sim.algorithms.clustering import cosines
from fedge_sim.config import CloudCluster
from fedge_sim.reporting.tables import TableWriter
from tests.conftest import run

GATES = {
    "eps_1": 0.4,
    "eps_2": 1.6,
    "gamma_max": 0.0,
    "min_cluster_size": 1,
    "linkage": "complete",
}
LINKAGES = st.sampled_from(["complete", "single"])
WIDE = {"eps_1": np.inf, "eps_2": 0.0}  # always at rest, always moving


def random_cosines(seed, n, width=4):
    return cosines(list(np.random.default_rng(seed).normal(size=(n, width))))


def across(matrix, part):
    """The largest similarity across a cut."""
    return matrix[np.ix_(part, ~part)].max()


@given(st.integers(0, 10**6), st.integers(2, 7))
def test_the_single_cut_is_the_best_of_all(seed, n):
    matrix = random_cosines(seed, n)
    part, value = bipartition(matrix, 1, "single")
    others = [np.isin(np.arange(n), own) for k in range(1, n) for own in combinations(range(n), k)]
    assert value == across(matrix, part) == min(across(matrix, other) for other in others)


@given(st.integers(0, 10**6), st.integers(2, 9), LINKAGES)
def test_the_cut_is_that_of_agglomerative_clustering(seed, n, linkage):
    """The class that the authors' code uses."""
    matrix = random_cosines(seed, n)
    method = AgglomerativeClustering(2, metric="precomputed", linkage=linkage)
    part, value = bipartition(matrix, 1, linkage)
    np.testing.assert_array_equal(pairs(part), pairs(method.fit_predict(-matrix)))
    assert value == across(matrix, part)


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 4), LINKAGES)
def test_parts_are_large_enough(seed, n, least, linkage):
    matrix = random_cosines(seed, n)
    cut = bipartition(matrix, least, linkage)
    if cut is None:
        # not one of the clusters on the way from one to n has two parts that are large enough
        for k in range(2, n + 1):
            method = AgglomerativeClustering(k, metric="precomputed", linkage=linkage)
            assert (np.bincount(method.fit_predict(-matrix)) >= least).sum() < 2
        return
    part, value = cut
    assert min(part.sum(), (~part).sum()) >= least
    assert value == across(matrix, part)


@pytest.mark.parametrize("linkage", ["complete", "single"])
def test_who_is_too_few_is_not_cut(linkage):
    assert bipartition(np.ones((1, 1)), 1, linkage) is None
    assert bipartition(random_cosines(0, 3), 2, linkage) is None
    # 0 is like nobody, but would stand alone; the pairs are (1, 2) and (3, 4)
    matrix = np.float64(
        [
            [1.0, -0.5, -0.5, -0.6, -0.6],
            [-0.5, 1.0, 0.9, 0.1, 0.1],
            [-0.5, 0.9, 1.0, 0.1, 0.1],
            [-0.6, 0.1, 0.1, 1.0, 0.9],
            [-0.6, 0.1, 0.1, 0.9, 1.0],
        ]
    )
    assert bipartition(matrix, 1, linkage)[1] == -0.5
    part, value = bipartition(matrix, 2, linkage)
    assert value == 0.1
    assert part[3] == part[4] != part[0] == part[1] == part[2]


@pytest.mark.parametrize("linkage", ["complete", "single"])
def test_equal_updates_stay_together(linkage):
    matrix = np.float32([[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    part, value = bipartition(matrix, 1, linkage)
    assert part[0] == part[1] != part[2]
    assert value == 0.0
    assert bipartition(np.ones((3, 3)), 1, linkage)[1] == 1.0  # gamma_max is what forbids this cut


def planted(seed, sizes=(3, 4), width=30, noise=0.1):
    """Two groups of updates that point against each other; mean 0 if examples say so."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=width)
    direction *= 2 / np.linalg.norm(direction)
    group = rng.permutation(np.repeat([0, 1], sizes))
    updates = np.where(group[:, None] == 0, direction, -direction)
    examples = np.where(group == 0, sizes[1], sizes[0])
    return group, list(updates + noise / width**0.5 * rng.normal(size=updates.shape)), examples


def pairs(labels):
    return np.equal.outer(labels, labels)


@given(st.integers(0, 10**6), LINKAGES)
def test_planted_groups_are_found_and_no_third(seed, linkage):
    group, updates, examples = planted(seed)
    gates = GATES | {"linkage": linkage}
    labels, matrix = split_clusters([0] * 7, updates, examples, **gates)
    np.testing.assert_array_equal(pairs(labels), pairs(group))
    assert matrix[group == 0][:, group == 1].max() < -0.9  # signed
    # within a group all move alike: its mean is no smaller than its members
    again, _ = split_clusters(labels, updates, examples, **gates)
    np.testing.assert_array_equal(again, labels)


@pytest.mark.parametrize(
    "change",
    [{"eps_1": 0.0}, {"eps_2": 2.5}, {"gamma_max": 1.0}, {"min_cluster_size": 4}],
)
def test_each_gate_matters(change):
    _, updates, examples = planted(0)
    assert split_clusters([0] * 7, updates, examples, **GATES)[0].max() == 1
    assert split_clusters([0] * 7, updates, examples, **GATES | change)[0].tolist() == [0] * 7


def test_the_mean_is_by_examples():
    _, updates, examples = planted(0)
    low = GATES | {"eps_1": 0.2}
    assert split_clusters([0] * 7, updates, examples, **low)[0].max() == 1
    # three against four: |mean| is 2/7
    assert split_clusters([0] * 7, updates, [1] * 7, **low)[0].max() == 0


UPDATES = arrays(
    np.float32, st.tuples(st.integers(1, 8), st.just(3)), elements=st.floats(-4, 4, width=32)
)


@given(UPDATES, st.data())
def test_clusters_only_split_in_two(updates, data):
    n = len(updates)
    before = np.array(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
    least = data.draw(st.integers(1, 3))
    gates = GATES | WIDE | {"min_cluster_size": least, "linkage": data.draw(LINKAGES)}
    labels, matrix = split_clusters(before, list(updates), [1] * n, **gates)
    assert not (pairs(labels) & ~pairs(before)).any()  # never joined
    for k in np.unique(before):
        parts, sizes = np.unique(labels[before == k], return_counts=True)
        assert len(parts) == 1 or (len(parts) == 2 and sizes.min() >= least)
    assert list(dict.fromkeys(labels.tolist())) == list(range(labels.max() + 1))
    assert abs(matrix).max() <= 1 + 1e-6
    assert (np.diag(matrix) == 1).all()


@given(st.integers(0, 10**6), st.permutations(range(7)))
def test_the_order_of_leaves_only_permutes_the_labels(seed, order):
    rng = np.random.default_rng(seed)
    updates, examples = rng.normal(size=(7, 5)), rng.integers(1, 9, size=7)
    before = rng.integers(0, 2, size=7)
    labels, _ = split_clusters(before, list(updates), examples, **GATES | WIDE)
    order = np.array(order)
    shuffled, _ = split_clusters(
        before[order], list(updates[order]), examples[order], **GATES | WIDE
    )
    np.testing.assert_array_equal(pairs(shuffled), pairs(labels[order]))


@given(UPDATES, st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
def test_what_is_not_finite_counts_as_0(updates, value, data):
    place = tuple(data.draw(st.integers(0, size - 1)) for size in updates.shape)
    broken, mended = updates.copy(), updates.copy()
    broken[place], mended[place] = value, 0
    gates = GATES | WIDE
    results = [
        split_clusters([0] * len(u), list(u), [1] * len(u), **gates) for u in (broken, mended)
    ]
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


# ---------------------------------------------------------------------- in the cloud


@given(st.integers(0, 10**6), st.integers(2, 7), LINKAGES)
def test_who_is_absent_has_no_part_in_a_split(seed, number, linkage):
    rng = np.random.default_rng(seed)
    updates, examples = rng.normal(size=(7, 5)), rng.integers(1, 9, size=7)
    before = rng.integers(0, 2, size=7)
    present = rng.choice(7, number, replace=False)
    gates = GATES | {"eps_1": 1.5, "eps_2": 0.0, "linkage": linkage}
    labels, matrix = split_clusters(before, list(updates), examples, **gates, present=present)
    alone, _ = split_clusters(before[present], list(updates[present]), examples[present], **gates)
    np.testing.assert_array_equal(pairs(labels[present]), pairs(alone))
    assert not (pairs(labels) & ~pairs(before)).any()
    for leaf in set(range(7)) - set(present.tolist()):
        # it stays with those that were together with it; if they part, with whom it is most like
        own = np.array([k for k in present if before[k] == before[leaf]], int)
        if len(own):
            assert labels[leaf] == labels[own[matrix[leaf, own].argmax()]]


@given(st.integers(0, 10**6))
def test_who_is_absent_follows_its_planted_group(seed):
    group, updates, examples = planted(seed)
    rng = np.random.default_rng(seed)
    present = [rng.choice(np.flatnonzero(group == k), 2, replace=False) for k in (0, 1)]
    present = np.concatenate(present)
    labels, _ = split_clusters([0] * 7, updates, examples, **GATES | WIDE, present=present)
    np.testing.assert_array_equal(pairs(labels), pairs(group))
    # of one that has never trained nobody knows where it belongs: the others wait for it
    updates[np.setdiff1d(range(7), present)[0]] *= 0
    labels, _ = split_clusters([0] * 7, updates, examples, **GATES | WIDE, present=present)
    assert not labels.any()


def cloud_step(state, moves, settings, examples):
    models = [
        {"w": state.model_for(leaf)["w"] + move, "buffer": np.float32([leaf])}
        for leaf, move in enumerate(moves)
    ]
    return cloud.step(state, models, examples, settings, global_lr=1.0, trainable={"w"})


def test_the_cloud_keeps_cfl_clusters_between_rounds_and_splits_them_further():
    settings = CloudCluster(method="cfl", start_round=2, frequency=2, min_cluster_size=1)
    start = {"w": np.zeros(2, np.float32), "buffer": np.zeros(1, np.float32)}
    state = cloud.initial_state(start, 4)
    first = np.float32([[2, 0], [2, 0.1], [-2, 0], [-2, -0.1]])
    second = np.float32([[2, 0], [-2, 0], [2, 0], [2, 0]])
    expected = [(0, 0, 0, 0), (0, 0, 1, 1), (0, 0, 1, 1), (0, 1, 2, 2)]
    for moves, labels in zip((first, first, second, second), expected, strict=True):
        state = cloud_step(state, moves, settings, [1] * 4)
        assert state.labels == labels
        assert (state.similarity is None) == (state.global_round % 2 == 1)
    # compared by what training changed, not by the models, which are far apart by now
    assert state.similarity[1, 2] < -0.99
    # a split gives each part its own average
    np.testing.assert_array_equal(
        state.cluster_models[0]["w"] - state.cluster_models[1]["w"], [4, 0]
    )


def test_other_methods_go_back_to_one_cluster():
    settings = CloudCluster(method="agglomerative", frequency=2, features="updates")
    state = cloud.initial_state({"w": np.zeros(2, np.float32)}, 3)
    moves = np.float32([[1, 0], [0, 1], [1, 0]])
    state = cloud_step(state, moves, settings, [1] * 3)
    assert state.labels == (0, 1, 0)
    state = cloud_step(state, moves, settings, [1] * 3)
    assert state.labels == (0, 0, 0)
    assert state.similarity is None


@given(UPDATES)
def test_the_global_model_does_not_depend_on_clusters(updates):
    state = cloud.initial_state({"w": np.zeros(3, np.float32)}, len(updates))
    examples = range(1, len(updates) + 1)
    cfl = CloudCluster(method="cfl", eps_1=100, eps_2=0, min_cluster_size=1)
    split = cloud_step(state, updates, cfl, examples)
    whole = cloud_step(state, updates, CloudCluster(method="none"), examples)
    assert whole.labels == (0,) * len(updates)
    assert whole.similarity is None
    np.testing.assert_array_equal(split.global_model["w"], whole.global_model["w"])


def test_cfl_finds_the_planted_users_in_a_run(small):
    settings = small(
        "cloud_cluster.method=cfl",
        "cloud_cluster.eps_1=1.0",
        "cloud_cluster.eps_2=0.5",
        "hierarchy.num_servers=9",
        "hierarchy.clients_per_server=[1,1,1,1,1,1,1,1,1]",
        "hierarchy.global_rounds=1",
        "hierarchy.local_epochs=2",
    )
    result = run(settings, [TableWriter()])
    assert result.last.cloud.labels == (0,) * 6 + (1,) * 3
    [entry] = json.loads((result.folder / "metrics/seed_42/cluster_history.json").read_text())
    assert (entry["method"], entry["ari_truth"]) == ("cfl", 1.0)
    assert np.min(entry["similarity"]) < 0
