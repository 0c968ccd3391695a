"""Measure this application, plain Flower and a bare loop on one workload, one after the other.

``python scripts/bench.py --workload w1`` prints seconds a round and peak memory of all sides,
their ratios, and how much of the machine's speed their training uses; ``w1-full`` does so for ours
on as many windows as HHAR has, and ``cifar`` for many devices with few images each; ``overhead``
shows what a round costs by the number of clients when these do nothing; ``cohort`` how many
clients a second the ways to train do. Each side has processes of its own. A round lasts until the
next one starts, evaluation and result files included; the first one and the start (imports, data,
actors) are reported apart.
"""

import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import bench_cohort
import bench_overhead
import bench_training
import typer
from measuring import Options

WORKLOADS = {
    "w1": bench_training.bench_w1,
    "w1-full": bench_training.bench_full,
    "cifar": bench_training.bench_cifar,
    "overhead": bench_overhead.bench,
    "cohort": bench_cohort.bench,
}


def main(
    workload: Annotated[str, typer.Option(help=f"One of: {', '.join(WORKLOADS)}.")] = "w1",
    rounds: Annotated[
        int, typer.Option(min=1, help="Measured rounds, after a warm-up; cohort has none.")
    ] = 5,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="TABLE.KEY=VALUE",
            help="A setting of our sides, for example runtime.training=single; repeatable.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Where the picture of cohort goes.")] = Path(
        "results/cohort.png"
    ),
) -> None:
    """Measure this application, plain Flower and a bare loop on one workload."""
    if workload not in WORKLOADS:
        raise typer.BadParameter(f"{workload!r} is unknown; there is {', '.join(WORKLOADS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that "finally" happens
    folder = Path(tempfile.mkdtemp(prefix="fedge-bench-")).resolve()
    try:
        WORKLOADS[workload](Options(rounds, folder, tuple(assignments or ()), output))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    typer.run(main)
