"""A client's own part in a method: what it keeps from one round to the next.

SCAFFOLD's client keeps its variate, pFedMe's its personal model, FedBN's its BatchNorm layers,
and one that trains alone its whole model. It is kept in the ``Context.state`` that Flower gives
a ClientApp; on our grids that comes from a file (:mod:`fedge_sim.runtime.state`).
"""

import math
from collections.abc import Iterable, Set
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedge_sim import records
from fedge_sim.algorithms import Arrays, scaffold
from fedge_sim.algorithms.personal import personal_names
from fedge_sim.client import Tools, initial_model
from fedge_sim.config import Settings
from fedge_sim.data import FederatedData
from fedge_sim.training.base import ClientTask, ClientUpdate, model_arrays

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Message, RecordDict

_STATEFUL = ("scaffold", "pfedme", "fedbn", "local")


def is_stateful(settings: Settings) -> bool:
    """Whether clients keep something from one round to the next."""
    return settings.hierarchy.client_rule in _STATEFUL


def keeps_a_model(settings: Settings) -> bool:
    """Whether a client evaluates with arrays that no other has."""
    return is_stateful(settings) and settings.hierarchy.client_rule != "scaffold"


class Member:
    """One client of a run, while it answers a message.

    Parameters
    ----------
    settings : Settings
    data : FederatedData
    state : RecordDict
        What the clients of this node keep, by :func:`records.state_key`.
    client : int
    tools : Tools
        Their network says which arrays there are.
    """

    def __init__(
        self,
        settings: Settings,
        data: FederatedData,
        state: "RecordDict",
        client: int,
        tools: Tools,
    ) -> None:
        self._settings, self._data, self._state = settings, data, state
        self._rule, self._key = settings.hierarchy.client_rule, records.state_key(client)
        divided = self._rule in ("fedbn", "local")
        self._personal: Set[str] = (
            personal_names(self._rule, tools.network) if divided else frozenset()
        )
        kept = state.array_records.get(self._key)
        self._kept = None if kept is None else records.to_arrays(kept)
        self._correction: Arrays = {}

    def start(self, given: Arrays) -> Arrays:
        """Return what the client trains from: the model that it is given, less what is its own."""
        if not self._personal:
            return given
        return {**given, **(self._initial() if self._kept is None else self._kept)}

    def used(self, given: Arrays, purpose: str) -> Arrays:
        """Return what the client evaluates if it is given a model for some purpose."""
        if purpose == records.PERSONAL:
            return given if self._kept is None else self._kept
        return self.start(given)

    def shared(self, arrays: Arrays) -> "ArrayRecord":
        """Return what the client sends: all but what is its own."""
        return records.to_record({n: a for n, a in arrays.items() if n not in self._personal})

    def correction(self, message: "Message") -> Arrays | None:
        """Return what SCAFFOLD adds to the client's gradients; None if that is nothing."""
        if (record := records.variate_of(message)) is None:
            return None
        server = records.to_arrays(record)
        if self._warms_up(message):
            self._correction = {name: np.zeros_like(c) for name, c in server.items()}
            return None
        self._correction = scaffold.correction(server, self._kept)
        return self._correction

    def keep(self, task: ClientTask, update: ClientUpdate) -> "ArrayRecord | None":
        """Keep what the next round needs, and return the change of SCAFFOLD's variate.

        An update that is not finite, which the leaf server leaves out, leaves no trace.
        """
        finite = _finite(update.arrays.values()) and math.isfinite(update.loss)
        if self._rule == "scaffold":
            zeros = {n: np.zeros_like(c) for n, c in self._correction.items()}
            before = self._kept or zeros
            if not finite or update.steps == 0:
                return records.to_record(zeros)
            after = scaffold.new_variate(
                task.start,
                update.arrays,
                self._correction,
                steps=update.steps,
                lr=task.settings.lr,
                momentum=task.settings.momentum,
            )
            if not _finite(after.values()):
                return records.to_record(zeros)
            self._put(after)
            return records.to_record({name: after[name] - before[name] for name in after})
        if finite and self._personal:
            self._put({n: a for n, a in update.arrays.items() if n in self._personal})
        elif finite and update.personal is not None and _finite(update.personal.values()):
            self._put(update.personal)
        return None

    def _warms_up(self, message: "Message") -> bool:
        flat_round = records.config_of(message)[records.ROUND]
        return bool(flat_round <= self._settings.hierarchy.scaffold_warmup_rounds)

    def _initial(self) -> Arrays:
        data = self._data
        model = initial_model(self._settings, data.example_shape, len(data.classes))
        return {n: a for n, a in model_arrays(model).items() if n in self._personal}

    def _put(self, arrays: Arrays) -> None:
        self._state[self._key] = records.to_record(arrays)


def _finite(arrays: Iterable[NDArray[Any]]) -> bool:
    return all(np.isfinite(array).all() for array in arrays)
