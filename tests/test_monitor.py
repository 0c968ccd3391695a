"""The timeline of a run, the figures made from it, and the command that shows them."""

import json
import os
import subprocess
import sys
import threading
import time
from itertools import pairwise

import matplotlib.image
import numpy as np
import polars as pl
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from fedge_sim.errors import TimelineError
from fedge_sim.monitor import (
    Told,
    busy_seconds,
    find_run,
    main,
    most_workers,
    parse_rounds,
    phases,
    read_timeline,
    read_workers,
    total,
)
from fedge_sim.reporting.base import ClientDone, RunInfo
from fedge_sim.reporting.picture import COLOURS, draw, sub_lanes
from fedge_sim.reporting.tables import TableWriter
from fedge_sim.reporting.timeline import COLUMNS, TIMELINE, WORKERS, TimelineWriter
from tests.conftest import ROOT, clean_environment, run

HEADER = ",".join(COLUMNS) + "\n"
# Two actors. Round 1: a is busy 0-4 and 6-10 (two clients at once from 1 to 3), b 0-8; then both
# evaluate for a second. Round 2: a alone, 2 seconds.
BY_HAND = (
    "1,train,0,0,a,0.0,4.0\n"
    "1,train,0,1,a,1.0,3.0\n"
    "1,train,1,2,b,0.0,8.0\n"
    "1,train,0,3,a,6.0,10.0\n"
    "1,leaf,0,0,a,11.0,12.0\n"
    "1,cloud,1,2,b,11.0,12.0\n"
    "2,train,0,0,a,20.0,22.0\n"
)
BOTH = [Told(-1.0, ["a", "b"])]


@pytest.fixture
def folder(tmp_path):
    """A results folder with the timeline above."""
    results = tmp_path / "results" / "a run"
    results.mkdir(parents=True)
    (results / TIMELINE).write_text(HEADER + BY_HAND)
    (results / WORKERS).write_text('[{"told_s": -1.0, "workers": ["a", "b"]}]')
    return results


def timeline_of(spans, worker="a"):
    """Return a timeline of one round's training from (start, end) pairs of one worker."""
    schema = {"round": int, "phase": str, "worker": str, "client": int, "start_s": float}
    rows = [(1, "training", worker, c, s, e) for c, (s, e) in enumerate(spans)]
    return pl.DataFrame(rows, schema={**schema, "end_s": float}, orient="row")


def busy(spans):
    return busy_seconds(timeline_of(spans))["busy_s"].item()


# --------------------------------------------------------------------- figures


def test_the_figures_by_hand(folder):
    table = phases(read_timeline(folder / TIMELINE), BOTH)
    rows = table.select("round", "phase", "wall_s", "busy_s", "workers", "longest_client").rows()
    assert rows == [
        (1, "training", 10.0, 16.0, 2, 2),
        (1, "evaluation", 1.0, 2.0, 2, 0),
        (2, "training", 2.0, 2.0, 2, 0),
    ]
    assert table["mean_busy"].to_list() == [1.6, 2.0, 1.0]
    assert table["parallelism"].to_list() == [0.8, 1.0, 0.5]
    assert table["longest_s"].to_list() == [8.0, 1.0, 2.0]
    assert total(table) == (12.0, 1.5, 0.75)
    assert total(table, "evaluation") == (1.0, 2.0, 1.0)


def test_a_phase_without_length_has_no_parallelism():
    whole = total(phases(timeline_of([(3.0, 3.0)]), BOTH))
    assert whole.wall_s == 0.0
    assert np.isnan(whole.mean_busy)
    assert np.isnan(whole.parallelism)


def test_workers_are_those_that_there_were():
    told = [Told(-1.0, ["a", "b"]), Told(5.0, ["a"]), Told(9.0, ["a", "b", "c"])]
    start, end = np.array([[-2, -0.5], [0, 4], [0, 6], [5, 8], [6, 9], [6, 9.5], [20, 20]]).T
    assert most_workers(told, start, end).tolist() == [2, 2, 2, 1, 1, 3, 3]


seconds = st.integers(0, 40)
spans = st.lists(st.tuples(seconds, seconds).map(sorted).map(tuple), min_size=1, max_size=12)


@given(spans)
def test_busy_time_is_the_union_of_the_spans(spans):
    seconds_of = [set(range(start, end)) for start, end in spans]
    assert busy(spans) == len(set().union(*seconds_of))


@given(spans, st.randoms())
def test_busy_time_does_not_depend_on_the_order_or_on_repeats(spans, random):
    shuffled = spans * 2
    random.shuffle(shuffled)
    assert busy(shuffled) == busy(spans)


