"""SCAFFOLD: the paper's identities, and what the older system broke."""

import json

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedge_sim import checkpoint
from fedge_sim.algorithms import scaffold
from fedge_sim.data import federated_data
from fedge_sim.records import to_arrays
from fedge_sim.runtime.state import StateFile
from tests.conftest import Keep, run

CLIENTS, K, LR = 4, 10, 0.05


def quadratics(seed, size=3):
    """Return curvatures and minima of f_i(x) = 1/2 (x - a_i)' H_i (x - a_i)."""
    rng = np.random.default_rng(seed)
    curvature = rng.uniform(0.2, 2.0, (CLIENTS, size))
    return curvature, rng.normal(0, 3, (CLIENTS, size))


def train(curvature, minimum, x, correction, lr=LR, momentum=0.0):
    y, velocity = x.copy(), np.zeros_like(x)
    for _ in range(K):
        velocity = momentum * velocity + curvature * (y - minimum) + correction
        y = y - lr * velocity
    return y


def rounds(curvature, minima, number, *, corrected, momentum=0.0):
    """Run FedAvg or SCAFFOLD on the quadratics; return the model, c and the c_i."""
    x = np.zeros(curvature.shape[1])
    c = {"w": np.zeros_like(x)}
    variates = [None] * CLIENTS
    for _ in range(number):
        models, changes = [], []
        for i in range(CLIENTS):
            added = scaffold.correction(c, variates[i]) if corrected else {"w": np.zeros_like(x)}
            y = train(curvature[i], minima[i], x, added["w"], momentum=momentum)
            after = scaffold.new_variate(
                {"w": x}, {"w": y}, added, steps=K, lr=LR, momentum=momentum
            )
            before = np.zeros_like(x) if variates[i] is None else variates[i]["w"]
            changes.append({"w": after["w"] - before})
            variates[i] = after
            models.append(y)
        x = np.mean(models, axis=0)
        c = scaffold.server_variate(c, changes, CLIENTS)
    return x, c["w"], np.array([v["w"] for v in variates])


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_scaffold_reaches_the_optimum_where_fedavg_is_biased(seed, momentum):
    curvature, minima = quadratics(seed)
    optimum = (curvature * minima).sum(axis=0) / curvature.sum(axis=0)
    biased, _, _ = rounds(curvature, minima, 400, corrected=False, momentum=momentum)
    exact, c, variates = rounds(curvature, minima, 400, corrected=True, momentum=momentum)
    assert np.linalg.norm(biased - optimum) > 0.05
    np.testing.assert_allclose(exact, optimum, atol=1e-5)
    # the corrections are what is between the gradient of all and a client's own, at the optimum
    gradients = curvature * (optimum - minima)
    np.testing.assert_allclose(c - variates, gradients.mean(axis=0) - gradients, atol=1e-4)
    if momentum == 0:  # and the variates are the gradients themselves
        np.testing.assert_allclose(variates, gradients, atol=1e-4)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.floats(0.001, 1), st.floats(0, 0.99))
@example(seed=0, steps=5, lr=0.05, momentum=0.9)  # K / (1 - b) is four times too long here
def test_a_variate_is_the_mean_gradient_of_the_path(seed, steps, lr, momentum):
    """With a constant gradient g and PyTorch's own SGD: c_i+ = g, whatever was added."""
    g, added = np.random.default_rng(seed).normal(size=(2, 5))
    x = np.zeros(5)
    y = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([y], lr, momentum)
    for _ in range(steps):
        y.grad = torch.tensor(g + added)
        optimizer.step()
    after = scaffold.new_variate(
        {"w": x},
        {"w": y.detach().numpy(), "mean": x},
        {"w": added},
        steps=steps,
        lr=lr,
        momentum=momentum,
    )
    assert after.keys() == {"w"}
    np.testing.assert_allclose(after["w"], g, atol=1e-9)


@pytest.mark.parametrize(("steps", "share"), [(5, 0.26), (25, 0.67), (100, 0.91)])
def test_the_length_of_a_path_is_fednovas(steps, share):
    b = 0.9
    exact = (steps - b * (1 - b**steps) / (1 - b)) / (1 - b)
    assert scaffold.path_length(steps, b) == pytest.approx(exact, rel=1e-12)
    assert scaffold.path_length(steps, b) == pytest.approx(share * steps / (1 - b), rel=0.02)
    assert scaffold.path_length(steps, 0.0) == steps
    # where the formula of powers divides nothing by nothing
    assert scaffold.path_length(steps, 1 - 1e-12) == pytest.approx(steps * (steps + 1) / 2)


