"""The HHAR reader: real files with real damage, invented damage, and what windows must hold."""

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedge_sim.config import load_settings
from fedge_sim.data import DATASETS, federate, load_dataset
from fedge_sim.data.hhar_csv import CLASSES, COLUMNS, LABELS, FileReport, Key, read_sensor_file
from fedge_sim.data.hhar_files import SENSORS
from fedge_sim.data.resampling import MAX_GAP, ROW, UNKNOWN, clean
from fedge_sim.data.store import canonical
from fedge_sim.errors import DataError, FedgeError
from tests.conftest import ROOT, Keep, clean_environment, run

HEADER = ",".join(COLUMNS)
MS = 1_000_000


def read(file: Path):
    """Return a file's report and its rows by key."""
    report, parts = FileReport(file.name), {}
    for key, rows, share in read_sensor_file(file, report):
        parts.setdefault(key, []).append(rows)
        assert 0 < share <= 1
    return report, {key: np.concatenate(own) for key, own in parts.items()}


def line(index, ms, *, ns=None, xyz=(0.5, 9.8, -1.0), user="a", device="nexus4_1", gt="walk"):
    ns = ms * MS if ns is None else ns
    model = device.partition("_")[0]
    return ",".join(map(str, (index, ms, ns, *xyz, user, model, device, gt)))


def write_set(folder: Path, accelerometer: str, gyroscope: str, kind="Phones") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{kind}_accelerometer.csv").write_text(accelerometer)
    (folder / f"{kind}_gyroscope.csv").write_text(gyroscope)
    return folder


def steady(seconds: float, *, start_ms=1_000_000, rate=100, **rest) -> list[str]:
    step = 1000 / rate
    return [line(i, start_ms + round(i * step), **rest) for i in range(round(seconds * rate))]


def table(*parts: list[str]) -> str:
    return "\n".join([HEADER, *(row for part in parts for row in part)]) + "\n"


def hhar(folder: Path, *assignments: str):
    own = ["app.config.dataset=hhar", f"app.config.data-root={folder}"]
    return load_settings(assignments=[*own, "app.config.use-watches=false", *assignments])


# ------------------------------------------------------------------------- the real files


@pytest.mark.parametrize(
    ("name", "rows", "null", "creation_known"),
    [
        ("paipradeep_Phones_accelerometer.csv", 7008, 1001, False),
        ("paipradeep_Phones_gyroscope.csv", 7008, 1001, False),
        ("rdavilao_Phones_accelerometer.csv", 10000, 0, True),
        ("rdavilao_Phones_gyroscope.csv", 10000, 0, True),
        ("rdavilao_Watch_accelerometer.csv", 10000, 344, True),
        ("rdavilao_Watch_gyroscope.csv", 10000, 343, True),
    ],
)
def test_every_excerpt_is_read(shared, name, rows, null, creation_known):
    file = shared / "data" / "hhar_excerpt" / name
    report, parts = read(file)
    assert (report.rows, report.bad_rows, report.null_labels) == (rows, 0, null)
    assert not report.unknown_labels
    (own,) = parts.values()
    assert len(own) == rows - null
    assert ((own["creation"] != UNKNOWN).all(), (own["creation"] == UNKNOWN).all()) == (
        creation_known,
        not creation_known,
    )
    # the first labelled row, read by hand
    lines = [re.split(r"[,\t]", text) for text in file.read_text().splitlines()]
    cells = next(cells for cells in lines if cells[-1] in LABELS)
    assert int(own["arrival"][0]) == int(cells[1]) * MS
    np.testing.assert_array_equal(own["xyz"][0], np.array(cells[3:6], np.float32))
    assert own["label"][0] == LABELS[cells[9]]


def test_a_folder_of_excerpts_becomes_windows_without_any_flag(shared):
    config = load_settings(
        assignments=[
            "app.config.dataset=hhar",
            f"app.config.data-root={shared / 'data' / 'hhar_excerpt'}",
        ]
    ).data
    data = load_dataset(config)
    assert data.names.users == ("a",)
    assert data.names.devices == ("gear_1", "nexus4_1")
    assert data.names.models == ("gear", "nexus4")
    counts = np.bincount(data.device)
    assert counts.min() >= 50  # a minute of either
    # gravity is there, in m/s^2
    gravity = np.linalg.norm(data.x[:, :3].mean(axis=2), axis=1)
    assert 9 < np.median(gravity) < 10.5
    assert [f["rows"] for f in data.report["files"]] == [7008, 10000, 10000, 7008, 10000, 10000]


