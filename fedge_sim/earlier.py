"""A run that the version before wrote: made one that can be gone on with, if it means the same.

Checkpoints of format 3 carry no settings and no checksums of files. A run of rounds goes on from
one to the models that the version before would have come to, with the examples of its clients in
``partition.json``. Where a setting has another meaning since, the run is refused.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors import SafetensorError, safe_open

from fedge_sim import checkpoint
from fedge_sim.checkpoint import Checkpoints
from fedge_sim.config import Settings, settings_from_json
from fedge_sim.data import federated_data
from fedge_sim.errors import CheckpointError
from fedge_sim.member import is_stateful
from fedge_sim.reporting.tables import DISTRIBUTED, write_json

FORMAT = 3
GATE = "gate_judged"  # a column that tables of rounds did not have


def upgrade(folder: Path) -> None:
    """Write a run's checkpoint and ``run.json`` as this version has them, if they are of format 3.

    Parameters
    ----------
    folder : Path
        The run's results folder.

    Raises
    ------
    CheckpointError
        If a file is damaged, or the run would be another one in this version.
    """
    file = folder / checkpoint.NAME
    if (tree := _load(file)) is None:
        return
    if tree.pop("ended"):
        raise CheckpointError(f"{folder}: the run is finished, there is nothing to resume")
    run = checkpoint.run_of(folder)
    try:
        run["settings"]["cloud_cluster"].setdefault("linkage", "single")  # CFL had no other
        settings = settings_from_json(json.dumps(run["settings"]))
    except (AttributeError, KeyError, TypeError):
        raise CheckpointError(f"{folder / checkpoint.RUN}: has no settings") from None
    if changed := _what_means_something_else(settings):
        raise CheckpointError(
            f"{file}: an earlier version wrote it, and {changed}: go on with that version, or "
            "start a new run"
        )
    data = federated_data(
        settings.with_data(
            partition="file", partition_file=str((folder / "partition.json").resolve())
        )
    )
    if data.dataset.content != run.get("dataset_sha256"):
        raise CheckpointError(f"{folder}: the data are not those that the run began with")
    _cut_back(folder, tree.pop("csv_sizes"))
    has_gate = settings.hierarchy.cluster_better_delta > -1
    metrics = folder / "metrics" / f"seed_{settings.seed}"
    _add_gate_columns(metrics, len(tree["leaves"]) if has_gate else 0)
    for leaf in tree["leaves"]:
        leaf["started_from"] = {}  # of a leaf server that is not drawn: there was none
    run["settings"] = settings.model_dump(mode="json", by_alias=True)
    write_json(folder / checkpoint.RUN, run)
    checkpoints = Checkpoints(folder, settings, data.dataset.content, data.clients)
    checkpoints.save({**tree, "states": None}, ended=False)


def _load(file: Path) -> Any:
    """Return the state in a checkpoint of format 3; None if it is of another."""
    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            if "sha256" not in metadata:
                return None
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        digest = hashlib.sha256(metadata["tree"].encode())
        checkpoint.add_arrays(digest, arrays)
        if digest.hexdigest() != metadata["sha256"]:
            raise ValueError("its content is not what was written")
        number, packed = json.loads(metadata["tree"])
        return checkpoint.unpack(packed, arrays) if number == FORMAT else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: the checkpoint is damaged: {error}") from None


def _what_means_something_else(settings: Settings) -> str:
    """Return why a run would be another one in this version; empty if it would not."""
    h = settings.hierarchy
    if is_stateful(settings):
        return f"it has no checksums of what clients keep (client_rule = {h.client_rule!r})"
    if h.participation < 1:
        return f"other numbers of clients train since (participation = {h.participation})"
    if settings.devices.enable:
        return "devices take other times since (devices.enable = true)"
    return ""


def _add_gate_columns(metrics: Path, leaves: int) -> None:
    """Add what the gates judged and accepted, which the leaf servers' tables say."""
    table = pl.read_csv(metrics / DISTRIBUTED, infer_schema=False)
    if GATE in table.columns:  # by an upgrade that was stopped
        return
    columns = ["gate_accepted", "gate_acc_old", "gate_acc_new"]
    counts = np.zeros((table.height, 2), np.int64)
    for leaf in range(leaves):
        own = pl.read_csv(metrics / f"server_{leaf}.csv", columns=columns).to_numpy()
        judged = np.isfinite(own.astype(float)).all(axis=1)
        counts += np.stack([judged, judged & (own[:, 0] > 0)], axis=1)
    table = table.with_columns(gate_judged=counts[:, 0], gate_accepted=counts[:, 1])
    aside = metrics / f"{DISTRIBUTED}.tmp"
    table.write_csv(aside, line_terminator="\r\n")
    aside.replace(metrics / DISTRIBUTED)


def _cut_back(folder: Path, sizes: dict[str, int]) -> None:
    """Drop rows that were written after the checkpoint, and tables that were begun after it."""
    for path, size in sizes.items():
        file = folder / path
        if not file.is_file() or file.stat().st_size < size:
            raise CheckpointError(f"{file}: must have {size} bytes at least to go on")
    for file in list(folder.glob("metrics/*/*.csv")):
        if file.relative_to(folder).as_posix() not in sizes:
            file.unlink()
    for path, size in sizes.items():
        with (folder / path).open(encoding="utf-8") as table:
            if GATE in table.readline():  # cut back already, by an upgrade that was stopped
                continue
        os.truncate(folder / path, size)
