"""``python -m fedge_sim.orchestrator`` on Ray: what a person sees, stops, and looks at."""

import csv
import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.conftest import SMALL, clean_environment, command_line

SETS = [argument for override in SMALL for argument in ("--set", override)]


class Command:
    """A run of the command line in a session of its own, its output read line by line."""

    def __init__(self, output, *sets: str, **environment: str) -> None:
        arguments = [part for pair in sets for part in ("--set", pair)]
        self.process = subprocess.Popen(
            command_line("--output-dir", str(output), *SETS, *arguments),
            env=clean_environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.seen = ""

    def wait_for(self, pattern: str) -> str:
        """Read on until a line has the pattern; return what its group matched."""
        for line in self.process.stdout:
            self.seen += line
            if found := re.search(pattern, line):
                return found[found.re.groups]
        raise AssertionError(f"{pattern!r} never came:\n{self.seen}")

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> int:
        self.seen += self.process.stdout.read()
        return self.process.wait(300)


@pytest.fixture
def command(tmp_path):
    started = []

    def start(*sets: str, **environment: str) -> Command:
        started.append(Command(tmp_path / "results", *sets, **environment))
        return started[-1]

    yield start
    for run in started:
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)
        run.process.stdout.close()
        print(run.seen, f"ended with {run.process.wait()}")  # which pytest shows if a test failed


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_no_process_and_keeps_finished_rounds(command, tmp_path, how):
    run = command("runtime.backend='ray'", "hierarchy.global_rounds=1000")
    run.wait_for("round 2/1000")
    children = run.children()
    assert any("ray::Trainer" in " ".join(child.cmdline()) for child in children)
    # Ctrl-C reaches all processes of the terminal, a batch system's signal the first one alone.
    if how == signal.SIGINT:
        os.killpg(run.process.pid, how)
    else:
        run.process.send_signal(how)
    assert run.end() == 130
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert "stopped; what is finished is kept: go on with --resume" in run.seen.splitlines()[-1]
    (folder,) = (tmp_path / "results").iterdir()
    rounds = table(folder / "metrics" / "seed_42" / "distributed_metrics.csv")
    assert [row["round"] for row in rounds][:2] == ["1", "2"]
    workers = json.loads((folder / "workers.json").read_text())[-1]["workers"]
    assert {row["worker"] for row in table(folder / "timeline.csv")} == set(workers)


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_run_that_hangs_ends_with_a_stack_dump_and_its_own_exit_code(command):
    slow = "hierarchy.local_epochs=100000"
    run = command("runtime.backend='ray'", "runtime.progress_timeout_s=5.0", slow)
    assert run.end() == 3
    assert "error: no client got done for 5 s (runtime.progress_timeout_s), 9 wait" in run.seen
    assert "--- trainer-0 cpu 1" in run.seen
    assert "training/local.py" in run.seen


def test_the_dashboard_and_its_metrics(command):
    run = command("runtime.dashboard=true", "hierarchy.global_rounds=100000")
    dashboard = run.wait_for(r"Ray dashboard: (http://127\.0\.0\.1:\d+)")
    metrics = run.wait_for(r"metrics for Prometheus: (http://\S+)")
    run.wait_for("round 2/100000")
    actors = json.loads(read(f"{dashboard}/logical/actors"))["data"]["actors"].values()
    names = {actor["reprName"] for actor in actors}
    assert "trainer-0 cpu 1" in names
    assert "<!doctype html>" in read(dashboard).lower()
    deadline = time.monotonic() + 300
    wanted = {"rounds", "accuracy", "clients_per_second", "queue_length", "actor_memory_bytes"}
    while True:
        values = {}
        for line in read(metrics).splitlines():
            if found := re.match(r"ray_fedge_(\w+)\{(.*)\} (\S+)", line):
                values.setdefault(found[1], {})[found[2]] = float(found[3])
        # Every process reports at its own time.
        told = wanted <= values.keys() and len(values["actor_memory_bytes"]) >= len(names)
        if told and max(values["rounds"].values()) >= 2:
            break
        assert time.monotonic() < deadline, values
        time.sleep(0.5)
        run.process.stdout.readline()
    assert all(0 < value <= 1 for value in values["accuracy"].values())
    assert all(value > 0 for value in values["clients_per_second"].values())
    assert {
        re.search(r'actor="([^"]*)"', tags)[1] for tags in values["actor_memory_bytes"]
    } == names
    assert all(value > 2**24 for value in values["actor_memory_bytes"].values())
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130


@pytest.mark.parametrize("dashboard", [False, True])
def test_a_local_run_listens_on_this_machine_alone(command, dashboard):
    shown = f"runtime.dashboard={str(dashboard).lower()}"
    run = command("runtime.backend='ray'", shown, "hierarchy.global_rounds=100000")
    if dashboard:
        read(run.wait_for(r"metrics for Prometheus: (http://127\.0\.0\.1:\d+\S+)"))
    run.wait_for("round 2/100000")
    listening = {}
    for process in [psutil.Process(run.process.pid), *run.children()]:
        with suppress(psutil.NoSuchProcess):
            sockets = process.net_connections("inet")
            there = [s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN]
            found = {address.removeprefix("::ffff:") for address in there}  # IPv4, as IPv6
            listening.setdefault(process.name(), set()).update(found)
    assert {"gcs_server", "raylet"} <= listening.keys()
    assert any(name.startswith("ray::") for name in listening)
    assert listening["gcs_server"] == listening["raylet"] == {"127.0.0.1"}
    assert set().union(*listening.values()) == {"127.0.0.1"}, listening
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130


def test_a_dashboard_that_does_not_start_in_time_is_done_without(command):
    run = command(
        "runtime.dashboard=true", "hierarchy.global_rounds=1", RAY_DASHBOARD_STARTUP_TIMEOUT_S="0"
    )
    assert run.end() == 0
    assert "Ray's dashboard did not start, and the run goes on without it" in run.seen
    assert "round 1/1" in run.seen


def test_a_tmpdir_that_is_too_long_ends_with_the_way_out(command, tmp_path):
    folder = tmp_path / ("scratch-of-a-job-" * 6)
    folder.mkdir()
    run = command("runtime.backend='ray'", TMPDIR=str(folder))
    assert run.end() == 1
    *_, line = run.seen.splitlines()
    assert line.startswith("error: Ray cannot be started: ")
    assert line.endswith(
        "set the environment variable RAY_TMPDIR to a folder with a short name, for example RAY_TMPDIR=/tmp"
    )
    assert "Traceback" not in run.seen
    run = command(
        "runtime.backend='ray'", "hierarchy.global_rounds=1", TMPDIR=str(folder), RAY_TMPDIR="/tmp"
    )
    assert run.end() == 0


def read(url: str) -> str:
    """Read a page; the dashboard shares its cores with the run, and may take its time."""
    deadline = time.monotonic() + 300
    while True:
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                return answer.read().decode()
        except OSError as error:
            if time.monotonic() > deadline:
                raise AssertionError(f"{url} does not answer: {error!r}") from error
            time.sleep(1)
