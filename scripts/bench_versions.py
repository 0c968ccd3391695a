"""Measures a run of versions: one job after the other, and all that can be trained at once.

The same events every time; a side is a process of its own, without its set-up, and sides take
turns. What it prints are medians and ratios to strictly sequential.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[1]
JOB = ROOT / "scripts" / "jobs" / "cifar10_16px.toml"
ONE = ("runtime.training=single", "runtime.backend=inprocess", "runtime.compile=false")
# Of each side: its settings, and how far ahead it trains (None: as far as it can).
SIDES: dict[str, tuple[tuple[str, ...], int | None]] = {
    "strictly sequential": ((*ONE, "runtime.num_workers=1"), 0),
    "2 threads": ((*ONE, "runtime.num_workers=2"), None),
    "2 actors": (("runtime.training=single", "runtime.backend=ray", "runtime.num_workers=2"), None),
    "2 threads, cohorts of 8": (
        ("runtime.training=cohort", "runtime.cohort_size=8", *ONE[1:], "runtime.num_workers=2"),
        None,
    ),
    "as it chooses itself": ((), None),
}
GPU: dict[str, tuple[tuple[str, ...], int | None]] = {
    "GPU, strictly sequential": (("runtime.training=single", "runtime.num_workers=1"), 0),
    "GPU, cohorts of 32": (("runtime.training=cohort", "runtime.cohort_size=32"), None),
    "GPU, as it chooses itself": ((), None),
}


def main(
    config: Annotated[Path, typer.Option(help="The job.")] = JOB,
    assignments: Annotated[list[str] | None, typer.Option("--set")] = None,
    repeats: Annotated[int, typer.Option()] = 3,
    gpu: Annotated[bool, typer.Option(help="Sides on a GPU, too.")] = False,
    side: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Print the table."""
    sides = SIDES | (GPU if gpu else {})
    if side:
        own, ahead = sides[side]
        print(json.dumps(_measure(config, [*(assignments or []), *own], ahead)))
        return
    times: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name in sides:
            sets = [part for text in assignments or [] for part in ("--set", text)]
            more = ["--gpu"] if gpu else []
            command = [sys.executable, __file__, "--config", str(config), "--side", name]
            done = subprocess.run(
                [*command, *sets, *more], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr}")
            times[name].append(json.loads(done.stdout.splitlines()[-1]))
    print("| | seconds | x strictly sequential | updates a second | simulated / real |")
    print("| --- | ---: | ---: | ---: | ---: |")
    first = statistics.median(t["seconds"] for t in times["strictly sequential"])
    for name, found in times.items():
        seconds = statistics.median(t["seconds"] for t in found)
        one = found[0]
        print(
            f"| {name} | {seconds:.1f} | {first / seconds:.2f} | {one['updates'] / seconds:.1f} "
            f"| {one['simulated'] / seconds:.2f} |"
        )


def _measure(config: Path, assignments: list[str], ahead: int | None) -> dict[str, float]:
    from fedge_sim.config import load_settings
    from fedge_sim.device_run import DeviceRun
    from fedge_sim.reporting.base import Callback, VersionRecord
    from fedge_sim.runtime.backend import open_grid

    class Watch(Callback):
        """Keeps when the last version was made; the clock begins with the first hook."""

        def on_run_start(self, info: object) -> None:
            self.started, self.updates = time.perf_counter(), 0

        def on_version(self, record: VersionRecord) -> None:
            self.seconds = time.perf_counter() - self.started
            self.simulated = record.event.time
            self.updates += len(record.event.jobs)

    watch = Watch()
    with TemporaryDirectory() as folder:
        settings = load_settings(config, assignments=assignments, output_dir=Path(folder))
        with open_grid(settings, lambda _: None, lambda _: None) as (grid, settled):
            DeviceRun(settled, grid, [watch], ahead=ahead).run()
    return {
        "seconds": watch.seconds,
        "simulated": watch.simulated,
        "updates": float(watch.updates),
    }


if __name__ == "__main__":
    typer.run(main)
