"""Whatever happens to a file of a run: it goes on to the very same results, or says which is wrong.

Each file of a run that was stopped halfway, and of a comparison that is finished, is damaged in
each way; the program then does its work again.
"""

import io
import json
import os
import re
import shutil
from contextlib import nullcontext
from functools import cache

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from fedge_sim import checkpoint, compare, device_run, orchestrator
from fedge_sim.config import load_settings
from fedge_sim.errors import FedgeError, StateError
from fedge_sim.orchestrator import resume, run
from fedge_sim.reporting import callbacks_of
from fedge_sim.reporting.base import Callback
from tests.test_checkpoint import same

COMMON = (
    *("app.config.dataset=digits", "app.config.num-classes=10", "app.config.model=mlp"),
    *("app.config.partition=iid", "hierarchy.num_servers=2", "runtime.backend=inprocess"),
    *("runtime.training=reference", "hierarchy.local_epochs=1"),
)
ROUNDS = (
    *("hierarchy.clients_per_server=[2,1]", "hierarchy.global_rounds=3"),
    *("hierarchy.client_rule=scaffold", "cloud_cluster.tau=1.0"),
)
VERSIONS = (
    *("hierarchy.clients_per_server=[2,2]", "hierarchy.prox_mu=0.0", "devices.enable=true"),
    *("devices.local_iters=2", "devices.device_selection_size=2", "devices.max_model_version=4"),
    *("devices.num_updates_for_model=1", "asynchronous.rule=fedbuff", "asynchronous.server=leaf"),
    *("asynchronous.cloud_versions=1", "hierarchy.server_lr=0.5"),
    'devices.device_speed={distribution="exponential", mean=1.0}',
)


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def zero(file):
    file.write_bytes(bytes(file.stat().st_size))


