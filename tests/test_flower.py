"""Real runs of Flower: ``flwr run .`` on a SuperLink of this test's own."""

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import tomli
from safetensors.numpy import load_file

from fedge_sim.orchestrator import Orchestrator
from fedge_sim.reporting.weights import WeightWriter
from fedge_sim.runtime.in_process import InProcessGrid
from tests import unruly
from tests.conftest import OVER_SEVERAL_LINES, ROOT, SMALL, run
from tests.test_replies import ONE_LEAF

TIME_COLUMNS = {"total_comp_time_sec", "comp_time_sec", "round_time_sec"}


def two_free_ports() -> list[str]:
    with socket.create_server(("127.0.0.1", 0)) as a, socket.create_server(("127.0.0.1", 0)) as b:
        return [str(s.getsockname()[1]) for s in (a, b)]


class Flower:
    """The ``flwr`` command with a home and ports of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        http, control = two_free_ports()
        self.environment = {
            **{k: v for k, v in os.environ.items() if k != "SEED"},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(home),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": http,
            "FLWR_LOCAL_CONTROL_API_PORT": control,
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
        }

    def __call__(self, *args: str, cwd: Path = ROOT) -> str:
        return subprocess.run(
            ["flwr", *args],
            cwd=cwd,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=True,
        ).stdout

    def run(
        self, overrides: str, output: Path, nodes: int | None, app: Path = ROOT
    ) -> tuple[str, str]:
        """Return the status of a run and what it printed."""
        federation = f"num-supernodes={nodes} client-resources-num-cpus=1"
        self(
            *("run", str(app), "--stream"),
            *(("--federation-config", federation) if nodes else ()),
            *("-c", f'output-dir="{output}" overrides="{overrides}"'),
            cwd=app,
        )
        newest = json.loads(self("list", "--format", "json"))["runs"][0]
        # What is streamed may end before the log does.
        return newest["status"], self("log", str(newest["run-id"]), "--show")

    def start(self) -> None:
        """Start the SuperLink: Flower gives it 15 s, which a busy machine may not have."""
        for _ in range(10):
            with suppress(subprocess.CalledProcessError):
                self("list")
                return
        raise AssertionError("no SuperLink starts")

    def superlink(self) -> psutil.Process:
        """Return the process that listens on this Flower's port."""
        port = int(self.environment["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"])
        [process] = {
            c.pid
            for c in psutil.net_connections("tcp")
            if c.laddr.port == port and c.status == psutil.CONN_LISTEN
        }
        return psutil.Process(process)

    def stop(self) -> None:
        """End every process that has this home, and their children."""
        own = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("FLWR_HOME") == str(self.home):
                    own += [process, *process.children(recursive=True)]
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        for process in own:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(own, timeout=60)


@pytest.fixture(scope="module")
def flower(tmp_path_factory):
    flower = Flower(tmp_path_factory.mktemp("flower-home"))
    yield flower
    flower.stop()
    # Nothing that belongs to this home is left.
    assert not [
        p
        for p in psutil.process_iter(["environ"])
        if (p.info["environ"] or {}).get("FLWR_HOME") == str(flower.home)
        and p.status() != psutil.STATUS_ZOMBIE
    ]


def test_the_command_of_the_readme_ends_this_superlink_and_no_other(flower, tmp_path):
    text = (ROOT / "README.md").read_text()
    assert not re.search(r"pkill|killall", text)
    [command] = re.findall(r"^ *(kill .*)$", text, flags=re.MULTILINE)
    if not shutil.which("lsof"):
        pytest.skip("lsof is not installed here")
    own = Flower(tmp_path / "home")
    try:
        for each in (flower, own):
            each.start()
        theirs, ours = (each.superlink() for each in (flower, own))
        subprocess.run(["bash", "-c", command], env=own.environment, check=True, timeout=60)
        ours.wait(60)
        assert theirs.is_running()
        assert flower.superlink() == theirs
    finally:
        own.stop()


