"""The result files of a run of versions: what each is made of, and what became of every job."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedge_sim.reporting.base import Callback, HeldOut, RunInfo, VersionRecord
from fedge_sim.reporting.tables import ClusterFiles, append_rows, write_json, write_run

if TYPE_CHECKING:
    from fedge_sim.cloud import CloudState
    from fedge_sim.runtime.rounds import Job
    from fedge_sim.runtime.timeline import CloudAnswers, VersionMade

VERSIONS, JOBS, HELD_OUT = "versions.csv", "jobs.csv", "held_out.csv"
TOTALS = "devices.json"
LOSSES = ("dropped out", "went offline", "timed out", "too late")


class VersionWriter(Callback):
    """Writes ``run.json``, ``metrics/seed_<S>/``, and in the end totals and two figures.

    What a run sums up to is read back from its files, so that nothing grows with the versions
    but these, and a run that was resumed has all of it.
    """

    def on_run_start(self, info: RunInfo) -> None:
        """Write down what is about to run, unless the run is resumed."""
        self._folder, self._metrics = info.folder, _metrics(info)
        self._places = info.settings.clients_at_a_time
        if not self._metrics.exists():
            self._metrics.mkdir(parents=True)
            write_run(info)
        if info.settings.asynchronous.server == "leaf":
            self._clusters = ClusterFiles(info)

    def on_version(self, record: VersionRecord) -> None:
        """Add the version, and what became of its jobs."""
        append_rows(self._metrics / VERSIONS, [version_row(record)])
        if rows := list(job_rows(record.event)):
            append_rows(self._metrics / JOBS, rows)

    def on_held_out(self, record: HeldOut) -> None:
        """Add the evaluation."""
        append_rows(self._metrics / HELD_OUT, [held_out_row(record)])

    def on_cloud_step(self, event: "CloudAnswers", state: "CloudState") -> None:
        """Add how the leaf servers were grouped."""
        self._clusters.write(event.step, state, event.time)

    def on_versions_end(self, state: "CloudState", left: Sequence["Job"]) -> None:
        """Write ``devices.json``, and draw accuracy against time, and staleness."""
        if not (self._metrics / JOBS).exists():
            return  # no version was made
        if left:
            append_rows(self._metrics / JOBS, [job_row(job) for job in left])
        from fedge_sim.reporting.device_totals import draw_accuracy, draw_staleness, totals

        found = totals(self._metrics, self._places)
        write_json(self._folder / TOTALS, found)
        draw_staleness(found["staleness"], self._folder / "staleness.png")
        if (self._metrics / HELD_OUT).exists():
            draw_accuracy(self._metrics / HELD_OUT, self._folder / "accuracy_against_time.png")


def versions_written(info: RunInfo) -> int:
    """Return how many versions a run has written down: those of a run that is resumed."""
    file = _metrics(info) / VERSIONS
    if not file.exists():
        return 0
    with file.open(encoding="utf-8") as rows:
        return sum(1 for _ in rows) - 1


def _metrics(info: RunInfo) -> Path:
    return info.folder / "metrics" / f"seed_{info.settings.seed}"


def version_row(record: VersionRecord) -> dict[str, Any]:
    """Return a version: its updates, their staleness in versions, and what was lost before it."""
    event = record.event
    stale = [event.version - 1 - job.version for job in event.jobs]
    lost = Counter[str](job.fate for job in event.lost)
    return {
        "server": event.server,
        "version": event.version,
        "simulated_seconds": event.time,
        "updates": record.num_updates,
        "failed": len(event.jobs) - record.num_updates,
        "mean_staleness": sum(stale) / len(stale) if stale else math.nan,
        "max_staleness": max(stale, default=math.nan),
        **{fate.replace(" ", "_"): lost[fate] for fate in LOSSES},
        "active": event.active,
        "by_timeout": int(event.by_timeout),
        "train_loss": record.train_loss,
        "bytes_up": record.bytes_up,
        "bytes_down": record.bytes_down,
        "seconds": record.seconds,
    }


def job_rows(event: "VersionMade") -> Iterator[dict[str, Any]]:
    """Yield a row for each job of a version, and for each that was lost before it.

    ``staleness`` is how many versions its server had made since; of a lost one there is none.
    """
    for job in event.jobs:
        yield job_row(job, event.version - 1 - job.version)
    for job in event.lost:
        yield job_row(job)


def job_row(job: "Job", staleness: int | str = "") -> dict[str, Any]:
    """Return what became of a job."""
    return {
        "job": job.number,
        "client": job.client,
        "server": job.server,
        "leaf": job.leaf,
        "version": job.version,
        "started": job.started,
        "ended": job.ended,
        "training": job.training,
        "fate": job.fate,
        "staleness": staleness,
    }


def held_out_row(record: HeldOut) -> dict[str, Any]:
    """Return an evaluation on held-out examples."""
    return {
        "what": record.what,
        "server": record.server,
        "version": record.version,
        "simulated_seconds": record.simulated_seconds,
        "updates": record.updates,
        "accuracy": record.test.accuracy,
        "loss": record.test.loss,
        "num_examples": record.test.num_examples,
        "seconds": record.seconds,
    }
