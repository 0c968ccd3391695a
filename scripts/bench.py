"""Measure this application and plain Flower on one workload, one after the other.

``python scripts/bench.py --workload w1`` prints seconds a round and peak memory of both, and
their ratio. Each side has processes of its own and reads the same arrays. A round lasts until
the next one starts, evaluation and result files included; the first one (imports, data,
actors) is reported apart.
"""

import json
import math
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer

from fedge_sim.config import load_settings
from fedge_sim.data.split import TEST_SHARE
from fedge_sim.orchestrator import run_in_process
from fedge_sim.reporting.base import Callback, RoundRecord, RunInfo
from fedge_sim.reporting.tables import TableWriter
from fedge_sim.reporting.weights import WeightWriter
from fedge_sim.runtime.in_process import available_cores

PLAIN_FLOWER = Path(__file__).resolve().parent / "plain_flower"
OURS = "examples.npz"  # the same arrays as our dataset "arrays" takes them
STAMPS = "stamps.jsonl"  # when each round started, and when the last one ended
MARKER = "FEDGE_BENCH"  # in the environment of every process of a side: the side's folder
SAMPLE_SECONDS = 0.2
SAMPLING_SHARE = 0.05  # of one core, at most: reading PSS takes milliseconds a process
STOP_SECONDS = 10
LOCAL = ("127.0.0.1", 0)  # any free port


@dataclass(frozen=True)
class Workload:
    """What both sides compute: random windows, and how clients train on them."""

    sizes: tuple[tuple[int, ...], ...]  # windows of each client, by leaf server
    training: Mapping[str, float]  # settings of [tool.flwr.hierarchy] that plain Flower has too
    window_shape: tuple[int, ...] = (6, 100)
    num_classes: int = 6
    model: str = "cnn1d"

    @property
    def client_sizes(self) -> tuple[int, ...]:
        """Windows of client 0, 1, ..."""
        return sum(self.sizes, ())

    @property
    def steps(self) -> int:
        """Batch steps of all clients in a round."""
        train = (size - round(TEST_SHARE * size) for size in self.client_sizes)
        batches = sum(math.ceil(n / self.training["batch_size"]) for n in train)
        return int(self.training["local_epochs"]) * batches

    def write(self, folder: Path) -> None:
        """Make the arrays, from a fixed seed."""
        rng, n = np.random.default_rng(0), sum(self.client_sizes)
        folder.mkdir()
        x = rng.standard_normal((n, *self.window_shape), np.float32)
        y = rng.integers(self.num_classes, size=n)
        client = np.repeat(np.arange(len(self.client_sizes)), self.client_sizes)
        for name, array in (("x", x), ("y", y), ("client", client)):
            np.save(folder / f"{name}.npy", array)
        user = np.char.zfill(client.astype(str), 5)  # as text, users are in the same order
        np.savez(folder / OURS, X=x, y=y, user=user)


WORKLOADS = {
    "w1": Workload(
        sizes=((2755,) * 3, (569,) * 3, (523,) * 3),
        training={
            "lr_init": 0.05,
            "local_epochs": 5,
            "batch_size": 32,
            "momentum": 0.9,
            "weight_decay": 1e-4,
            "clip_norm": 1.0,
            "label_smoothing": 0.1,
        },
    ),
}


@dataclass(frozen=True)
class Measurement:
    """What one side took."""

    seconds: list[float]  # of every round, the warm-up first
    memory: int  # the most seen, bytes
    other_cores: float  # that other programs used meanwhile, on average: noise

    @property
    def median(self) -> float:
        """Seconds a round, without the warm-up."""
        return statistics.median(self.seconds[1:])

    def __str__(self) -> str:
        measured = self.seconds[1:]
        times = (self.median, min(measured), max(measured), self.seconds[0])
        columns = "".join(f"{t:9.2f}" for t in times)
        return f"{columns}{self.memory / 2**20:10,.0f}{self.other_cores:13.2f}"