def test_real_movement_becomes_the_windows_that_a_plain_reading_gives(shared):
    """Every window of one user against straight lines through the rows, by another way."""
    folder = shared / "data" / "hhar_schema"
    data = load_dataset(hhar(folder).data)
    assert data.names.users == tuple("abcdefghi")
    assert data.names.classes == CLASSES
    assert data.x.shape[1:] == (6, 100)
    assert 2900 < len(data) < 3100
    _, acc = read(folder / "Phones_accelerometer.csv")
    key = Key("c", "s3mini", "s3mini_1")
    rows = acc[key]
    own = np.flatnonzero(data.user == 2)
    known = {}
    for row in own:
        known.setdefault(data.recording[row], []).append(row)
    checked = 0
    time = rows["creation"] + (rows["arrival"] - rows["creation"]).min()
    pieces = np.split(np.arange(len(rows)), np.flatnonzero(np.diff(time) > MAX_GAP) + 1)
    long = [p for p in pieces if time[p[-1]] - time[p[0]] >= 1.98e9]
    assert len(known) == len(long)
    for piece, in_order in zip(long, (known[r] for r in sorted(known)), strict=True):
        for row in in_order:
            at = int(data.position[row]) * 20_000_000 + np.arange(100) * 20_000_000
            for axis in range(3):
                straight = np.interp(at + time[piece[0]], time[piece], rows["xyz"][piece, axis])
                # The recording begins where both sensors do, within a sample of the piece's start.
                error = np.abs(straight - data.x[row, axis]).mean()
                assert error < 0.1 + 0.3 * straight.std()
            labels = rows["label"][piece]
            assert data.y[row] in labels
            checked += 1
    assert checked == len(own) > 300


def test_hhar_form_trains_to_90_percent_on_real_movement(shared, tmp_path):
    keep = Keep()
    folder = shared / "data" / "hhar_schema"
    wanted = hhar(folder, "app.config.standardise=client", f"app.config.output-dir={tmp_path}")
    assert wanted.hierarchy.global_rounds == 10
    last = run(wanted, [keep]).last
    assert last.mean_client_accuracy >= 0.90
    assert last.mean_leaf_accuracy >= 0.90


