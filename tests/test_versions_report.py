"""What a run of versions leaves behind and shows, its events being those of a real timeline."""

import csv
import io
import json
import logging
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fedge_sim.cloud import initial_state
from fedge_sim.config import Settings
from fedge_sim.data.base import ClientData, DataSummary, Standardisation
from fedge_sim.reporting import callbacks_of
from fedge_sim.reporting.base import ClientDone, HeldOut, RunInfo, VersionRecord
from fedge_sim.reporting.progress import VersionReporter
from fedge_sim.reporting.stopping import EarlyStopping, TargetAccuracy
from fedge_sim.reporting.timeline import TimelineWriter
from fedge_sim.reporting.versions import VersionWriter, job_rows, version_row
from fedge_sim.runtime.timeline import Job, VersionMade, timeline
from fedge_sim.training.local import Evaluation

STATE = initial_state({"head": np.zeros((2, 3), np.float32)}, 3)


def info_of(folder, per_leaf=50, accuracies=(), hierarchy=(), **asynchronous):
    clients = () if per_leaf else (ClientData(np.arange(5), np.arange(4), np.arange(4, 5)),) * 9
    settings = Settings.from_tables(
        {
            "app": {"config": {"partition": "iid"}},
            "hierarchy": dict(hierarchy),
            "devices": {
                "enable": True,
                "devices_per_leaf": per_leaf,
                "device_selection_size": 5,
                "num_updates_for_model": 2,
                "max_model_version": 30,
                "device_speed": {"distribution": "exponential", "mean": [1.0, 2.0]},
                "download_delay": {"distribution": "constant", "mean": 0.5},
                "job_timeout": 6.0,
                "dropout": 0.1,
            },
            "asynchronous": {"rule": "fedbuff", **asynchronous},
        }
    )
    data = DataSummary(clients, (6, 100), ("sit", "walk"), (Standardisation.identity(6),), "f00d")
    return RunInfo(settings, folder, data, 123, accuracies)


def record_of(event, seconds=1.0):
    return VersionRecord(event, len(event.jobs), 0.5, 700, 11, 22, seconds)


def held_out(accuracy, version=1, what="cloud", server=-1, time=2.0):
    return HeldOut(what, server, version, time, 7, Evaluation(0.25, accuracy, 90), 3.5)


def job(number, version, started, ended, training, fate="update"):
    return Job(number, 10 + number, 0, 2, version, started, ended, training, fate)


def made(version, time, jobs, lost=()):
    return VersionMade(time, 0, version, version, tuple(jobs), tuple(lost), 3, False, last=False)


# The first version is of jobs 0 and 1; the second of job 2, which began with version 0.
BY_HAND = [
    made(1, 2.0, [job(0, 0, 0.0, 1.0, 0.5), job(1, 0, 0.0, 2.0, 1.5)]),
    made(2, 4.0, [job(2, 0, 0.0, 4.0, 3.0)], [job(3, 1, 2.0, 3.0, 1.0, "timed out")]),
]


