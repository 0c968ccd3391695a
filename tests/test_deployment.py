"""Real processes: a SuperLink and SuperNodes on 127.0.0.1, whose clients keep their state there."""

import json
import subprocess
import time
from contextlib import suppress

import psutil
import pytest

from tests.conftest import ROOT, SMALL, run
from tests.test_flower import Flower, table, two_free_ports

# Few clients: a SuperNode starts a process for every message.
RULE = (
    *("hierarchy.client_rule=scaffold", "hierarchy.num_servers=1"),
    "hierarchy.clients_per_server=[2]",
)
MODEL = "metrics/seed_42/clients.csv"


@pytest.fixture
def deployment(tmp_path):
    """Yield a Flower whose connection "here" is a SuperLink with two SuperNodes."""
    flower = Flower(tmp_path / "home")
    (flower.home).mkdir()
    link, control = two_free_ports()
    (flower.home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    )

    def start(*command):
        log = (tmp_path / f"{command[0]}-{len(list(tmp_path.iterdir()))}.log").open("w")
        with log:
            return subprocess.Popen(
                command, cwd=ROOT, env=flower.environment, stdout=log, stderr=subprocess.STDOUT
            )

    start(
        *("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", link),
        *("--control-api-address", f"127.0.0.1:{control}"),
    )

    def start_node(clients):
        port, _ = two_free_ports()
        return start(
            *("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}"),
            *("--node-config", f'client-ids="{clients}"', "--port", port),
        )

    flower.start, flower.start_node = start, start_node
    flower.nodes = [start_node(clients) for clients in ("0", "1")]
    time.sleep(3)
    yield flower
    flower.stop()


def test_scaffold_on_supernodes_equals_the_run_in_this_process(deployment, small, tmp_path):
    output = tmp_path / "deployed"
    log = deployment(
        *("run", ".", "here", "--stream"),
        *("-c", f'output-dir="{output}" overrides="{" ".join((*SMALL, *RULE))}"'),
    )
    assert output.exists(), log
    (theirs,) = output.iterdir()
    ours = run(small(*RULE)).folder
    rows, expected = table(theirs / MODEL), table(ours / MODEL)
    assert len(rows) == len(expected) == 4
    for a, b in zip(rows, expected, strict=True):
        for column in ("own_accuracy", "own_loss", "own_train_loss", "bytes_up"):
            assert float(a[column]) == pytest.approx(float(b[column]), abs=1e-6), column
    assert not (theirs / "state").exists()  # it is with the nodes


def kill(process):
    """Kill a process and all that it started, as a machine does that loses its power."""
    own = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in own:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait(30)


def test_a_supernode_that_is_killed_and_comes_back_is_taken_in_again(deployment, tmp_path):
    """Killed in the first round, which goes on without its client, and back in the second."""
    output = tmp_path / "deployed"
    two = ("hierarchy.num_servers=1", "hierarchy.clients_per_server=[2]")
    deployment.start(
        *("flwr", "run", ".", "here", "--stream"),
        *("-c", f'output-dir="{output}" overrides="{" ".join((*SMALL, *two))}"'),
    )

    def wait_until(happened):
        deadline = time.monotonic() + 400
        while not happened():
            assert time.monotonic() < deadline, [f.read_text() for f in tmp_path.glob("*.log")]
            time.sleep(0.2)

    wait_until(lambda: list(output.glob("*/run.json")))
    kill(deployment.nodes[1])
    deployment.start_node("1")
    *_, new = sorted(tmp_path.glob("flower-supernode-*.log"))
    wait_until(lambda: "Sending: train message" in new.read_text())
    (rows,) = map(table, output.glob(f"*/{MODEL}"))
    sent = [(row["client"], float(row["bytes_up"]) > 0) for row in rows if row["round"] == "1"]
    assert sent == [("0", True), ("1", False)]
    newest = json.loads(deployment("list", "here", "--format", "json"))["runs"][0]
    said = " ".join(deployment("log", str(newest["run-id"]), "here", "--show").split())
    assert "client 1 of leaf server 0 left out: Error: Node Unavailable" in said
    assert "client 1 is served by node " in said
    assert "Traceback" not in said