def test_made_files_are_read_whole_and_can_be_told_apart(tmp_path):
    """Every window of a made set of all devices comes back with its user, device and label."""
    command = [sys.executable, "scripts/make_hhar_csv.py", str(tmp_path), "--rows", "400000"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    data = load_dataset(
        load_settings(
            assignments=["app.config.dataset=hhar", f"app.config.data-root={tmp_path}"]
        ).data
    )
    assert data.names.users == tuple("abcdefghi")
    assert set(np.unique(data.y)) == set(range(6))
    kinds = {name.partition("_")[0] for name in data.names.devices}
    assert "samsungold" not in kinds  # it has no gyroscope
    assert kinds & {"gear", "lgwatch"}
    absent = {d["device"] for d in data.report["devices"] if d.get("problem") == "no gyroscope"}
    assert {name.partition("_")[0] for name in absent} == {"samsungold"}
    # most of what both sensors recorded, at 50 Hz with a second's stride, is in a window
    rows = sum(f["rows"] for f in data.report["files"])
    assert rows == pytest.approx(400_000, rel=0.05)
    assert len(data) > 500


@pytest.mark.parametrize("sensor", ["accelerometer", "gyroscope"])
def test_no_window_is_joined_over_a_pause_of_a_watch(shared, sensor):
    """The watch's own clock stands still in pauses: who cuts by it alone sees none of the 30."""
    file = shared / "data" / "hhar_excerpt" / f"rdavilao_Watch_{sensor}.csv"
    cells = [text.split(",") for text in file.read_text().splitlines()]
    rows = np.zeros(len(cells), ROW)
    rows["arrival"] = [int(row[1]) * MS for row in cells]
    rows["creation"] = [int(row[2]) for row in cells]
    pauses = np.flatnonzero(np.diff(rows["arrival"]) > 500 * MS)
    assert len(pauses) == 30
    assert np.diff(rows["arrival"]).max() > 37_000 * MS
    unseen = np.diff(rows["creation"])[pauses] < 50 * MS
    assert unseen.sum() == {"accelerometer": 29, "gyroscope": 30}[sensor]

    _, parts = read(file)
    (labelled,) = parts.values()
    for own, expected in ((rows, 30), (labelled, 29)):  # "null" rows begin or end with one
        arrival = own["arrival"]
        pauses = np.flatnonzero(np.diff(arrival) > 500 * MS)
        assert len(pauses) == expected
        found = clean(own)
        begin, end = found.time[found.starts], found.time[found.ends - 1]
        for pause in pauses:
            before, after = arrival[pause], arrival[pause + 1]
            assert not ((begin <= before) & (end >= after)).any(), (before, after)
        assert ((end[:-1] <= begin[1:]) & (begin <= end)[1:]).all()
        for start, stop in zip(found.starts, found.ends, strict=True):
            assert (np.diff(found.time[start:stop]) <= MAX_GAP).all()


# ------------------------------------------------------------------- forms of the CSV file


def variants() -> dict[str, str]:
    plain = table(steady(3), steady(3, user="b", gt="sit", start_ms=1_010_000))
    rows = plain.splitlines()
    cells = [row.split(",") for row in rows]
    order = [9, 4, 3, 8, 0, 7, 1, 6, 5, 2]
    return {
        "plain": plain,
        "crlf": plain.replace("\n", "\r\n"),
        "tabs": plain.replace(",", "\t"),
        "semicolons": plain.replace(",", ";"),
        "no header": "\n".join(rows[1:]) + "\n",
        "no header, tabs, crlf": "\r\n".join(rows[1:]).replace(",", "\t"),
        "no last newline": plain.rstrip("\n"),
        "byte order mark": "\ufeff" + plain,
        "blank lines": plain.replace("\n", "\n\n"),
        "quotes": "\n".join(",".join(f'"{c}"' for c in row) for row in cells),
        "blanks": plain.replace(",", " , "),
        "other order": "\n".join(",".join(row[i] for i in order) for row in cells),
        "more columns": "\n".join(",".join(["7", *row, "x"]) for row in cells).replace("7", "n", 1),
        "other case": HEADER.lower() + "\n" + "\n".join(rows[1:]).replace("walk", "Walk"),
    }


@pytest.mark.parametrize("name", variants())
def test_forms_of_one_file(tmp_path, name):
    (tmp_path / "plain.csv").write_text(variants()["plain"])
    (tmp_path / "other.csv").write_text(variants()[name], newline="")
    plain_report, plain = read(tmp_path / "plain.csv")
    report, other = read(tmp_path / "other.csv")
    assert report.rows == plain_report.rows == 600
    assert report.bad_rows == 0
    assert plain.keys() == other.keys()
    for key in plain:
        assert plain[key].tobytes() == other[key].tobytes()


EPOCH_MS = 1_424_696_633_908


def file_with(file: Path, column: str, change, separator=",", ending="") -> Path:
    """Write ten seconds of the times of 2015, one column of it changed."""
    rows = [text.split(",") for text in steady(10, start_ms=EPOCH_MS, rate=90)]
    place = COLUMNS.index(column)
    for row in rows:
        row[place] = change(row[place])
    lines = [HEADER.replace(",", separator), *(separator.join(row) + ending for row in rows)]
    file.write_text("\n".join(lines))
    return file


@pytest.mark.parametrize(
    ("column", "change", "separator"),
    [
        ("Arrival_Time", lambda ms: f"{int(ms) / 1000:.3f}", ","),  # seconds
        ("Arrival_Time", lambda ms: f"{int(ms) / 1000:.3f}".rstrip("0").rstrip("."), ","),
        ("Arrival_Time", lambda ms: f"{int(ms) / 1000:.3f}".replace(".", ","), ";"),
        ("Arrival_Time", lambda ms: f'"{int(ms) / 1000:.3f}"'.replace(".", ","), ","),
        ("Arrival_Time", lambda ms: f"{int(ms) / 1000:.12e}", ","),
        ("Arrival_Time", lambda ms: f"{ms}123", ","),  # microseconds
        ("Arrival_Time", lambda ms: f"{ms}123456", ","),  # nanoseconds
        ("Arrival_Time", lambda ms: f"{ms}.0", ","),
        ("Arrival_Time", lambda ms: f"{int(ms):.12E}", ","),  # all digits, by a spreadsheet
        ("Arrival_Time", lambda ms: f"{int(ms):.12E}".replace(".", ","), ";"),
        ("y", lambda y: y.replace(".", ","), ";"),
        ("y", lambda y: y.replace(".", ","), "\t"),
        ("y", lambda y: f'"{y}"'.replace(".", ","), ","),
        ("z", lambda z: f'"{z}"'.replace(".", ","), ","),
    ],
)
def test_times_and_numbers_in_forms_that_cannot_be_mistaken(tmp_path, column, change, separator):
    plain = file_with(tmp_path / "plain.csv", column, str)
    _, expected = read(plain)
    report, found = read(file_with(tmp_path / "other.csv", column, change, separator))
    assert report.bad_rows == 0
    assert {k: v.tobytes() for k, v in found.items()} == {
        k: v.tobytes() for k, v in expected.items()
    }


def test_decimal_commas_in_quotes_without_a_header(tmp_path):
    plain = file_with(tmp_path / "plain.csv", "x", str)
    quoted = file_with(tmp_path / "quoted.csv", "x", lambda x: f'"{x}"'.replace(".", ","))
    quoted.write_text(quoted.read_text().partition("\n")[2])
    (_, expected), (report, found) = read(plain), read(quoted)
    assert report.rows == 900
    assert {k: v.tobytes() for k, v in found.items()} == {
        k: v.tobytes() for k, v in expected.items()
    }


@pytest.mark.parametrize(
    ("column", "change", "problem"),
    [
        (
            "Arrival_Time",
            lambda ms: str(int(ms) // 1000),
            "Arrival_Time: 889 of 900 rows have the time of the row before: it is in seconds",
        ),
        (
            "Arrival_Time",
            lambda ms: f"{int(ms) / 1000 - 1_424_696_600:.3f}",  # since the start
            "Arrival_Time: 889 of 900 rows have the time of the row before: it is in seconds",
        ),
        (
            "Arrival_Time",
            lambda ms: f"{int(ms) / 1000:.1f}",
            "Arrival_Time: 900 of 900 rows have a time that has lost its last digits",
        ),
        (
            "Arrival_Time",
            lambda ms: f"{int(ms) / 86_400_000 + 25_569:.5f}",  # a spreadsheet's days
            "Arrival_Time: 899 of 900 rows have the time of the row before: it is in seconds or",
        ),
        ("Arrival_Time", lambda ms: f"{int(ms):.2E}", "digits, as in a spreadsheet ('1.42E+12')"),
        ("Arrival_Time", lambda ms: f"{int(ms):.6e}", "Arrival_Time: 900 of 900 rows have a time"),
        ("Arrival_Time", lambda ms: f"{int(ms):.10e}", "Arrival_Time: 900 of 900 rows have a"),
        ("Arrival_Time", lambda ms: ms[:-3] + "000", "Arrival_Time: 900 of 900 rows have a time"),
        (
            "Arrival_Time",
            lambda ms: "2015-02-23 14:03:01",
            "Arrival_Time: 900 (a date: '2015-02-2314:03:01'; expected milliseconds since 1970)",
        ),
        ("Arrival_Time", lambda ms: "23.02.2015 14:03", "Arrival_Time: 900 (a date: '23.02.2015"),
        ("Arrival_Time", lambda ms: "14:03:01", "Arrival_Time: 900 (a date: '14:03:01'"),
        ("Arrival_Time", lambda ms: "", "Arrival_Time: 900 (empty)"),
        ("Arrival_Time", lambda ms: "-" + ms, "Arrival_Time: 900 ('-1424696633908'; expected mil"),
        ("Arrival_Time", lambda ms: "1.424.696.633.908", "('1.424.696.633.908'; expected millis"),
        (
            "y",
            lambda y: y.replace(".", ","),
            "number of cells: 900 (more than 10, as decimal commas or a column without a name",
        ),
        ("y", lambda y: "g", "y: 900 ('g'; expected a number)"),
        ("User", lambda user: "", "User: 900 (empty)"),
    ],
)
def test_the_column_that_is_wrong_is_named_with_its_count(tmp_path, column, change, problem):
    with pytest.raises(DataError) as caught:
        read(file_with(tmp_path / "x.csv", column, change))
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_wrong_column_is_counted(tmp_path):
    rows = [line(1, 1, xyz=("?", 1, "q"))] * 3 + [line(2, "?", xyz=(1, 1, "r"))] * 2 + ["1,2"]
    file = tmp_path / "x.csv"
    file.write_text(table(steady(1), rows))
    report = FileReport(file.name)
    with pytest.raises(DataError, match=r"6 of 106 .* z: 6 \('q'; .* x: 4 \('\?'; .* y: 1 "):
        list(read_sensor_file(file, report))
    assert report.bad_columns == {
        **{"Arrival_Time": 2, "x": 4, "y": 1, "z": 6},
        **{"User": 1, "Model": 1, "Device": 1},
    }


def test_a_sensors_clock_that_cannot_be_read_is_done_without_and_said(tmp_path, caplog):
    logging.getLogger("fedge_sim").propagate = True
    plain, other = (
        [text.split(",") for text in steady(5, start_ms=EPOCH_MS, rate=90)] for _ in range(2)
    )
    for row in other:
        row[2] = f"{int(row[2]):.14E}"
    own = ["\n".join([HEADER, *map(",".join, rows)]) for rows in (plain, other)]
    known = load_dataset(hhar(write_set(tmp_path / "1", own[0], own[0])).data)
    assert "Creation_Time" not in caplog.text
    found = load_dataset(hhar(write_set(tmp_path / "2", own[1], own[1])).data)
    assert "Creation_Time of 450 of 450 rows is no whole number of nanoseconds" in caplog.text
    assert "1.42469663390800E+18" in caplog.text
    assert found.content == known.content


def test_blocks_join_without_a_seam(tmp_path, monkeypatch):
    file = tmp_path / "x.csv"
    file.write_text(variants()["plain"])
    _, whole = read(file)
    for size in (1, 100, 1000, 12345):
        monkeypatch.setattr("fedge_sim.data.hhar_csv.BLOCK_BYTES", size)
        _, parts = read(file)
        assert {k: v.tobytes() for k, v in parts.items()} == {
            k: v.tobytes() for k, v in whole.items()
        }


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "is empty"),
        ("\n\n", "is empty, or begins with an empty line"),
        (HEADER + "\n", "there are no rows in it"),
        (HEADER.replace(",gt", "") + "\n", "line 1 has 9 columns and no gt; expected the header"),
        (HEADER.replace("x,y", "a,b") + "\n", "no x, y;"),
        ("1,2,3\n4,5,6\n", "line 1 has 3 columns and no Arrival_Time"),
        ("PK\x03\x04 this is a zip file", "line 1 has 1 columns"),
        (table(steady(1), [line(1, 1, xyz=("?", 1, 2))] * 2), "2 of 102 rows have no time"),
        (table(steady(1), [line(1, 1, xyz=("?", 1, 2))] * 2), "the first is line 102: '1,1,"),
        (table(steady(1), [line(1, "", ns=1)] * 2), "2 of 102 rows"),
        (table(steady(1, gt="null")), "none of its 100 rows has a known label: 100 have none"),
        (table(steady(1, gt="swim")), "the others 'swim' (100); expected walk, sit"),
        (table(steady(1), [line(1, "1e30", ns=1)] * 2), "2 of 102 rows"),
        (table(steady(1), [line(1, -5)] * 2), "2 of 102 rows"),
        (table(steady(1), [line(1, 1, xyz=(1, "nan", 2))] * 2), "2 of 102 rows"),
        (table(steady(1), [line(1, 1, xyz=(1, 2, "1e39"))] * 2), "2 of 102 rows"),
        (table(steady(1), [line(1, 1, user="")] * 2), "2 of 102 rows"),
        (table(steady(1), ["1,2,3"] * 2), "2 of 102 rows"),
        (table(steady(1), [HEADER] * 2), "2 of 102 rows"),
    ],
)
def test_files_that_are_refused(tmp_path, content, problem):
    folder = write_set(tmp_path / "set", content, table(steady(3)))
    with pytest.raises(DataError) as caught:
        load_dataset(hhar(folder, f"app.config.cache-dir={tmp_path / 'cache'}").data)
    message = str(caught.value)
    assert problem in message
    assert "Phones_accelerometer.csv" in message
    assert "\n" not in message
    assert [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"] == []


def test_a_file_without_lines_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("fedge_sim.data.hhar_csv.BLOCK_BYTES", 1000)
    file = tmp_path / "x.csv"
    file.write_text(table(steady(1)) + "x" * 70_000)
    with pytest.raises(DataError, match="has a line of more than 65,536 bytes"):
        read(file)


def test_one_percent_of_bad_rows_is_left_out_and_counted(tmp_path):
    file = tmp_path / "x.csv"
    good = steady(5)
    bad = [line(1, 1, xyz=("?", 1, 2)), "1,2", HEADER, line(1, 2, xyz=("inf", 1, 2)), ",,,,x"]
    file.write_text(table(good[:200], bad, good[200:]))
    report, parts = read(file)
    assert (report.rows, report.bad_rows) == (505, 5)
    assert sum(len(rows) for rows in parts.values()) == 500


def test_unknown_labels_are_left_out_counted_and_listed(tmp_path, caplog):
    logging.getLogger("fedge_sim").propagate = True
    odd = [
        *steady(0.03, gt="swim", start_ms=2_000_000),
        *steady(0.02, gt="fly", start_ms=3_000_000),
    ]
    folder = write_set(tmp_path, table(steady(5), odd), table(steady(5)))
    data = load_dataset(hhar(folder).data)
    assert data.report["files"][0]["unknown_labels"] == {"swim": 3, "fly": 2}
    assert "rows with unknown labels left out: 'swim' (3), 'fly' (2)" in caplog.text
    assert len(data) == 4


def test_more_than_one_percent_of_unknown_labels_is_refused_and_they_are_listed(tmp_path):
    odd = [
        *steady(0.04, gt="swim", start_ms=2_000_000),
        *steady(0.02, gt="fly", start_ms=3_000_000),
    ]
    folder = write_set(tmp_path, table(steady(5), odd), table(steady(5)))
    with pytest.raises(DataError) as caught:
        load_dataset(hhar(folder).data)
    said = "6 of 506 rows have unknown labels, expected at most 1%: 'swim' (4), 'fly' (2); rename"
    assert said in str(caught.value)


def test_unknown_labels_without_end_are_kept_in_bounds(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text(table([line(i, 10 * i, gt=f"label {i}") for i in range(3000)], steady(1)))
    report = FileReport(file.name)
    with pytest.raises(DataError, match=r"3,000 of 3,100 rows have unknown .* more; rename"):
        list(read_sensor_file(file, report))
    assert len(report.unknown_labels) <= 1001
    assert sum(report.unknown_labels.values()) == 3000


@pytest.mark.parametrize(
    "spelling",
    [
        lambda label: CLASSES[LABELS[label]],
        lambda label: CLASSES[LABELS[label]].upper(),
        str.capitalize,
        lambda label: {"stairsup": "Stairs Up", "stairsdown": "stairs_down"}.get(label, label),
        lambda label: {"stairsup": "stairs-up", "stairsdown": "Downstairs"}.get(label, label),
        lambda label: {"stairsup": "WALKING_UPSTAIRS", "bike": "\tBiking "}.get(label, label),
    ],
)
def test_labels_are_known_as_people_spell_them(tmp_path, spelling):
    parts = {label: (3, 1_000_000 + 10_000 * code) for label, code in LABELS.items()}
    plain = [steady(s, start_ms=at, gt=label) for label, (s, at) in parts.items()]
    other = [steady(s, start_ms=at, gt=spelling(label)) for label, (s, at) in parts.items()]
    null = steady(3, start_ms=2_000_000, gt="null")
    expected = write_set(tmp_path / "1", table(*plain, null), table(*plain))
    written = write_set(
        tmp_path / "2",
        *(table(*other, null).replace(",", ";"), table(*other).replace(",", ";")),
    )
    known = load_dataset(hhar(expected).data)
    found = load_dataset(hhar(written).data)
    assert found.content == known.content
    assert np.bincount(found.y).tolist() == [2] * 6
    assert found.report["files"][0]["null_labels"] == 300


@pytest.mark.parametrize("no_value", ["null", "NULL", "", "nan", "None", "NA", "<NA>", "N/A"])
def test_what_says_no_value_is_no_label(tmp_path, no_value):
    file = tmp_path / "x.csv"
    file.write_text(table(steady(1), steady(1, start_ms=2_000_000, gt=no_value)))
    report, _ = read(file)
    assert (report.null_labels, report.unknown_labels) == (100, {})


def test_warnings_are_said_whenever_the_store_is_opened(tmp_path, caplog):
    """Those of an older store, which has none in it, are not: it is opened all the same."""
    logging.getLogger("fedge_sim").propagate = True
    acc = table(steady(5), steady(1, user="c"), steady(0.03, gt="swim", start_ms=2_000_000))
    folder = write_set(tmp_path / "set", acc, table(steady(5), steady(1, user="c")))
    settings = hhar(folder, f"app.config.cache-dir={tmp_path / 'cache'}").data

    def said():
        caplog.clear()
        load_dataset(settings)
        return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]

    first = said()
    assert len(first) == 3
    assert any("'swim' (3)" in line for line in first)
    assert any("no client: c" in line for line in first)
    assert said() == first
    [manifest] = (tmp_path / "cache").glob("hhar-*/manifest.json")
    without = json.loads(manifest.read_text())
    del without["warnings"], without["seal"]
    without["seal"] = hashlib.sha256(canonical(without)).hexdigest()
    manifest.write_text(json.dumps(without))
    assert said() == []


@pytest.mark.parametrize("missing", ["Phones_accelerometer.csv", "Phones_gyroscope.csv"])
def test_a_missing_file_is_named(tmp_path, missing):
    folder = write_set(tmp_path, table(steady(3)), table(steady(3)))
    (folder / missing).unlink()
    with pytest.raises(DataError, match=f"needs the file {missing}, which is not there"):
        load_dataset(hhar(folder).data)
    watches = load_settings(
        assignments=["app.config.dataset=hhar", f"app.config.data-root={folder}"]
    )
    with pytest.raises(DataError, match=r"needs the file .*which is not there"):
        load_dataset(watches.data)


def test_missing_watches_say_how_to_do_without(tmp_path):
    folder = write_set(tmp_path, table(steady(3)), table(steady(3)))
    both = load_settings(assignments=["app.config.dataset=hhar", f"app.config.data-root={folder}"])
    with pytest.raises(DataError, match=r"Watch_accelerometer.csv.*use-watches = false"):
        load_dataset(both.data)


def test_the_folder_that_the_archive_unpacks_to_is_found(tmp_path):
    content = table(steady(5))
    write_set(tmp_path / "Activity recognition exp", content, content)
    assert len(load_dataset(hhar(tmp_path).data)) == 4


def zipped(file: Path, members: dict[str, str | bytes]) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def members(seconds=5, folder="Activity recognition exp/", kinds=("Phones",)) -> dict[str, str]:
    own = {f"{folder}{kind}_{sensor}.csv": sensor for kind in kinds for sensor in SENSORS}
    return {name: table(steady(seconds)) for name in own}


@pytest.mark.parametrize("below", ["any name", "any name/Activity recognition exp"])
def test_a_folder_one_level_deeper_is_found(tmp_path, below):
    write_set(tmp_path / below, table(steady(5)), table(steady(5)))
    write_set(tmp_path / "Still exp", table(steady(9)), table(steady(9)))
    write_set(tmp_path / ".hidden", table(steady(9)), table(steady(9)))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "Phones_gyroscope.csv").write_text("half of it")
    assert len(load_dataset(hhar(tmp_path).data)) == 4