def change_a_digit(file):
    """Change a digit in the first half of a text; of other files, a bit in the middle."""
    data = bytearray(file.read_bytes())
    text = file.suffix in (".json", ".csv")
    digits = [m.start() for m in re.finditer(rb"\d", data)] if text else []
    place = digits[len(digits) // 3] if digits else len(data) // 2
    data[place] ^= 1  # 0 and 1, 2 and 3, ... take each other's place
    file.write_bytes(data)


DAMAGES = {
    "delete": lambda file: file.unlink(),
    "cut": cut,
    "zero": zero,
    "digit": change_a_digit,
    "empty": lambda file: os.truncate(file, 0),
    "null": lambda file: file.write_text("null"),
    "list": lambda file: file.write_text('[1, {"a": []}]'),
    "table": lambda file: file.write_text('{"settings": {"app": 1}, "a": [1]}'),
}
# What no result needs, or is replaced by what comes.
REMADE = re.compile(r"(^|/)(workers\.json|cluster_history\.json|models/.*)$")


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """A collection of all that a test process has takes longer than to refuse a run."""
    monkeypatch.setattr(orchestrator, "frozen", nullcontext)


class Stop(Callback):
    """Ends a run when the results of a round, or of a version, are written: not its checkpoint."""

    def __init__(self, after):
        self.left = after

    def on_round_end(self, record):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def on_version(self, record):
        self.on_round_end(record)


def callbacks(settings):
    return callbacks_of(settings, Console(file=io.StringIO()))


def content(folder):
    """Return all results, but for wall time: tables, JSON, models, and the last state."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.suffix == ".csv" and name != "timeline.csv":
            table = pl.read_csv(file, infer_schema_length=None)
            times = [c for c in table.columns if c in ("seconds",) or c.endswith("time_sec")]
            found[name] = repr(table.drop(times).rows())
        elif file.suffix == ".json" and name != "workers.json":
            found[name] = json.loads(file.read_text())
            if name == "devices.json":
                del found[name]["seconds"]
        elif name.startswith("models/"):
            found[name] = file.read_bytes()
    return found


def state(folder):
    """Return the last state, but for wall time; what clients keep is in it as checksums."""
    tree = checkpoint.load(folder / checkpoint.NAME)
    return {key: value for key, value in tree.items() if key not in ("seconds", "files")}


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """Return a function to a run that was stopped, and its folder when it has gone on."""

    @cache
    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        own = ROUNDS if kind == "rounds" else VERSIONS
        settings = load_settings(assignments=[*COMMON, *own, f"app.config.output-dir={folder}"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(device_run, "SAVE_SECONDS", 0.0)
            patch.setattr(device_run, "SAVE_SHARE", np.inf)
            with pytest.raises(KeyboardInterrupt):
                run(settings, [*callbacks(settings), Stop(3)])
        [stopped] = folder.iterdir()
        whole = shutil.copytree(stopped, folder / "whole")
        resume(whole, callbacks)
        return stopped, whole

    return make


def files_of(folder):
    names = (f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
    return sorted(name for name in names if name not in (".lock", checkpoint.NAME))


def go_on(folder):
    """Go on with a run; return what it is refused with, or ""."""
    try:
        resume(folder, callbacks)
    except FedgeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["rounds", "versions"])
def test_a_run_has_the_files_that_are_damaged_here(halfway, kind):
    found = files_of(halfway(kind)[0])
    for name in ("run.json", "partition.json", "timeline.csv", "workers.json"):
        assert name in found
    assert sum(name.startswith("clusters/clusters_g") for name in found) >= 2
    assert sum(name.startswith("clusters/similarity_matrix_g") for name in found) >= 2
    assert sum(name.startswith("metrics/seed_42/") for name in found) >= 3
    assert ("state/clients.bin" in found) == (kind == "rounds")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["rounds", "versions"])
def test_a_damaged_run_is_refused_by_the_files_name_and_nothing_is_changed(
    halfway, tmp_path, kind, damage
):
    stopped, _ = halfway(kind)
    files = [name for name in files_of(stopped) if not REMADE.search(name)]
    known = checkpoint.load(stopped / checkpoint.NAME)["files"]
    for number, name in enumerate(files):
        if "clusters/" in name and name not in known:
            continue  # of the round that was under way: it is made anew
        folder = shutil.copytree(stopped, tmp_path / str(number))
        DAMAGES[damage](folder / name)
        before = {file: (folder / file).read_bytes() for file in files_of(folder)}
        refusal = go_on(folder)
        if (name, damage, refusal) == ("state/clients.bin", "digit", ""):  # of an older round
            assert same(state(folder), state(halfway(kind)[1]))
            continue
        assert name.rpartition("/")[2] in refusal, (name, refusal)
        assert "\n" not in refusal
        assert {file: (folder / file).read_bytes() for file in files_of(folder)} == before
        shutil.rmtree(folder)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["rounds", "versions"])
def test_what_no_result_needs_is_made_anew(halfway, tmp_path, kind, damage):
    stopped, whole = halfway(kind)
    folder = shutil.copytree(stopped, tmp_path / "run")
    known = checkpoint.load(stopped / checkpoint.NAME)["files"]
    under_way = [f for f in files_of(stopped) if f.startswith("clusters/") and f not in known]
    names = [f for f in files_of(stopped) if REMADE.search(f)]
    assert len(names) >= (5 if kind == "rounds" else 2)  # versions write models at the end
    for name in names + under_way:
        DAMAGES[damage](folder / name)
    assert go_on(folder) == ""
    assert content(folder) == content(whole)
    assert same(state(folder), state(whole))
    assert json.loads((folder / "workers.json").read_text())


@pytest.mark.parametrize("kind", ["rounds", "versions"])
def test_a_damaged_checkpoint_is_refused(halfway, tmp_path, kind):
    folder = shutil.copytree(halfway(kind)[0], tmp_path / "run")
    file = folder / checkpoint.NAME
    data = file.read_bytes()
    for damage in DAMAGES.values():
        damage(file)
        assert checkpoint.NAME in go_on(folder)
        file.write_bytes(data)


def test_a_table_that_grew_since_is_cut_back(halfway, tmp_path):
    stopped, whole = halfway("rounds")
    folder = shutil.copytree(stopped, tmp_path / "run")
    for file in folder.glob("metrics/*/*.csv"):
        with file.open("a") as stream:
            stream.write("7,half a row")
    assert go_on(folder) == ""
    assert content(folder) == content(whole)


class Flip(Callback):
    """Changes a bit of each state, of both slots, after a round; as a bad disk does."""

    def on_run_start(self, info):
        self.file = info.folder / "state" / "clients.bin"

    def on_round_end(self, record):
        states = np.fromfile(self.file, np.uint8).reshape(6, -1)
        states[:, 5] ^= 64
        states.tofile(self.file)


def test_a_state_that_is_damaged_while_the_run_goes_on_ends_it(tmp_path):
    settings = load_settings(assignments=[*COMMON, *ROUNDS, f"app.config.output-dir={tmp_path}"])
    with pytest.raises(StateError, match=r"clients\.bin: the state of client \d .*; go on from"):
        run(settings, [*callbacks(settings), Flip()])
    [folder] = tmp_path.iterdir()
    assert re.search(r"clients\.bin: the state of client 0 is not what was written", go_on(folder))


# ------------------------------------------------------------------ a comparison


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a comparison that is finished."""
    folder = tmp_path_factory.mktemp("compared") / "out"
    assert again(folder)[0] is False
    return folder


def again(folder):
    """Compare; return whether a run failed, what was printed, and the tables."""
    out = io.StringIO()
    console = Console(file=out, width=250, markup=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "draw_figures", lambda *_: None)
        failed, _ = compare.compare(
            None,
            [*compare.ALL_ROUNDS, *COMMON, "hierarchy.clients_per_server=[2,1]",
             "hierarchy.global_rounds=2"],
            compare.parse_variants("fedge,scaffold", []),
            [1],
            None,
            folder,
            console,
        )  # fmt: skip
    return failed, out.getvalue(), [f.read_text() for f in sorted(folder.glob("*.csv"))]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_comparison_gives_the_same_table_or_says_what_is_wrong(
    compared, tmp_path, damage
):
    _, _, tables = again(compared)
    files = [f.relative_to(compared) for f in compared.glob("runs/scaffold/**/*") if f.is_file()]
    files += [f.relative_to(compared) for f in compared.glob("partitions/*")]
    wanted = re.compile(
        r"state\.json|partitions/|run\.json|clients\.csv|cluster_history|checkpoint|partition\.json"
        r"|clusters_g1|models/global"
    )
    refused = set()
    chosen = [file for file in files if wanted.search(file.as_posix())]
    assert len(chosen) >= 9
    for number, file in enumerate(chosen):
        folder = shutil.copytree(compared, tmp_path / str(number))
        for text in (*folder.glob("runs/*/*/*/run.json"), *folder.glob("runs/*/*/state.json")):
            text.write_text(text.read_text().replace(str(compared), str(folder)))
        DAMAGES[damage](folder / file)
        try:
            failed, printed, found = again(folder)
        except FedgeError as error:
            failed, printed, found = True, str(error), []
        if failed:
            refused.add(file.name)
            assert file.name in printed, (file, printed)
        else:
            assert found == tables, file
        shutil.rmtree(folder)
    if damage != "digit":
        assert refused >= {"run.json", "clients.csv", "cluster_history.json", checkpoint.NAME}
        assert not refused & {"state.json", "global.safetensors"}