@given(st.lists(spans, min_size=1, max_size=4))
def test_parallelism_is_a_share_and_that_of_twice_the_workers_is_half(spans_by_worker):
    frame = pl.concat([timeline_of(s, f"w{i}") for i, s in enumerate(spans_by_worker)])
    names = [f"w{i}" for i in range(len(spans_by_worker))]
    table = phases(frame, [Told(0.0, names)])
    if table["wall_s"].item() > 0:
        assert 0 <= table["parallelism"].item() <= 1
        idle_too = phases(frame, [Told(0.0, names + [f"idle {n}" for n in names])])
        assert idle_too["parallelism"].item() == table["parallelism"].item() / 2
        assert (
            table["longest_s"].item()
            <= table["busy_s"].item()
            <= table["wall_s"].item() * len(names)
        )


@given(spans)
def test_bars_in_a_sub_lane_never_hide_each_other_and_lanes_are_few(spans):
    starts, ends = zip(*spans, strict=True)
    lanes = sub_lanes(starts, ends)
    for lane in set(lanes):
        own = sorted(span for span, at in zip(spans, lanes, strict=True) if at == lane)
        assert all(before[1] <= after[0] for before, after in pairwise(own))
    at_once = [sum(s <= t < max(e, s + 1e-9) for s, e in spans) for t in starts]
    assert lanes.max() + 1 <= max(at_once)


# ---------------------------------------------------------------------- writer


class ToldOfTwoActors(TimelineWriter):
    """Tells itself, as a grid on two actors does: one trains everyone, the other none."""

    def on_run_start(self, info):
        self.on_workers(["trainer-0", "trainer-1"])
        super().on_run_start(info)
        self.leaf_of = {
            client: leaf
            for leaf, clients in enumerate(info.settings.hierarchy.leaf_clients)
            for client in clients
        }

    def on_round_end(self, record):
        threads = [
            threading.Thread(target=self._tell, args=(client, time.time())) for client in range(9)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        super().on_round_end(record)
        assert self._done == []

    def _tell(self, client, now):
        for purpose in ("train", "leaf"):
            leaf = self.leaf_of[client]
            self.on_client_done(ClientDone(client, leaf, purpose, "trainer-0", now, now + 0.25))


def test_a_run_writes_its_timeline(small):
    result = run(small(), [TableWriter(), ToldOfTwoActors()])
    lines = (result.folder / TIMELINE).read_text().splitlines()
    assert lines[0] == "round,purpose,leaf,client,worker,start_s,end_s"
    timeline = read_timeline(result.folder / TIMELINE)
    assert timeline.group_by("round", "phase").len().sort("round", "phase").rows() == [
        (1, "evaluation", 9),
        (1, "training", 9),
        (2, "evaluation", 9),
        (2, "training", 9),
    ]
    assert timeline.select("client", "leaf").unique().sort("client").rows() == [
        (client, client // 3) for client in range(9)
    ]
    assert timeline["start_s"].is_sorted()
    assert 0 < timeline["start_s"][0] < timeline["end_s"][-1] < 60  # since the run's start
    assert all(len(line.rpartition(".")[2]) <= 6 for line in lines[1:])
    told = read_workers(result.folder / WORKERS, timeline)
    assert [entry.workers for entry in told] == [["trainer-0", "trainer-1"]]
    assert phases(timeline, told)["parallelism"].to_list() == pytest.approx([0.5] * 4)


@pytest.fixture
def begun(small, tmp_path):
    """Return a function that begins the files of a writer, and one that ends a round."""

    class Record:
        global_round = 1

    writer = TimelineWriter()

    def begin():
        writer.on_run_start(RunInfo(small(), tmp_path, data=None, num_parameters=1))

    def end(number):
        record = Record()
        record.global_round = number
        writer.on_round_end(record)
        return read_timeline(tmp_path / TIMELINE)

    return writer, begin, end


def test_what_is_told_before_the_start_is_kept_and_what_is_unfinished_not(begun, tmp_path):
    writer, begin, end = begun
    now = time.time()
    writer.on_client_done(ClientDone(4, 1, "train", 'a,b "c"', now - 2, now - 1))
    begin()
    assert (tmp_path / TIMELINE).read_text() == HEADER
    (row,) = end(1).select("round", "client", "worker").rows()
    assert row == (1, 4, 'a,b "c"')
    writer.on_client_done(ClientDone(5, 1, "train", "a", now, now - 3))  # a clock set back
    writer.close()
    assert len(read_timeline(tmp_path / TIMELINE)) == 1
    last = end(2).row(-1, named=True)
    assert (last["round"], last["client"]) == (2, 5)
    assert last["start_s"] == last["end_s"]


def test_workers_are_written_when_they_change(begun, tmp_path):
    writer, begin, end = begun
    begin()
    for workers in (["a", "b"], ["a", "b"], ["a"]):
        writer.on_workers(workers)
    assert json.loads((tmp_path / WORKERS).read_text()) == []
    writer.on_client_done(ClientDone(0, 0, "train", "a", 1.0, 2.0))
    timeline = end(1)
    told = read_workers(tmp_path / WORKERS, timeline)
    assert [entry.workers for entry in told] == [["a", "b"], ["a"]]
    before = (tmp_path / WORKERS).stat().st_mtime_ns
    end(2)
    assert (tmp_path / WORKERS).stat().st_mtime_ns == before


# --------------------------------------------------------------------- reading


@pytest.mark.parametrize("half", ["2,train,0,0,a,20.0,2", "2,tr", '2,train,0,0,"a'])
def test_a_half_written_last_line_is_skipped(folder, half):
    whole = read_timeline(folder / TIMELINE)
    with (folder / TIMELINE).open("a") as file:
        file.write(half)
    assert read_timeline(folder / TIMELINE).equals(whole)


@pytest.mark.parametrize(
    "row",
    [
        "1,train,0,0,a,0.0",
        "1,train,0,0,a,0.0,1.0,2.0",
        "1,train,0,0,a,0.0,wrong",
        "1,train,0,0,a,0.0,nan",
        "1,train,0,0,a,2.0,1.0",
        "0,train,0,0,a,0.0,1.0",
        "1,train,0,-1,a,0.0,1.0",
        "1,train,0,0.5,a,0.0,1.0",
        "1,train,0,0,,0.0,1.0",
        "",
    ],
)
def test_a_damaged_row_is_named_by_its_line(folder, row):
    (folder / TIMELINE).write_text(HEADER + BY_HAND + row + "\n" + BY_HAND)
    with pytest.raises(TimelineError, match=r"timeline.csv, line 9: damaged row '") as caught:
        read_timeline(folder / TIMELINE)
    assert f"{row!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty; rows come when"),
        (HEADER, "empty; rows come when"),
        (HEADER[:9], "empty; rows come when"),
        ("round,server\n1,2\n", "line 1: expected the columns round,purpose,"),
        (HEADER + '1,"train,0\n' * 3, "damaged"),
        (HEADER + "\0\n\xff\n", "damaged"),
    ],
)
def test_a_timeline_that_is_none(folder, content, message):
    (folder / TIMELINE).write_bytes(content.encode("latin-1"))
    with pytest.raises(TimelineError, match=message) as caught:
        read_timeline(folder / TIMELINE)
    assert "\n" not in str(caught.value)