def git_status() -> str:
    if not shutil.which("git") or not (ROOT / ".git").exists():
        return ""
    command = ["git", "status", "--porcelain"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("nodes", [None, 9, 12])
def test_flwr_run_equals_the_run_in_this_process(flower, small, tmp_path, nodes):
    """With Flower's default of 2 SuperNodes, with as many as clients, and with more."""
    before = git_status(), (ROOT / "pyproject.toml").read_bytes()
    status, log = flower.run(" ".join(SMALL), tmp_path / "flower", nodes)
    assert status == "finished:completed", log
    assert (git_status(), (ROOT / "pyproject.toml").read_bytes()) == before
    (theirs,) = (tmp_path / "flower").iterdir()
    assert f"results: {theirs}" in log
    assert f"9 clients, nodes that serve them: {min(nodes or 2, 9)}\n" in log
    ours = run(small()).folder

    models = sorted(f.name for f in (ours / "models").glob("*.safetensors"))
    assert models == sorted(f.name for f in (theirs / "models").glob("*.safetensors"))
    for name in models:
        a, b = (load_file(folder / "models" / name) for folder in (ours, theirs))
        assert max(np.abs(a[key] - b[key]).max() for key in a) <= 1e-6

    files = {f.relative_to(ours) for f in ours.rglob("*") if f.is_file()}
    assert files == {f.relative_to(theirs) for f in theirs.rglob("*") if f.is_file()}
    for name in files:
        if name.suffix == ".csv":
            for a, b in zip(table(ours / name), table(theirs / name), strict=True):
                assert a.keys() == b.keys()
                assert a.get("fate") == b.get("fate")
                for column in a.keys() - TIME_COLUMNS - {"fate"}:
                    same = pytest.approx(float(b[column]), abs=1e-6, nan_ok=True)
                    assert float(a[column]) == same, (name, column)
    history = Path("metrics") / "seed_42" / "cluster_history.json"
    a, b = (json.loads((folder / history).read_text()) for folder in (ours, theirs))
    assert [entry["clusters"] for entry in a] == [entry["clusters"] for entry in b]


def test_flwr_build_makes_a_bundle_of_version_1(flower, tmp_path):
    printed = flower("build", "--app", str(ROOT), cwd=tmp_path)
    (file,) = tmp_path.glob("*.fab")
    assert f"Successfully built {file.name}" in printed
    with zipfile.ZipFile(file) as bundle:
        names = set(bundle.namelist())
        assert bundle.read("LICENSE") == (ROOT / "LICENSE").read_bytes()
        document = tomli.loads(bundle.read("pyproject.toml").decode())
        listed = {line.split(",")[0] for line in bundle.read(".info/CONTENT").decode().split("\n")}
    code = {str(f.relative_to(ROOT)) for f in (ROOT / "fedge_sim").rglob("*.py")}
    assert names == code | {"LICENSE", "pyproject.toml", ".info/CONTENT"}
    assert listed == names - {".info/CONTENT"}
    assert document["project"]["license"] == {"file": "LICENSE"}
    app = document["tool"]["flwr"]["app"]
    assert (app["fab-format-version"], app["flwr-version-target"]) == (1, "1.42.0")


def test_flwr_run_takes_tables_over_several_lines(flower, tmp_path):
    """What TOML 1.1 allows in an application's file."""
    app = tmp_path / "fedge-sim"
    shutil.copytree(ROOT / "fedge_sim", app / "fedge_sim", ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copy(ROOT / "LICENSE", app)
    text = (ROOT / "pyproject.toml").read_text()
    (app / "pyproject.toml").write_text(text + "\n" + OVER_SEVERAL_LINES)
    few = (*SMALL, "hierarchy.global_rounds=1", "devices.update_timeout=30.0")
    status, log = flower.run(" ".join(few), tmp_path / "out", None, app)
    assert status == "finished:completed", log
    (folder,) = (tmp_path / "out").iterdir()
    devices = json.loads((folder / "run.json").read_text())["settings"]["devices"]
    assert (devices["device_speed"]["mean"], devices["update_timeout"]) == ([1.0, 1.3, 1.6], 30)


def test_a_wrong_setting_fails_the_run_and_names_itself(flower, tmp_path):
    status, log = flower.run("hierarchy.global_round=5", tmp_path / "out", None)
    assert status == "finished:failed"
    assert "[hierarchy] global_round = 5: unknown key; did you mean 'global_rounds'?" in log
    assert not (tmp_path / "out").exists()


UNRULY_APP = """
[project]
name = "unruly"
version = "1.0.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "server:app"
clientapp = "client:app"

[tool.flwr.app.config]
output-dir = ""
overrides = ""
"""
UNRULY_CLIENT = """
import sys

sys.path.insert(0, {root!r})
from flwr.clientapp import ClientApp
from tests import unruly


class Unruly(ClientApp):
    def __call__(self, message, context):
        return unruly.app(message, context)


app = Unruly()
"""


def test_clients_that_misbehave_are_left_out_by_name(flower, small, tmp_path):
    """Replies of the wrong form, one that comes too late, and an error, in Flower's simulation.

    A client that never ended would keep Flower from ending the simulation.
    """
    app = tmp_path / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(UNRULY_APP)
    (app / "server.py").write_text("from fedge_sim import server_app\n\napp = server_app.app\n")
    (app / "client.py").write_text(UNRULY_CLIENT.format(root=str(ROOT)))
    trained = ["raise", "float64", "a shape that broadcasts", "no metrics", "negative examples"]
    rules = {f"c{n}": (name, 99) for n, name in enumerate([*trained, "take 100 s"], start=1)}
    rules |= {"e7": ("an accuracy above 1", 99)}
    output = small(f"app.config.output-dir={tmp_path / 'out'}")
    unruly.rule(output, **rules)
    one_round = (*SMALL, *ONE_LEAF, "runtime.client_timeout_s=45.0")
    status, log = flower.run(" ".join(one_round), tmp_path / "out", 9, app)
    assert status == "finished:completed", log
    said = " ".join(log.split())
    for client, words in {
        1: "",
        2: "the array ",
        3: "the array ",
        4: "its reply has no metrics",
        5: "'num-examples' in its reply is -3",
        6: "no reply within 45 s (client_timeout_s)",
        7: "'accuracy' in its reply is 1.5",
    }.items():
        assert f"client {client} of leaf server 0 left out: {words}" in said, said
    (theirs,) = (folder for folder in (tmp_path / "out").iterdir() if folder.is_dir())
    rows = table(theirs / "metrics/seed_42/clients.csv")
    sent = [int(row["client"]) for row in rows if float(row["bytes_up"])]
    assert sent == [0, 7, 8]
    unruly.rule(small(*ONE_LEAF), **{f"c{n}": ("raise", 99) for n in range(1, 7)})
    with InProcessGrid(unruly.app, 2, small(*ONE_LEAF).runtime) as grid:
        ours = Orchestrator(small(*ONE_LEAF), grid, [WeightWriter()]).run().folder
    for file in (ours / "models").glob("*.safetensors"):
        a, b = load_file(file), load_file(theirs / "models" / file.name)
        assert max(np.abs(a[key] - b[key]).max() for key in a) <= 1e-6
