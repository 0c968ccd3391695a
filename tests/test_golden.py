"""What the methods' own authors' code gives, number by number: the golden files.

They lie in ``../shared/golden``, or in the folder that the environment variable FEDGE_GOLDEN names;
the README there says what each array is. Cases, sizes and settings are read from the files, so
that other cases in the same form are tested as well. What runs is this package's own code.
"""

import copy
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate, pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedge_sim import cloud
from fedge_sim.algorithms import fedrevive
from fedge_sim.algorithms.asynchronous import ServerRule, Update, beta, beta_of, staleness_weight
from fedge_sim.algorithms.cfl import bipartition
from fedge_sim.algorithms.clustering import cosines, weight_clustering
from fedge_sim.algorithms.distillation import Lesson, Teacher, distil, taught, teacher_weights
from fedge_sim.algorithms.generator import Generator
from fedge_sim.algorithms.server_rules import server_rule
from fedge_sim.algorithms.synthesis import Synthesiser, backward_synthesis, statistics_gaps
from fedge_sim.client import train_settings
from fedge_sim.config import CloudCluster, Settings, load_settings
from fedge_sim.config_devices import FedRevive
from fedge_sim.data.base import ClientData, Standardisation
from fedge_sim.models import build_model
from fedge_sim.models.cnn1d import CNN1D
from fedge_sim.models.tracker import MEAN, VARIANCE, Tracker
from fedge_sim.reporting.base import ClientRound
from fedge_sim.training.base import ClientTask, load_arrays, model_arrays
from fedge_sim.training.evaluation import evaluate_together
from fedge_sim.training.local import pool
from fedge_sim.training.single import Single
from tests.conftest import SHARED, UCI_NPZ
from tests.imposed import Given, Order, data_of, run_given

EXACT = {"rtol": 0, "atol": 1e-9}  # of float64

Arrays = Mapping[str, NDArray[Any]]


# ------------------------------------------------------------------- the files


def folder() -> Path:
    """Return where the golden files lie."""
    return Path(os.environ.get("FEDGE_GOLDEN") or SHARED / "golden")


def golden(file: str, prefix: str = "") -> Arrays:
    """Return the arrays of a file by name, or those below ``prefix/`` without it.

    A folder or file that is not there is an error; without ``../shared``, and without a folder
    that is named, the test is skipped.
    """
    if not os.environ.get("FEDGE_GOLDEN") and not SHARED.exists():
        pytest.skip("no ../shared folder beside the project, and FEDGE_GOLDEN is not set")
    start = f"{prefix}/" if prefix else ""
    return {n.removeprefix(start): a for n, a in _read(file).items() if n.startswith(start)}