def test_workers_without_or_with_a_damaged_file(folder):
    timeline = read_timeline(folder / TIMELINE)
    (folder / WORKERS).write_text("[]")
    assert read_workers(folder / WORKERS, timeline)[0].workers == ["a", "b"]
    (folder / WORKERS).unlink()
    assert read_workers(folder / WORKERS, timeline)[0].workers == ["a", "b"]
    for content in ("[{", '[{"told_s": 1.0}]', '{"a": 1}', "\0"):
        (folder / WORKERS).write_text(content)
        with pytest.raises(TimelineError, match=r"workers.json: damaged \(.*") as caught:
            read_workers(folder / WORKERS, timeline)
        assert "\n" not in str(caught.value)


def test_every_path_that_means_a_run(folder):
    older = folder.parent / "older"
    metrics = folder / "metrics" / "seed_42"
    for path in (older, metrics):
        path.mkdir(parents=True)
    (older / TIMELINE).write_text(HEADER)
    os.utime(older / TIMELINE, (1, 1))
    (metrics / "clients.csv").write_text("")
    paths = [folder, folder.parent, folder / TIMELINE, metrics, metrics / "clients.csv"]
    assert [find_run(path) for path in paths] == [folder] * 5
    assert find_run(older / TIMELINE) == older


@pytest.mark.parametrize(("text", "span"), [("3", (3, 3)), ("3-5", (3, 5)), (" 10-10 ", (10, 10))])
def test_rounds(text, span):
    assert parse_rounds(text) == span


@pytest.mark.parametrize("text", ["", "0", "-3", "3-", "5-3", "3..5", "three", "1e9", "٣"])
def test_rounds_that_are_none(text):
    with pytest.raises(TimelineError, match="expected a round, as 3, or a span of them, as 3-5"):
        parse_rounds(text)


# --------------------------------------------------------------------- picture


def share_of(picture, colour):
    """Return which share of a picture's pixels has a colour."""
    return float((abs(picture[..., :3] - to_rgb(colour)).max(axis=-1) < 0.02).mean())