def test_zero_variates_are_fedavg(small):
    """All variates are zero in the first round, and in every round of the warm-up."""
    plain, first, warm = Keep(), Keep(), Keep()
    run(small("hierarchy.global_rounds=3"), [plain])
    rule = "hierarchy.client_rule=scaffold"
    run(small("hierarchy.global_rounds=3", rule), [first])
    run(small("hierarchy.global_rounds=3", rule, "hierarchy.scaffold_warmup_rounds=2"), [warm])

    def head(keep, g):
        return keep.records[g - 1].cloud.global_model["head.weight"].tobytes()

    assert head(plain, 1) == head(first, 1) == head(warm, 1)
    assert head(plain, 2) == head(warm, 2) != head(first, 2)
    assert head(plain, 3) != head(warm, 3)  # the warm-up has left its variates behind


def kept_variates(result, settings):
    """Return c_i of every client that has one, from the file."""
    h = settings.hierarchy
    saved = checkpoint.load(result.folder / checkpoint.NAME)["states"]
    states = StateFile(result.folder / "state", h.num_clients, saved)
    found = [states.read(client) for client in range(h.num_clients)]
    states.close()
    return [None if record is None else to_arrays(record) for record in found]


@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_c_is_the_mean_of_the_variates(small, participation):
    settings = small(
        *("hierarchy.client_rule=scaffold", "hierarchy.global_rounds=3"),
        *("hierarchy.num_servers=2", "hierarchy.clients_per_server=[5, 4]"),
        f"hierarchy.participation={participation}",
    )
    result = run(settings)
    variates = kept_variates(result, settings)
    leaves = checkpoint.load(result.folder / checkpoint.NAME)["leaves"]
    for leaf, clients in zip(leaves, settings.hierarchy.leaf_clients, strict=True):
        for name, c in leaf["variate"].items():
            own = [variates[i][name] for i in clients if variates[i] is not None]
            np.testing.assert_allclose(c, sum(own) / len(clients), atol=1e-6, err_msg=name)
            assert np.abs(c).max() > 0


def test_variates_have_no_buffers(small):
    settings = small("hierarchy.client_rule=scaffold", "hierarchy.global_rounds=1")
    layout = json.loads((run(settings).folder / "state/layout.json").read_text())[1]
    assert not [name for name, _, _ in layout if "running" in name or "tracked" in name]


@pytest.mark.parametrize(("seed", "clip_norm"), [(42, 1.0), (42, 0.0), (43, 0.0), (44, 0.0)])
def test_a_hundred_rounds_stay_finite(small, tmp_path, seed, clip_norm):
    """The older system went to NaN by round 4: sizes 5 to 1, two classes a client."""
    digits = small(
        "app.config.dataset=digits", "app.config.num-classes=0", "app.config.partition=iid"
    )
    y = federated_data(digits).dataset.y
    rng, rows, left = np.random.default_rng(seed), {}, set(range(len(y)))
    for client in range(9):
        wanted, classes = (300 if client < 3 else 60), [client, (client + 1) % 10]
        mine = rng.permutation([r for r in sorted(left) if y[r] in classes])[: wanted * 9 // 10]
        left -= set(mine.tolist())
        others = rng.permutation(sorted(left))[: wanted - len(mine)]
        left -= set(others.tolist())
        rows.setdefault(str(client // 3), {})[str(client)] = sorted(
            {*mine.tolist(), *others.tolist()}
        )
    file = tmp_path / "skewed.json"
    file.write_text(json.dumps(rows))
    settings = small(
        *("app.config.dataset=digits", "app.config.num-classes=0", "app.config.model=mlp"),
        *("app.config.partition=file", f"app.config.partition-file='{file}'"),
        *(f"app.config.seed={seed}", f"hierarchy.clip_norm={clip_norm}", "runtime.training=single"),
        *(
            "hierarchy.client_rule=scaffold",
            "hierarchy.global_rounds=100",
            "hierarchy.lr_gamma=1.0",
        ),
        *("hierarchy.lr_init=0.05", "hierarchy.momentum=0.9", "cloud_cluster.enable=false"),
    )
    keep = Keep()
    result = run(settings, [keep])
    for variate in kept_variates(result, settings):
        assert all(np.isfinite(array).all() for array in variate.values())
    losses = [record.central_test.loss for record in keep.records]
    assert np.isfinite(losses).all()
    assert keep.records[-1].central_test.accuracy > 0.6
