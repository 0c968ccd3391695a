"""When each client was worked on, and by whom: what ``python -m fedge_sim.monitor`` reads."""

import csv
import io
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from pydantic import FiniteFloat, TypeAdapter

from fedge_sim.reporting.base import Callback, ClientDone, RoundRecord, RunInfo, VersionRecord
from fedge_sim.reporting.tables import write_json

log = logging.getLogger(__name__)

TIMELINE, WORKERS = "timeline.csv", "workers.json"
COLUMNS = ("round", "purpose", "leaf", "client", "worker", "start_s", "end_s")


class Told(NamedTuple):
    """The workers that a grid had from some time on, in seconds since the run's start."""

    told_s: FiniteFloat
    workers: list[str]


def read_told(file: Path) -> list[Told]:
    """Read ``workers.json``; raises OSError, or ValueError if it is damaged."""
    return TypeAdapter(list[Told]).validate_json(file.read_bytes())


class TimelineWriter(Callback):
    """Writes ``timeline.csv`` and ``workers.json`` into the results folder.

    A row of the first is one client's last try, in seconds since the run's start, and belongs
    to the global round at whose end it was known; in a run of versions, to the version. The
    second lists, in order, the names of all workers and from when on they were those, so that
    one without work counts as idle. Both are written at the end of a round, or with a version: a
    kill keeps the finished ones.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._done: list[ClientDone] = []
        self._told: list[tuple[float, list[str]]] = []

    def on_workers(self, workers: Sequence[str]) -> None:
        """Keep the workers' names, and the time."""
        with self._lock:
            if not self._told or self._told[-1][1] != list(workers):
                self._told.append((time.time(), list(workers)))

    def on_client_done(self, done: ClientDone) -> None:
        """Keep it until the round's end."""
        with self._lock:
            self._done.append(done)

    def on_run_start(self, info: RunInfo) -> None:
        """Begin the files; seconds count from here, or on from where a resumed run was."""
        self._folder, self._start = info.folder, time.time()
        self._num_told = -1
        if (self._folder / TIMELINE).exists():
            with (self._folder / TIMELINE).open(newline="", encoding="utf-8") as file:
                ends = [float(row["end_s"]) for row in csv.DictReader(file)]
            self._start -= max(ends, default=0.0)
            with self._lock:
                self._told = self._told_before() + self._told
        else:
            self._append([COLUMNS])
        self._write_workers()

    def _told_before(self) -> list[tuple[float, list[str]]]:
        """Return who worked before the run was resumed; no result needs it."""
        try:
            told = read_told(self._folder / WORKERS)
        except (OSError, ValueError):
            file = self._folder / WORKERS
            log.warning(
                "%s: is missing or damaged, and begun anew: who worked before is lost", file
            )
            return []
        return [(self._start + entry.told_s, entry.workers) for entry in told]

    def on_round_end(self, record: RoundRecord) -> None:
        """Add what was done in the round."""
        self._write(record.global_round)

    def on_version(self, record: VersionRecord) -> None:
        """Add what was done since the version before."""
        self._write(record.event.version)

    def _write(self, number: int) -> None:
        with self._lock:
            done, self._done = self._done, []
        self._append(
            [
                (
                    *(number, d.purpose, d.leaf, d.client, d.worker),
                    self._seconds(d.started),
                    # A clock that was set back in between gives no negative time.
                    self._seconds(max(d.started, d.ended)),
                )
                for d in sorted(done, key=lambda d: d.started)
            ]
        )
        self._write_workers()

    def _seconds(self, unix_time: float) -> float:
        return round(unix_time - self._start, 6)

    def _append(self, rows: Sequence[Sequence[object]]) -> None:
        """Write rows at once, so that a kill leaves at most the last one half-written."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        with (self._folder / TIMELINE).open("a", newline="", encoding="utf-8") as stream:
            stream.write(text.getvalue())

    def _write_workers(self) -> None:
        """Write who works, if that changed since it was last written."""
        with self._lock:
            told = list(self._told)
        if len(told) != self._num_told:
            entries = [{"told_s": self._seconds(at), "workers": names} for at, names in told]
            write_json(self._folder / WORKERS, entries, indent=None)
            self._num_told = len(told)
