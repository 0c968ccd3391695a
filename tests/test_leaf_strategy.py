"""Flower's strategies as the rule of a leaf server, against their formulas written with numpy."""

import logging
import random

import numpy as np
import pytest
from flwr.serverapp import strategy
from flwr.supercore.task_identity import TaskIdentity

from fedge_sim import memory
from fedge_sim.algorithms.aggregation import weighted_mean
from fedge_sim.config import Hierarchy
from fedge_sim.errors import ConfigError, RoundError
from fedge_sim.leaf_strategy import LeafRule, allowed

TRAINABLE = {"w", "b"}
CLIENTS = range(7)
WEIGHTS = {client: 10.0 * (client + 1) for client in CLIENTS}
LOSSES = {client: 0.5 + 0.1 * client for client in CLIENTS}


@pytest.fixture(scope="module", autouse=True)
def _frozen():
    """As in a run: some strategies of Flower's collect garbage in every round."""
    with memory.frozen():
        yield


def rule(name, clients=7, **options):
    options = {"leaf_strategy": name, "leaf_strategy_options": options}
    return LeafRule(Hierarchy(num_servers=1, clients_per_server=(clients,), **options), TRAINABLE)


def model(rng):
    return {
        "w": rng.normal(size=(3, 2)).astype(np.float32),
        "steps": np.array(rng.integers(100)),
        "b": rng.normal(size=4).astype(np.float32),
        "running_var": np.asarray(rng.uniform(0.1, 2), np.float32),  # an array without axes
    }


def rounds(count=3):
    """Return (round, start, updates); the start is the cloud's, not what the rule gave before."""
    rng = np.random.default_rng(5)
    return [(t, model(rng), {c: model(rng) for c in CLIENTS}) for t in range(1, count + 1)]


def mean_of(updates):
    return weighted_mean([updates[c] for c in CLIENTS], [WEIGHTS[c] for c in CLIENTS])


def double(arrays):
    return {name: np.asarray(array, np.float64) for name, array in arrays.items()}


# ------------------------------------------------- what each strategy's paper says, one by one
# A formula goes from (memory, round, start, updates, mean) to the floating arrays, in float64.


def fedavg(memory, t, start, updates, mean):
    return mean


def fedmedian(memory, t, start, updates, mean):
    return {n: np.median([updates[c][n] for c in CLIENTS], axis=0) for n in start}


def fedtrimmedavg(memory, t, start, updates, mean):
    """Yin et al. 2018, def. 2: of 7 values, the least and the greatest are cut off."""
    return {n: np.sort([updates[c][n] for c in CLIENTS], axis=0)[1:-1].mean(0) for n in start}


def flat(arrays):
    return np.concatenate([np.ravel(arrays[n]) for n in ("w", "b", "running_var")])


def krum_order(updates, clients, malicious):
    """Blanchard et al. 2017: by the squared distances to the n - f - 2 nearest others."""
    scores = {}
    for c in clients:
        away = [np.sum((flat(updates[c]) - flat(updates[d])) ** 2) for d in clients if d != c]
        scores[c] = sum(sorted(away)[: len(clients) - malicious - 2])
    return sorted(clients, key=scores.__getitem__)


def krum(memory, t, start, updates, mean):
    return updates[krum_order(updates, CLIENTS, 2)[0]]


def multikrum(memory, t, start, updates, mean):
    best = krum_order(updates, CLIENTS, 2)[:3]
    return weighted_mean([updates[c] for c in best], [WEIGHTS[c] for c in best])


def bulyan(memory, t, start, updates, mean):
    """El Mhamdi et al. 2018: of n - 2f chosen, the mean of the n - 4f values next to the median."""
    chosen = krum_order(updates, CLIENTS, 1)[:5]
    result = {}
    for n in start:
        values = np.stack([updates[c][n] for c in chosen])
        nearest = np.argsort(np.abs(values - np.median(values, axis=0)), axis=0)[:3]
        result[n] = np.take_along_axis(values, nearest, axis=0).mean(axis=0)
    return result