def test_the_same_files_in_two_folders_are_refused(tmp_path):
    for name in ("one", "two"):
        write_set(tmp_path / name, table(steady(5)), table(steady(5)))
    with pytest.raises(DataError, match=r"in several places, .*one, .*two; set data-root to one"):
        load_dataset(hhar(tmp_path).data)


def test_the_archive_itself_is_read(tmp_path):
    """Its inner archive alone, and that in UCI's outer one, with what other programs put in."""
    expected = load_dataset(hhar(write_set(tmp_path / "set", *members().values())).data)
    junk = {
        "__MACOSX/Activity recognition exp/._Phones_accelerometer.csv": b"\0\5\x16\7",
        "Activity recognition exp/.Phones_gyroscope.csv": "hidden",
        "../Phones_accelerometer.csv": table(steady(9)),
        "/Phones_gyroscope.csv": table(steady(9)),
        "Activity recognition exp/readme.txt": "not ours",
        "Activity recognition exp/": "",
    }
    inner = zipped(tmp_path / "Activity recognition exp.zip", junk | members())
    outer = zipped(
        tmp_path / "heterogeneity+activity+recognition.zip",
        {
            "__MACOSX/._Activity recognition exp.zip": b"\0\5\x16\7",
            inner.name: inner.read_bytes(),
            "Still exp.zip": zipped(tmp_path / "s.zip", members(9, "Still exp/")).read_bytes(),
        },
    )
    prefixed = zipped(tmp_path / "p.zip", members(folder="own_"))
    (tmp_path / "holds it").mkdir()
    shutil.copy(outer, tmp_path / "holds it")
    before = sorted(tmp_path.rglob("*"))
    for root in (inner, outer, prefixed, tmp_path / "holds it"):
        found = load_dataset(hhar(root).data)
        assert (found.content, len(found)) == (expected.content, 4)
    assert sorted(tmp_path.rglob("*")) == before  # nothing was unpacked beside them


