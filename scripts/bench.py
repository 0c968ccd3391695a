"""Measure this application and plain Flower on one workload, one after the other.

``python scripts/bench.py --workload w1`` prints seconds a round and peak memory of both, and
their ratio; ``--workload overhead`` what a round costs by the number of clients when these do
nothing. Each side has processes of its own. A round lasts until the next one starts, evaluation
and result files included; the first one and the start (imports, data, actors) are reported apart.
"""

import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import bench_overhead
import bench_training
import typer

WORKLOADS = {"w1": bench_training.bench, "overhead": bench_overhead.bench}


def main(
    workload: Annotated[str, typer.Option(help=f"One of: {', '.join(WORKLOADS)}.")] = "w1",
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds, after a warm-up.")] = 5,
) -> None:
    """Measure this application and plain Flower, one after the other, on one workload."""
    if workload not in WORKLOADS:
        raise typer.BadParameter(f"{workload!r} is unknown; there is {', '.join(WORKLOADS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that "finally" happens
    folder = Path(tempfile.mkdtemp(prefix="fedge-bench-")).resolve()
    try:
        WORKLOADS[workload](rounds, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    typer.run(main)