def adaptive(second_moment, beta_1=0.8, corrected=False):
    """Reddi et al. 2021, alg. 2, with beta_2 = 0.95, eta = 0.3, tau = 0.01.

    Flower corrects Adam's rate for the bias of the first rounds, as Kingma & Ba 2015, sec. 2 do.
    """

    def formula(memory, t, start, updates, mean):
        eta = 0.3 * np.sqrt(1 - 0.95 ** (t + 1)) / (1 - beta_1 ** (t + 1)) if corrected else 0.3
        result = {}
        for n in start:
            delta = mean[n] - start[n]
            m, v = memory.get(n, (0 * delta, 0 * delta))
            m, v = beta_1 * m + (1 - beta_1) * delta, second_moment(v, delta**2)
            memory[n] = m, v
            result[n] = start[n] + eta * m / (np.sqrt(v) + 0.01)
        return result

    return formula


def fedavgm(memory, t, start, updates, mean):
    """Hsu et al. 2019: v = momentum v + (x - mean), x - lr v."""
    for n in start:
        memory[n] = 0.6 * memory.get(n, 0) + start[n] - mean[n]
    return {n: start[n] - 0.5 * memory[n] for n in start}


def qfedavg(memory, t, start, updates, mean):
    """Li et al. 2020, alg. 2, with L = 1 / 0.2 and q = 0.5; the norm is over trainable arrays."""
    deltas, h = dict.fromkeys(start, 0.0), 0.0
    for c in CLIENTS:
        step = {n: 5.0 * (start[n] - updates[c][n]) for n in start}
        norm = sum(np.sum(step[n] ** 2) for n in TRAINABLE)
        for n in start:
            deltas[n] = deltas[n] + LOSSES[c] ** 0.5 * step[n]
        h += 0.5 * LOSSES[c] ** -0.5 * norm + 5.0 * LOSSES[c] ** 0.5
    return {n: start[n] - deltas[n] / h for n in start}


ADAPTIVE = {"beta_1": 0.8, "beta_2": 0.95, "eta": 0.3, "tau": 0.01}
FORMULAS = {
    "FedAvg": (fedavg, {}),
    "FedMedian": (fedmedian, {}),
    "FedTrimmedAvg": (fedtrimmedavg, {"beta": 0.2}),
    "Krum": (krum, {"num_malicious_nodes": 2}),
    "MultiKrum": (multikrum, {"num_malicious_nodes": 2, "num_nodes_to_select": 3}),
    "Bulyan": (bulyan, {"num_malicious_nodes": 1}),
    "FedAdam": (adaptive(lambda v, d2: 0.95 * v + 0.05 * d2, corrected=True), ADAPTIVE),
    "FedYogi": (adaptive(lambda v, d2: v - 0.05 * d2 * np.sign(v - d2)), ADAPTIVE),
    "FedAdagrad": (adaptive(lambda v, d2: v + d2, beta_1=0.0), {"eta": 0.3, "tau": 0.01}),
    "FedAvgM": (fedavgm, {"server_learning_rate": 0.5, "server_momentum": 0.6}),
    "QFedAvg": (qfedavg, {"client_learning_rate": 0.2, "q": 0.5}),
}
OPTIMISERS = {"FedAdam", "FedYogi", "FedAdagrad", "FedAvgM", "QFedAvg"}


def test_every_allowed_strategy_has_a_formula_here():
    assert allowed() == sorted(FORMULAS)