def test_the_store_of_an_archive_is_that_of_its_contents(tmp_path):
    both = {**members(), **members(kinds=("Watch",))}
    file = zipped(tmp_path / "x.zip", both)
    assert len(load_dataset(hhar(file).data)) == 4
    changed = file.stat()
    outer = zipped(tmp_path / "outer.zip", {"inner.zip": file.read_bytes()})
    assert len(load_dataset(hhar(outer).data).report["files"]) == 2
    for archive in (file, outer):
        with_watches = load_dataset(hhar(archive, "app.config.use-watches=true").data)
        assert [f["file"] for f in with_watches.report["files"]] == [
            *("Phones_accelerometer.csv", "Watch_accelerometer.csv"),
            *("Phones_gyroscope.csv", "Watch_gyroscope.csv"),
        ]
    # other contents of the same size, at the same time
    other = {name: text.replace("9.8", "9.7") for name, text in both.items()}
    zipped(file, other)
    assert file.stat().st_size == changed.st_size
    os.utime(file, ns=(changed.st_mtime_ns, changed.st_mtime_ns))
    assert load_dataset(hhar(file).data).x[0, 1, 0] == np.float32(9.7)


@pytest.mark.parametrize("nested", [False, True])
def test_an_archive_that_is_damaged_or_another_is_refused(tmp_path, nested):
    def wrapped(content: bytes) -> Path:
        file = tmp_path / "x.zip"
        if nested:
            return zipped(file, {"Activity recognition exp.zip": content})
        file.write_bytes(content)
        return file

    whole = zipped(tmp_path / "whole", members()).read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"Phones_accelerometer.csv") + 60] ^= 0xFF
    for content in (b"no archive", whole[: len(whole) // 2], bytes(flipped)):
        with pytest.raises(
            DataError, match=r"x\.zip.*not a .zip archive that can be read"
        ) as caught:
            load_dataset(hhar(wrapped(content)).data)
        assert "\n" not in str(caught.value)
        assert "scratch" not in str(caught.value)
    gone = {name: text for name, text in members().items() if "gyro" not in name}
    missing = zipped(tmp_path / "missing", gone).read_bytes()
    with pytest.raises(
        DataError, match=r"needs the file Phones_gyroscope\.csv, which is not there"
    ):
        load_dataset(hhar(wrapped(missing)).data)
    with pytest.raises(DataError, match=r"needs the file Watch_.*or set use-watches = false"):
        load_dataset(hhar(wrapped(whole), "app.config.use-watches=true").data)


def test_several_archives_are_refused_by_name(tmp_path):
    for name in ("a.zip", "b.zip"):
        zipped(tmp_path / name, members())
    with pytest.raises(DataError, match=r"several archives, a\.zip, b\.zip; set"):
        load_dataset(hhar(tmp_path).data)


def test_a_sensor_that_is_absent_and_a_user_without_windows(tmp_path, caplog):
    logging.getLogger("fedge_sim").propagate = True
    acc = table(steady(5), steady(5, user="b"), steady(1, user="c"))
    gyro = table(steady(5), steady(5, user="b", device="s3_1"), steady(1, user="c"))
    data = load_dataset(hhar(write_set(tmp_path, acc, gyro)).data)
    assert data.names.users == ("a",)
    assert "left out, no gyroscope: b/nexus4_1" in caplog.text
    assert "left out, no accelerometer: b/s3_1" in caplog.text
    assert "left out, never both sensors for as long as a window: c/nexus4_1" in caplog.text
    assert "users without any window, so in no client: b, c" in caplog.text


def test_every_window_has_its_user_model_and_device(tmp_path):
    carried = [("b", "nexus4_2"), ("a", "s3_1"), ("b", "nexus4_1")]
    parts = [steady(3 + i, user=user, device=d) for i, (user, d) in enumerate(carried)]
    data = load_dataset(hhar(write_set(tmp_path, table(*parts), table(*parts))).data)
    names = data.names
    found = zip(data.user, data.model, data.device, strict=True)
    owners = [(names.users[u], names.models[m], names.devices[d]) for u, m, d in found]
    assert owners == [
        *[("a", "s3", "s3_1")] * 3,
        *[("b", "nexus4", "nexus4_1")] * 4,
        *[("b", "nexus4", "nexus4_2")] * 2,
    ]
    # the two phones of b recorded at the same time: one recording
    assert data.recording.tolist() == [0] * 3 + [1] * 6
    assert data.position.tolist() == [0, 50, 100, 0, 50, 100, 150, 0, 50]


def test_blocks_are_held_out_in_time_and_not_by_device(tmp_path):
    parts = [steady(60, device=device) for device in ("nexus4_1", "s3_1", "s3_2")]
    folder = write_set(tmp_path, table(*parts), table(*parts))
    one_client = ["hierarchy.num_servers=1", "hierarchy.clients_per_server=[1]"]
    data = federate(hhar(folder, "app.config.split=blocked", *one_client))
    (own,) = data.clients
    at = data.dataset.position
    assert len(own.test) > 30
    nearest = np.abs(at[own.test][:, None].astype(int) - at[own.train].astype(int)).min()
    assert nearest >= 100  # of any device


def test_settings_of_windows_make_other_stores(tmp_path):
    folder = write_set(tmp_path, table(steady(5)), table(steady(5)))
    found = {}
    for setting in ("seed=1", "window-stride-seconds=0.5", "window-seconds=1", "sample-rate-hz=25"):
        data = load_dataset(hhar(folder, f"app.config.{setting}").data)
        found[setting] = (len(data), data.example_shape)
    assert list(found.values()) == [(4, (6, 100)), (7, (6, 100)), (5, (6, 50)), (4, (6, 50))]


def test_no_window_at_all_is_an_error(tmp_path):
    folder = write_set(tmp_path, table(steady(1)), table(steady(1)))
    with pytest.raises(DataError, match="no window of 100 samples in 1 devices"):
        load_dataset(hhar(folder).data)
    with pytest.raises(FedgeError, match="at least 2 samples"):
        load_dataset(hhar(folder, "app.config.window-seconds=0.01").data)


# ---------------------------------------------------------------------- odd rows


CELL = st.one_of(
    st.sampled_from(["", "nan", "inf", "-1", "1e400", "null", "walk", "sit", "a", "1.4E+018"]),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=6),
)
ODD_LINE = st.one_of(
    st.lists(CELL, max_size=13).map(",".join),
    st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"").decode("latin1")),
)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 400), ODD_LINE), max_size=12), st.booleans())
@example([(5, '"unclosed')], True)
@example([(0, "\x00" * 20), (3, "#comment"), (400, ",,,,,,,,,")], False)
def test_odd_rows_never_crash_the_reader(tmp_path_factory, odd, header):
    """Odd lines among good ones: they are counted or refused, and take no good row with them."""
    rows = steady(4)
    for place, text in sorted(odd, key=lambda pair: -pair[0]):
        rows.insert(place, text)
    file = tmp_path_factory.mktemp("odd") / "x.csv"
    text = "\n".join([HEADER, *rows] if header else rows)
    file.write_bytes(text.encode(errors="surrogateescape"))
    try:
        report, parts = read(file)
    except DataError as error:
        refused = str(error)
    else:
        refused = ""
    file.unlink()
    if refused:
        assert refused.startswith(f"{file}: ")
        assert "\n" not in refused
        return
    kept = sum(len(own) for own in parts.values())
    assert 400 <= kept <= report.rows <= 400 + len(odd)
    labelled = report.null_labels + sum(report.unknown_labels.values())
    assert kept + report.bad_rows + labelled == report.rows
    good = parts[Key("a", "nexus4", "nexus4_1")]
    assert set(range(1_000_000, 1_004_000, 10)) <= set((good["arrival"] // MS).tolist())
    for own in parts.values():
        clean(own)


def test_the_same_input_gives_the_same_bytes(tmp_path):
    folder = tmp_path / "set"
    command = [sys.executable, "scripts/make_hhar_csv.py", str(folder), "--rows", "80000"]
    subprocess.run([*command, "--no-watches"], cwd=ROOT, check=True, capture_output=True)
    contents = set()
    for number in range(2):
        cache = f"app.config.cache-dir={tmp_path / str(number)}"
        contents.add(load_dataset(hhar(folder, cache).data).content)
    copy = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    contents.add(load_dataset(hhar(copy).data).content)
    assert len(contents) == 1


# -------------------------------------------------------------------- the command line


def data_command(*args: str, env=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fedge_sim.data", *args],
        cwd=ROOT,
        env=clean_environment(**(env or {})),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_prepare_and_describe(shared, tmp_path):
    root = str(shared / "data" / "hhar_schema")
    phones = ("--set", "app.config.use-watches=false")
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    done = data_command("prepare", "hhar", "--data-root", root, *phones, env=env)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "fedge-sim").glob("hhar-*/X.npy"))) == 1
    rows = {c[0]: c[1:] for c in (line.split() for line in cells(done.stdout))}
    assert rows["a"][-1] == "370"
    assert rows["all"][-1] == "2,973"
    assert sum(int(rows[user][-1]) for user in "abcdefghi") == 2973
    assert "Phones_accelerometer.csv: 200,384 rows" in done.stdout

    done = data_command(
        *("describe", "hhar", "--data-root", root, *phones),
        *("--set", "app.config.partition=classes", "--set", "app.config.partition-classes=1"),
        env=env,
    )
    assert done.returncode == 0, done.stderr
    assert "2,973 examples" in done.stdout
    clients = [line.split() for line in cells(done.stdout.split("partition classes")[1])]
    clients = [row for row in clients if row[0].isdigit()]
    assert len(clients) == 9
    for row in clients:  # leaf, client, training, test, distance, one class
        counts = [int(n) for n in row[5:]]
        assert sum(counts) == max(counts) == int(row[2]) + int(row[3])
        share = {"walking": 685, "sitting": 581, "standing": 623, "biking": 0}
        share |= {"stairsup": 569, "stairsdown": 515}
        of_all = share[CLASSES[int(np.argmax(counts))]] / 2973
        assert float(row[4]) == pytest.approx(1 - of_all, abs=0.001)
    assert "2,973 of 2,973 are used" in done.stdout


