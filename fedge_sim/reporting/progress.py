"""What a person sees: a progress bar on a terminal, a line a round in a log, a closing table."""

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fedge_sim.cloud import CloudState
from fedge_sim.records import TRAIN
from fedge_sim.reporting.base import (
    Callback,
    ClientDone,
    HeldOut,
    RoundRecord,
    RunInfo,
    VersionRecord,
)
from fedge_sim.reporting.stopping import is_of_all
from fedge_sim.reporting.tables import gate_decisions
from fedge_sim.reporting.versions import LOSSES, TOTALS, versions_written
from fedge_sim.runtime.rounds import Job

log = logging.getLogger(__name__)


class ConsoleReporter(Callback):
    """Shows the run on a console.

    Parameters
    ----------
    console : rich Console
        A progress bar is drawn if it is a terminal, else each round is logged.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("round {task.fields[round]}/{task.fields[rounds]}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[clients]}"),
            TextColumn("accuracy {task.fields[accuracy]}  clusters {task.fields[clusters]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def on_run_start(self, info: RunInfo) -> None:
        """Say what runs, and start the bar."""
        settings, h = info.settings, info.settings.hierarchy
        log.info(
            "%s on %s, seed %d: %d leaf servers, %d clients, %d training examples of %s (partition "
            "%s, split %s, standardise %s), %d parameters",
            *(settings.data.model, settings.data.dataset, settings.seed),
            *(h.num_servers, h.num_clients, sum(info.data.num_train), info.data.form),
            *(settings.data.partition, _split(info), settings.data.standardise),
            info.num_parameters,
        )
        log.info("results: %s", info.folder)
        self._settings, self._folder = settings, info.folder
        self._what = f"{info.data.form}, {_split(info)} split"
        self._started, self._done_before = time.perf_counter(), len(info.accuracies)
        self._in_a_round = h.server_rounds_per_global * settings.num_training
        if h.participation < 1:
            log.info("%d of %d clients train in a round", settings.num_training, h.num_clients)
        self._task = self._progress.add_task(
            "rounds",
            total=h.global_rounds * self._in_a_round,
            completed=len(info.accuracies) * self._in_a_round,
            round=len(info.accuracies) + 1,
            rounds=h.global_rounds,
            clients=f"0/{settings.num_training} clients",
            accuracy="-",
            clusters="-",
        )
        self._progress.start()

    def on_client_done(self, done: ClientDone) -> None:
        """Move the bar when a client has trained."""
        if done.purpose == TRAIN:
            self._progress.advance(self._task)
            n = self._settings.num_training
            trained = (int(self._progress.tasks[0].completed) - 1) % n + 1
            self._progress.update(self._task, clients=f"{trained}/{n} clients")

    def on_round_end(self, record: RoundRecord) -> None:
        """Show the round's accuracy and clusters, or log them."""
        clusters = _clusters(record.cloud)
        if self._console.is_terminal:
            h = self._settings.hierarchy
            rounds = h.global_rounds
            self._progress.update(
                self._task,
                # Exact, also where a client tried twice or was left out.
                completed=record.global_round * self._in_a_round,
                round=min(record.global_round + 1, rounds),
                accuracy=f"{record.mean_client_accuracy:.1%}",
                clusters=clusters,
            )
            return
        log.info(
            "round %d/%d  leaf accuracy %.4f  client accuracy %.4f  clusters %s  %.1f s%s",
            record.global_round,
            self._settings.hierarchy.global_rounds,
            record.mean_leaf_accuracy,
            record.mean_client_accuracy,
            clusters,
            record.seconds,
            _simulated(record),
        )

    def on_run_end(self, last: RoundRecord) -> None:
        """Print a table by leaf and cluster, the totals, and where the results are."""
        self.close()
        title = f"test accuracy after round {last.global_round}: {self._what}"
        table = Table(title=title, min_width=len(title))
        for name in ("leaf server", "cluster", "clients", "training examples", "leaf", "cloud"):
            table.add_column(name, justify="right")
        for leaf in last.leaves:
            table.add_row(
                str(leaf.leaf),
                str(leaf.cluster),
                ", ".join(str(c.client) for c in leaf.clients),
                str(sum(c.num_train for c in leaf.clients)),
                f"{leaf.leaf_test.accuracy:.2%}",
                f"{leaf.cloud_test.accuracy:.2%}",
            )
        self._console.print(table)
        own = self._settings.hierarchy.client_rule in ("pfedme", "local")
        whose = "the clients' own models" if own else "the models handed back"
        seconds = time.perf_counter() - self._started
        self._console.print(
            f"mean leaf accuracy before the cloud step: {last.mean_leaf_accuracy:.2%}\n"
            f"mean client accuracy of {whose}: {last.mean_client_accuracy:.2%}\n"
            f"one model for all (the average of the leaves): {last.central_test.accuracy:.2%}\n"
            f"{self._gates()}"
            f"clusters: {_clusters(last.cloud)}; {seconds:.1f} s, "
            f"{seconds / (last.global_round - self._done_before):.1f} s a round"
            f"{_simulated(last)}\n"
            f"results: {self._folder}",
            highlight=False,
            soft_wrap=True,
        )

    def _gates(self) -> str:
        """Return a line on the cloud's models that the accuracy gates judged; empty if none were.

        It counts all rounds, also those before a run was resumed.
        """
        metrics = self._folder / "metrics" / f"seed_{self._settings.seed}"
        judged, accepted = gate_decisions(metrics) if metrics.exists() else (0, 0)
        if not judged:
            return ""
        share = f"{accepted / judged:.0%}"
        return f"accuracy gate: accepted {accepted} of {judged} cloud models ({share})\n"

    def close(self) -> None:
        """Take the bar off the screen."""
        self._progress.stop()