@pytest.mark.parametrize("name", FORMULAS)
def test_three_rounds_give_what_the_formula_says(name):
    formula, options = FORMULAS[name]
    tested, memory = rule(name, **options), {}
    for t, start, updates in rounds():
        result = tested.aggregate(t, start, updates, WEIGHTS, LOSSES)
        mean = double(mean_of(updates))
        expected = formula(memory, t, double(start), {c: double(updates[c]) for c in updates}, mean)
        if name in OPTIMISERS:  # takes no step on a buffer
            expected = {**expected, "running_var": mean["running_var"]}
        expected["steps"] = updates[6]["steps"]  # of the largest
        assert list(result) == list(start)
        for n, array in start.items():
            assert (result[n].dtype, result[n].shape) == (array.dtype, array.shape)
            np.testing.assert_allclose(result[n], expected[n], rtol=2e-6, atol=1e-6, err_msg=n)


@pytest.mark.parametrize("name", FORMULAS)
def test_the_order_of_the_updates_and_the_random_state_change_nothing(name):
    ((t, start, updates),) = rounds(1)
    updates = {c: double(updates[c]) for c in CLIENTS}  # no rounding hides the order
    start = double(start)
    random.seed(3)
    one = rule(name, **FORMULAS[name][1]).aggregate(t, start, updates, WEIGHTS, LOSSES)
    drawn = random.random()
    random.seed(3)
    assert random.random() == drawn
    mixed = {c: updates[c] for c in (4, 0, 6, 2, 1, 5, 3)}
    two = rule(name, **FORMULAS[name][1]).aggregate(t, start, mixed, WEIGHTS, LOSSES)
    assert {n: a.tobytes() for n, a in one.items()} == {n: a.tobytes() for n, a in two.items()}


# ------------------------------------------------------------------------------------ poison


@pytest.mark.parametrize("poisoned", ["w", "running_var"])
@pytest.mark.parametrize(
    ("name", "options", "survives"),
    [
        ("FedAvg", {}, False),
        ("FedMedian", {}, True),
        ("FedTrimmedAvg", {"beta": 0.2}, True),
        ("Krum", {"num_malicious_nodes": 1}, True),
        ("MultiKrum", {"num_malicious_nodes": 1, "num_nodes_to_select": 3}, True),
        ("Bulyan", {"num_malicious_nodes": 1}, True),
    ],
)
def test_a_poisoned_client(name, options, survives, poisoned):
    ((t, start, updates),) = rounds(1)
    for value in (1e6, -1e30):  # the square of the second is no float32
        updates[2][poisoned] = np.full_like(updates[2][poisoned], value)
        result = rule(name, **options).aggregate(t, start, updates, WEIGHTS, LOSSES)
        assert (np.abs(result[poisoned]).max() < 10) == survives


def test_krum_gives_one_of_the_honest():
    ((t, start, updates),) = rounds(1)
    for client in (1, 5):
        updates[client] = {n: np.asarray(a + 50, a.dtype) for n, a in updates[client].items()}
    result = rule("Krum", num_malicious_nodes=2).aggregate(t, start, updates, WEIGHTS, LOSSES)
    same = [c for c in CLIENTS if np.allclose(result["w"], updates[c]["w"], rtol=1e-6)]
    assert len(same) == 1
    assert same[0] not in (1, 5)


def test_krum_tells_apart_what_float32_cannot():
    """Models a little apart and far from 0: their squared norms have no digits left for it."""
    ((t, start, updates),) = rounds(1)
    updates = {c: {n: a + np.asarray(0, a.dtype) for n, a in start.items()} for c in CLIENTS}
    for client in CLIENTS:
        updates[client]["w"] = np.full((3, 2), 1000 + [0, 1, 3, 3.5, 4, 5.5, 9][client] / 64, "f4")
    result = rule("Krum", num_malicious_nodes=2).aggregate(t, start, updates, WEIGHTS, LOSSES)
    best = krum_order({c: double(updates[c]) for c in CLIENTS}, CLIENTS, 2)[0]
    np.testing.assert_array_equal(result["w"], updates[best]["w"])


