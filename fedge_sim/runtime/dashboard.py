"""What Ray's dashboard shows of a run, beside its actors: metrics, for Prometheus too."""

import threading
import time

from ray.util.metrics import Gauge

from fedge_sim.reporting.base import Callback, ClientDone, RoundRecord
from fedge_sim.runtime.node import LocalGrid

SECONDS = 1.0  # between two reports of what changes all the time


class DashboardMetrics(Callback):
    """Reports rounds, accuracy, clients per second and the queue's length.

    Memory is reported by each actor, as ``fedge_actor_memory_bytes``.
    """

    def __init__(self, grid: LocalGrid) -> None:
        self._grid = grid
        self._lock = threading.Lock()
        self._clients, self._since = 0, time.monotonic()
        self._rounds = Gauge("fedge_rounds", "Global rounds that are finished")
        self._accuracy = Gauge(
            "fedge_accuracy", "Mean client accuracy of the models that the cloud hands back"
        )
        self._pace = Gauge("fedge_clients_per_second", "Clients done, training or evaluation")
        self._queue = Gauge("fedge_queue_length", "Clients that wait, or are being worked on")

    def on_client_done(self, done: ClientDone) -> None:
        """Count it, and report now and then."""
        with self._lock:
            self._clients += 1
            elapsed = time.monotonic() - self._since
            if elapsed >= SECONDS:
                self._pace.set(self._clients / elapsed)
                self._queue.set(self._grid.waiting)
                self._clients, self._since = 0, time.monotonic()

    def on_round_end(self, record: RoundRecord) -> None:
        """Report the round."""
        self._rounds.set(record.global_round)
        self._accuracy.set(record.mean_client_accuracy)
        self._queue.set(self._grid.waiting)