class Stamps(Callback):
    """Notes when the first round starts and when each has ended, its result files written."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def on_run_start(self, info: RunInfo) -> None:
        """Note the time."""
        self._stamp()

    def on_round_end(self, record: RoundRecord) -> None:
        """Note the time, but fail if a client did: a round without it would look fast."""
        if not all(client.bytes_up for client in record.clients):
            raise RuntimeError(f"a client failed in round {record.global_round}")
        self._stamp()

    def _stamp(self) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps({"time": time.time()}) + "\n")


def run_ours(name: str, rounds: int, folder: Path) -> None:
    """Run this application in this process, as ``python -m fedge_sim.orchestrator`` does."""
    workload = WORKLOADS[name]
    tables = {
        "app.config.dataset": "arrays",
        "app.config.data-root": folder.parent / "data" / OURS,
        "app.config.cache-dir": folder / "cache",
        "app.config.partition": "user",
        "app.config.model": workload.model,
        "app.config.num-classes": workload.num_classes,
        "app.config.output-dir": folder / "results",
        "hierarchy.num_servers": len(workload.sizes),
        "hierarchy.clients_per_server": [len(leaf) for leaf in workload.sizes],
        "hierarchy.global_rounds": rounds,
    } | {f"hierarchy.{key}": value for key, value in workload.training.items()}
    settings = load_settings(assignments=[f"{key}={value}" for key, value in tables.items()])
    run_in_process(settings, [TableWriter(), WeightWriter(), Stamps(folder / STAMPS)])


def measure_ours(name: str, rounds: int, folder: Path) -> Measurement:
    """Measure :func:`run_ours` in a process of its own."""
    script = [sys.executable, str(Path(__file__).resolve())]
    command = [*script, "--workload", name, "--rounds", str(rounds), "--ours", str(folder)]
    return measure(command, dict(os.environ), folder)


def measure_flower(name: str, rounds: int, folder: Path) -> Measurement:
    """Measure the app in ``plain_flower`` under ``flwr run``: a node a client, a core a node."""
    workload = WORKLOADS[name]
    config = {key.replace("_", "-"): value for key, value in workload.training.items()}
    config |= {"num-server-rounds": rounds, "num-classes": workload.num_classes}
    paths = {"data-root": folder.parent / "data", "stamps": folder / STAMPS}
    pairs = [f"{k}={v}" for k, v in config.items()] + [f'{k}="{v}"' for k, v in paths.items()]
    federation = f"num-supernodes={len(workload.client_sizes)} client-resources-num-cpus=1"
    with socket.create_server(LOCAL) as http, socket.create_server(LOCAL) as control:
        free_ports = [str(s.getsockname()[1]) for s in (http, control)]
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",  # for flower-superlink
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": free_ports[0],
        "FLWR_LOCAL_CONTROL_API_PORT": free_ports[1],
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
    }
    flwr = str(bin_folder / "flwr")
    command = [flwr, "run", str(PLAIN_FLOWER), "--stream", "--federation-config", federation]

    def completed() -> bool:
        """Ask Flower: ``flwr run`` exits 0 even when the run failed."""
        listing = [flwr, "list", "--format", "json"]
        answer = subprocess.run(listing, env=environment, capture_output=True, text=True)
        return "finished:completed" in answer.stdout

    return measure([*command, "-c", " ".join(pairs)], environment, folder, completed)


def measure(
    command: list[str],
    environment: dict[str, str],
    folder: Path,
    completed: Callable[[], bool] = lambda: True,
) -> Measurement:
    """Run a command that writes stamps into the folder; stop whatever it leaves running."""
    folder.mkdir()
    environment[MARKER] = str(folder)
    log, peak = folder / "log.txt", 0
    cpu: dict[int, float] = {}
    began, busy_before = time.perf_counter(), busy_seconds(psutil.cpu_times())
    try:
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, env=environment, cwd=folder, stdout=out, stderr=subprocess.STDOUT
            )
        while process.poll() is None:
            started = time.perf_counter()
            samples = {p.pid: sample(p) for p in side_processes(folder)}
            peak = max(peak, sum(memory for memory, _ in samples.values()))
            cpu |= {pid: seconds for pid, (_, seconds) in samples.items() if seconds}
            cost = time.perf_counter() - started
            time.sleep(max(SAMPLE_SECONDS, cost / SAMPLING_SHARE) - cost)
        others = busy_seconds(psutil.cpu_times()) - busy_before - sum(cpu.values())
        others /= time.perf_counter() - began
        if process.returncode or not completed():
            raise SystemExit(f"{log.read_text(errors='replace')[-5000:]}\n{folder.name} failed")
    finally:
        stop(folder)
    stamps = [json.loads(line)["time"] for line in (folder / STAMPS).read_text().splitlines()]
    return Measurement(np.diff(stamps).tolist(), peak, max(0.0, others))


def side_processes(folder: Path) -> list[psutil.Process]:
    """Return a side's processes: also those that left the tree, as SuperLink and Ray do.

    Some of Ray's overwrite their environment with a title; they are known by their parents.
    """
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():  # parents come first
        with suppress(psutil.Error, OSError):  # gone by now, or somebody else's
            if process.ppid() in found or process.environ().get(MARKER) == str(folder):
                found[process.pid] = process
    return list(found.values())


def sample(process: psutil.Process) -> tuple[int, float]:
    """Return a process's memory in bytes (PSS, or RSS where that cannot be read) and CPU time."""
    with suppress(psutil.Error):
        cpu = busy_seconds(process.cpu_times())
        with suppress(psutil.AccessDenied, AttributeError):
            return int(process.memory_full_info().pss), cpu
        return int(process.memory_info().rss), cpu
    return 0, 0.0  # it has just ended