def _split(info: RunInfo) -> str:
    return "given" if info.data.sides_given else info.settings.data.split


def _simulated(record: RoundRecord) -> str:
    """Return the time on the virtual clock and who was lost in the round, if there is one."""
    if math.isnan(record.simulated_seconds):
        return ""
    lost = Counter[str](client.fate for client in record.clients if client.lost)
    names = "".join(f", {number} {fate}" for fate, number in sorted(lost.items()))
    return f"  simulated {record.simulated_seconds:,.1f} s{names}"


def _clusters(state: CloudState) -> str:
    groups = (state.members(k) for k in range(len(state.cluster_models)))
    return " ".join("{" + ",".join(map(str, group)) + "}" for group in groups)


class VersionReporter(Callback):
    """Shows a run of versions on a console, after what wrote its files.

    Parameters
    ----------
    console : rich Console
        A progress bar is drawn if it is a terminal, else each held-out evaluation is logged.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("version {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[simulated]} simulated  accuracy {task.fields[accuracy]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def on_run_start(self, info: RunInfo) -> None:
        """Say what runs, and start the bar."""
        settings, h = info.settings, info.settings.hierarchy
        at_leaves = settings.asynchronous.server == "leaf"
        log.info(
            "%s on %s, seed %d: %d devices under %d leaf servers, versions made by %s "
            "(rule %s, up to %d devices at work), examples of %s, partition %s, %d parameters",
            *(settings.data.model, settings.data.dataset, settings.seed),
            *(h.num_clients, h.num_servers, "each of them" if at_leaves else "the cloud"),
            *(settings.asynchronous.rule, settings.clients_at_a_time),
            *(info.data.form, settings.data.partition, info.num_parameters),
        )
        log.info("results: %s", info.folder)
        versions, own = settings.devices.max_model_version, settings.fedrevive
        first = max(own.freeze_versions + 1, own.warmup_versions + 2)
        if settings.asynchronous.rule == "fedrevive" and versions < first:
            log.warning("nothing is distilled before version %d of %d", first, versions)
        self._folder, self._form = info.folder, info.data.form
        self._last: HeldOut | None = None
        servers = h.num_servers if at_leaves else 1
        self._task = self._progress.add_task(
            "versions",
            total=servers * versions,
            completed=versions_written(info),
            simulated="0 s",
            accuracy="-",
        )
        self._progress.start()

    def on_version(self, record: VersionRecord) -> None:
        """Move the bar."""
        simulated = f"{record.event.time:,.0f} s"
        self._progress.update(self._task, advance=1, simulated=simulated)

    def on_held_out(self, record: HeldOut) -> None:
        """Show the accuracy, or log it."""
        if is_of_all(record) or self._last is None or not is_of_all(self._last):
            self._last = record
            self._progress.update(self._task, accuracy=f"{record.test.accuracy:.1%}")
        if not self._console.is_terminal:
            log.info(
                "%s version %d  simulated %.1f s  updates %d  accuracy %.4f  loss %.4f  %.1f s",
                _whose(record),
                *(record.version, record.simulated_seconds, record.updates),
                *(record.test.accuracy, record.test.loss, record.seconds),
            )

    def on_versions_end(self, state: CloudState, left: Sequence[Job]) -> None:
        """Print what the run sums up to, and where the results are."""
        self.close()
        if (file := self._folder / TOTALS).exists():
            self._console.print(self._table(json.loads(file.read_text(encoding="utf-8"))))
        self._console.print(f"results: {self._folder}", highlight=False, soft_wrap=True)

    def _table(self, totals: dict[str, Any]) -> Table:
        table = Table(title="the run of versions", show_header=False)
        simulated, real, jobs = totals["simulated_seconds"], totals["seconds"], totals["jobs"]
        lost = [f"{jobs[fate]} {fate}" for fate in LOSSES if fate in jobs]
        at_work = f"{totals['mean_concurrency']:.1f} on average, of {totals['places']:,} places"
        rows = {
            "examples": self._form,
            "versions": f"{totals['versions']:,}",
            "updates": f"{totals['updates']:,}, of {totals['devices_used']:,} devices",
            "simulated time": f"{simulated:,.1f} s",
            "real time": f"{real:,.1f} s",
            "simulated / real": f"{simulated / real:,.1f}" if real else "-",
            "devices at work": at_work,
            "nobody computes": f"{totals['idle_share']:.0%} of these places' time",
            "lost": ", ".join(lost) or "none",
        }
        if self._last is not None:
            rows["held-out accuracy"] = f"{self._last.test.accuracy:.2%} ({_whose(self._last)})"
        for name, value in rows.items():
            table.add_row(name, value)
        return table

    def close(self) -> None:
        """Take the bar off the screen."""
        self._progress.stop()


def _whose(record: HeldOut) -> str:
    """Return whose model was evaluated, in words."""
    if record.server < 0:
        return record.what
    handed = " (the cloud's model)" if record.what == "cloud" else ""
    return f"leaf server {record.server}{handed}"