def cells(text: str) -> list[str]:
    """Return the lines of a table without its lines."""
    bare = (line.replace("│", " ").strip() for line in text.splitlines() if "│" in line)
    return [line for line in bare if line]


def test_names_and_paths_may_look_like_anything(tmp_path):
    odd = tmp_path / "d \N{GRINNING FACE} \"'"
    rows = table(steady(4, user="[/red]"), steady(0.04, gt="[/b]swim"))
    write_set(odd, rows, table(steady(4, user="[/red]")))
    phones = ("--set", "app.config.use-watches=false")
    one_client = ("--set", "hierarchy.num_servers=1", "--set", "hierarchy.clients_per_server=[1]")
    done = data_command(
        *("describe", "hhar", "--data-root", str(odd), *phones, *one_client),
        env={"XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    assert "[/red]" in done.stdout
    assert "'[/b]swim' 4" in done.stdout
    assert all(name in data_command("--help").stdout for name in DATASETS)


def test_the_command_line_tells_what_is_wrong(tmp_path):
    for args, message in (
        (("prepare", "hhar", "--data-root", str(tmp_path)), "needs the file Phones_accelerometer"),
        (("prepare", "hharr"), "did you mean 'hhar'?"),
        (("describe", "digits", "--set", "app.config.partition=usr"), "did you mean 'user'"),
        (("describe", "digits"), "does not say the user of an example"),
    ):
        done = data_command(*args)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