# --------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("FedAdm", {}, ['leaf_strategy = "FedAdm"', "did you mean 'FedAdam'?", "Krum, MultiKrum"]),
        ("zzz", {}, ["no strategy of Flower's", "allowed: Bulyan"]),
        ("Strategy", {}, ["aggregates", "allowed: Bulyan"]),
        ("Result", {}, ["aggregates", "allowed: Bulyan"]),
        ("FedXgbBagging", {}, ["trees"]),
        ("FedXgbCyclic", {}, ["trees"]),
        ("FedProx", {}, ["hierarchy.prox_mu"]),
        ("FedAvg", {"eta": 0.1}, ["eta = 0.1", "no option of FedAvg, which has none"]),
        ("FedAdam", {"et": 0.1}, ["et = 0.1", "did you mean 'eta'?", "beta_1, beta_2, eta"]),
        ("FedAdam", {"min_train_nodes": 3}, ["no option of FedAdam", "allowed: beta_1"]),
        ("FedAdam", {"eta": "big"}, ['leaf_strategy_options] eta = "big"', "must be float"]),
        ("FedAdam", {"eta": True}, ["must be float"]),
        ("QFedAvg", {"train_loss_key": "x"}, ["no option of QFedAvg", "client_learning_rate, q"]),
        ("Bulyan", {"selection_rule": "x"}, ["no option of Bulyan: allowed: num_malicious_nodes"]),
        ("Krum", {"num_malicious_nodes": 1.0}, ["must be int"]),
        ("FedTrimmedAvg", {"beta": 0.7}, ["FedTrimmedAvg refuses", "[0, 0.5)"]),
        # what only a trial shows
        ("Krum", {"num_malicious_nodes": 3}, ["7 clients in a round", "= 9 clients", "got 7"]),
        ("Bulyan", {"num_malicious_nodes": 2}, ["7 clients in a round", "at least 11", "7."]),
        ("MultiKrum", {"num_nodes_to_select": 0}, ["gave no model"]),
        ("QFedAvg", {"client_learning_rate": 0}, ["ZeroDivisionError"]),
        ("FedAdam", {"beta_1": 1.0}, ["not finite"]),
    ],
)
def test_refused_in_one_line_that_says_what_is_allowed(name, options, words, caplog):
    with pytest.raises(ConfigError) as error:
        rule(name, **options)
    text = str(error.value)
    assert text.startswith("[hierarchy")
    assert "\n" not in text
    assert [word for word in words if word not in text] == []
    assert caplog.text == ""


def test_every_wrapper_is_refused():
    wrappers = [name for name in strategy.__all__ if name.startswith("DifferentialPrivacy")]
    assert len(wrappers) >= 4
    for name in wrappers:
        with pytest.raises(ConfigError, match="wraps another strategy"):
            rule(name)


def test_those_who_take_part_are_counted_not_all():
    hierarchy = {"num_servers": 2, "clients_per_server": (20, 14), "participation": 0.5}
    chosen = {"leaf_strategy": "Bulyan", "leaf_strategy_options": {"num_malicious_nodes": 1}}
    LeafRule(Hierarchy(**hierarchy, **chosen), TRAINABLE)  # needs 7, and 7 of 14 take part
    chosen["leaf_strategy_options"]["num_malicious_nodes"] = 2
    with pytest.raises(ConfigError, match="7 clients in a round"):
        LeafRule(Hierarchy(**hierarchy, **chosen), TRAINABLE)


@pytest.mark.parametrize(
    ("name", "reason"), [("Bulyan", "at least 7 .* received 4"), ("Krum", "= 5 clients .* got 4")]
)
def test_too_few_updates_in_a_round_end_it_with_the_reason(name, reason):
    ((t, start, updates),) = rounds(1)
    few = {c: updates[c] for c in range(4)}
    with pytest.raises(RoundError, match=reason):
        rule(name, num_malicious_nodes=1).aggregate(t, start, few, WEIGHTS, LOSSES)