def busy_seconds(cpu_times: Any) -> float:
    """Return the CPU seconds in which there was work, of a process or of the whole machine."""
    return float(cpu_times.user + cpu_times.system + getattr(cpu_times, "nice", 0.0))


def stop(folder: Path) -> None:
    """End a side's processes: first asked to, then killed."""
    for action in (psutil.Process.terminate, psutil.Process.kill):
        processes = side_processes(folder)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                action(process)
        psutil.wait_procs(processes, timeout=STOP_SECONDS)


def header(name: str, rounds: int) -> str:
    """Return what is measured, where, when, and with what."""
    workload, load, cpuinfo = WORKLOADS[name], os.getloadavg()[0], Path("/proc/cpuinfo")
    sizes = workload.client_sizes
    fields = [line.split(":") for line in cpuinfo.open()] if cpuinfo.exists() else []
    cpu = next((f[1].strip() for f in fields if f[0].strip() == "model name"), platform.machine())
    packages = ("fedge-sim", "flwr", "ray", "torch", "numpy")
    versions = [f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)]
    return (
        f"workload  {name}: {len(sizes)} clients, {sum(sizes):,} windows {workload.window_shape}, "
        f"{workload.model}, {workload.steps:,} batch steps a round\n"
        f"rounds    {rounds} measured, after 1 of warm-up\n"
        f"machine   {cpu}, {available_cores()} cores, load average before {load:.1f}\n"
        f"date      {datetime.now(UTC):%Y-%m-%d %H:%M} UTC\n"
        f"versions  {', '.join(versions)}\n\n"
        f"{'':<14}{'s/round':>9}{'fastest':>9}{'slowest':>9}{'warm-up':>9}{'peak MiB':>10}"
        f"{'other cores':>13}"
    )


def main(
    workload: Annotated[str, typer.Option(help=f"One of: {', '.join(WORKLOADS)}.")] = "w1",
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds, after a warm-up.")] = 5,
    ours: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure this application and plain Flower, one after the other, on one workload."""
    if workload not in WORKLOADS:
        raise typer.BadParameter(f"{workload!r} is unknown; there is {', '.join(WORKLOADS)}")
    if ours is not None:  # the process that measure_ours starts
        return run_ours(workload, rounds, ours)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that "finally" happens
    print(header(workload, rounds), flush=True)
    root = Path(tempfile.mkdtemp(prefix="fedge-bench-")).resolve()
    try:
        WORKLOADS[workload].write(root / "data")
        mine = measure_ours(workload, rounds + 1, root / "ours")
        print(f"{'ours':<14}{mine}", flush=True)
        plain = measure_flower(workload, rounds + 1, root / "plain-flower")
        print(f"{'plain Flower':<14}{plain}\n")
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(f"memory ours/plain-flower: {mine.memory / plain.memory:.2f}")
    print(f"ratio ours/plain-flower: {mine.median / plain.median:.2f}")
    return None


if __name__ == "__main__":
    typer.run(main)