def drawn(tmp_path, rows, workers=("a",)):
    (tmp_path / TIMELINE).write_text(HEADER + "".join(rows))
    file = tmp_path / "picture.png"
    draw(read_timeline(tmp_path / TIMELINE), workers, "a title", file)
    return matplotlib.image.imread(file)


def test_the_picture_shows_bars_in_the_leaves_colours(folder):
    draw(read_timeline(folder / TIMELINE), ["a", "b", "idle"], "title", folder / "p.png")
    picture = matplotlib.image.imread(folder / "p.png")
    height, width, _ = picture.shape
    assert width == 1650
    assert 400 < height < 800
    first, second, third = (share_of(picture, colour) for colour in COLOURS[:3])
    assert first > 0.02  # leaf server 0: 12 seconds in lanes of the picture's 22
    assert second > 0.03
    assert third == 0
    # Clients side by side are stacked.
    one = drawn(folder, ["1,train,0,0,a,0,1\n", "1,train,0,0,a,1,2\n"])
    two = drawn(folder, ["1,train,0,0,a,0,1\n", "1,train,0,0,a,0,1\n"] * 4)
    assert two.shape[0] > 1.3 * one.shape[0]


def test_bars_too_thin_to_see_still_show_a_busy_worker(tmp_path):
    rows = [f"{i + 1},train,0,0,a,{i * 0.01:.2f},{i * 0.01 + 0.009:.3f}\n" for i in range(20_000)]
    assert share_of(drawn(tmp_path, rows), COLOURS[0]) > 0.1


def test_many_leaves_and_workers_and_no_time(tmp_path):
    rows = [f"1,train,{i},{i},trainer-{i},1.0,1.0\n" for i in range(200)]
    assert drawn(tmp_path, rows, [f"trainer-{i}" for i in range(200)]).shape[0] == 2400


# --------------------------------------------------------------------- command


def monitor(*args, cwd):
    return subprocess.run(
        [sys.executable, "-m", "fedge_sim.monitor", *args],
        cwd=cwd,
        env=clean_environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_prints_the_table_and_draws_the_last_rounds(folder):
    with (folder / TIMELINE).open("a") as file:
        file.writelines(f"{g},train,2,5,b,{g * 10}.0,{g * 10 + 1}.0\n" for g in (3, 4, 5))
    done = monitor("results", cwd=folder.parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "│     1 │ training   │ 10.000 │      1.60 │       2 │       80.0% │" in done.stdout
    assert "client 2, 8.000 s" in done.stdout
    assert "training: 15.00 s, on average 1.40 of 2 workers busy: parallelism 70.0%" in done.stdout
    assert f"picture of rounds 3 to 5: {folder / 'timeline.png'}" in done.stdout
    picture = matplotlib.image.imread(folder / "timeline.png")
    assert share_of(picture, COLOURS[2]) > 0.01  # leaf server 2, the only one in these rounds
    assert share_of(picture, COLOURS[0]) == 0


def test_the_command_ends_with_one_line_and_a_code(tmp_path):
    done = monitor("nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'nowhere'}: no such file or folder\n"


@pytest.mark.parametrize(
    ("suffix", "begins"), [("pdf", b"%PDF"), ("svg", b"<?xml"), ("PNG", b"\x89PNG")]
)
def test_other_formats_of_some_rounds(folder, capsys, suffix, begins):
    file = folder / f"p.{suffix}"
    main(folder, file, "2-9")
    shown = capsys.readouterr().out
    assert "evaluation" not in shown  # none in that round
    assert f"picture of round 2: {file}" in shown
    assert file.read_bytes().startswith(begins)
    assert not (folder / "timeline.png").exists()


@pytest.mark.parametrize(
    ("run", "output", "rounds", "message"),
    [
        ("empty", None, None, "empty: no timeline.csv here"),
        ("a run", None, "7", "which has the rounds 1 to 2"),
        ("a run", None, "", "--rounds : expected a round"),
        ("a run", "p.doc", None, "p.doc: expected a name that ends in .png, .pdf, .svg"),
        ("a run", "none/p.png", None, "none/p.png: cannot be written (No such file"),
        ("a run", "d.png", None, "d.png: cannot be written (Is a directory)"),
    ],
)
def test_what_the_command_cannot_do(folder, capsys, run, output, rounds, message):
    (folder.parent / "empty").mkdir()
    (folder.parent / "d.png").mkdir()
    with pytest.raises(typer.Exit) as caught:
        main(folder.parent / run, output and folder.parent / output, rounds)
    error = capsys.readouterr().err
    assert caught.value.exit_code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