def test_a_model_that_is_not_finite_ends_the_round():
    ((t, start, updates),) = rounds(1)
    with pytest.raises(RoundError, match="QFedAvg gave a model that is not finite"):
        rule("QFedAvg").aggregate(t, start, updates, WEIGHTS, {**LOSSES, 3: float("nan")})


def test_any_strategy_that_needs_no_more_does_with_one_client():
    ((t, start, updates),) = rounds(1)
    for name in set(FORMULAS) - {"Bulyan", *OPTIMISERS}:
        result = rule(name, clients=1).aggregate(t, start, {4: updates[4]}, {4: 3.0}, {4: 0.1})
        for n in start:
            np.testing.assert_array_equal(result[n], updates[4][n])


# ------------------------------------------------------------------------ between the rounds


def same_tree(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same_tree(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            same_tree(x, y)
    elif isinstance(a, np.ndarray):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    else:
        assert a == b


@pytest.mark.parametrize("name", FORMULAS)
def test_a_restored_rule_goes_on_bit_for_bit(name):
    options = FORMULAS[name][1]
    straight, first, second = (rule(name, **options) for _ in range(3))
    for i, (t, start, updates) in enumerate(rounds()):
        before = straight.state()
        expected = straight.aggregate(t, start, updates, WEIGHTS, LOSSES)
        if i == 0:
            first.aggregate(t, start, updates, WEIGHTS, LOSSES)
            state = first.state()
            second.aggregate(t, updates[1], updates, WEIGHTS, LOSSES)  # is forgotten
            second.restore(state)
            assert bool(state["memory"]) == (name in OPTIMISERS - {"QFedAvg"})
        else:
            same_tree(second.state(), before)
            result = second.aggregate(t, start, updates, WEIGHTS, LOSSES)
            same_tree(result, expected)
    same_tree(first.state(), state)  # nobody else's rounds changed it


def test_a_state_is_plain_and_only_its_own_strategys():
    tested = rule("FedAdam")
    assert tested.state() == {"strategy": "FedAdam", "memory": {}}
    tested.aggregate(*rounds(1)[0], WEIGHTS, LOSSES)
    memory = tested.state()["memory"]
    assert {name: set(arrays) for name, arrays in memory.items()} == {
        "m_t": TRAINABLE,
        "v_t": TRAINABLE,
    }
    for arrays in memory.values():  # a caller's own
        arrays["w"] += 1
    assert not np.array_equal(tested.state()["memory"]["m_t"]["w"], memory["m_t"]["w"])
    other = rule("FedAdam")
    other.restore({"strategy": "FedAdam", "memory": memory})
    memory["m_t"]["w"] += 1
    assert not np.array_equal(other.state()["memory"]["m_t"]["w"], memory["m_t"]["w"])
    other.restore(rule("FedAdam").state())
    assert other.state()["memory"] == {}
    with pytest.raises(ConfigError, match="the run that goes on had 'FedAdam'"):
        rule("FedYogi").restore(tested.state())


# ------------------------------------------------------------------------------ on its own


def test_it_needs_no_grid_and_no_run(monkeypatch):
    for key in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, key, None)
    rule("FedAvg").aggregate(*rounds(1)[0], WEIGHTS, LOSSES)


def test_the_identity_of_a_run_is_left_alone(monkeypatch):
    for key in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, key, 77)
    rule("FedAvg").aggregate(*rounds(1)[0], WEIGHTS, LOSSES)
    assert (TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id) == (77, 77, 77)


def test_flowers_lines_are_kept_back_during_the_calls_only():
    lines, flower = [], logging.getLogger("flwr")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    flower.addHandler(handler)
    try:
        rule("FedAdam").aggregate(*rounds(1)[0], WEIGHTS, LOSSES)
        assert lines == []
        flower.info("another's")
        assert lines == ["another's"]
    finally:
        flower.removeHandler(handler)