def rows_of(folder, name):
    with (folder / "metrics" / "seed_42" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def write(info, events, writer=None):
    writer = writer or VersionWriter()
    writer.on_run_start(info)
    for event in events:
        writer.on_version(record_of(event, 0.5 * event.time))
    return writer


def test_a_versions_row_by_hand():
    row = version_row(record_of(BY_HAND[1], 9.0))
    assert row == {
        **{"server": 0, "version": 2, "simulated_seconds": 4.0, "updates": 1, "failed": 0},
        **{"mean_staleness": 1.0, "max_staleness": 1},
        **{"dropped_out": 0, "went_offline": 0, "timed_out": 1, "too_late": 0},
        **{"active": 3, "by_timeout": 0, "train_loss": 0.5},
        **{"bytes_up": 11, "bytes_down": 22, "seconds": 9.0},
    }
    assert [row["staleness"] for row in job_rows(BY_HAND[1])] == [1, ""]


def test_totals_by_hand(tmp_path):
    under_way = [job(9, 1, 3.0, 4.0, 0.5, "under way")]
    write(info_of(tmp_path), BY_HAND).on_versions_end(STATE, under_way)
    assert json.loads((tmp_path / "devices.json").read_text()) == {
        **{"versions": 2, "updates": 3, "simulated_seconds": 4.0, "seconds": 2.0},
        "jobs": {"timed out": 1, "under way": 1, "update": 3},
        "places": 5,
        "mean_concurrency": pytest.approx((8 + 1) / 4),
        "idle_share": pytest.approx(1 - (0.5 + 1.5 + 3.0 + 1.0) / (5 * 4 - 1)),
        "devices_used": 5,
        "staleness": {"0": 2, "1": 1},
    }


@pytest.mark.parametrize("server", ["cloud", "leaf"])
def test_all_of_a_run_is_written_down(tmp_path, server):
    more = {"cloud_versions": 9} if server == "leaf" else {}
    info = info_of(tmp_path, server=server, **more)
    events = [e for e in timeline(info.settings, 100, 100) if isinstance(e, VersionMade)]
    writer = write(info, events)
    writer.on_held_out(held_out(0.5))
    writer.on_versions_end(STATE, [])
    versions, jobs = rows_of(tmp_path, "versions.csv"), rows_of(tmp_path, "jobs.csv")
    assert [(int(v["server"]), int(v["version"])) for v in versions] == [
        (event.server, event.version) for event in events
    ]
    known = {j.number: j for event in events for j in (*event.jobs, *event.lost)}
    assert len(known) == len(jobs)
    for row in jobs:
        of = known[int(row["job"])]
        assert (int(row["client"]), row["fate"]) == (of.client, of.fate)
        assert (float(row["started"]), float(row["ended"])) == (of.started, of.ended)
    totals = json.loads((tmp_path / "devices.json").read_text())
    fates = Counter(of.fate for of in known.values())
    assert totals["jobs"] == fates
    assert fates["dropped out"] > 0
    assert sum(totals["staleness"].values()) == totals["updates"] == fates["update"]
    assert totals["devices_used"] == len({of.client for of in known.values()})
    assert totals["simulated_seconds"] == events[-1].time
    at_work = 5 * (3 if server == "leaf" else 1)
    assert 0.8 * at_work < totals["mean_concurrency"] < 1.05 * at_work
    assert 0 < totals["idle_share"] < 1
    [row] = rows_of(tmp_path, "held_out.csv")
    assert (row["what"], row["server"], row["accuracy"], row["num_examples"]) == (
        *("cloud", "-1", "0.5", "90"),
    )
    for name in ("accuracy_against_time.png", "staleness.png"):
        with Image.open(tmp_path / name) as image:
            assert np.asarray(image.convert("L")).std() > 5  # something is drawn


@pytest.mark.parametrize(("per_leaf", "listed"), [(0, 9), (50, 0)])
def test_what_runs_is_written_down(tmp_path, per_leaf, listed):
    write(info_of(tmp_path, per_leaf), [])
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["settings"]["asynchronous"]["rule"] == "fedbuff"
    assert (run["dataset_sha256"], run["num_parameters"]) == ("f00d", 123)
    assert len(run["clients"]) == listed
    assert (tmp_path / "partition.json").exists() == (listed > 0)


def test_a_run_that_is_resumed_has_all_of_it(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    events = [e for e in timeline(info_of(whole).settings, 0, 0) if isinstance(e, VersionMade)]
    for folder, cut in ((whole, len(events)), (parts, 12)):
        folder.mkdir()
        write(info_of(folder), events[:cut])
        write(info_of(folder), events[cut:]).on_versions_end(STATE, [])
    assert (whole / "devices.json").read_text() == (parts / "devices.json").read_text()
    assert rows_of(whole, "jobs.csv") == rows_of(parts, "jobs.csv")


def test_a_run_without_versions_has_no_totals(tmp_path):
    writer = write(info_of(tmp_path), [])
    writer.on_versions_end(STATE, [])
    assert not (tmp_path / "devices.json").exists()


def test_lost_jobs_alone_and_many_before_the_first_update(tmp_path):
    lost = [job(i, 0, 0.0, 1.0, 0.0, "went offline") for i in range(200)]
    events = [
        made(1, 2.0, [], lost),
        made(11, 3.0, [job(200, 0, 2.0, 3.0, 1.0)]),
        made(13, 4.0, [job(201, 10, 2.0, 4.0, 1.0)]),
    ]
    write(info_of(tmp_path), events).on_versions_end(STATE, [])
    totals = json.loads((tmp_path / "devices.json").read_text())
    assert totals["jobs"] == {"update": 2, "went offline": 200}
    assert list(totals["staleness"]) == ["2", "10"]  # numbers in their order


def test_workers_are_written_with_versions(tmp_path):
    """A run that is resumed before its first evaluation goes on with its file."""
    for number in (1, 2):
        writer = TimelineWriter()
        writer.on_run_start(info_of(tmp_path))
        writer.on_client_done(ClientDone(number, 0, "train", "worker-0", 1.0, 2.0))
        writer.on_version(record_of(replace(BY_HAND[0], version=number)))
    with (tmp_path / "timeline.csv").open(newline="") as file:
        assert [(row["round"], row["client"]) for row in csv.DictReader(file)] == [
            *(("1", "1"), ("2", "2"))
        ]


# ------------------------------------------------------------------ when a run ends


def test_the_target_is_the_clouds():
    callback = TargetAccuracy()
    callback.on_run_start(info_of(None, hierarchy={"target_accuracy": 0.8}))
    assert callback.on_held_out(held_out(0.79)) is None
    assert callback.on_held_out(held_out(0.9, what="leaf", server=1)) is None
    assert callback.on_held_out(held_out(0.9, server=1)) is None
    assert callback.on_held_out(held_out(0.8)) == "held-out accuracy 0.8000 (target_accuracy)"
    callback.on_run_start(info_of(None))
    assert callback.on_held_out(held_out(1.0)) is None


def test_patience_counts_the_clouds_evaluations():
    """Those of the part before a run was resumed, too."""
    callback = EarlyStopping()
    few = {"es_patience": 3, "es_delta": 0.01}
    callback.on_run_start(info_of(None, hierarchy=few, accuracies=(0.4, 0.5, 0.505)))
    assert callback.on_held_out(held_out(0.1, what="leaf", server=0)) is None
    assert callback.on_held_out(held_out(0.5)) is None
    reason = "held-out accuracy has not risen by 0.01 above 0.5000 for 3 evaluations (es_patience)"
    assert callback.on_held_out(held_out(0.509)) == reason


# ------------------------------------------------------------------ the console


def shown(info, events, terminal):
    out = io.StringIO()
    console = Console(file=out, width=140, force_terminal=terminal, markup=False)
    callbacks = [VersionWriter(), VersionReporter(console)]
    for callback in callbacks:
        callback.on_run_start(info)
    for event in events:
        for callback in callbacks:
            callback.on_version(record_of(event))
    for callback in callbacks:
        callback.on_held_out(held_out(0.5))
        callback.on_held_out(held_out(0.9, what="leaf", server=1))
    for callback in callbacks:
        callback.on_versions_end(STATE, [])
        callback.close()
    return out.getvalue()


def test_a_log_has_a_line_for_each_evaluation(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        text = shown(info_of(tmp_path), BY_HAND, terminal=False)
    first, _, cloud, leaf = [record.getMessage() for record in caplog.records]
    assert "150 devices under 3 leaf servers, versions made by the cloud (rule fedbuff" in first
    assert cloud == (
        "cloud version 1  simulated 2.0 s  updates 7  accuracy 0.5000  loss 0.2500  3.5 s"
    )
    assert leaf.startswith("leaf server 1 version 1 ")
    for part in ("3, of 4 devices", "1 timed out", "4.0 s", "50.00% (cloud)", str(tmp_path)):
        assert part in text


def test_a_run_too_short_to_distil_is_told_so(tmp_path, caplog):
    shown(info_of(tmp_path, rule="fedrevive"), BY_HAND, terminal=False)
    assert "nothing is distilled before version 102 of 30" in caplog.text


def test_a_terminal_has_a_bar(tmp_path, caplog):
    info = info_of(tmp_path, server="leaf", cloud_interval=5.0)
    with caplog.at_level(logging.INFO):
        text = shown(info, BY_HAND, terminal=True)
    assert "version 2/90" in text  # of three servers
    assert "4 s simulated  accuracy 50.0%" in text
    assert len(caplog.records) == 2


def test_the_bar_of_a_resumed_run_goes_on(tmp_path):
    write(info_of(tmp_path), BY_HAND)
    assert "version 4/30" in shown(info_of(tmp_path), BY_HAND, terminal=True)


def test_a_run_has_the_callbacks_of_its_kind():
    versions = info_of(None).settings
    names = {
        by: [type(callback).__name__ for callback in callbacks_of(settings, Console())]
        for by, settings in (("versions", versions), ("rounds", Settings()))
    }
    assert names["versions"] == [
        *("VersionWriter", "WeightWriter", "TimelineWriter", "EarlyStopping", "TargetAccuracy"),
        "VersionReporter",
    ]
    assert names["rounds"][-1] == "ConsoleReporter"
