"""Run one side of a benchmark in processes of its own, and measure it from outside.

The side writes a stamp (the time) into its folder when its first round starts and when each
round has ended; its memory is the sum of all its processes'.
"""

import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from stamps import BEGUN, STAMPS

from fedge_sim.runtime.in_process import available_cores

PLAIN_FLOWER = Path(__file__).resolve().parent / "plain_flower"
MARKER = "FEDGE_BENCH"  # in the environment of every process of a side: the side's folder
SAMPLE_SECONDS = 0.2
SAMPLING_SHARE = 0.02  # of one core, at most: reading PSS takes milliseconds a process
STOP_SECONDS = 10
GPU_SHARE = 0.25  # of a GPU, for each of plain Flower's actors, where there is one
LOCAL = ("127.0.0.1", 0)  # any free port
MIB = 2**20


@dataclass(frozen=True)
class Options:
    """What a benchmark is asked for.

    Attributes
    ----------
    rounds : int
        To be measured, after a warm-up.
    folder : Path
        For whatever it writes, removed at the end.
    assignments : tuple of str
        Settings of our sides, ``table.key=value``.
    output : Path
        Where its picture goes, if it draws one.
    """

    rounds: int
    folder: Path
    assignments: tuple[str, ...]
    output: Path


@dataclass(frozen=True)
class Measurement:
    """What one side took. All times are unix seconds.

    Attributes
    ----------
    launched : float
        When its first process was started.
    begun : float
        When its run began: after the imports, where the side says so.
    stamps : list of float
        When its first round started, and when each round ended.
    memory : list of tuple of float and int
        When memory was read, and how much all its processes had, in bytes.
    other_cores : float
        That other programs used meanwhile, on average: noise.
    """

    launched: float
    begun: float
    stamps: list[float]
    memory: list[tuple[float, int]]
    other_cores: float

    @property
    def start(self) -> float:
        """Seconds from the launch to the first round: imports, data, actors."""
        return self.stamps[0] - self.launched

    @property
    def start_of_run(self) -> float:
        """Seconds from the run's beginning to the first round."""
        return self.stamps[0] - self.begun

    @property
    def seconds(self) -> list[float]:
        """Seconds of every round, the warm-up first."""
        return [float(s) for s in np.diff(self.stamps)]

    @property
    def measured(self) -> list[float]:
        """Seconds of every round but the warm-up; of a single round, that one's."""
        return self.seconds[1:] or self.seconds

    @property
    def median(self) -> float:
        """Seconds a round, without the warm-up."""
        return statistics.median(self.measured)

    @property
    def peak(self) -> float:
        """The most memory seen, in MiB."""
        return max(memory for _, memory in self.memory) / MIB

    def growth(self, skip: int) -> float:
        """Return the bytes by which memory grows in a round, by least squares.

        Parameters
        ----------
        skip : int
            Rounds at the start that are left out.
        """
        times, memory = np.array(self.memory).T
        rounds = np.interp(times, self.stamps, np.arange(len(self.stamps)))
        steady = (times >= self.stamps[skip]) & (times <= self.stamps[-1])
        return float(np.polyfit(rounds[steady], memory[steady], deg=1)[0])


def measure_script(script: str, arguments: list[str], folder: Path) -> Measurement:
    """Measure a Python file with these arguments; its actors find the modules beside it."""
    environment = os.environ | {"PYTHONPATH": str(Path(script).resolve().parent)}
    return measure([sys.executable, script, *arguments], environment, folder)


def measure_flower(config: Mapping[str, str | float], num_nodes: int, folder: Path) -> Measurement:
    """Measure the app in ``plain_flower`` under ``flwr run``: a node a client, a core a node."""
    config = {**config, "num-clients": num_nodes, "stamps": str(folder / STAMPS)}
    pairs = [f"{key}={json.dumps(value)}" for key, value in config.items()]
    federation = f"num-supernodes={num_nodes} client-resources-num-cpus=1"
    if torch.cuda.is_available() and not config.get("empty"):
        federation += f" client-resources-num-gpus={GPU_SHARE}"
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
    log = folder / "log.txt"
    memory: list[tuple[float, int]] = []
    cpu: dict[int, float] = {}
    launched, busy_before = time.time(), busy_seconds(psutil.cpu_times())
    try:
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, env=environment, cwd=folder, stdout=out, stderr=subprocess.STDOUT
            )
        while process.poll() is None:
            started = time.perf_counter()
            samples = {p.pid: sample(p) for p in side_processes(folder)}
            memory.append((time.time(), sum(pss for pss, _ in samples.values())))
            cpu |= {pid: seconds for pid, (_, seconds) in samples.items() if seconds}
            cost = time.perf_counter() - started
            time.sleep(max(SAMPLE_SECONDS, cost / SAMPLING_SHARE) - cost)
        others = busy_seconds(psutil.cpu_times()) - busy_before - sum(cpu.values())
        others /= time.time() - launched
        if process.returncode or not completed():
            raise SystemExit(f"{log.read_text(errors='replace')[-5000:]}\n{folder.name} failed")
    finally:
        stop(folder)
    stamps = [json.loads(line)["time"] for line in (folder / STAMPS).read_text().splitlines()]
    begun = float((folder / BEGUN).read_text()) if (folder / BEGUN).exists() else launched
    return Measurement(launched, begun, stamps, memory, max(0.0, others))


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


def header(workload: str, rounds: int | None = None, assignments: Sequence[str] = ()) -> str:
    """Return what is measured, where, when, and with what."""
    load, cpuinfo = os.getloadavg()[0], Path("/proc/cpuinfo")
    fields = [line.split(":") for line in cpuinfo.open()] if cpuinfo.exists() else []
    cpu = next((f[1].strip() for f in fields if f[0].strip() == "model name"), platform.machine())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    packages = ("fedge-sim", "flwr", "ray", "torch", "numpy")
    versions = [f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)]
    lines = {
        "workload": workload,
        "rounds": f"{rounds} measured, after 1 of warm-up" if rounds else "",
        "settings": " ".join(assignments),
        "machine": f"{cpu}, {available_cores()} cores, {gpu}, load average before {load:.1f}",
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "versions": ", ".join(versions),
    }
    return "".join(f"{name:<10}{text}\n" for name, text in lines.items() if text)


def verdict(what: str, value: float, target: str, met: bool, digits: int = 3) -> str:
    """Return a line: what was measured, beside what we aim for."""
    return f"{what:<64}{value:8.{digits}f}   target: {target}: {'met' if met else 'MISSED'}"
