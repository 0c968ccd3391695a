"""What the methods' own authors' code gives, number by number: the golden files.

They lie in ``../shared/golden``, or in the folder that the environment variable FEDGE_GOLDEN names;
the README there says what each array is. Cases, sizes and settings are read from the files, so
that other cases in the same form are tested as well. What runs is this package's own code.
"""

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedge_sim import cloud
from fedge_sim.algorithms.asynchronous import Update, staleness_weight
from fedge_sim.algorithms.clustering import weight_clustering
from fedge_sim.algorithms.server_rules import server_rule
from fedge_sim.config import CloudCluster, load_settings
from fedge_sim.data.base import ClientData, Standardisation
from fedge_sim.models.cnn1d import CNN1D
from fedge_sim.reporting.base import ClientRound
from fedge_sim.training.base import load_arrays, model_arrays
from tests.conftest import SHARED, UCI_NPZ
from tests.imposed import Given, data_of, run_given

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
