"""Measure the data layer: how fast CSV files become a store, and what an open store costs.

``python scripts/bench_data.py --rows 43000000`` makes files in HHAR's form (about 95 bytes a
row, in a temporary folder), reads them once in a process of its own, opens the store again, and
then opens it in nine processes that gather every window.
"""

import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from make_hhar_csv import make

from fedge_sim.config import AppConfig, load_settings
from fedge_sim.data import load_dataset

PROCESSES = 9
REPEATS = 20
MIB = 2**20


def config(folder: Path) -> AppConfig:
    """Return the settings that read a folder of HHAR."""
    pairs = ("dataset=hhar", f"data-root={json.dumps(str(folder), ensure_ascii=False)}")
    return load_settings(assignments=[f"app.config.{pair}" for pair in pairs]).data


def ingest(folder: Path) -> tuple[float, float]:
    """Make the store as a user does; return seconds and peak memory in MiB, start-up included."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "fedge_sim.data", "prepare", "hhar", "--data-root"]
    subprocess.run([*command, str(folder)], check=True, stdout=subprocess.DEVNULL)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return time.perf_counter() - started, peak


def count_rows(file: Path) -> int:
    """Return the rows of a CSV file with a header, in little memory."""
    with file.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(MIB), b"")) - 1


def memory() -> Any:
    """Return this process's memory by kind, in bytes."""
    return psutil.Process().memory_full_info()


def open_and_use(folder: Path, everyone: Barrier, answers: Any) -> None:
    """Open the store, gather every window, and say what memory that took in this process."""
    settings, before = config(folder), memory()
    started = time.perf_counter()
    dataset = load_dataset(settings)
    seconds, opened = time.perf_counter() - started, memory()
    total = sum(float(dataset.x[i : i + 512].sum()) for i in range(0, len(dataset), 512))
    everyone.wait()  # all have touched all of it
    used = memory()
    everyone.wait()  # nobody lets go before all have looked
    answers.put((seconds, opened.uss - before.uss, used.uss - before.uss, used.pss - before.pss))
    assert total == total  # what was read is finite


def main(
    rows: Annotated[int, typer.Option(help="Rows of all files together.")] = 43_000_000,
    folder: Annotated[Path | None, typer.Option(help="Use these CSV files instead.")] = None,
) -> None:
    """Measure reading HHAR's files and opening the store."""
    root = Path(tempfile.mkdtemp(prefix="fedge-bench-data-"))
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    try:
        if folder is None:
            folder = root / "csv"
            rows = make(folder, rows, seed=42)
        else:
            rows = sum(count_rows(file) for file in folder.glob("*.csv"))
        print(f"machine   {platform.machine()}, {os.cpu_count()} cores")
        print(f"date      {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, load {os.getloadavg()[0]:.1f}")
        seconds, peak = ingest(folder)
        print(f"reading   {rows:,} rows in {seconds:.1f} s: {rows / seconds:,.0f} rows a second, ")
        print(f"          peak memory {peak:,.0f} MiB")
        dataset, times = load_dataset(config(folder)), []
        print(f"store     {len(dataset):,} windows, {dataset.x.nbytes / MIB:,.0f} MiB")
        for _ in range(REPEATS):
            started = time.perf_counter()
            load_dataset(config(folder))
            times.append(time.perf_counter() - started)
        print(f"opening   {statistics.median(times) * 1000:.1f} ms, median of {REPEATS}")
        context = multiprocessing.get_context("spawn")
        everyone, answers = context.Barrier(PROCESSES), context.Queue()
        own = [
            context.Process(target=open_and_use, args=(folder, everyone, answers))
            for _ in range(PROCESSES)
        ]
        for process in own:
            process.start()
        found = list(zip(*(answers.get(timeout=600) for _ in own), strict=True))
        for process in own:
            process.join()
        print(f"{PROCESSES} processes that open the store and read all of it, the most of each:")
        print(f"          opening {max(found[0]) * 1000:.1f} ms")
        print(f"          private memory: opening adds {max(found[1]) / MIB:.1f} MiB, ", end="")
        print(f"reading all adds {max(found[2]) / MIB:.1f} MiB")
        print(f"          PSS: together {sum(found[3]) / MIB:,.0f} MiB more than before")
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    typer.run(main)