@cache
def _read(file: str) -> Arrays:
    with np.load(folder() / f"{file}.npz", allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def cases(marker: str, *files: str, pattern: str = "") -> list[Any]:
    """Return what a test of (file, case) is parametrised with.

    Parameters
    ----------
    marker : str
        The name of an array that each case has, and nothing else.
    *files : str
        Those that must be there; of one that is not, the only case is "", at which
        :func:`golden` fails.
    pattern : str
        Of further files, such as ``"niid_*"``.
    """
    further = {file.stem for file in folder().glob(f"{pattern}.npz")} if pattern else set()
    found = []
    for file in sorted(further.union(files)):
        names = _read(file) if (folder() / f"{file}.npz").exists() else {}
        own = [name.removesuffix(f"/{marker}") for name in names if name.endswith(f"/{marker}")]
        found += [pytest.param(file, case, id=f"{file}-{case}") for case in own or [""]]
    return found


def settings_of(case: Arrays) -> dict[str, Any]:
    """Return the settings of a case as numbers and text."""
    return {n.removeprefix("settings/"): a.item() for n, a in case.items() if "settings/" in n}


def test_a_missing_folder_file_or_case_is_no_success(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDGE_GOLDEN", str(tmp_path / "not there"))
    assert [case.values for case in cases("w", "gone", pattern="go*")] == [("gone", "")]
    with pytest.raises(FileNotFoundError, match="not there"):
        golden("gone")


# ------------------------------------------------- heads that are alike (clustering)


def test_weight_clustering():
    file = golden("weight_clustering")
    names = sorted(name.removesuffix("_tau") for name in file if name.endswith("_tau"))
    assert names
    for case in names:
        heads, tau = file[f"{case}_head"], float(file[f"{case}_tau"])
        expected = file[f"{case}_similarity"]
        models = [{"norm": np.ones(3, np.float32), "head": head} for head in heads]
        labels, matrix, _ = weight_clustering([list(m.values()) for m in models], tau=tau)
        np.testing.assert_allclose(matrix, expected, atol=1e-5, err_msg=case)
        state, table = cloud.initial_state(models[0], len(models)), CloudCluster(tau=tau)
        at_cloud, same = cloud.cluster(state, models, models, [1] * len(models), table, {"head"})
        np.testing.assert_array_equal(same, matrix, err_msg=case)
        assert at_cloud == tuple(labels), case
        others = expected[~np.eye(len(heads), dtype=bool)]
        if not (abs(others - tau) < 1e-6).any():  # the last bit of a processor's sums decides
            np.testing.assert_array_equal(labels, file[f"{case}_labels"], err_msg=case)


# ---------------------------------------------------- updates of different ages


def function_of(name: str) -> dict[str, Any]:
    """Return the arguments of a staleness function: ``hinge_10_4`` has a = 10 and b = 4."""
    function, *numbers = name.split("_")
    return {"function": function, **dict(zip("ab", map(float, numbers), strict=False))}


def test_staleness_weights():
    file = golden("staleness")
    names = [name for name in file if name.startswith("weights/")]
    assert names
    for name in names:
        arguments = {"a": 1.0, "b": 0.0, **function_of(name.removeprefix("weights/"))}
        ours = [staleness_weight(s, **arguments) for s in file["staleness"].tolist()]
        np.testing.assert_allclose(ours, file[name], **EXACT, err_msg=name)


@pytest.mark.parametrize(("file", "case"), cases("models", "staleness"))
def test_updates_of_different_ages(file, case):
    arrays, found = golden(file), golden(file, case)
    rule, name = case.split("/")
    of = function_of(name.split("_K")[0])
    number = int(found.get("K", 1))
    assignments = [
        *("devices.enable=true", "devices.device_speed.mean=1.0"),
        f"devices.device_selection_size={max(6, number)}",
        f"devices.num_updates_for_model={number}",
        *(f"asynchronous.rule={rule}", f"asynchronous.staleness={of.pop('function')}"),
        *(f"asynchronous.staleness_{key}={value}" for key, value in of.items()),
    ]
    if rule == "fedasync":
        assignments.append(f"asynchronous.mixing={float(arrays['fedasync/mixing'])}")
    else:
        assignments.append(f"hierarchy.server_lr={float(found['server_lr'])}")
    server = server_rule(load_settings(assignments=assignments), {"w"}, 0, (6, 100), 6)
    np.testing.assert_array_equal(found["models"][0], arrays["start"])
    models, waiting = [{"w": arrays["start"]}], []
    for client, delta in enumerate(arrays["deltas"]):
        version = int(found["start_version"][client])
        start, staleness = models[version], len(models) - 1 - version
        assert staleness == found["staleness"][client]
        trained = {"w": start["w"] + delta}
        waiting.append(Update(client, client, version, staleness, 1, (1,), trained, start))
        if len(waiting) == number:
            models.append(server.make_version(models[-1], waiting, len(models)))
            waiting = []
    np.testing.assert_allclose([model["w"] for model in models], found["models"], **EXACT)


# ------------------------------------------------------------- the older program


def cut(values: NDArray[Any], sizes: NDArray[Any]) -> list[NDArray[np.int64]]:
    """Return a flat list's parts, of these sizes."""
    return np.split(values.astype(np.int64), np.cumsum(sizes)[:-1])


def test_the_older_program_with_equal_settings(monkeypatch, tmp_path):
    """Models of all rounds to 1e-12, and every answer: with equal settings we are that program.

    The golden file says all that is random; its settings stand in ``older_program.md``.
    """
    file = golden("older_program_float64")
    sizes = file["train_sizes"].astype(int)
    rounds, per_leaf = len(file["labels"]), file["leaf_right"].shape[1:]
    train, test = (cut(file[part], file[f"{part}_sizes"]) for part in ("train", "test"))
    epochs = len(file["orders"]) // (rounds * sizes.sum())
    orders = iter(cut(file["orders"], np.tile(np.repeat(sizes, epochs), rounds)))
    order_of = {
        (r, client): [next(orders) for _ in range(epochs)]
        for r in range(1, rounds + 1)
        for client in range(len(sizes))
    }
    with np.load(SHARED / UCI_NPZ, allow_pickle=False) as archive:
        x, y = archive["X"], archive["y"]
    clients = [ClientData(np.sort(a), np.sort(b)) for a, b in zip(train, test, strict=True)]
    scale = Standardisation(file["mean"], file["std"])
    network = CNN1D(x.shape[1:], int(y.max()) + 1).double()
    start = {n.removeprefix("start."): a for n, a in file.items() if n.startswith("start.")}
    load_arrays(network, {**model_arrays(network), **start})
    given = Given(network, data_of(x, y, clients, scale), lambda r, client: order_of[r, client])
    done = run_given(
        monkeypatch,
        given,
        *(f"app.config.output-dir={tmp_path}", f"hierarchy.global_rounds={rounds}"),
        *(f"hierarchy.local_epochs={epochs}", "hierarchy.lr_gamma=0.99"),
        *("cloud_cluster.enable=true", "cloud_cluster.tau=0.7"),
        f"hierarchy.num_servers={per_leaf[0]}",
        f"hierarchy.clients_per_server={[per_leaf[1]] * per_leaf[0]}",
    )
    compared = 0
    for r, (record, leaves) in enumerate(zip(done.records, done.leaf_models, strict=True), 1):
        models = {f"leaf{leaf}": model for leaf, model in enumerate(leaves)}
        models["cloud"] = record.cloud.global_model
        for who, model in models.items():
            for name, array in model.items():
                if (expected := file.get(f"round{r}.{who}.{name}")) is not None:
                    assert array.dtype == np.float64
                    np.testing.assert_allclose(array, expected, rtol=0, atol=1e-12)
                    compared += 1
        assert record.cloud.labels == tuple(file["labels"][r - 1])
        for what in ("leaf", "cloud"):
            right = [[_right(c, what) for c in leaf.clients] for leaf in record.leaves]
            assert right == file[f"{what}_right"][r - 1].tolist()
    assert compared == sum(name.startswith("round") for name in file)


def _right(client: ClientRound, what: str) -> float:
    result = getattr(client, f"{what}_test")
    return round(result.accuracy * result.num_examples, 9)


# ------------------------------------------------------- FedAvg, FedProx, SCAFFOLD


class Dense(nn.Module):
    """Linear layers with ReLU between them: weight and bias of one after the other."""

    hidden: tuple[int, ...] = ()

    def __init__(self, example_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        widths = (*example_shape, *self.hidden, num_classes)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


def dense(hidden: tuple[int, ...], x: NDArray[Any], y: NDArray[Any], model: NDArray[Any]) -> Dense:
    """Return a network in float64 with the values of a flat model (P,)."""
    kind = type("Dense", (Dense,), {"hidden": hidden})
    network = kind(x.shape[1:], int(y.max()) + 1).double()
    assert sum(p.numel() for p in network.parameters()) == len(model)
    load_arrays(network, by_name(network, model))
    return network


def flat(model: Arrays) -> NDArray[np.float64]:
    """Return a model as one vector (P,), its arrays in their order."""
    assert {array.dtype for array in model.values()} == {np.dtype(np.float64)}
    return np.concatenate([array.ravel() for array in model.values()])


def by_name(network: nn.Module, model: NDArray[Any]) -> Arrays:
    """Return a flat model (P,) as a network's arrays."""
    own = copy.deepcopy(network)
    nn.utils.vector_to_parameters(torch.tensor(model), own.parameters())
    return model_arrays(own)


def ends_of(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return first row, and the one after the last, of every client."""
    return list(pairwise(accumulate(map(int, sizes), initial=0)))


HIDDEN = {"perceptron": (), "mlp": (16, 8)}
NIID = ("niid_perceptron", "niid_mlp_full", "niid_mlp_decay")


def niid_cases() -> list[Any]:
    """Return the cases of methods that are here.

    With momentum SCAFFOLD is left out: their correction is outside of it, ours in the gradient.
    """

    def is_here(file: str, case: str) -> bool:
        s = settings_of(golden(file, case)) if case else {"algorithm": "fedavg"}
        is_scaffold = s["algorithm"] == "scaffold" and s["momentum"] == 0
        return is_scaffold or s["algorithm"] in ("fedavg", "fedprox")

    return [c for c in cases("w", *NIID, pattern="niid_*") if is_here(*c.values)]


def on_paths(found: list[Any], *others: str, of: str) -> list[Any]:
    """Return the cases to be trained one client at a time, and those of a file in other ways.

    The ways are equal to each other elsewhere (``test_paths.py``).
    """
    return [
        pytest.param(*case.values, training, id=f"{case.id}-{training}")
        for case in found
        for training in ("single", *(others if case.values[0] == of else ()))
    ]


@pytest.mark.parametrize(
    ("file", "case", "training"),
    on_paths(niid_cases(), "reference", "cohort", of="niid_mlp_decay"),
)
def test_niid_bench(monkeypatch, tmp_path, file, case, training):
    found = golden(file, case)
    s, selected = settings_of(found), found["selected"]
    data = golden(file, s["data"])
    x, y = data["train_x"], data["train_y"]
    parts = [np.arange(*ends) for ends in ends_of(data["sizes"])]
    clients = [ClientData(own, own[:1]) for own in parts]
    done = run_given(
        monkeypatch,
        Given(
            dense(HIDDEN[s["model"]], x, y, found["w"][0]),
            data_of(x, y, clients),
            epochs=lambda r, client: repeat(parts[client]),
            selected=lambda r: np.flatnonzero(selected[r - 1]).tolist(),
        ),
        *(f"app.config.output-dir={tmp_path}", f"hierarchy.global_rounds={s['rounds']}"),
        *("hierarchy.num_servers=1", f"hierarchy.clients_per_server=[{len(parts)}]"),
        *(f"hierarchy.lr_init={s['lr']}", f"hierarchy.local_epochs={s['epochs']}"),
        f"hierarchy.batch_size={s['batch_size'] or max(map(len, parts))}",
        *(f"hierarchy.momentum={s['momentum']}", f"hierarchy.weight_decay={s['weight_decay']}"),
        *("hierarchy.clip_norm=0.0", "hierarchy.label_smoothing=0.0", "hierarchy.es_patience=0"),
        f"hierarchy.prox_mu={s['mu']}",
        f"hierarchy.client_rule={'scaffold' if s['algorithm'] == 'scaffold' else 'sgd'}",
        f"runtime.training={training}",
    )
    models = [flat(record.cloud.global_model) for record in done.records]
    np.testing.assert_allclose(models, found["w"][1:], **EXACT)
    for r, expected in zip(found["kept_rounds"].tolist(), found["clients"], strict=True):
        for client, model in done.trained[r - 1].items():
            np.testing.assert_allclose(flat(model), expected[client], **EXACT)
    if s["algorithm"] == "scaffold":
        np.testing.assert_allclose([flat(c) for c in done.variates], found["c"], **EXACT)
        for r, expected in zip(found["kept_rounds"].tolist(), found["c_i"], strict=True):
            zero = np.zeros_like(expected[0])  # of a client that never took part
            own = [flat(k) if (k := done.kept[r - 1].get(i)) else zero for i in range(len(parts))]
            np.testing.assert_allclose(own, expected, **EXACT)


# ------------------------------------------------------------------------- pFedMe

PFEDME = ("pfedme_mclr", "pfedme_mclr_subset", "pfedme_dnn")


def pfedme_files() -> list[Any]:
    """Return all files of pFedMe's runs."""
    there = {file.stem for file in folder().glob("pfedme_*.npz")} - {"pfedme_data"}
    return [pytest.param(file, id=file) for file in sorted(there.union(PFEDME))]


@pytest.mark.parametrize(
    ("file", "training"), on_paths(pfedme_files(), "reference", of="pfedme_mclr_subset")
)
def test_pfedme(monkeypatch, tmp_path, file, training):
    """Every model to 1e-9, of the run and of each client, and what they report of them.

    Their personal figures are those of w_i, not of theta: as published, so tested here on w_i.
    """
    found, users = golden(file), golden("pfedme_data")
    s, number = settings_of(found), len(users["users"])
    own = [golden("pfedme_data", f"user{k}") for k in range(number)]
    x = np.concatenate([user[part] for user in own for part in ("train_x", "test_x")])
    y = np.concatenate([user[part] for user in own for part in ("train_y", "test_y")])
    ends = ends_of([len(user[part]) for user in own for part in ("train_y", "test_y")])
    rows = [np.arange(*span) for span in ends]
    clients = [ClientData(*pair) for pair in zip(rows[::2], rows[1::2], strict=True)]

    def epochs(r: int, client: int) -> Iterator[NDArray[np.int64]]:
        """Go on where the round before ended: the loader's place outlives the round."""
        mine = clients[client].train
        yield mine[int(found[f"user{client}/batch_start"][r - 1][0]) :]
        yield from repeat(mine)

    size, classes = x.shape[1], int(y.max()) + 1
    hidden, rest = divmod(found["w"].shape[1] - classes, size + classes + 1)  # one layer, or none
    given = Given(
        dense((hidden,) if rest == 0 else (), x, y, found["w"][0]),
        data_of(x, y, clients),
        epochs=epochs,
        selected=lambda r: sorted(found["selected"][r - 1].tolist()),
    )
    assignments = [
        *(f"app.config.output-dir={tmp_path}", f"hierarchy.global_rounds={s['rounds']}"),
        *("hierarchy.num_servers=1", f"hierarchy.clients_per_server=[{number}]"),
        *("hierarchy.client_rule=pfedme", f"hierarchy.local_steps={s['local_rounds']}"),
        *(f"hierarchy.pfedme_lambda={s['lamda']}", f"hierarchy.pfedme_steps={s['K']}"),
        f"hierarchy.pfedme_inner_lr={s['personal_learning_rate']}",
        f"hierarchy.pfedme_outer_lr={s['learning_rate']}",
        *(f"hierarchy.server_lr={s['beta']}", f"hierarchy.batch_size={s['batch_size']}"),
        *(f"hierarchy.weight_decay={s['weight_decay']}", "hierarchy.label_smoothing=0.0"),
        *("hierarchy.es_patience=0", f"runtime.training={training}"),
    ]
    done = run_given(monkeypatch, given, *assignments)
    models = [flat(record.cloud.global_model) for record in done.records]
    np.testing.assert_allclose(models, found["w"][1:], **EXACT)
    network = given.network
    how = train_settings(done.settings, lr=math.nan, prox_mu=math.nan)
    for r, w_i, theta in zip(*(found[n] for n in ("kept_rounds", "w_i", "theta")), strict=True):
        shared, personal = done.trained[r - 1], done.kept[r - 1]
        start = by_name(network, found["w"][r - 1])
        for client in set(range(number)) - shared.keys():  # there all train, and some are averaged
            rows, order = clients[client].train, Order(epochs(r, client))
            task = ClientTask(start, given.data.examples(client), rows, how, order)
            [update] = Single(copy.deepcopy(network)).train([task])
            shared[client], personal[client] = update.arrays, update.personal
        results = {"test": [], "train": []}
        for client in range(number):
            np.testing.assert_allclose(flat(shared[client]), w_i[client], **EXACT)
            np.testing.assert_allclose(flat(personal[client]), theta[client], **EXACT)
            load_arrays(network, shared[client])
            for part, evaluations in results.items():
                rows = getattr(clients[client], part)
                evaluations += evaluate_together(network, [(given.data.examples(client), rows)])
        accuracy, loss = pool(results["test"]).accuracy, pool(results["train"]).loss
        assert accuracy == pytest.approx(found["reported_personal_test_accuracy"][r - 1], abs=1e-9)
        assert loss == pytest.approx(found["reported_personal_train_loss"][r - 1], abs=1e-9)
    # Their figures in a round are of the model before it.
    tests = [record.central_test.accuracy for record in done.records[:-1]]
    losses = [record.central_train.loss for record in done.records[:-1]]
    np.testing.assert_allclose(tests, found["global_test_accuracy"][1:], **EXACT)
    np.testing.assert_allclose(losses, found["global_train_loss"][1:], **EXACT)


# ------------------------------------------------------- clusters that are split (CFL)


def as_partition(labels: NDArray[Any]) -> list[tuple[int, ...]]:
    """Return who is together, whatever the clusters are called."""
    return sorted(tuple(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels))


@pytest.mark.parametrize(("file", "case"), cases("complete", "cfl_bipartition"))
def test_cfl_cuts_and_splits(file, case):
    found = golden(file, case)
    updates, n = list(found["updates"]), len(found["updates"])
    matrix = cosines(updates)
    np.testing.assert_allclose(matrix, found["similarity"], **EXACT)
    for linkage in ("complete", "single"):
        part, across = bipartition(matrix, 1, linkage)
        assert as_partition(part) == as_partition(found[linkage])
        np.testing.assert_allclose(across, found[f"across_{linkage}"], **EXACT)
    lengths = found["mean_norm"], found["max_norm"]
    tested = 0
    for pair, gates in enumerate(found["eps"]):
        if np.isclose(gates, lengths, rtol=1e-12).any():
            continue  # the last bit of a norm decides
        for at, global_round in enumerate(found["rounds"].tolist()):
            # Theirs starts after round 20, and leaves two together; ours has settings for both.
            table = CloudCluster(
                method="cfl",
                start_round=21,
                min_cluster_size=1 if n > 2 else 2,
                eps_1=gates[0],
                eps_2=gates[1],
            )
            start = {"w": np.zeros_like(updates[0])}
            state = replace(cloud.initial_state(start, n), global_round=global_round - 1)
            models = [{"w": update} for update in updates]
            labels, _ = cloud.cluster(state, models, [start] * n, [1] * n, table, {"w"})
            assert (len(set(labels)) == 2) == found["split"][pair, at]
            if len(set(labels)) == 2:
                assert as_partition(np.array(labels)) == as_partition(found["complete"])
            tested += 1
    assert tested


# Not "as_published", where their code takes a part's indices within its cluster for clients'.
RUNS = [case for case in cases("clusters", "cfl_run") if case.values[1] != "as_published"]


@pytest.mark.parametrize(("file", "case"), RUNS)
def test_cfl_over_rounds(file, case):
    """Split, keep, and average each cluster."""
    arrays, found = golden(file), golden(file, case)
    given = settings_of(arrays)
    table = CloudCluster(
        method="cfl",
        start_round=given["round_guard"] + 1,
        min_cluster_size=1,
        eps_1=given["eps_1"],
        eps_2=given["eps_2"],
    )
    number = arrays["updates"].shape[1]
    state = cloud.initial_state({"w": np.zeros(arrays["updates"].shape[2])}, number)
    for at, global_round in enumerate(arrays["rounds"].tolist()):
        state = replace(state, global_round=global_round - 1)
        updates = arrays["updates"][at]
        models = [{"w": state.model_for(k)["w"] + update} for k, update in enumerate(updates)]
        examples = [1] * number
        state = cloud.step(state, models, examples, table, global_lr=1.0, trainable={"w"})
        members = [tuple(np.flatnonzero(row).tolist()) for row in found["member"][at] if row.any()]
        assert as_partition(np.array(state.labels)) == sorted(members)
        assert len(state.cluster_models) == found["clusters"][at]
        ours = [state.model_for(k)["w"] for k in range(number)]
        np.testing.assert_allclose(ours, found["models"][at], **EXACT)


# ---------------------------------------------------------------------- FedRevive

NUMBERS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


class Tracked(nn.Module):
    """Convolutions with trackers of the authors' kind, and a head; as wide as its arrays are."""

    def __init__(self, arrays: Arrays) -> None:
        super().__init__()
        self.convs = [name.removesuffix(".weight") for name in arrays if name.startswith("conv")]
        for number, name in enumerate(self.convs, 1):
            out, channels, size, _ = arrays[f"{name}.weight"].shape
            conv = nn.Conv2d(channels, out, size, padding=size // 2, bias=False)
            self.add_module(name, conv)
            self.add_module(f"stat_track{number}", Tracker(out))
        self.head = nn.Linear(*arrays["head.weight"].shape[::-1])

    def forward(self, x):
        for number, name in enumerate(self.convs, 1):
            tracker = getattr(self, f"stat_track{number}")
            x = torch.relu(tracker(getattr(self, name)(x)))
            x = functional.max_pool2d(x, 2) if number <= 2 else x
        return self.head(x.mean(dim=(2, 3)))


def ours(arrays: Arrays) -> dict[str, NDArray[Any]]:
    """Return a network's arrays by the names that they have here."""
    return {
        name.replace("running_mean", MEAN).replace("running_var", VARIANCE)
        if "stat_track" in name
        else name: array
        for name, array in arrays.items()
    }


def revived(kind: str, name: str, dtype: torch.dtype) -> nn.Module:
    """Return one of the networks of FedRevive's files."""
    arrays = golden("fedrevive_networks", f"{kind}/{name}")
    channels = arrays["conv1.weight"].shape[1]
    network = (
        Tracked(arrays)
        if any("stat_track" in name for name in arrays)
        else build_model("cnn2d-small", (channels, 16, 16), len(arrays["head.bias"]))
    )
    load_arrays(network, ours(arrays))
    return network.to(dtype)


def teachers_of(kind: str, dtype: torch.dtype) -> list[Teacher]:
    mixes = golden("fedrevive_networks")[f"{kind}/mixes"]
    return [Teacher(revived(kind, f"teacher{k}", dtype), mix) for k, mix in enumerate(mixes)]


def near(values: Any, expected: NDArray[Any], tolerance: float) -> None:
    """Check tensors by a tolerance relative to the largest value."""
    values = values.detach().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    scale = max(abs(expected).max(), 1e-300)
    np.testing.assert_allclose(values, expected, rtol=0, atol=tolerance * scale)


def test_weights_of_teachers():
    file = golden("fedrevive_losses", "unknown_class")
    teachers = [Teacher(nn.Identity(), mix) for mix in file["mixes"]]
    np.testing.assert_allclose(teacher_weights(teachers).numpy(), file["weights"], **EXACT)
    assert (file["mixes"].sum(axis=0) == 0).any()


@NUMBERS
@pytest.mark.parametrize(("file", "case"), cases("loss_oh", "fedrevive_losses"))
def test_losses_of_synthesis(file, case, dtype):
    found, kind = golden(file, case), case.split("/")[0]
    teachers, tolerance = teachers_of(kind, dtype), 1e-9 if dtype == torch.float64 else 1e-4
    student = revived(kind, "student", dtype).eval().requires_grad_(False)
    labels, x = torch.from_numpy(found["labels"]), torch.from_numpy(found["x"]).to(dtype)
    weights = teacher_weights(teachers)
    np.testing.assert_allclose(weights, found["weights"], **EXACT)
    np.testing.assert_allclose(weights[:, labels].T, found["sample_weights"], **EXACT)
    for k, teacher in enumerate(teachers):
        with statistics_gaps(teacher.network) as gaps:
            near(teacher.network(x), found["teacher_logits"][k], tolerance)
        near(torch.stack(gaps), found["layer_gaps"][k], tolerance)
    near(student(x), found["student_logits"], tolerance)

    for name, part, weight in (
        ("oh", "one_hot", FedRevive(batch_norm=0, adversarial=0)),
        ("bn", "batch_norm", FedRevive(one_hot=0, batch_norm=1, adversarial=0)),
        ("adv", "adversarial", FedRevive(one_hot=0, batch_norm=0, adversarial=1)),
    ):
        leaf = x.clone().requires_grad_()
        losses = backward_synthesis(leaf, labels, teachers, student, weight)
        near(getattr(losses, part), found[f"loss_{name}"], tolerance)
        near(losses.total(weight), found[f"loss_{name}"], tolerance)
        near(leaf.grad, found[f"grad_{name}"], tolerance)
    published = FedRevive()
    for name, opponent in (("loss_total", student), ("loss_total_without_adv", None)):
        leaf = x.clone().requires_grad_()
        losses = backward_synthesis(leaf, labels, teachers, opponent, published)
        near(losses.total(published), found[name], tolerance)
        parts = (("oh", 1.0), ("bn", 0.003), ("adv", 0.1 if opponent else 0.0))
        near(leaf.grad, sum(w * found[f"grad_{part}"] for part, w in parts), tolerance)


class Normalise(nn.Module):
    """What the authors' images go through before a network sees them."""

    def __init__(self, mean: NDArray[Any], std: NDArray[Any]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.from_numpy(std).view(-1, 1, 1))

    def forward(self, x):
        return (x - self.mean) / self.std


@torch.no_grad()
def copy_parameters(network: nn.Module, arrays: Arrays) -> None:
    """Copy arrays, buffers among them, to parameters in the same order."""
    parameters = [a for n, a in arrays.items() if "running" not in n and "num_batches" not in n]
    for parameter, array in zip(network.parameters(), parameters, strict=True):
        assert parameter.shape == array.shape
        parameter.copy_(torch.from_numpy(array))


def synthesiser(dtype: torch.dtype) -> Synthesiser:
    """Return the generator of the file, as it starts, and its settings."""
    s = golden("fedrevive_generator", "settings")
    first = golden("fedrevive_generator", "call1")
    own = FedRevive(
        noise_size=int(s["nz"]),
        generator_width=int(s["ngf"]),
        generator_steps=int(s["g_steps"]),
        generator_lr=float(s["lr_g"]),
        noise_lr=float(s["lr_z"]),
        class_weight=float(s["class_embedding_weight"]),
        batch_norm=float(s["bn"]),
        one_hot=float(s["oh"]),
        adversarial=float(s["adv"]),
        adversarial_start=int(s["ep_start"]),
        max_samples=len(first["labels"]),
    )
    generator = Generator(first["first_inputs"].shape[1:], own.noise_size, own.generator_width)
    copy_parameters(generator, golden("fedrevive_generator", "start"))
    # Theirs ends otherwise: images here are as theirs are once they are normalised.
    generator.layers[-1] = nn.Sigmoid()
    generator.standardise = Normalise(s["aug_mean"], s["aug_std"])
    return Synthesiser(generator.to(dtype), own)


def calls_of_the_file() -> list[str]:
    names = {name.split("/")[0] for name in golden("fedrevive_generator")}
    return sorted((n for n in names if n.startswith("call")), key=lambda n: int(n[4:]))


def test_calls_of_the_synthesiser():
    source = synthesiser(torch.float64)
    own, generator = source._settings, source.generator
    teachers = teachers_of("track", torch.float64)
    student = revived("track", "student", torch.float64).eval().requires_grad_(False)
    assert calls_of_the_file()
    for number, name in enumerate(calls_of_the_file(), 1):
        found = golden("fedrevive_generator", name)
        labels = found["labels"]
        z, classes = (torch.tensor(found[key]) for key in ("z", "class_embeddings"))
        with torch.no_grad():
            x = generator(z + own.class_weight * classes[torch.from_numpy(labels)])
        near(x, generator.standardise(torch.tensor(found["first_inputs"])).numpy(), 1e-9)
        made = source.synthesise(labels, z, classes, teachers, student)
        assert source.calls == number
        for part, key in (("one_hot", "oh"), ("batch_norm", "bn"), ("adversarial", "adv")):
            values = torch.stack([getattr(losses, part) for losses in made.losses])
            near(values, found[f"losses_{key}"], 1e-9)
        totals = torch.stack([losses.total(own) for losses in made.losses])
        near(totals, found["losses_total"], 1e-9)
        assert int(totals.argmin()) == found["best_step"]
        near(source.x, generator.standardise(torch.tensor(found["best_inputs"])).numpy(), 1e-9)
        assert source.labels.tolist() == labels.tolist()
        near(z, found["z_after"], 1e-9)
        near(classes, found["class_embeddings_after"], 1e-9)
        for network, key in ((made.copy, "fast"), (generator, "generator")):
            right = golden("fedrevive_generator", f"{name}/{key}").values()
            for parameter, array in zip(network.parameters(), right, strict=True):
                np.testing.assert_allclose(parameter.detach(), array, **EXACT)


@NUMBERS
def test_the_generator_follows_its_copies(dtype):
    """Reptile alone; in float32 where a difference is more than rounding: a step has its sign."""
    source = synthesiser(dtype)
    generator, clone = source.generator, copy.deepcopy(source.generator)
    clear = [torch.ones_like(p, dtype=torch.bool) for p in generator.parameters()]
    before = golden("fedrevive_generator", "start")
    exact = dtype == torch.float64
    for name in calls_of_the_file():
        copy_parameters(generator, before)
        copy_parameters(clone, golden("fedrevive_generator", f"{name}/fast"))
        pairs = zip(generator.parameters(), clone.parameters(), clear, strict=True)
        clear = [known & ((a - b).abs() > (-1 if exact else 1e-5)) for a, b, known in pairs]
        source._move_towards(clone)
        before = golden("fedrevive_generator", f"{name}/generator")
        for now, right, known in zip(generator.parameters(), before.values(), clear, strict=True):
            assert known.float().mean() > 0.5
            off = (now.detach().double() - torch.from_numpy(right)).abs() * known
            assert off.max() < (1e-9 if exact else 1e-5)


@NUMBERS
@pytest.mark.parametrize(("file", "case"), cases("losses", "fedrevive_kd"))
def test_the_student_of_a_distillation(file, case, dtype):
    kind, temperature = case.split("/T")
    found, teachers = golden(file, case), teachers_of(kind, dtype)
    x = torch.from_numpy(golden(file)[f"{kind}/x"]).to(dtype)
    logits = torch.from_numpy(golden(file)[f"{kind}/teacher_logits"])
    own = FedRevive(temperature=float(temperature))
    exact, loose = dtype == torch.float64, 1e-6 if "track" in kind else 1e-5
    lesson = taught(list(x), teachers, own.temperature)
    targets = torch.softmax(logits / own.temperature, -1).transpose(0, 1)
    near(lesson.targets, targets.numpy(), 1e-9 if exact else 1e-5)
    after = {int(name.split("/")[0].removeprefix("after")) for name in found if "after" in name}
    for steps in sorted(after):
        student = revived(kind, "student", dtype)
        start = model_arrays(student.double())
        losses = distil(student.to(dtype), Lesson(lesson.x[:steps], lesson.targets[:steps]), own)
        near(losses, found["losses"][:steps], 1e-9 if exact else 1e-5)
        end = model_arrays(student)
        expected = ours(golden(file, f"{case}/after{steps}"))
        assert expected
        for name, right in expected.items():
            near_to = 1e-9 if exact else loose * max(1, abs(start[name]).max())
            np.testing.assert_allclose(
                end[name] - start[name], right, rtol=0, atol=near_to, err_msg=name
            )


def test_how_little_is_left_of_an_update():
    file = golden("fedrevive_beta")
    staleness = file["staleness"].tolist()
    forms = [name.removesuffix("/factors") for name in file if name.endswith("/factors")]
    assert len(forms) >= 4
    for form in forms:
        for factor, right in zip(file[f"{form}/factors"], file[f"{form}/beta"], strict=True):
            made = [beta(s, form, float(factor), 1.0) for s in staleness]
            np.testing.assert_allclose(made, right, **EXACT, err_msg=form)
    steps = golden("fedrevive_beta", "stepwise")
    for factor, active, size, right in zip(
        *(steps[key] for key in ("factor", "active_jobs", "buffer_size", "beta")), strict=True
    ):
        s = of_versions("fedrevive", int(active), int(size), "stepwise", float(factor))
        np.testing.assert_allclose([beta_of(s, k) for k in staleness], right, **EXACT)


class Vector(nn.Module):
    """A model that is some numbers, in float64."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, x):
        return self.w.expand(len(x), -1)


class Imposed:
    """FedRevive's source of lessons and its distillation, imposed; it counts what is done.

    ``kd`` is what a student would learn, by the bytes of the newest teacher.
    """

    def __init__(self, monkeypatch, size: int) -> None:
        self.kd: dict[bytes, NDArray[Any]] = {}
        self.done = [0, 0]  # syntheses and distillations
        monkeypatch.setattr(fedrevive, "build_model", lambda *_: Vector(size))
        monkeypatch.setattr(fedrevive, "distil", self.distil)

    def rule(self, settings: Settings) -> ServerRule:
        rule = server_rule(settings, {"w"}, 0, (3, 8, 8), 2)
        if settings.asynchronous.rule == "fedrevive":
            rule.source = self
        return rule

    def prepare(self, teachers, student, random):
        self.done[0] += 1

    def lesson(self, teachers, random):
        return self.kd[teachers[-1].network.w.numpy().tobytes()]

    def distil(self, student, lesson, settings):
        self.done[1] += 1
        with torch.no_grad():
            student.w.add_(torch.from_numpy(lesson))
        return [0.0]


def of_versions(rule: str, active: int, size: int, form: str, factor: float, *more: str):
    """Return the settings of a server that makes versions."""
    return load_settings(
        assignments=[
            *("devices.enable=true", "devices.device_speed.mean=1.0", f"asynchronous.rule={rule}"),
            *(f"devices.device_selection_size={active}", f"devices.num_updates_for_model={size}"),
            *(f"asynchronous.beta={form}", f"asynchronous.beta_factor={factor}"),
            *("hierarchy.clients_per_server=[1000]", "hierarchy.num_servers=1"),
            *("fedrevive.batch_norm=0.0", *more),
        ]
    )


def test_what_becomes_of_an_update_by_version_and_staleness(monkeypatch):
    file = golden("fedrevive_beta", "decision")
    settings = of_versions("fedrevive", 4, 1, "cosine", 75.0)  # freeze and warm-up as they are
    imposed, zero = Imposed(monkeypatch, 2), {"w": np.zeros(2)}
    rule = imposed.rule(settings)
    plain = imposed.rule(of_versions("downweight", 4, 1, "cosine", 75.0))
    trained = {"w": np.array([1.0, 0.0])}
    imposed.kd[trained["w"].tobytes()] = np.array([0.0, 1.0])
    for i, completed in enumerate(file["rounds_completed"].tolist()):
        for j, staleness in enumerate(file["staleness"].tolist()):
            update = Update(0, 0, completed - staleness, staleness, 1, (1, 1), trained, zero)
            np.testing.assert_allclose(beta_of(settings, staleness), file["beta"][j], **EXACT)
            imposed.done = [0, 0]
            weights = rule.make_version(zero, [update], completed + 1)["w"]
            synthesises, distils, of_update, of_kd = file["table"][i, j]
            right = [synthesises, distils, of_update, of_kd * distils]  # what is not distilled is 0
            np.testing.assert_allclose([*imposed.done, *weights], right, **EXACT)
            weights = plain.make_version(zero, [update], completed + 1)["w"]
            np.testing.assert_allclose(weights, [file["downweight_only"][j], 0], **EXACT)


@pytest.mark.parametrize(("file", "case"), cases("models", "fedrevive_server"))
def test_versions_of_a_server(file, case, monkeypatch):
    found, own = golden(file, case), golden(file, "settings")
    name, lr = case.split("_")[0], float(found["server_lr"])
    size, client = int(own["buffer_size"]), found["client"].tolist()
    settings = of_versions(
        *({"dfkd": "fedrevive"}.get(name, name), 100, size, "cosine", float(own["cosine_factor"])),
        f"fedrevive.teacher_buffer_size={int(own['kd_buffer_size'])}",
        f"fedrevive.freeze_versions={int(own['freeze_rounds'])}",
        f"fedrevive.warmup_versions={int(own['warmup_rounds'])}",
        f"hierarchy.server_lr={lr}",
    )
    imposed = Imposed(monkeypatch, found["models"].shape[1])
    rule, one_by_one = imposed.rule(settings), imposed.rule(settings)
    models, waiting, by_model = [{"w": found["models"][0]}], [], {}
    for i, delta in enumerate(found["update"]):
        start, now = int(found["start_version"][i]), len(models) - 1
        assert (now, now - start) == (found["rounds_completed"][i], found["staleness"][i])
        np.testing.assert_allclose(beta_of(settings, now - start), found["beta"][i], **EXACT)
        trained = {"w": models[start]["w"] + delta}
        by_model[trained["w"].tobytes()] = client[i]
        imposed.kd[trained["w"].tobytes()] = found["kd"][i]
        update = Update(client[i], i, start, now - start, 1, (1, 1), trained, models[start])
        waiting.append(update)

        imposed.done = [0, 0]
        alone = one_by_one.make_version(models[-1], [update], now + 1)["w"]
        np.testing.assert_allclose((alone - models[-1]["w"]) / lr, found["processed"][i], **EXACT)
        assert imposed.done == [found["synthesises"][i], found["distils"][i]]
        teachers = [t.network.w.numpy() for t in getattr(one_by_one, "teachers", ())]
        known = [by_model[w.tobytes()] for w in reversed(teachers)]
        assert known == [k for k in found["teachers"][i].tolist() if k >= 0]

        if len(waiting) == size:
            models.append(rule.make_version(models[-1], waiting, now + 1))
            waiting = []
    np.testing.assert_allclose([model["w"] for model in models], found["models"], **EXACT)
