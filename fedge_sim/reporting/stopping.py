"""Ends a run early: no better any more, or good enough."""

import math

from fedge_sim.reporting.base import Callback, HeldOut, RoundRecord, RunInfo


class EarlyStopping(Callback):
    """Ends the run when mean client accuracy has not risen by ``es_delta`` for ``es_patience`` rounds.

    It counts from the best accuracy that was such a rise; ``es_patience = 0`` turns it off. In a
    run of versions it is the cloud's accuracy on held-out examples, and evaluations are counted.
    """  # noqa: E501

    def on_run_start(self, info: RunInfo) -> None:
        """Take in the rounds that are done already."""
        h = info.settings.hierarchy
        self._patience, self._delta = h.es_patience, h.es_delta
        self._best, self._waited = -math.inf, 0
        for accuracy in info.accuracies:
            self._take_in(accuracy)

    def on_round_end(self, record: RoundRecord) -> str | None:
        """Return the reason if the patience is at its end."""
        self._take_in(record.mean_client_accuracy)
        return self._reason("client accuracy", "rounds")

    def on_held_out(self, record: HeldOut) -> str | None:
        """Return the reason if the patience is at its end."""
        if not is_of_all(record):
            return None
        self._take_in(record.test.accuracy)
        return self._reason("held-out accuracy", "evaluations")

    def _reason(self, what: str, times: str) -> str | None:
        if self._patience and self._waited >= self._patience:
            return (
                f"{what} has not risen by {self._delta} above {self._best:.4f} for "
                f"{self._waited} {times} (es_patience)"
            )
        return None

    def _take_in(self, accuracy: float) -> None:
        if accuracy > self._best and accuracy >= self._best + self._delta:
            self._best, self._waited = accuracy, 0
        else:
            self._waited += 1


class TargetAccuracy(Callback):
    """Ends the run when mean client accuracy reaches ``target_accuracy``; 0 turns it off.

    In a run of versions it is the cloud's accuracy on held-out examples.
    """

    def on_run_start(self, info: RunInfo) -> None:
        """Keep the target."""
        self._target = info.settings.hierarchy.target_accuracy

    def on_round_end(self, record: RoundRecord) -> str | None:
        """Return the reason if the target is reached."""
        if self._target and record.mean_client_accuracy >= self._target:
            return f"client accuracy {record.mean_client_accuracy:.4f} (target_accuracy)"
        return None

    def on_held_out(self, record: HeldOut) -> str | None:
        """Return the reason if the target is reached."""
        if self._target and is_of_all(record) and record.test.accuracy >= self._target:
            return f"held-out accuracy {record.test.accuracy:.4f} (target_accuracy)"
        return None


def is_of_all(record: HeldOut) -> bool:
    """Whether an evaluation is of what the cloud has for all leaf servers together."""
    return (record.what, record.server) == ("cloud", -1)
