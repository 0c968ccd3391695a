"""Runs that the version before wrote, with checkpoints of format 3."""

import hashlib
import json
import re

import polars as pl
import pytest
from safetensors.numpy import save_file

from fedge_sim import checkpoint, earlier, orchestrator
from fedge_sim.errors import CheckpointError
from fedge_sim.reporting.base import Callback
from fedge_sim.reporting.tables import DISTRIBUTED, TableWriter
from fedge_sim.reporting.weights import WeightWriter

METRICS = "metrics/seed_42"


class Stopped(Callback):
    """Ends a run after its first round, when it is written down, as a kill would."""

    def on_round_end(self, record) -> None:
        if record.global_round == 2:
            raise KeyboardInterrupt


def as_before(folder) -> None:
    """Write a stopped run's files as format 3 had them."""
    file, table = folder / checkpoint.NAME, folder / METRICS / DISTRIBUTED
    rows = pl.read_csv(table, infer_schema=False).drop("gate_judged", "gate_accepted")
    rows.write_csv(table, line_terminator="\r\n")
    tree = checkpoint.load(file)
    sizes = {path: size for path, (size, _) in tree.pop("files").items() if path.endswith(".csv")}
    first = table.read_bytes().split(b"\r\n")[:2]
    sizes[f"{METRICS}/{DISTRIBUTED}"] = sum(len(line) + 2 for line in first)
    del tree["began"], tree["states"]
    for leaf in tree["leaves"]:
        del leaf["started_from"]
    checkpoint.save(file, {**tree, "csv_sizes": sizes})
    with checkpoint.safe_open(file, framework="numpy") as opened:
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        text = json.dumps([earlier.FORMAT, json.loads(opened.metadata()["tree"])[1]])
    digest = hashlib.sha256(text.encode())
    checkpoint.add_arrays(digest, arrays)
    save_file(arrays, file, {"tree": text, "sha256": digest.hexdigest()})
    run = json.loads((folder / "run.json").read_text())
    del run["settings"]["cloud_cluster"]["linkage"], run["settings"]["app"]["config"]["layout"]
    (folder / "run.json").write_text(json.dumps(run))


@pytest.fixture
def stopped(small, tmp_path):
    """Return a function from settings to the folder of such a run, stopped in its second round."""

    def folder(*own, name="stopped"):
        settings = small(*own, f"app.config.output-dir={tmp_path / name}")
        with pytest.raises(KeyboardInterrupt):
            orchestrator.run(settings, [TableWriter(), WeightWriter(), Stopped()])
        (made,) = (tmp_path / name).iterdir()
        as_before(made)
        return made

    return folder


def resume(folder):
    return orchestrator.resume(folder, lambda settings: [TableWriter(), WeightWriter()])


def everything(folder):
    files = [*folder.rglob("models/*.safetensors"), *folder.rglob("clusters/*.json")]
    tables = {
        path.name: [
            {k: v for k, v in row.items() if not k.endswith(("seconds", "_sec"))}
            for row in pl.read_csv(path, infer_schema=False).to_dicts()
        ]
        for path in (folder / METRICS).glob("*.csv")
    }
    return tables, {file.name: file.read_bytes() for file in files if file.name != "models.json"}


OWN = ("hierarchy.global_rounds=3", "runtime.backend=inprocess")


def test_it_goes_on_to_what_it_would_have_been(small, stopped):
    whole = orchestrator.run(small(*OWN), [TableWriter(), WeightWriter()]).folder
    folder = stopped(*OWN)
    resume(folder)
    assert everything(folder) == everything(whole)
    run = json.loads((folder / "run.json").read_text())
    assert run["settings"]["cloud_cluster"]["linkage"] == "single"
    with pytest.raises(CheckpointError, match="the run is finished"):
        resume(folder)


def test_an_upgrade_that_was_stopped_is_done_again(small, stopped, monkeypatch):
    whole = orchestrator.run(small(*OWN), [TableWriter(), WeightWriter()]).folder
    folder = stopped(*OWN)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            resume(folder)
    resume(folder)
    assert everything(folder) == everything(whole)


def test_clients_keep_their_examples_though_users_are_dealt_out_otherwise(small, stopped):
    """The run's settings name a partition that deals otherwise than partition.json says."""
    folder = stopped(*OWN, "app.config.partition=iid")
    run = json.loads((folder / "run.json").read_text())
    run["settings"]["app"]["config"]["partition"] = "user"
    (folder / "run.json").write_text(json.dumps(run))
    kept = (folder / "partition.json").read_bytes()
    result = resume(folder)
    assert (folder / "partition.json").read_bytes() == kept
    whole = orchestrator.run(small(*OWN, "app.config.partition=iid"), [WeightWriter()])
    assert {name: array.tobytes() for name, array in result.last.cloud.global_model.items()} == {
        name: array.tobytes() for name, array in whole.last.cloud.global_model.items()
    }


@pytest.mark.parametrize(
    ("own", "why"),
    [
        (
            ["hierarchy.client_rule=fedbn", "cloud_cluster.enable=false"],
            r"no checksums of what clients keep \(client_rule = 'fedbn'\)",
        ),
        (["hierarchy.participation=0.5"], r"other numbers of clients train since"),
        (
            ["devices.enable=true", "devices.device_speed={mean = [1.0], std = 0.2}"],
            r"devices take other times since",
        ),
    ],
)
def test_what_would_be_another_run_is_refused_and_left_as_it_is(stopped, own, why):
    folder = stopped(*OWN, *own)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(CheckpointError, match=f"an earlier version wrote it, and .*{why}"):
        resume(folder)
    assert {file: file.read_bytes() for file in before} == before


def test_a_damaged_one_is_refused(stopped):
    folder = stopped(*OWN)
    file = folder / checkpoint.NAME
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(f"{file}: the checkpoint is damaged")):
        resume(folder)
